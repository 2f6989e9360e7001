"""Input of ``mmcl data convert``: its options, and records in chunks that any process can read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmcl.core.card.schema import escape_unprintable
from mmcl.data.shards.reader import expect_max_samples
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, IntArray, Split

_SCENARIOS = ("class", "domain", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SPLITS = ("", "train", "test", "validation")
"""Splits that an input may state for a record; "" leaves it to the held-out draw."""
_SPLIT_OF: dict[str, Split] = {
    "train": "train", "training": "train", "restval": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_LIKE_A_SPLIT = re.compile(r"(train|val|valid|validation|dev|test)\d", re.IGNORECASE)
ProgressFn = Callable[[str, int, int], None]
"""Progress callback, called with (what is done, samples done, samples in all)."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Args:
        name: of the stream and its card; letters, digits, - and _.
        task: name of the task if there is only one; "" takes ``name``.
        scenario: "class", "domain" or "task"; None = "class" if every task has its own classes,
            else "domain".
        classes_per_task: split the classes, in their order, into tasks of this many; None = do not.
        first_task_classes: classes of the first task; None = as many as in the others.
        class_order_seed: seed of the order of the classes, see `class_order`; None = the input's.
        task_order: names of all tasks in the order in which they are learned; () = by value where
            a column states them, else as they are met.
        test_fraction: fraction of the samples that is held out if the input has no test split.
        seed: of the held-out draw and of ``max_samples``.
        max_samples: 200 = at most 200 samples of each input, 0.02 = that fraction; None = all.
        shard_samples: samples at which a shard is closed.
        shard_bytes: size at which a shard is closed; at least one sample is in each.
        max_bad_fraction: fraction of an input's samples that may be bad and are left out.
        num_workers: processes.
        license: of the data, for the card.
        scorer: of answers.
        max_new_tokens: of an answer, for the card; None = the card's default.
        class_names: file of the names of classes in prompts; None = the classes, or known ids.
    """

    name: str
    task: str = ""
    scenario: str | None = None
    classes_per_task: int | None = None
    first_task_classes: int | None = None
    class_order_seed: int | None = None
    task_order: tuple[str, ...] = ()
    test_fraction: float = 0.1
    seed: int = 0
    max_samples: int | float | None = None
    shard_samples: int = 1000
    shard_bytes: int = 256 << 20
    max_bad_fraction: float = 0.0
    num_workers: int = 1
    license: str = ""
    scorer: str = "exact"
    max_new_tokens: int | None = None
    class_names: Path | None = None

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), ("task", self.task or self.name)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{what} is {name!r}, expected up to 64 letters, digits, - and _")
        test, bad = self.test_fraction, self.max_bad_fraction
        if not 0 < test < 1:
            raise ValueError(f"test_fraction is {test}, expected a fraction between 0 and 1")
        if not 0 <= bad <= 1:
            raise ValueError(f"max_bad_fraction is {bad}, expected a fraction from 0 to 1")
        if self.scenario not in (None, *_SCENARIOS):
            raise ValueError(f"scenario is {self.scenario!r}, expected {', '.join(_SCENARIOS)}")
        positive = (
            "classes_per_task", "first_task_classes", "shard_samples", "shard_bytes",
            "num_workers", "max_new_tokens",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        expect_max_samples(self.max_samples)
        self._check_class_split()

    def _check_class_split(self) -> None:
        for name in ("first_task_classes", "class_order_seed"):
            if getattr(self, name) is not None and self.classes_per_task is None:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and classes are not split into tasks: give "
                    "classes_per_task as well"
                )
        if not 0 <= (self.class_order_seed or 0) < 1 << 32:
            raise ValueError(
                f"class_order_seed is {self.class_order_seed}, expected 0 to {(1 << 32) - 1}"
            )


@dataclass(frozen=True)
class Record:
    """One sample of an input.

    Attributes:
        name: by which a person finds it in the input, "" if only its number says so.
        members: extension -> content as the shard will hold it; a class is left to ``label``.
        task: stated task, "" if none.
        label: name of its class, "" if it has none.
        split: one of ``SPLITS``.
        remarks: what a user may not expect of it; each is counted and reported once.
        unused: keys of the record that are not used.
    """

    name: str
    members: Mapping[str, bytes]
    task: str = ""
    label: str = ""
    split: str = ""
    remarks: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class InvalidRecord:
    """A bad record.

    Attributes:
        name: by which a person finds it in the input.
        reason: what is wrong with it.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SkippedRecord:
    """A bad sample that was left out: its file, its number there, its id and the reason."""

    file: str
    position: int
    name: str
    reason: str

    def __str__(self) -> str:
        # Ids and paths come from the file: nothing in them may steer a terminal or fill it.
        line = f"{self.file}, sample {self.position} (id '{self.name[:60]}'): {self.reason[:300]}"
        return escape_unprintable(line)


def split_of(name: str) -> Split | None:
    """Return the split that a name states in the data sets of the field, in any case.

    ``restval`` is the part of COCO's validation images that Karpathy and Fei-Fei 2015,
    arXiv:1412.2306, train on.

    Args:
        name: train, training, restval; val, valid, validation, dev; test or testing.

    Returns:
        The split, None for every other name.
    """
    return _SPLIT_OF.get(name.strip().lower())


