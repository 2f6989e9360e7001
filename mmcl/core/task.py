"""Task and TaskStream: the tasks of a stream in training order, with their class numbering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, overload

from mmcl.core.card import (
    Ability,
    Card,
    Decoding,
    EvalOnlyEntry,
    KeyUntil,
    Knowledge,
    Scenario,
    Shift,
    Stage,
    TaskEntry,
    read_card,
)

TaskType = Literal[
    "captioning", "classification", "retrieval", "instruction", "preference", "editing", "image"
]
_SHARED_FIELDS = (
    "name", "task_type", "stage", "train", "test", "size", "test_size", "templates", "text_field",
    "image_field", "label_field", "key_until", "ignore_members", "decoding", "replay_ratio",
)  # fmt: skip
"""Fields of a task that are equal to those of its entry on the card."""


@dataclass(frozen=True)
class Task:
    """A task of a stream, or an eval-only task.

    Attributes:
        index: position in the training order, from 0; eval-only tasks are numbered after the tasks.
        name: name of the task.
        task_type: type of its samples, which decides loss and score; "image" for sources only.
        stage: "cpt" continual pre-training, "dap" domain-adaptive pre-training, or "cft"
            continual fine-tuning.
        train: shard files or urls of the training split.
        test: shard files or urls of the test split.
        size: number of training samples as stated on the card; 0 = not known.
        test_size: number of test samples as stated on the card; 0 = not known.
        classes: names of the classes that are new in this task, in training order.
        class_ids: class numbers (columns of the class scores) of all classes of this task,
            ascending.
        label_to_class: class number of each label on the card, -1 if the label is not of this task.
        label_names: class name of each label on the card.
        templates: prompt templates, each with one ``{}``.
        image_field: member of a sample that holds its image, "" = the only one.
        text_field: member of a sample that holds its text, a webdataset extension.
        label_field: member of a sample that holds its class, as a number or a name.
        key_until: where the key of a sample ends in the names of its members.
        ignore_members: members of samples that are of no use.
        scorer: name of the scorer of generated answers; "" for samples classified or matched.
        decoding: "generate" free text, or "candidates": the likeliest of the task's classes.
        max_new_tokens: tokens of a generated answer, at most.
        epochs: passes over the training data, None = the trainer's setting.
        replay_ratio: fraction of every batch that is replayed, None = the strategy's setting.
        mixture: (number of a source, its fraction of every batch) for each source.
        is_eval_only: True for an eval-only task, which is evaluated after every task.
        repeat_of: index of the task that this one repeats, with the same data, None = of none.
        knowledge: facts that an eval-only task asks for: "invariant" over time, "updated" or "new"
            since before training; None = not stated.
        ability: what an eval-only task probes: "general" ability, "instruction" following or
            "safety"; None = not stated.
    """

    index: int
    name: str
    task_type: TaskType = "classification"
    stage: Stage = "cft"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    size: int = 0
    test_size: int = 0
    classes: tuple[str, ...] = ()
    class_ids: tuple[int, ...] = ()
    label_to_class: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    image_field: str = ""
    text_field: str = "txt"
    label_field: str = "cls"
    key_until: KeyUntil = "first_dot"
    ignore_members: tuple[str, ...] = ()
    scorer: str = ""
    decoding: Decoding = "generate"
    max_new_tokens: int = 64
    epochs: int | None = None
    replay_ratio: float | None = None
    mixture: tuple[tuple[int, float], ...] = ()
    is_eval_only: bool = False
    repeat_of: int | None = None
    knowledge: Knowledge | None = None
    ability: Ability | None = None


@dataclass(frozen=True)
class DataSource:
    """Extra data that tasks mix in: a general set, or a reference set for distillation.

    Attributes:
        number: from 1; the value of ``Batch.source_ids`` for its samples.
        name: name of the source.
        task: its task type, shards (``train``), size, text and columns, as a task with index -1.
        in_loss: whether its samples are in the task loss.
    """

    number: int
    name: str
    task: Task
    in_loss: bool


class TaskStream(Sequence[Task]):
    """Sequence of tasks in training order, with eval-only tasks and data sources.

    The number of a class is the position of its first appearance in the training order: its column
    in the class scores. An eval-only task has a label space of its own.

    Args:
        name: name of the stream.
        scenario: what the model may know at test: "task" (the sample's task, TIL), "class"
            (nothing, CIL) or "domain" (nothing, but the classes stay the same, DIL).
        tasks: tasks in training order.
        eval_only: tasks that are only evaluated, after every task.
        folder: base folder of relative shard names.
        hashes: shard name -> sha256, for shards whose hash the card states.
        license: license of the data.
        sources: general and reference sets that tasks mix in.
        counts: shard name -> number of samples, for shards whose count the card states.
        class_names: class -> its name in prompts, for classes that have another there.
        shift: what changes from task to task: "temporal" (time), "content" (domain) or "language";
            None = not stated.
    """

    def __init__(
        self,
        name: str,
        scenario: Scenario,
        tasks: Sequence[Task],
        eval_only: Sequence[Task] = (),
        *,
        folder: Path = Path(),
        hashes: dict[str, str] | None = None,
        license: str = "",
        sources: Sequence[DataSource] = (),
        counts: dict[str, int] | None = None,
        class_names: Mapping[str, str] | None = None,
        shift: Shift | None = None,
    ) -> None:
        self.name = name
        self.scenario = scenario
        self.tasks = tuple(tasks)
        self.eval_only_tasks = tuple(eval_only)
        self.folder = folder
        self.hashes = dict(hashes or {})
        self.license = license
        self.sources = tuple(sources)
        self.counts = dict(counts or {})
        self.class_names = dict(class_names or {})
        self.shift = shift

    @classmethod
    def read(
        cls, card: Path, order: Sequence[int] | None = None, scorers: Sequence[str] = (),
        repeats: int = 1,
    ) -> TaskStream:  # fmt: skip
        """Read a stream card.

        Args:
            card: YAML file; relative shard names start in its folder.
            order: indices of the card's tasks in training order, None = as on the card; a task
                that is left out is not part of the stream.
            scorers: names that tasks may give as ``scorer``; empty = any.
            repeats: see ``of_card``.

        Raises:
            FileNotFoundError: if there is no card.
            ValueError: with all errors of the card at once, or if order or repeats are wrong.
        """
        return cls.of_card(read_card(card, scorers), card, order, repeats)

    @classmethod
    def of_card(
        cls, read: Card, card: Path, order: Sequence[int] | None = None, repeats: int = 1
    ) -> TaskStream:
        """Make a stream from a card that was read already.

        Args:
            read: the card's content.
            card: its file; relative shard names start in its folder.
            order: see ``read``.
            repeats: times that all tasks are trained, in the same order. The second time "a" is a
                task of its own named "a (2)": with ``repeat_of``, the same data and classes.

        Raises:
            ValueError: if the order is empty, repeats a task or names one that does not exist; if
                repeats is below 1, or a task of the card has the name of a repeated one.
        """
        chosen = list(range(len(read.tasks))) if order is None else list(order)
        known = set(range(len(read.tasks)))
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= known:
            raise ValueError(
                f"order is {chosen}, expected some of 0 to {len(read.tasks) - 1}, none twice: "
                f"{card} has {len(read.tasks)} tasks"
            )
        tasks = _repeated(_numbered(read, [read.tasks[number] for number in chosen]), repeats)
        eval_only = [
            _eval_only_task(read, entry, index)
            for index, entry in enumerate(read.eval_only, start=len(tasks))
        ]
        return cls(
            read.name,
            read.scenario,
            tasks,
            eval_only,
            folder=card.parent,
            hashes=read.hashes,
            license=read.license,
            sources=_sources(read, tasks),
            counts={name: count for name, count in read.counts.items() if count},
            class_names=read.class_names,
            shift=read.shift,
        )

    def first_occurrence(self, number: int) -> int:
        """Return the column of the task that a column repeats, its own if it repeats none."""
        origin = self.evaluated_task(number).repeat_of
        return number if origin is None else origin

    def last_trained(self, number: int, row: int) -> int:
        """Return the last occurrence of a column's task among the first ``row`` tasks.

        None of them trained = the first occurrence.
        """
        first = self.first_occurrence(number)
        return max([first, *(t.index for t in self.tasks[:row] if t.repeat_of == first)])

    def classes_seen(self, index: int) -> tuple[str, ...]:
        """Return the names of all classes of tasks 0 to ``index``, in order of class number."""
        return tuple(name for task in self.tasks[: index + 1] for name in task.classes)

    def prompt_names(self, classes: Iterable[str]) -> tuple[str, ...]:
        """Return the names of classes as prompts have them; two may be equal."""
        return tuple(self.class_names.get(each, each) for each in classes)

    def display_names(self, classes: Iterable[str]) -> tuple[str, ...]:
        """Return the names of classes for people, all different: ``crane (n02012849)``.

        They do not depend on the other classes, so they stay when tasks are appended.
        """
        stated = ((each, self.class_names.get(each, each)) for each in classes)
        return tuple(name if name == own else f"{name} ({own})" for own, name in stated)

    def evaluated_task(self, number: int) -> Task:
        """Return the task or eval-only task of a column of the accuracy matrix."""
        return (self.tasks + self.eval_only_tasks)[number]

    @property
    def all_tasks(self) -> tuple[Task, ...]:
        """Tasks, then eval-only tasks: the columns of the accuracy matrix."""
        return self.tasks + self.eval_only_tasks

    def shard(self, name: str) -> str:
        """Return the path or url of a shard, given its name on the card."""
        if "://" in name or name.startswith("pipe:"):
            return name
        return str(self.folder / (Path(name).expanduser() if name.startswith("~/") else name))

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...
    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)


def _entry(card: Card, entry: TaskEntry, index: int) -> Task:
    numbers = {name: 1 + n for n, name in enumerate(card.sources)}
    return Task(
        index=index,
        **{field: getattr(entry, field) for field in _SHARED_FIELDS},
        scorer=entry.scorer if entry.task_type == "instruction" else "",
        max_new_tokens=entry.max_new_tokens or Task.max_new_tokens,
        epochs=entry.epochs or None,
        mixture=tuple((numbers[name], share) for name, share in entry.mixture.items()),
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
        task = replace(task, classes=new, class_ids=labels, label_to_class=columns)
        tasks.append(replace(task, label_names=tuple(card.classes)))
    return tasks


def _repeated(tasks: list[Task], repeats: int) -> list[Task]:
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected the times that tasks are trained, from 1")
    found = list(tasks)
    for time in range(2, repeats + 1):
        for task in tasks:
            name = f"{task.name} ({time})"
            again = replace(task, name=name, classes=(), repeat_of=task.index)
            found.append(replace(again, index=len(found)))
    names = {task.name for task in tasks} & {task.name for task in found[len(tasks) :]}
    if names:
        raise ValueError(
            f"the card has a task '{min(names)}', the name of a task when it is repeated: rename "
            "it, or set repeats to 1"
        )
    return found


def _eval_only_task(card: Card, entry: EvalOnlyEntry, index: int) -> Task:
    names = entry.classes
    # Labels are positions in the card's list, unless the task has classes that the card lacks.
    listed = card.classes if set(names) <= set(card.classes) else names
    column_of = {name: column for column, name in enumerate(names)}
    columns = tuple(column_of.get(name, -1) for name in listed)
    task, labels = _entry(card, entry, index), tuple(range(len(names)))
    task = replace(task, classes=names, class_ids=labels, label_to_class=columns)
    return replace(
        task,
        label_names=tuple(listed),
        is_eval_only=True,
        knowledge=entry.knowledge,
        ability=entry.ability,
    )


def _sources(card: Card, tasks: Sequence[Task]) -> list[DataSource]:
    names = [name for task in tasks for name in task.classes]
    column_of = {name: column for column, name in enumerate(names)}
    sources = []
    for number, (name, entry) in enumerate(card.sources.items(), start=1):
        own = set(entry.classes)
        # Samples of a class that no task of this order has are shown to the model, not scored.
        columns = tuple(column_of.get(c, len(names)) if c in own else -1 for c in card.classes)
        samples = Task(
            index=-1,
            name=name,
            task_type=entry.task_type,
            train=entry.shards,
            size=entry.size,
            label_to_class=columns if entry.task_type == "classification" else (),
            label_names=card.classes,
            templates=entry.templates,
            image_field=entry.image_field,
            text_field=entry.text_field,
            label_field=entry.label_field,
            key_until=entry.key_until,
            ignore_members=entry.ignore_members,
        )
        sources.append(DataSource(number, name, samples, entry.in_loss))
    return sources
