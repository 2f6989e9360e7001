"""Fields of a task: which members of a sample hold its image, its text and its label.

A card names them (``image_field``, ``text_field``, ``label_field``); what it does not name is found
among the members of a shard if there is exactly one candidate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from mmcl.core import Task
from mmcl.core.card.schema import escape_unprintable, repr_short
from mmcl.data.image_formats import is_numbered
from mmcl.data.shards.tar_index import IMAGES, is_read
from mmcl.data.stored_sample import BadSample

Field = Literal["image", "text", "label"]

TEXTS = ("txt", "text", "caption", "captions", "cap")
"""Usual names of a text member, or of their last part, as in ``outputs.txt``."""
LABELS = (
    "cls", "label", "labels", "class", "target", "index",
    "cls.txt", "label.txt", "class.txt", "index.txt",
)  # fmt: skip
"""Usual names of a label member."""
_RIVALS = {"text": frozenset(TEXTS), "label": frozenset(LABELS) - {"index", "index.txt"}}
"""Names that are a second text or label beside the usual one."""
_WORDS = {"image": "image", "text": "caption", "label": "label"}
_SHOWN = 12


class UnfitMembers(ValueError):
    """Members of a shard from which a task cannot take its samples; the text follows its name."""


class StoredAs(NamedTuple):
    """Use of a member: its field, its rank among alternatives, and its name in ``Sample.members``.

    The name of an image is "" where its format must be read from its content.
    """

    field: Field
    rank: int
    name: str


@dataclass(frozen=True)
class SampleFields:
    """Fields that a task reads of every sample, as its card names them.

    Attributes:
        task_type: of the task.
        image: member that holds the image, or alternatives as in ``jpg;png``; "" = the only one.
        text: member that holds the text, or ``json.<key>``; "txt" = it, or the only usual one.
        label: member that holds the label, or ``json.<key>``; "cls" = it, or the only usual one.
        ignored: members that are known to be of no use.
    """

    task_type: str
    image: str = ""
    text: str = "txt"
    label: str = "cls"
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task) -> SampleFields:
        """Return the fields of a task, members in lower case."""
        is_instruction = task.task_type == "instruction"
        text = "json" if is_instruction else task.text_field.lower()
        ignored = tuple(member_name(name) for name in task.ignore_members)
        return cls(
            task.task_type, task.image_field.lower(), text, task.label_field.lower(), ignored
        )

    @cached_property
    def has_alternatives(self) -> bool:
        """Whether a field names several members, as in ``jpg;png``."""
        return any(";" in name for name in (self.image, self.text, self.label))

    @cached_property
    def used(self) -> tuple[Field, ...]:
        """The fields that this type of task reads."""
        if self.task_type == "image":
            return ("image",)
        return ("image", "label") if self.task_type == "classification" else ("image", "text")

    @property
    def required(self) -> tuple[Field, ...]:
        """The fields that every sample must have; a conversation may have no image."""
        return ("text",) if self.task_type == "instruction" else self.used

    def has_several(self, member: str) -> bool:
        """Whether a member is one of the several images that a conversation may have: ``0.jpg``."""
        return self.task_type == "instruction" and not self.image and is_numbered(member)

    def members(
        self, extensions: Sequence[str], is_image: Callable[[str], bool]
    ) -> dict[str, StoredAs]:
        """Return the members of a shard that are used, and for what.

        Args:
            extensions: all members that occur in the shard.
            is_image: whether the content of a member, of no usual name, is an image.

        Raises:
            UnfitMembers: if a required field has no member or several candidates.
        """
        found: dict[str, StoredAs] = {}
        known = [name for name in extensions if name not in self.ignored]
        for field in self.used:
            stated = alternatives(getattr(self, field))
            names = [name for name in stated if name in extensions]
            clash = sorted(set(names) & set(self.ignored))
            if clash:
                raise UnfitMembers(
                    f"has {dotted(clash)} under ignore_members, which is also its {field}_field: "
                    "correct the card"
                )
            if field == "image" and not stated:
                names = self._images(known, is_image)
            elif getattr(self, field) == ("cls" if field == "label" else "txt"):
                names = self._usual(field, known)
            for rank, name in enumerate(names):
                stored = self.text if field == "text" else "cls"
                if field == "image":
                    last = name.rpartition(".")[2]
                    rank, stored = (rank if stated else 0), last if last in IMAGES else ""
                    if self.has_several(name):
                        stored = name
                elif name == "json" and "json" in stated:
                    stored = "json"
                found.setdefault(name, StoredAs(field, rank, stored))
        return found

    def expect_required(
        self, found: Mapping[str, StoredAs], extensions: Sequence[str],
        read_json: Callable[[], bytes],
    ) -> None:  # fmt: skip
        """Check that every required field has a member in a shard.

        Args:
            found: result of ``members``.
            extensions: all members that occur in the shard.
            read_json: returns the content of some ``.json`` member.

        Raises:
            UnfitMembers: naming the members that samples have, and the key of the card to set.
        """
        has = {each.field for each in found.values()}
        for field in self.required:
            if field in has:
                continue
            hint = f"name it with {field}_field on the card"
            if self.task_type == "instruction":
                hint = "a conversation is a .json member, or set another task_type"
            elif field != "image" and "json" in extensions and (keys := _keys(read_json(), field)):
                hint += f"; .json has the keys {', '.join(keys)}, such as json.{keys[0]}"
            hint += _hint_of_dots(extensions)
            raise UnfitMembers(
                f"has no {_WORDS[field]} member{_stated(field, getattr(self, field))}: its samples "
                f"have {dotted(extensions) or 'no member that can be read'}; {hint}"
            )

    def missing(self, field: Field, found: Mapping[str, StoredAs], members: Sequence[str]) -> str:
        """Return the error of a sample without a required field, which lists its members."""
        word = "conversation" if self.task_type == "instruction" else _WORDS[field]
        names = [name for name, use in found.items() if use.field == field]
        if field == "image" and not self.image and any(found[name].name for name in names):
            names = list(IMAGES)
        return f"it has no {word} ({dotted(names)}): its members are {dotted(members)}"

    def _images(self, known: Sequence[str], is_image: Callable[[str], bool]) -> list[str]:
        """Return the members that may be the image: by their name, else by their content."""
        named = [name for name in known if name.rpartition(".")[2] in IMAGES]
        others = set(alternatives(self.text) + alternatives(self.label)) | {"txt", "json", "cls"}
        return named or [name for name in known if name not in others and is_image(name)]

    def _usual(self, field: Field, known: Sequence[str]) -> list[str]:
        """Return the one member of a usual name."""
        usual: str = getattr(self, field)
        rivals = [name for name in known if name in _RIVALS[field]]
        if field == "text" and usual not in known:
            rivals = [name for name in known if name.rpartition(".")[2] in TEXTS]
        elif field == "label" and usual not in known:
            rivals = [name for name in known if name in LABELS or name.endswith(".cls")]
        if len(rivals) > 1:
            raise UnfitMembers(
                f"has {len(rivals)} members that may be the {_WORDS[field]}, {dotted(rivals)}: "
                f"name one with {field}_field on the card, or the others under ignore_members"
                f"{_hint_of_dots(rivals)}"
            )
        return rivals


class UnusedMembers:
    """Counter of the members of a stream that no task uses, to name each once."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.used: set[str] = set()
        self.ignored: set[str] = set()
        self.samples = 0
        self._shards: set[str] = set()

    def add(
        self, shard: str, samples: int, counts: Mapping[str, int], used: Collection[str],
        ignored: Sequence[str],
    ) -> None:  # fmt: skip
        """Add the members of a shard: how often each occurs, and those that its task uses."""
        self.ignored.update(map(member_name, ignored))
        self.used.update(used)
        if shard in self._shards or not counts:
            return
        self._shards.add(shard)
        self.samples += samples
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def lines(self) -> tuple[str, ...]:
        """Return lines that name the members that no task uses, and what ignores no member."""
        unused = sorted(self.counts.keys() - self.used - self.ignored)
        absent = sorted(self.ignored - self.counts.keys()) if self.counts else []
        idle = (f"ignore_members has {dotted(absent)}, which no sample has",) if absent else ()
        if not unused:
            return idle
        named = [f".{escape_unprintable(name)} ({self.counts[name]:,})" for name in unused[:_SHOWN]]
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        return (
            f"of {self.samples:,} samples these members are not used: {', '.join(named)}{more}",
            *idle,
        )