def file_split(name: str) -> Split | None:
    """Return the split that a word in a file's or folder's name states: ``train-00000.parquet``."""
    found = {split_of(word) for word in re.split(r"[\W_]+", name)} - {None}
    return found.pop() if len(found) == 1 else None


def expect_no_near_splits(names: Iterable[str], where: str) -> None:
    """Refuse folders that are no known splits and whose names look like two: ``val2017``."""
    near = {name for name in names if file_split(name) or _LIKE_A_SPLIT.match(name)}
    if len(near) > 1:
        raise ValueError(
            f"{where} has the folders {', '.join(map(repr, sorted(near)[:5]))}, which look like "
            "splits and are of no known name: name them train, val or test"
        )


def file_splits(folder: Path, files: Sequence[Path]) -> list[str]:
    """Return the split of each file by its name or its folder, "" if no name states one.

    Raises:
        ValueError: if only some names state one, or one looks like a split and is none.
    """
    splits: list[str] = []
    for file in files:
        *above, name = file.relative_to(folder).parts
        words = (file_split(part) for part in (Path(name).stem, *reversed(above)))
        splits.append(next(filter(None, words), ""))
    unknown = [file for file, split in zip(files, splits, strict=True) if not split]
    if not any(splits):
        unknown = [file for file in files if _LIKE_A_SPLIT.match(file.stem)]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is of no known split among the {len(files)} files of {folder}: name it "
            "train, val or test, or move it away"
        )
    return splits


Splitting = TypeVar("Splitting", bound="Chunk")


def without_validation(chunks: Sequence[Splitting]) -> tuple[list[Splitting], list[str]]:
    """Leave out the chunks of the validation split where there is a test split.

    Returns:
        The other chunks, and what was left out.
    """
    splits = [getattr(chunk, "split", "") for chunk in chunks]
    if "test" not in splits or "validation" not in splits:
        return list(chunks), []
    kept = [chunk for chunk, own in zip(chunks, splits, strict=True) if own != "validation"]
    count = sum(map(len, chunks)) - sum(map(len, kept))
    return kept, [f"{count:,} validation samples left out: there is a test split"]


def captions_member(captions: Sequence[str]) -> bytes:
    """Return the ``json`` member of an image with several captions: ``{"captions": [...]}``.

    Raises:
        BadSample: if there is none, or one is empty, too long or not UTF-8.
    """
    if not captions or not all(caption.strip() for caption in captions):
        raise BadSample("one of its captions is empty" if captions else "it has no caption")
    try:
        data = json.dumps({"captions": list(captions)}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadSample("its captions are not UTF-8: save the file as UTF-8") from None
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"its captions have {len(data)} bytes, more than {MAX_TEXT_BYTES}")
    return data


def task_name(value: Any, column: str, where: str = "") -> str:
    """Return the name of the task that a value of a task column states.

    A whole float is named as the integer (tables store years with gaps as floats), a date in ISO
    8601, without its time if that is midnight.

    Args:
        value: text, number, date, or None.
        column: of the value, for messages.
        where: line or row of the value, for messages.

    Raises:
        BadSample: if it is missing, no such value, or not UTF-8.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, datetime) and value.tzinfo is None and value.time() == time():
        value = value.date()
    if isinstance(value, date):
        value = value.isoformat()
    is_missing = value is None or value != value  # NaN
    if not is_missing and not isinstance(value, str | int | float):
        raise BadSample(f"its {column} is a {type(value).__name__}, expected a text or a number")
    text = "" if is_missing else str(value).strip()
    if not text:
        place = f" ({where})" if where else ""
        raise BadSample(f"its {column} is empty{place}: every sample needs a task")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample(f"its {column} is not UTF-8: save the file as UTF-8") from None
    return text


class Chunk(Protocol):
    """A chunk of an input, about a thousand records; picklable."""

    def __len__(self) -> int:
        """Return n, the number of records."""
        ...

    def subset(self, indices: IntArray) -> Chunk:
        """Return a chunk with only the records at these rising indices, 0 to n - 1."""
        ...

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the records as they are at this moment.

        Raises:
            RuntimeError: if a file changed since the input was opened.
        """
        ...


@dataclass(frozen=True)
class InputData:
    """Input data: a folder, a table or an instruction file.

    Attributes:
        task_type: "classification", "captioning", "retrieval" or "instruction".
        where: path for messages.
        chunks: all chunks.
        classes: in the order of their numbers, if that is known without reading.
        tasks: in their order, if that is known; others come in the order in which they are met.
        task_column: column or key that was chosen to state the task, or "folder": tasks are
            ordered by its values; "" = as above.
        text_field: member of a sample that holds its text, or ``json.captions``.
        class_names: class -> its name in prompts, where that is another.
        notes: what a user may not expect of the input, a sentence each.
        interleaved: whether each shard is to hold samples of every class; False where taking
            single records out of a chunk is slow.
    """

    task_type: str
    where: str
    chunks: Sequence[Chunk]
    classes: Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_column: str = ""
    text_field: str = "txt"
    class_names: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    interleaved: bool = False
