"""Names of classes in prompts: read from a file, and a remark on those that no caption has."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcl.data.convert.inputs.column_names import key_of
from mmcl.data.stored_sample import one_line

_UNREADABLE = re.compile(
    r"n\d{8}"  # a WordNet id
    r"|\d+([.,]\d+)?"
    r"|\d+[._-]\s*\D.*"  # 001.Black_footed_Albatross
    r"|.*_.*"
    r"|(class|cls|label|category|cat|species|id)[ -]?\d+",
    re.IGNORECASE,
)
_CAMEL = re.compile(r".*[a-z]{2}[A-Z].*")
_NAME_COLUMNS = ("name", "classname", "labelname", "text", "title", "description", "species")
_MAX_BYTES = 64 << 20
_NAMED = 3
LookUp = Callable[[Sequence[str]], Mapping[str, str]]
"""From classes to the names of those that are known ids."""


def is_readable(name: str) -> bool:
    """Return whether a caption could hold a class name: no id, number, underscore or CamelCase."""
    return not (_UNREADABLE.fullmatch(name) or _CAMEL.fullmatch(name))


def naming_remark(classes: Sequence[str], template: str) -> str:
    """Return a remark on class names in prompts that no caption would hold, "" if all are good.

    Args:
        classes: names as prompts have them.
        template: a prompt with one ``{}``.
    """
    odd = [name for name in classes if not is_readable(name)]
    if not odd:
        return ""
    listed = ", ".join(f"'{name[:60]}'" for name in odd[:_NAMED])
    return (
        f"remark: {len(odd)} of {len(classes)} class names are as no caption has them "
        f'({listed}): prompts read "{template.replace("{}", odd[0][:60])}"; name them with '
        "--class_names FILE, or as class_names on the card"
    )


def read_class_names(path: Path, classes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Read the names of classes in prompts from a file.

    It holds a name a line, in the order of the classes or, where these are numbers, by number; or
    lines of an id and a name with a tab, comma or space between; a csv; or JSON: ``{id: name}``,
    ``{number: [id, name]}``, ``{name: number}`` or a list.

    Args:
        path: of the file, UTF-8.
        classes: of the input, in its order.

    Returns:
        The name of every class, and notes on ids in the file that no class has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or a class has no name in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct --class_names")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes: --class_names names classes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as UTF-8 or JSON ({one_line(error)}): save it again"
        ) from None
    known = set(classes)
    found = _of_lines(text.splitlines(), known) if content is None else _of_json(content, known)
    if isinstance(found, list):
        found = _in_order(path, found, classes)
    found = {own: name.strip() for own, name in found.items()}
    missing = [name for name in classes if not found.get(name)]
    if missing:
        raise ValueError(
            f"{path} has no name for {len(missing)} of {len(classes)} classes "
            f"({_listed(missing)}): add lines of the class and its name"
        )
    unknown = [own for own in found if own not in known]
    notes = [f"{path.name} also names {len(unknown)} classes that do not occur "
             f"({_listed(unknown)})"] if unknown else []  # fmt: skip
    return {name: found[name] for name in classes}, notes


@dataclass(frozen=True)
class ClassNames:
    """Names of classes in prompts, where they are others than the classes.

    Attributes:
        known: of ids that are known, and of classes whose names the input has twice.
        given: of the user's file.
        notes: where the names come from, and which are as no caption has them.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def on_card(self, old: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
        """Return the names for a card: those of the file, else of the card, else known ones."""
        merged = {**self.known, **old, **self.given}
        return {name: merged[name] for name in classes if merged.get(name, name) != name}


def name_classes(
    classes: Sequence[str],
    stated: Mapping[str, str],
    file: Path | None,
    look_up: LookUp,
    template: str,
) -> ClassNames:
    """Find the names of the classes of an input in prompts.

    Args:
        classes: of the input, in its order.
        stated: names that the input states.
        file: of names, see `read_class_names`; None = what is known.
        look_up: returns the names of those ids among the classes that are known.
        template: a prompt with one ``{}``, for the remark.
    """
    given, notes = ({}, list[str]()) if file is None else read_class_names(file, classes)
    known = {} if file is not None else look_up(classes)
    if known:
        own, name = next(iter(known.items()))
        notes.append(f"{len(known)} WordNet ids are named in prompts ('{own}': {name})")
    names = {**stated, **known, **given}
    remark = naming_remark([names.get(one, one) for one in classes], template)
    return ClassNames({**stated, **known}, given, [*notes, *([remark] if remark else [])])


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return ", ".join(repr(name[:60]) for name in names[:_NAMED]) + more


def _of_lines(lines: Sequence[str], known: set[str]) -> dict[str, str] | list[str]:
    """Return id -> name where lines begin with ids, else the names."""
    filled = [line for line in lines if line.strip()]
    best: dict[str, str] = {}
    for delimiter in ("\t", ",", ";", " "):
        if delimiter == " ":
            rows = [line.strip().split(None, 1) for line in filled]
        else:
            rows = list(csv.reader(filled, delimiter=delimiter))
        pairs = _pairs(rows, known)
        if len(pairs.keys() & known) > len(best.keys() & known):
            best = pairs
    return best or [line.strip() for line in filled]


def _pairs(rows: Sequence[Sequence[str]], known: set[str]) -> dict[str, str]:
    """Return id -> name of rows: the column with most ids, and the column of names."""
    width = min(map(len, rows), default=0)
    if width < 2:
        return {}
    columns = [[row[place].strip() for row in rows] for place in range(width)]
    counts = [len(known.intersection(column)) for column in columns]
    ids = counts.index(max(counts))
    names = [place for place in range(width) if place != ids]
    stated = [place for place in names if key_of(columns[place][0]) in _NAME_COLUMNS]
    chosen = (stated or names)[0]
    if not counts[ids] or (width > 2 and not stated and len(names) > 1):
        return {}
    is_header = columns[ids][0] not in known and bool(stated)
    pairs = zip(columns[ids][is_header:], columns[chosen][is_header:], strict=True)
    return dict(pairs)


def _of_json(content: Any, known: set[str]) -> dict[str, str] | list[str]:
    """Return id -> name, or the names, of the usual forms."""
    if isinstance(content, Mapping) and isinstance(content.get("id2label"), Mapping):
        content = content["id2label"]
    values = list(content.values() if isinstance(content, Mapping) else content or [])
    if isinstance(content, Mapping) and all(isinstance(value, str) for value in values):
        return dict(content)
    if isinstance(content, Mapping) and all(type(value) is int for value in values):
        return {str(number): name for name, number in content.items()}
    if isinstance(content, list) and all(isinstance(value, str) for value in values):
        return list(content)
    pairs = [value for value in values if isinstance(value, list) and len(value) == 2]
    if len(pairs) == len(values) and all(isinstance(word, str) for pair in pairs for word in pair):
        if isinstance(content, Mapping) and not known & {own for own, _ in pairs}:
            return {key: name for key, (_, name) in content.items()}
        return dict(pairs)
    raise ValueError(
        "the JSON of --class_names is in no known form: expected {class: name}, "
        "{number: [class, name]}, {name: number} or a list of names"
    )


def _in_order(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return class -> name for names by their letters, in the order of classes, or by number."""
    # American_Crow is named by "American crow" wherever the line is.
    spelt = {key_of(name): name for name in names}
    if all(key_of(own) in spelt for own in classes) and not any(map(str.isdecimal, classes)):
        return {own: spelt[key_of(own)] for own in classes}
    if len(names) == len(classes):
        return dict(zip(classes, names, strict=True))
    if all(name.isdecimal() for name in classes):
        numbers = sorted(map(int, classes))
        # Numbers that begin with 1 and end with the last line count from 1.
        first = 1 if numbers[-1] == len(names) and numbers[0] >= 1 else 0
        if numbers[-1] - first < len(names):
            return {name: names[int(name) - first] for name in classes}
    raise ValueError(
        f"{path} has {len(names)} names and there are {len(classes)} classes ({_listed(classes)}): "
        "write a line for each class, in their order, or lines of a class and its name"
    )
