"""Input of ``mmcl data convert``: its options, and records in chunks that any process can read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, Protocol

from mmcl.core.card.schema import escape_unprintable
from mmcl.data.shards.reader import expect_max_samples
from mmcl.data.stored_sample import BadSample, IntArray, Split

_SCENARIOS = ("class", "domain", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SPLITS = ("", "train", "test")
"""Splits that an input may state for a record; "" leaves it to the held-out draw."""
_SPLIT_OF: dict[str, Split] = {
    "train": "train", "training": "train", "restval": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
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
    """

    name: str
    members: Mapping[str, bytes]
    task: str = ""
    label: str = ""
    split: str = ""


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
        interleaved: whether each shard is to hold samples of every class; False where taking
            single records out of a chunk is slow.
    """

    task_type: str
    where: str
    chunks: Sequence[Chunk]
    classes: Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_column: str = ""
    interleaved: bool = False