def two_images(names: Iterable[str]) -> str:
    """Return the error of a sample that has several image members."""
    names = list(names)
    return (
        f"has {len(names)} image members, {dotted(names)}: name one with image_field on the card, "
        f"or the others under ignore_members{_hint_of_dots(names)}"
    )


def _hint_of_dots(names: Iterable[str]) -> str:
    is_dotted = any("." in name and name.rpartition(".")[2] in (*IMAGES, *TEXTS) for name in names)
    return ", or set key_until: last_dot if keys hold dots" if is_dotted else ""


def alternatives(stated: str) -> list[str]:
    """Return the members that a field of the card names: ``jpg;png`` is two, ``json.a`` is json."""
    return [member_name(name) for name in stated.split(";") if name.strip(" .")]


def member_name(stated: str) -> str:
    """Return the extension of a member as an index has it; of ``json.<key>`` it is json."""
    name = stated.strip().lower().removeprefix(".")
    return "json" if name.startswith("json.") else name


def dotted(names: Iterable[str]) -> str:
    """Return members as a text, ``.jpg, .txt``, the first dozen in full."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f".{name}" for name in names[:_SHOWN]) + more


def field_error(task: Task) -> str:
    """Return why a field of a task names no member that can be read, "" if all do."""
    fields = SampleFields.of(task)
    words = {"image": "image", "text": "text", "label": "label"}
    for field in fields.used:
        stated = getattr(task, f"{field}_field")
        if field == "text" and task.task_type == "instruction":
            continue
        is_json = field != "image" and stated.strip().lower().startswith("json.")
        names = alternatives(stated)
        if (field != "image" and not names) or not all(map(is_read, names)):
            return (
                f"takes its {words[field]} from .{stated}, expected a member of samples, such as "
                ".txt, .de.txt or .caption: pickles and compressed members are never read"
            )
        if "json" in names and not is_json:
            return (
                f"takes its {words[field]} from .json without a key: write {field}_field: "
                "json.<key>, such as json.caption"
            )
    return ""


def json_value(data: bytes, path: str) -> Any:
    """Return a value inside a ``.json`` member.

    Args:
        data: content of the member.
        path: ``json.<key>``, or ``json.<key>.<key>`` for a mapping inside; numbers index lists.

    Raises:
        BadSample: if it is not JSON, or has no such value.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadSample("its .json is not JSON in UTF-8") from None
    for key in path.split(".")[1:]:
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            has = ", ".join(map(repr_short, value)) if isinstance(value, Mapping) else "no keys"
            raise BadSample(f"its .json has no '{key}' ({path}): it has {has[:200]}")
    return value


def _keys(data: bytes, field: Field) -> list[str]:
    """Return some keys of a JSON mapping whose values may be a field: the usual ones first."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, Mapping):
        return []
    kinds = str | list if field == "text" else str | int
    usual = [key for key in value if key.lower() in (TEXTS if field == "text" else LABELS)]
    others = [key for key, held in value.items() if isinstance(held, kinds) and key not in usual]
    return [repr_short(key)[1:-1] for key in (usual + others)[:_SHOWN]]


def _stated(field: Field, stated: str) -> str:
    return f" (.{stated})" if stated else ""
