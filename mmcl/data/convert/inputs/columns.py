"""Columns of a table, or keys of JSON records: which of them is the image, the text, the label."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from mmcl.data.convert.inputs.column_names import (
    ADDRESSES,
    COLUMN_OPTIONS,
    NAMES,
    NEEDS,
    NUMBERED,
    QUESTION_USES,
    TASKS,
    is_image_name,
    is_meaningful,
    is_part_of_question,
    key_of,
    numbered_names,
)
from mmcl.data.convert.record import split_of
from mmcl.data.question_options import option_keys

_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
_NAMED = 20
_LAYOUTS = "path,text (captions), path,label (classes) or path,question,answer (questions)"
Peek = Callable[[str], Collection[str]]
"""From the name of a column to its distinct values, as texts; at most some hundred."""


@dataclass(frozen=True)
class ColumnOptions:
    """Options about the columns of a table or the keys of JSON records.

    Args:
        task_type: of the tasks; None = what the columns allow.
        task_column: that states the task; None = ``task``, if there is one.
        image_column: of the image; None = by its name.
        text_column: of the caption; None = by its name.
        label_column: of the class; None = by its name.
        split_column: of the split; None = by its name and values.
        ignore_columns: columns or keys that are harmless; in folders, names of files or folders.
        columns: names of the columns of a table without a header; () = its first row.
        follow_links: whether links in the folders of images may lead outside of them.
    """

    task_type: str | None = None
    task_column: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    ignore_columns: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    follow_links: bool = False

    def expect_none(self, where: str, *kept: str) -> None:
        """Refuse the options about columns, except those of ``kept``, where there are none."""
        for name in (*COLUMN_OPTIONS.values(), "ignore_columns", "columns"):
            if getattr(self, name) and name not in kept:
                raise ValueError(
                    f"--{name} is for tables, and {where} is none: leave it out"
                    + (", or give --task_level" if name == "task_column" else "")
                )


@dataclass(frozen=True)
class Columns:
    """Columns of a table that are used.

    Attributes:
        task_type: of the task.
        names: use -> the column's name in this table.
        unused: names of the other columns.
        absent: names in ``ignore_columns`` that this table does not have.
        has_lists: whether the text of every sample becomes a list of captions.
    """

    task_type: str
    names: Mapping[str, str]
    unused: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    has_lists: bool = False


@dataclass
class _Choice:
    """Choice of the columns of one table."""

    found: Sequence[str]
    options: ColumnOptions
    where: str
    images: Collection[str]
    turns: Collection[str]
    peek: Peek
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_key: dict[str, list[str]] = {}
        for name in self.found:
            self.by_key.setdefault(key_of(name), []).append(name)
        ignored = set(map(key_of, self.options.ignore_columns))
        self.free = [name for name in self.found if key_of(name) not in ignored]
        self.shown = list_names(self.found)

    def named(self, option: str, name: str) -> str:
        """Return the column that an option names."""
        same = [name] if name in self.found else self.by_key.get(key_of(name), [])
        if len(same) != 1:
            what = "several columns" if same else "no column"
            raise ValueError(
                f"{self.where} has {what} {name!r} for --{option}, it has {self.shown}"
            )
        return same[0]

    def candidates(self, use: str) -> list[str]:
        """Return the columns of the best group of names for a use, none if none is known."""
        if use in self.names:
            return [self.names[use]]
        # A column may state the task and the label.
        taken = {name for own, name in self.names.items() if own != "task"}
        free = [name for name in self.free if name not in taken]
        groups = [[name for name in free if key_of(name) in group] for group in NAMES[use]]
        if use == "turns":
            groups = [[name for name in free if name in self.turns], *groups]
        if use == "path":
            # An image in the table is better than a path, whatever the column is called.
            inside = [name for name in free if name in self.images]
            known = [name for name in inside if any(name in group for group in groups)]
            groups = [known or inside, *groups]
        groups.append(numbered_names(free, NUMBERED.get(use, ())))
        return next((group for group in groups if group), [])

    def choose(self, use: str, may_have_several: bool = False) -> None:
        """Choose the only candidate for a use, if there is one, or several that are numbered.

        Raises:
            ValueError: if there are several.
        """
        found = self.candidates(use)
        numbered = numbered_names(found, NUMBERED.get(use, ()))
        if may_have_several and numbered and len(numbered) == len(found):
            self.names |= {f"{use}#{number}": name for number, name in enumerate(numbered)}
            return
        if len(found) > 1:
            option = (
                f"--{COLUMN_OPTIONS[use]} {found[0]}"
                if use in COLUMN_OPTIONS
                else "--ignore_columns"
            )
            raise ValueError(
                f"{self.where} has {' and '.join(map(repr, found))}, which could each be the "
                f"{use}: choose one with {option}"
            )
        if found:
            self.names[use] = found[0]


def list_names(names: Iterable[str]) -> str:
    """Return names for a message; at most twenty, none of them long or unprintable."""
    listed = list(names)
    short = [
        name[:40] if name and name.isprintable() else repr(name[:40]) for name in listed[:_NAMED]
    ]
    return ", ".join(short) + (f" and {len(listed) - _NAMED} more" * (len(listed) > _NAMED))


def absent_names(where: PurePath, names: Sequence[str]) -> list[str]:
    """Return a note on names in ``--ignore_columns`` that an input does not have; [] if none.

    It is no error, since the other input (SOURCE or ``--test``) may have them.
    """
    listed = list_names(names)
    return [f"--ignore_columns names {listed}, which {where.name} does not have"] if names else []


def find_columns(
    found: Sequence[str],
    options: ColumnOptions,
    where: str,
    *,
    images: Collection[str] = (),
    lists: Collection[str] = (),
    turns: Collection[str] = (),
    peek: Peek = lambda _: (),
) -> Columns:
    """Choose the columns of a table by their names, ignoring case and separators.

    Of several candidates for a use one is preferred only where it is plainly better: an image in
    the table to a path, a path to a bare file name, a class to its number. A column that is not
    used, and that a user may expect to count, is an error unless ``ignore_columns`` names it.

    Args:
        found: names of the table's columns.
        options: what the user chose.
        where: path for messages.
        images: columns that hold images, not paths.
        lists: columns whose values are lists.
        turns: columns whose values are lists of the turns of a conversation.
        peek: gives the values of a column that may state the split.

    Raises:
        ValueError: if columns are missing, or more than one task type or column is possible.
    """
    choice = _Choice(found, options, where, images, turns, peek)
    for use, option in COLUMN_OPTIONS.items():
        if (name := getattr(options, option)) is not None:
            choice.names[use] = choice.named(option, name)
    task_type = options.task_type or _task_type(choice)
    uses = _uses(choice, task_type)
    _expect_needed(choice, task_type, uses)
    for use in uses:
        choice.choose(use, use == "text" or task_type == "instruction")
    _choose_split(choice)
    names = {
        use: name
        for use, name in choice.names.items()
        if use.split("#")[0] in (*uses, "split", "option")
    }
    unused = [name for name in choice.free if name not in names.values()]
    _expect_harmless(choice, task_type, names, unused)
    absent = [name for name in options.ignore_columns if key_of(name) not in choice.by_key]
    has_lists = names.get("text") in lists or "text#0" in names
    return Columns(task_type, names, tuple(unused), tuple(absent), has_lists)


def _expect_needed(choice: _Choice, task_type: str, uses: Sequence[str]) -> None:
    needed = uses[:1] if uses[0] == "turns" else uses[:2]
    missing = [use for use in needed if not choice.candidates(use)]
    if missing:
        _expect_images(choice)
        raise ValueError(
            f"{choice.where} lacks the column {' and '.join(missing)} that --task_type {task_type} "
            f"needs, it has {choice.shown}: expected {_LAYOUTS}; --image_column, --text_column "
            "and --label_column name others"
        )


def _uses(choice: _Choice, task_type: str) -> list[str]:
    """Return the uses to choose columns for, those that are needed first."""
    uses = [*NEEDS[task_type], "path", "task"]
    if task_type != "instruction":
        return list(dict.fromkeys(uses))
    if choice.candidates("turns"):
        return ["turns", "path", "system", "task"]
    if not choice.candidates("options"):
        options = option_keys(choice.free)
        choice.names |= {f"option#{letter}": name for letter, name in options.items()}
    # In ScienceQA the task is the form of a question, such as "closed choice".
    keys = set(choice.by_key)
    if "task" not in choice.names and {"choices", "lecture", "solution"} <= keys:
        uses.remove("task")
    is_alpaca = [key_of(name) for name in choice.candidates("question")] == ["instruction"]
    return [*uses, *QUESTION_USES, *(["input"] if is_alpaca else [])]


def _task_type(choice: _Choice) -> str:
    possible = [
        name
        for name, needs in NEEDS.items()
        if name != "retrieval" and all(map(choice.candidates, needs))
    ]
    chosen = [name for name in ("text", "label") if name in choice.names]
    if not chosen and _is_question(choice):
        return "instruction"
    if len(possible) > 1 and len(chosen) == 1:
        possible = [name for name in possible if chosen[0] in NEEDS[name]]
    if "instruction" in possible and choice.candidates("text") == choice.candidates("question"):
        possible = ["instruction"]
    if not possible:
        _expect_images(choice)
        if any(map(is_image_name, choice.found)):
            raise ValueError(
                f"{choice.where} has no header, its first row is {choice.shown}: name its columns "
                "with --columns path,text or --columns path,label"
            )
        raise ValueError(
            f"{choice.where} has the columns {choice.shown}: expected {_LAYOUTS}; --image_column, "
            "--text_column and --label_column name others"
        )
    if len(possible) > 1:
        raise ValueError(
            f"{choice.where} has the columns {choice.shown}, which could be "
            f"{' or '.join(possible)}: choose one with --task_type"
        )
    return possible[0]


def _is_question(choice: _Choice) -> bool:
    """Return whether a table is of conversations, or of questions by their very names."""
    if choice.candidates("turns"):
        return True
    has_options = choice.candidates("options") or option_keys(choice.free)
    keys = {key_of(name) for name in choice.free}
    has_names = "question" in keys and not keys.isdisjoint(("answer", "answers"))
    return has_names or bool(
        has_options and choice.candidates("question") and choice.candidates("answer")
    )


def _expect_images(choice: _Choice) -> None:
    """Refuse a table that has only addresses of its images."""
    addresses = [name for name in choice.free if key_of(name) in ADDRESSES]
    if addresses and not choice.candidates("path"):
        raise ValueError(
            f"{choice.where} has addresses of images ('{addresses[0]}') and no images, and they "
            "are not downloaded here: download them, for example with img2dataset, and name the "
            "column of their paths with --image_column"
        )


def _choose_split(choice: _Choice) -> None:
    """Choose the column of the split; of the less certain names by its values."""
    if "split" in choice.names:
        return
    sure = [name for name in choice.free if key_of(name) in NAMES["split"][0]]
    used = set(choice.names.values())
    unsure = [
        name for name in choice.free if key_of(name) in NAMES["split"][1] and name not in used
    ]
    found = list(sure)
    for name in unsure:
        values = set(choice.peek(name)) - {""}
        known = {value for value in values if stated_split(name, value)}
        if known and known == values:
            found.append(name)
        elif known or (len(values) > 1 and not sure and "task" not in choice.names):
            other = min(values - known) if known else min(values)
            raise ValueError(
                f"{choice.where} has the column {name!r} with values such as {other!r}, which may "
                f"state a split or a task: correct the values to train, val and test, or choose it "
                f"with --split_column or --task_column, or give --ignore_columns {name}"
            )
    if len(found) > 1:
        raise ValueError(
            f"{choice.where} has {' and '.join(map(repr, found))}, which could each be the split: "
            f"choose one with --split_column {found[0]}"
        )
    if found:
        choice.names["split"] = found[0]


def find_split(found: Sequence[str], options: ColumnOptions, where: str, peek: Peek) -> str | None:
    """Return the column, or key, that states the split; None if there is none.

    Raises:
        ValueError: if several may, or one of a less certain name has other values as well.
    """
    choice = _Choice(found, options, where, (), (), peek)
    for use in ("split", "task"):
        if (name := getattr(options, COLUMN_OPTIONS[use])) is not None:
            choice.names[use] = choice.named(COLUMN_OPTIONS[use], name)
    _choose_split(choice)
    return choice.names.get("split")


def expect_harmless_key(where: str, key: str) -> None:
    """Refuse a key of JSON records that is not used and that a user may expect to count."""
    is_part = is_meaningful(key, "record") or is_part_of_question(key)
    if is_part or key_of(key) in TASKS:
        raise ValueError(
            f"{where} has records with the key {key!r}, which is not used: give --ignore_columns "
            f"{key} if that is right"
            + f", or --task_column {key} if it states the task"
            * (not is_part)
        )


def stated_split(column: str, value: str) -> str | None:
    """Return the split that a value of a column states, also of ``is_train`` and the like."""
    split, key = split_of(value), key_of(column)
    if split or not key.startswith("is"):
        return split
    own = next((one for one in ("train", "val", "test") if key.startswith(f"is{one}")), "")
    other = {"train": "test", "val": "train", "test": "train"}.get(own, "")
    plain = value.strip().lower()
    return split_of(own if plain in _TRUE else other if plain in _FALSE else "")


def _expect_harmless(
    choice: _Choice, task_type: str, names: Mapping[str, str], unused: Sequence[str]
) -> None:
    for name in unused:
        reason = ""
        if name in choice.images:
            reason = "a second image"
        elif (
            task_type == "instruction"
            and is_part_of_question(name)
            and not ("image" in key_of(name) and any(use.startswith("path") for use in names))
        ):
            reason = "a part of the question or the answer"
        elif is_meaningful(name):
            reason = "a part of the image, a weight or a negative"
        elif "text" in names and is_meaningful(name, "text") and not choice.options.text_column:
            reason = "a second caption"
        elif "label" in names and is_meaningful(name, "label") and not choice.options.label_column:
            is_number = key_of(name) in NAMES["label"][1]
            reason = "" if is_number else "a second label"
        elif "task" not in names and key_of(name) in TASKS:
            reason = "a task"
        if reason:
            raise ValueError(
                f"{choice.where} has the column {name!r}, which looks like {reason} and is not "
                f"used for {task_type}: give --ignore_columns {name} if that is right"
                + (f", or --task_column {name}" if reason == "a task" else "")
            )
