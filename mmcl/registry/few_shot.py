"""Few labeled samples of one task as a stream of their own, and samples to measure it on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmcl.core import BadSample, Pixels, ProcessedSample, Task, TaskStream, write_atomic
from mmcl.core.seeding import hash_priorities
from mmcl.data import open_stream
from mmcl.data.batches.collate import make_example
from mmcl.data.shards.stream_writer import card_text, load_card, write_shard
from mmcl.evaluation import strict_json
from mmcl.evaluation.scorers import SCORERS
from mmcl.lightning.datamodule import ContinualDataModule

CARD, RECORD = "few_shot.yaml", "few_shot.json"
_CARD_KEYS = (
    "scenario", "task_type", "classes", "class_names", "templates", "scorer", "decoding",
    "max_new_tokens", "license", "source", "citation",
)  # fmt: skip
_TASK_KEYS = (
    "task_type", "stage", "classes", "templates", "scorer", "decoding", "max_new_tokens",
)  # fmt: skip
_MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class FewShot:
    """Record of few labeled samples of a task.

    Attributes:
        stream: name or path of the card that they are of.
        task: name of the task.
        seed: seed of the choice.
        samples: training samples, equally many of each class of a classification task.
        test_samples: test samples.
        per_class: name of a class -> training samples, empty for other types of tasks.
    """

    stream: str
    task: str
    seed: int
    samples: int
    test_samples: int
    per_class: Mapping[str, int]


def write_few_shot(
    stream: str, data_dir: str, task: str, folder: Path, *,
    samples: int, test_samples: int, seed: int,
) -> FewShot:  # fmt: skip
    """Write few training samples and some test samples of a task as a stream in a folder.

    A classification task gives equally many samples of each class, as far as it has them; the
    others are drawn over all samples. The choice depends on the seed and the task's name alone.

    Args:
        stream: name of a stream, or path of a card.
        data_dir: folder of built streams.
        task: name of the task; "" = the stream's only one.
        folder: of the card and its two shards.
        samples: training samples, 1 or more.
        test_samples: test samples at most, 1 or more.
        seed: of the choice.

    Returns:
        What was chosen; a folder that a killed call finished is read again.

    Raises:
        ValueError: if there is no such task, or ``samples`` is below its number of classes.
    """
    if (folder / RECORD).is_file():
        record: FewShot = strict_json.load(
            FewShot, strict_json.read(folder / RECORD), str(folder / RECORD)
        )
        return record
    data = ContinualDataModule(stream, data_dir)
    data.prepare_data()
    index, entry, content = _card_entry(data.card, task)
    one = TaskStream.read(data.card, [index], tuple(SCORERS))
    one.eval_only_tasks = ()
    opened = open_stream(one)
    own = opened.stream[0]
    chosen, per_class = _choose(opened.reader(0, "train"), own, samples, seed)
    order = _order(len(opened.reader(0, "test")), f"test/{own.name}", seed)
    tested = sorted(order[:test_samples])
    write_shard(folder / "test.tar", _copies(opened.reader(0, "test"), tested))
    write_shard(folder / "train.tar", _copies(opened.reader(0, "train"), chosen))
    card = _new_card(content, entry, own, len(chosen), len(tested))
    header = [f"{len(chosen)} training samples of task '{own.name}', chosen by mmcl recycle"]
    write_atomic(folder / CARD, card_text(card, header))
    record = FewShot(stream, own.name, seed, len(chosen), len(tested), per_class)
    write_atomic(folder / RECORD, strict_json.to_bytes(asdict(record)))
    return record


def _card_entry(card: Path, task: str) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """Return a task's index on a card, its entry and the card's content."""
    content = load_card(card)
    names = [str(entry["name"]) for entry in content["tasks"]]
    if not task and len(names) == 1:
        task = names[0]
    if task not in names:
        problem = f"has no task '{task}'" if task else "has several tasks"
        raise ValueError(f"{card} {problem}: give --task, one of {', '.join(names)}")
    index = names.index(task)
    return index, content["tasks"][index], content


def _choose(reader: Any, task: Task, samples: int, seed: int) -> tuple[list[int], dict[str, int]]:
    """Return the numbers of the chosen samples, increasing, and how many each class has."""
    order = _order(len(reader), f"train/{task.name}", seed)
    if task.task_type != "classification":
        readable = (number for number in order if _label(reader, number, task) is not None)
        return sorted(number for number, _ in zip(readable, range(samples), strict=False)), {}
    classes = len(task.classes)
    if samples < classes:
        raise ValueError(
            f"--samples is {samples} and task '{task.name}' has {classes} classes: give one sample "
            "or more for each"
        )
    columns = sorted(set(task.class_ids))
    quota = {
        column: samples // classes + (place < samples % classes)
        for place, column in enumerate(columns)
    }
    chosen: list[int] = []
    counts = dict.fromkeys(columns, 0)
    for number in order:
        label = _label(reader, number, task)
        if label is not None and counts[label] < quota[label]:
            counts[label] += 1
            chosen.append(number)
        if len(chosen) == samples:
            break
    names = dict(zip(task.class_ids, task.classes, strict=True))
    return sorted(chosen), {names[column]: count for column, count in counts.items()}


def _order(count: int, name: str, seed: int) -> list[int]:
    """Return 0 to ``count`` - 1 in an order that depends on the seed and a name."""
    group = zlib.crc32(f"recycle/{name}".encode())
    found: list[int] = (
        hash_priorities(seed, group, torch.arange(count)).argsort(stable=True).tolist()
    )
    return found


def _label(reader: Any, number: int, task: Task) -> int | None:
    """Return the class of a sample, -100 in tasks without classes; None if it is bad."""
    try:
        sample = reader.read(number)
        made = make_example(sample, number, task, _unchanged, seed=0, max_pixels=_MAX_PIXELS)
    except BadSample:
        return None
    return made.label


def _unchanged(pixels: Pixels, text: Any, seed: int) -> ProcessedSample:
    return ProcessedSample(None)


def _copies(reader: Any, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        try:
            members = reader.read(number).members
        except BadSample:  # a bad test sample stays one, as in the task's own split
            members = {"txt": b""}
        yield {"__key__": f"{number:09d}", **members}


def _new_card(
    content: Mapping[str, Any], entry: Mapping[str, Any], task: Task, size: int, test_size: int
) -> dict[str, Any]:
    card = {key: content[key] for key in _CARD_KEYS if key in content}
    own = {key: entry[key] for key in _TASK_KEYS if key in entry}
    # A reader gives members under their usual names, but for keys inside of a JSON member.
    for key in ("text_field", "label_field"):
        stated = str(entry.get(key, content.get(key, "")))
        if stated and (key == "text_field" or stated.strip(" .").lower().startswith("json.")):
            own[key] = stated
    sizes = {"train": "train.tar", "test": "test.tar", "size": size, "test_size": test_size}
    return {
        "name": f"{content['name']}-few-shot", **card,
        "tasks": [{"name": task.name, **own, **sizes}],
    }  # fmt: skip
