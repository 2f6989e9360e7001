"""Conversion of input data to a stream: ``mmcl data convert``, as shards or in place."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.core.card import read_card
from mmcl.data.convert.class_names import ClassNames, LookUp, name_classes
from mmcl.data.convert.inputs.columns import expect_harmless_key, list_names
from mmcl.data.convert.inputs.image_folder_input import natural
from mmcl.data.convert.inputs.open_input import is_instructions, open_input
from mmcl.data.convert.known_images import shared_images
from mmcl.data.convert.record import ConvertOptions, InputData, ProgressFn, SkippedRecord
from mmcl.data.convert.scan import (
    ScanResult,
    image_notes,
    scan_input,
    take_splits,
    write_left_out,
)
from mmcl.data.convert.task_files import InPlace, plan_task, unique_names, write_in_place
from mmcl.data.convert.task_split import TaskSplits, assign_tasks, class_positions, task_notes
from mmcl.data.parallel import WorkerPool
from mmcl.data.remote.file_lock import file_lock
from mmcl.data.shards.reader import subset_size
from mmcl.data.shards.stream_writer import (
    build_stream,
    card_counts,
    find_card,
    listed_shards,
    load_card,
    put_tasks,
    save_card,
)

__all__ = ["ConvertedTasks", "convert", "convert_tasks", "is_instructions", "open_input"]
RECIPE = 1  # counts up whenever the same input would give other bytes
_LISTED = 10
_MIN_SAMPLES_PER_WORKER = 10_000
"""Samples for which one more process is started, which takes the time of some thousands."""
_TEMPLATE = "a photo of a {}."
_NOT_IN_SHARDS = (
    "num_workers", "max_bad_fraction", "license", "scorer", "max_new_tokens", "scenario",
    "first_task_classes", "class_order_seed", "task_order", "class_names",
)  # fmt: skip
"""Options that do not change the bytes of a shard, or only by its task and classes."""


@dataclass(frozen=True)
class ConvertedTasks:
    """Tasks that were converted, for a card.

    Attributes:
        entries: of the card's ``tasks``.
        classes: all class names in the order of their ids.
        hashes: file -> sha256.
        counts: file -> number of samples.
        left_out: the first bad samples.
        num_bad: all bad samples.
        left_out_file: that lists ``left_out``, written if there are any.
        num_leaked: test samples whose image is, byte for byte, also a training image; only where
            a test input was given.
        notes: on how the tasks were made, a sentence each.
        class_names: names of classes in prompts.
    """

    entries: Sequence[dict[str, Any]]
    classes: Sequence[str]
    hashes: Mapping[str, str]
    counts: Mapping[str, int]
    left_out: Sequence[SkippedRecord]
    num_bad: int
    left_out_file: Path
    num_leaked: int
    notes: Sequence[str] = ()
    class_names: ClassNames = field(default_factory=ClassNames)


def convert(
    train: InputData,
    test: InputData | None,
    folder: Path,
    options: ConvertOptions,
    *,
    append: bool = False,
    card: Path | None = None,
    in_place: InPlace | None = None,
    look_up: LookUp = lambda _: {},
    allow_duplicates: bool = False,
    progress: ProgressFn = lambda *_: None,
) -> tuple[Path, ConvertedTasks]:
    """Convert an input to shards, and put its tasks on a card.

    Nothing is written before everything was read once. The same call resumes after a kill; after
    the end it changes nothing.

    Args:
        train: training samples, and test samples unless ``test`` is given.
        test: test samples.
        folder: of shards and card, created if missing.
        options: of the conversion.
        append: put the tasks at the end of an existing card; else the card is ``<name>.yaml``.
        card: to append to; None takes the only one of the folder.
        in_place: write no shards, use the samples in place.
        look_up: returns the names in prompts of those classes that are known ids.
        allow_duplicates: append a task also if its samples are all on the card already.
        progress: called with (what is done, samples done, samples in all).

    Returns:
        The path of the card, and what was converted.

    Raises:
        FileNotFoundError: if the card to append to is missing.
        ValueError: listing the bad samples if there are too many; if tasks cannot be assigned; or
            if a card of the folder uses shards of these names that were made from other data; or if
            all samples of an appended task are those of another task.
    """
    path = _card_path(folder, options, append, card)
    known = read_card(path).classes if path.is_file() else ()
    converted = convert_tasks(
        train, test, folder, options,
        known=known, append=append, in_place=in_place, look_up=look_up, progress=progress,
        compare_with=path if append else None, allow_duplicates=allow_duplicates,
    )  # fmt: skip
    with file_lock(folder):
        _put_on_card(path, load_card(path), converted, train, options, append)
    return path, converted


def convert_tasks(
    train: InputData,
    test: InputData | None,
    folder: Path,
    options: ConvertOptions,
    *,
    known: Sequence[str] = (),
    append: bool = False,
    in_place: InPlace | None = None,
    look_up: LookUp = lambda _: {},
    compare_with: Path | None = None,
    allow_duplicates: bool = False,
    progress: ProgressFn = lambda *_: None,
) -> ConvertedTasks:
    """Convert an input as `convert` does, but leave it to the caller to put its tasks on a card.

    ``known`` are the classes that a card has already, whose ids stay. ``append`` names the build
    record after the first task, not after the stream. ``compare_with`` is a card with whose tasks
    the new ones are compared, see `shared_images`.
    """
    sources = [train] if test is None else [train, test]
    in_all = (sum(map(len, source.chunks)) for source in sources)
    total = sum(subset_size(count, options.max_samples) for count in in_all)
    with WorkerPool(min(options.num_workers, 1 + total // _MIN_SAMPLES_PER_WORKER)) as workers:
        scans = _scan(sources, options, progress, workers)
        notes = [*_input_notes(scans), *take_splits(scans[0], scans[1] if test else None)]
        names = _class_names(scans, options, look_up)
        tasks, classes = assign_tasks(scans[0], scans[1] if test else None, options, known)
        name = unique_names([tasks[0].name])[0] if append else options.name
        shared = shared_images(compare_with, tasks, allow_duplicates, progress)
        if in_place is not None:
            entries, hashes, counts = write_in_place(folder, tasks, in_place)
        else:
            recipe = _recipe(scans, options, tasks, classes)
            entries, hashes, counts = _write_shards(
                folder, name, tasks, recipe, options, progress, workers
            )
    for entry, positions in zip(entries, class_positions(tasks, options), strict=True):
        entry.update(positions, task_type=train.task_type)
        if train.task_type == "instruction":
            entry["scorer"] = options.scorer
        if options.max_new_tokens is not None:
            entry["max_new_tokens"] = options.max_new_tokens
    left_out, left_out_file = write_left_out(folder / f"{name}.left_out.txt", scans)
    leaked = (np.isin(task.test.content, task.train.content).sum() for task in tasks if test)
    num_bad = sum(scan.num_bad for scan in scans)
    return ConvertedTasks(
        entries, classes, hashes, counts, left_out, num_bad, left_out_file, sum(map(int, leaked)),
        [*notes, *task_notes(tasks, options), *image_notes(scans), *shared, *names.notes], names,
    )  # fmt: skip


def _scan(
    sources: Sequence[InputData], options: ConvertOptions, progress: ProgressFn, workers: WorkerPool
) -> list[ScanResult]:
    """Scan the inputs.

    Raises:
        ValueError: if there are too many bad samples, or an option does not fit the inputs.
    """
    train, test = sources[0], sources[-1]
    if test.task_type != train.task_type:
        raise ValueError(
            f"--test {test.where} is {test.task_type} and SOURCE {train.where} is "
            f"{train.task_type}: give test samples of the same kind"
        )
    if options.max_new_tokens is not None and train.task_type != "instruction":
        raise ValueError(
            f"--max_new_tokens is for answers, and {train.where} has none: leave it out"
        )
    # Answers are scored only in the input from which the test samples are taken.
    scorer = options.scorer if train.task_type == "instruction" else ""
    scorers = [*("" for _ in sources[1:]), scorer]
    scans = [
        scan_input(source, options, progress, workers.map, scorer)
        for source, scorer in zip(sources, scorers, strict=True)
    ]
    _expect_few_bad(scans, options.max_bad_fraction)
    return scans


def _input_notes(scans: Sequence[ScanResult]) -> list[str]:
    """Return what a user may not expect of the inputs, each sentence once.

    Raises:
        ValueError: if records have a key that is not used and may be expected to count.
    """
    notes: list[str] = []
    for scan in scans:
        where = Path(scan.source.where).name
        for key in sorted(scan.unused):
            expect_harmless_key(scan.source.where, key)
        notes += scan.source.notes
        if scan.unused:
            notes.append(f"not used of {where}: {list_names(sorted(scan.unused))}")
        notes += [f"{where}, {count:,} samples: {text}" for text, count in scan.remarks.items()]
    return list(dict.fromkeys(notes))


def _class_names(
    scans: Sequence[ScanResult], options: ConvertOptions, look_up: LookUp
) -> ClassNames:
    """Return the names of the classes of all inputs in prompts.

    Raises:
        ValueError: if a file of names is given and a class has none in it, or there are no classes.
    """
    source = scans[0].source
    if source.task_type != "classification":
        if options.class_names is not None:
            raise ValueError(
                f"--class_names names classes, and {source.where} is {source.task_type}: leave it "
                "out"
            )
        return ClassNames()
    met = {scan.labels[n] for scan in scans for n in np.unique(scan.label[scan.size > 0])}
    stated = [name for name in source.classes if name in met]
    own = list(dict.fromkeys([*stated, *sorted(met, key=natural)]))
    return name_classes(own, source.class_names, options.class_names, look_up, _TEMPLATE)


def _card_path(folder: Path, options: ConvertOptions, append: bool, card: Path | None) -> Path:
    path = (card or find_card(folder)) if append else folder / f"{options.name}.yaml"
    if append and not path.is_file():
        raise FileNotFoundError(f"there is no card {path} to append to")
    if path.parent.resolve() != folder.resolve():
        raise ValueError(f"card {path} is not in {folder}: shards are stored next to their card")
    return path


def _expect_few_bad(scans: Sequence[ScanResult], max_bad_fraction: float) -> None:
    """Raise an error that lists the bad samples of all inputs if one has too many.

    Raises:
        ValueError: naming the first of them, and the option that leaves them out.
    """
    fractions = [scan.num_bad / scan.num_read for scan in scans]
    if all(fraction <= max_bad_fraction and fraction < 1 for fraction in fractions):
        return
    num_bad = sum(scan.num_bad for scan in scans)
    listed = [bad for scan in scans for bad in scan.left_out][:_LISTED]
    lines = "".join(f"\n  - {bad}" for bad in listed)
    more = f"\n  - and {num_bad - len(listed):,} more" if num_bad > len(listed) else ""
    if all(" is missing (no file " in bad.reason for bad in listed):
        more += "\nImage paths start from the folder of --images: is it the right one?"
    fix = "correct them"
    if max(fractions) < 1:
        needed = max(math.ceil(100 * scan.num_bad / scan.num_read) / 100 for scan in scans)
        fix += f", or leave them out with --skip_bad or --max_bad_fraction {needed:.2f}"
    raise ValueError(
        f"{num_bad:,} of {sum(scan.num_read for scan in scans):,} samples in "
        f"{' and '.join(scan.source.where for scan in scans)} cannot be used: {fix}:{lines}{more}"
    )


def _write_shards(
    folder: Path,
    name: str,
    tasks: Sequence[TaskSplits],
    recipe: Mapping[str, Any],
    options: ConvertOptions,
    progress: ProgressFn,
    workers: WorkerPool,
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]:
    """Write the shards of tasks; return card entries, hashes and counts."""
    folder.mkdir(parents=True, exist_ok=True)
    _expect_free(folder, name, recipe)
    planned = [
        plan_task(stem, task, options)
        for stem, task in zip(unique_names([task.name for task in tasks]), tasks, strict=True)
    ]
    plans = [plan for _, own in planned for plan in own]
    hashes: dict[str, str] = {}

    def keep_hashes(made: Mapping[str, str]) -> Mapping[str, str]:
        hashes.update(made)
        return {}

    build_stream(
        folder, name, plans, (), keep_hashes, recipe=recipe, parallel_map=workers.map,
        progress=lambda done, total: progress("writing shards", done, total),
    )  # fmt: skip
    return [entry for entry, _ in planned], hashes, card_counts(plans)


def _recipe(
    scans: Sequence[ScanResult],
    options: ConvertOptions,
    tasks: Sequence[TaskSplits],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on."""
    labels = [[task.name, [[name, classes.index(name)] for name in task.classes]] for task in tasks]
    return {
        "number": RECIPE,
        "options": {k: value for k, value in asdict(options).items() if k not in _NOT_IN_SHARDS},
        "sources": [scan.digest for scan in scans],
        "left_out": [scan.num_bad for scan in scans],
        # The ids of classes follow from the card that the tasks are put on.
        "tasks": hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
    }


