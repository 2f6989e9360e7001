"""Task and TaskStream: what is learned, in which order, and what the model may know at test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, overload

from mmcl.core.card import read_card
from mmcl.core.card_entries import Card, SourceEntry, TaskEntry

Kind = Literal["caption", "classify", "retrieve", "answer", "prefer", "edit", "picture"]
Stage = Literal["cpt", "dap", "cft"]
Scenario = Literal["task", "class", "domain"]
Decode = Literal["generate", "candidates"]


@dataclass(frozen=True)
class Task:
    """One member of a stream.

    Attributes:
        index: position in the learned order, from 0; probes go on counting after the tasks.
        name: of the task.
        kind: what its rows are, which decides loss and score; "picture" of sources only.
        stage: continual pre-training, domain adaptation or fine-tuning.
        train: shard files or urls of the training part.
        test: shard files or urls of the test part.
        size: training samples counted on the card; 0 = not known.
        test_size: test samples counted on the card.
        classes: names new in this task, in the learned order.
        labels: columns (learned class numbers) of all classes that occur in this task.
        columns: card label -> column, -1 where a label does not belong to this task.
        templates: prompt templates, each with one ``{}``.
        text: which member of a sample holds its text, a webdataset extension.
        scorer: what judges answers, by name; "" for rows that are classified or matched.
        decode: "generate" words freely, or let the likeliest of the "candidates" win, which are
            the classes that compete.
        max_new_tokens: of a generated answer.
        epochs: passes over the task, None = as the trainer says.
        share: part of every batch that recalled samples take, None = as the strategy says.
        mix: (number of a source, its part of every batch).
        is_probe: True for a test-only member that is scored in every row.
    """

    index: int
    name: str
    kind: Kind = "classify"
    stage: Stage = "cft"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    size: int = 0
    test_size: int = 0
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    templates: tuple[str, ...] = ()
    text: str = "txt"
    scorer: str = ""
    decode: Decode = "generate"
    max_new_tokens: int = 64
    epochs: int | None = None
    share: float | None = None
    mix: tuple[tuple[int, float], ...] = ()
    is_probe: bool = False


@dataclass(frozen=True)
class Source:
    """Rows that come beside those of tasks: a general set, or one to compare with a teacher on.

    Attributes:
        number: from 1; what ``Batch.source`` says of its rows.
        name: of the source.
        rows: kind, shards (``train``), size, text, columns; its index is -1.
        is_scored: whether its rows have a part in the task loss.
    """

    number: int
    name: str
    rows: Task
    is_scored: bool


class TaskStream(Sequence[Task]):
    """Tasks in the order in which they are learned, and probes that are only ever scored.

    Class numbers are columns: position of a class's first appearance in the learned order. A probe
    has a label space of its own.

    Args:
        name: of the stream.
        scenario: what the model may know at test: "task" (its task, TIL), "class" (nothing, CIL)
            or "domain" (nothing, but classes stay the same, DIL).
        tasks: in learned order.
        probes: never trained on.
        folder: where relative shard names start.
        hashes: shard name -> sha256, where the card states it.
        licence: of the data.
        sources: general and reference sets that tasks mix in.
        counts: shard name -> samples, where the card states it.
    """

    def __init__(
        self,
        name: str,
        scenario: Scenario,
        tasks: Sequence[Task],
        probes: Sequence[Task] = (),
        *,
        folder: Path = Path(),
        hashes: dict[str, str] | None = None,
        licence: str = "",
        sources: Sequence[Source] = (),
        counts: dict[str, int] | None = None,
    ) -> None:
        self.name = name
        self.scenario = scenario
        self.tasks = tuple(tasks)
        self.probes = tuple(probes)
        self.folder = folder
        self.hashes = dict(hashes or {})
        self.licence = licence
        self.sources = tuple(sources)
        self.counts = dict(counts or {})

    @classmethod
    def read(
        cls, card: Path, order: Sequence[int] | None = None, scorers: Sequence[str] = ()
    ) -> TaskStream:
        """Read a stream card.

        Args:
            card: YAML file beside its shards.
            order: task positions in the order to learn them, default as on the card; a task that
                is left out is not part of the stream.
            scorers: names that tasks may give theirs, none = any.

        Raises:
            FileNotFoundError: if there is no card.
            ValueError: listing every fault of the card at once, or a bad order.
        """
        return cls.of_card(read_card(card, scorers), card, order)

    @classmethod
    def of_card(cls, read: Card, card: Path, order: Sequence[int] | None = None) -> TaskStream:
        """Make a stream of a card that was read.

        Args:
            read: what the card says.
            card: its file; relative shard names start in its folder.
            order: see ``read``.

        Raises:
            ValueError: if the order is bad.
        """
        places = list(range(len(read.tasks))) if order is None else list(order)
        if (
            not places
            or len(set(places)) < len(places)
            or not set(places) <= set(range(len(read.tasks)))
        ):
            raise ValueError(
                f"order is {places}, expected some of 0 to {len(read.tasks) - 1}, none twice: "
                f"{card} has {len(read.tasks)} tasks"
            )
        tasks = _numbered(read, [read.tasks[place] for place in places])
        probes = [
            _probe(read, entry, len(tasks) + number) for number, entry in enumerate(read.probes)
        ]
        return cls(
            read.name,
            read.scenario,  # type: ignore[arg-type]  # the card reader checked the three words
            tasks,
            probes,
            folder=card.parent,
            hashes=read.hashes,
            licence=read.licence,
            sources=_sources(read, tasks),
            counts=read.counts,
        )

    def classes_until(self, index: int) -> tuple[str, ...]:
        """Return the names of all classes met in tasks 0 to ``index``, in column order."""
        return tuple(name for task in self.tasks[: index + 1] for name in task.classes)

    def column(self, number: int) -> Task:
        """Return the task or probe that a matrix column stands for."""
        return (self.tasks + self.probes)[number]

    @property
    def columns(self) -> tuple[Task, ...]:
        """Tasks, then probes."""
        return self.tasks + self.probes

    def shard(self, name: str) -> str:
        """Return the path or url of a shard that is named relative to the card."""
        return name if "://" in name or name.startswith("pipe:") else str(self.folder / name)

    @overload
    def __getitem__(self, place: int) -> Task: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Task, ...]: ...
    def __getitem__(self, place: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[place]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


def _entry(card: Card, entry: TaskEntry, index: int) -> Task:
    names = [source.name for source in card.sources]
    return Task(
        index=index,
        name=entry.name,
        kind=entry.kind,  # type: ignore[arg-type]  # checked by the card reader
        stage=entry.stage,  # type: ignore[arg-type]
        train=entry.train,
        test=entry.test,
        size=entry.size,
        test_size=entry.test_size,
        templates=entry.templates,
        text=entry.text,
        scorer=entry.scorer,
        decode=entry.decode,  # type: ignore[arg-type]  # checked by the card reader
        max_new_tokens=entry.max_new_tokens,
        epochs=entry.epochs,
        share=entry.share,
        mix=tuple((1 + names.index(name), share) for name, share in entry.mix),
    )


def _numbered(card: Card, entries: Sequence[TaskEntry]) -> list[Task]:
    seen: dict[str, int] = {}
    tasks = []
    for index, entry in enumerate(entries):
        new = tuple(name for name in entry.classes if name not in seen)
        seen.update({name: len(seen) + offset for offset, name in enumerate(new)})
        own = set(entry.classes)
        columns = tuple(seen[name] if name in own else -1 for name in card.classes)
        labels = tuple(sorted(column for column in columns if column >= 0))
        task = _entry(card, entry, index)
        tasks.append(replace(task, classes=new, labels=labels, columns=columns))
    return tasks


def _probe(card: Card, entry: TaskEntry, index: int) -> Task:
    names = entry.classes
    place = {name: column for column, name in enumerate(names)}
    # Labels are positions in the card's list, unless the probe brings classes that it lacks.
    listed = card.classes if set(names) <= set(card.classes) else names
    columns = tuple(place.get(name, -1) for name in listed)
    task = _entry(card, entry, index)
    labels = tuple(range(len(names)))
    return replace(task, classes=names, labels=labels, columns=columns, is_probe=True)


def _sources(card: Card, tasks: Sequence[Task]) -> list[Source]:
    place = {name: n for n, name in enumerate(name for task in tasks for name in task.classes)}
    return [_source(card, entry, 1 + n, place) for n, entry in enumerate(card.sources)]


def _source(card: Card, entry: SourceEntry, number: int, place: dict[str, int]) -> Source:
    own = set(entry.classes)
    # Of a class that no task of this order has, the rows are shown and not scored.
    columns = tuple(place.get(name, len(place)) if name in own else -1 for name in card.classes)
    rows = Task(
        index=-1,
        name=entry.name,
        kind=entry.kind,  # type: ignore[arg-type]  # checked by the card reader
        train=entry.shards,
        size=entry.size,
        columns=columns if entry.kind == "classify" else (),
        templates=entry.templates,
        text=entry.text,
    )
    return Source(number, entry.name, rows, entry.is_scored)