def _expect_free(folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse to overwrite shards that a card uses and that were made from other data.

    Raises:
        ValueError: naming the card.
    """
    try:
        record = json.loads((folder / f"{name}.build.json").read_text(encoding="utf-8"))
        shards = set(record["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if record.get("recipe") == json.loads(json.dumps(recipe)):
        return
    for card in sorted(folder.glob("*.yaml")):
        if listed_shards(card, shards):
            raise ValueError(
                f"'{name}' in {folder} was made from other files or options and card {card.name} "
                f"uses it: choose another --out or --name, or delete {name}.build.json to have it "
                "written again"
            )


def _put_on_card(
    path: Path,
    content: dict[str, Any],
    converted: ConvertedTasks,
    train: InputData,
    options: ConvertOptions,
    append: bool,
) -> None:
    if append and options.license:
        for entry in converted.entries:
            about = entry.get("description")
            entry["description"] = f"{about}; " * bool(about) + f"license: {options.license}"
    if not content:
        listed = [name for entry in converted.entries for name in entry.get("classes", ())]
        is_class_incremental = bool(listed) and len(set(listed)) == len(listed)
        content = {
            "name": options.name,
            "scenario": options.scenario or ("class" if is_class_incremental else "domain"),
            "task_type": train.task_type,
            "stage": "cft",
            **({"license": options.license} if options.license else {}),
            "source": Path(train.where).name,
            **({"templates": [_TEMPLATE]} if train.task_type == "classification" else {}),
        }
    content.setdefault("tasks", [])
    if content.get("text_field", "txt") != train.text_field:
        for entry in converted.entries:
            entry["text_field"] = train.text_field
    if options.scenario not in (None, content["scenario"]):
        raise ValueError(
            f"--scenario is {options.scenario} and card {path} says {content['scenario']}: leave "
            "it out, or change the card"
        )
    if converted.classes:
        content["classes"] = list(converted.classes)
        named = converted.class_names.on_card(content.pop("class_names", {}), converted.classes)
        if named:
            content["class_names"] = named
    made = f"Made by: mmcl data convert {Path(train.where).name}"
    content = put_tasks(content, converted.entries, converted.hashes, converted.counts)
    save_card(path, content, [made])
