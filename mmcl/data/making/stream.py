"""`mmcl data make`: from what somebody has to a stream, as shards or in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.core.card import read_card
from mmcl.data.builders.llava_cards import find_card, load_card, put_tasks, save_card
from mmcl.data.builders.llava_convert import expect_free, write_left_out
from mmcl.data.builders.llava_survey import Told
from mmcl.data.builders.llava_task import LeftOut
from mmcl.data.builders.shards import build_stream
from mmcl.data.lock import exclusive
from mmcl.data.making.dealing import DealtTask, deal
from mmcl.data.making.looking import Looked, look_through
from mmcl.data.making.loose import Loose, write_loose
from mmcl.data.making.options import MakeOptions
from mmcl.data.making.processes import Processes
from mmcl.data.making.record import Source
from mmcl.data.making.shards import plan_task, stems

RECIPE = 1  # counts up whenever the same source would give other bytes
_NAMED = 10
_WORTH = 10_000
"""Samples for which one process more is started; one makes thousands in the seconds it takes."""
_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class MadeStream:
    """What was made.

    Attributes:
        card: its path.
        entries: what the card says of the tasks that were made.
        left_out: the first ones that could not be used.
        faults: how many could not be used.
        twins: test samples whose picture is also learned from, byte for byte, because both parts
            were given so.
    """

    card: Path
    entries: Sequence[dict[str, Any]]
    left_out: Sequence[LeftOut]
    faults: int
    twins: int


def make(
    train: Source,
    test: Source | None,
    folder: Path,
    options: MakeOptions,
    *,
    append: bool = False,
    card: Path | None = None,
    loose: Loose | None = None,
    progress: Told = lambda *_: None,
) -> MadeStream:
    """Look through a source, write its shards, and put its tasks on a card.

    Nothing is written before everything was read once. The same call after a kill goes on where
    it stopped; after the end it changes nothing.

    Args:
        train: what to learn from, and to test on unless ``test`` is given.
        test: what to test on.
        folder: where shards and card lie; made if need be.
        options: see there.
        append: put the tasks at the end of a card that is there; else it is ``<name>.yaml``.
        card: to append to; None takes the only one of the folder.
        loose: write no shards, use the samples in place.
        progress: told (what is done, samples done, samples in all).

    Raises:
        FileNotFoundError: if the card to append to is missing.
        ValueError: listing what cannot be used; or if tasks cannot be dealt; or if a card of the
            folder uses shards of these names that were made from something else.
    """
    path = _card_path(folder, options, append, card)
    known = read_card(path).classes if path.is_file() else ()
    sources = [source for source in (train, test) if source is not None]
    with Processes(_workers(sources, options)) as processes:
        looked = [look_through(source, progress, processes.spread) for source in sources]
        faults = _expect_good(looked, options)
        tasks, classes = deal(looked[0], looked[1] if test else None, options, known)
        record = stems([tasks[0].name])[0] if append else options.name
        if loose is not None:
            built = write_loose(folder, tasks, loose)
        else:
            recipe = _recipe(looked, options, tasks, classes)
            built = _write_shards(folder, record, tasks, recipe, options, progress, processes)
    left_out = [fault for one in looked for fault in one.left_out]
    write_left_out(folder / f"{record}.left_out.txt", left_out)
    with exclusive(folder):
        _put_on_card(path, load_card(path), tasks, classes, built, train, options, append)
    twins = sum(_twins(task) for task in tasks) if test else 0
    return MadeStream(path, built[0], left_out, faults, twins)


Built = tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]
"""Entries of tasks, hashes of shards, and their counts."""


def _workers(sources: Sequence[Source], options: MakeOptions) -> int:
    """Return how many processes are worth the seconds that they take to start."""
    total = sum(len(piece) for source in sources for piece in source.pieces)
    return min(options.workers, 1 + total // _WORTH)


def _card_path(folder: Path, options: MakeOptions, append: bool, card: Path | None) -> Path:
    path = (card or find_card(folder)) if append else folder / f"{options.name}.yaml"
    if append and not path.is_file():
        raise FileNotFoundError(f"there is no card {path} to append to")
    if path.parent.resolve() != folder.resolve():
        raise ValueError(f"card {path} is not in {folder}: shards lie beside their card")
    return path


def _expect_good(looked: Sequence[Looked], options: MakeOptions) -> int:
    """Return how many records cannot be used, if that is allowed."""
    faults = sum(one.faults for one in looked)
    if not faults or options.skip_bad:
        return faults
    listed = [fault for one in looked for fault in one.left_out][:_NAMED]
    lines = "".join(f"\n  - {fault}" for fault in listed)
    more = f"\n  - and {faults - len(listed):,} more" if faults > len(listed) else ""
    where = " and ".join(one.source.where for one in looked)
    if all(str(fault).endswith("is missing") for fault in listed):
        more += "\nPicture paths start from the folder of --images: is it the right one?"
    raise ValueError(
        f"{faults:,} of {sum(map(len, looked)):,} samples in {where} cannot be used: correct them, "
        f"or give --skip_bad to leave them out:{lines}{more}"
    )


def _write_shards(
    folder: Path,
    record: str,
    tasks: Sequence[DealtTask],
    recipe: Mapping[str, Any],
    options: MakeOptions,
    progress: Told,
    processes: Processes,
) -> Built:
    folder.mkdir(parents=True, exist_ok=True)
    expect_free(folder, record, recipe)
    planned = [
        plan_task(stem, task, options)
        for stem, task in zip(stems([task.name for task in tasks]), tasks, strict=True)
    ]
    plans = [plan for entry in planned for plan in (*entry.train, *entry.test)]
    hashes: dict[str, str] = {}

    def note(made: Mapping[str, str]) -> Mapping[str, str]:
        hashes.update(made)
        return {}

    build_stream(
        folder,
        record,
        plans,
        (),
        note,
        recipe=recipe,
        progress=lambda done, total: progress("writing shards", done, total),
        spread=processes.spread,
    )
    return [one.entry for one in planned], hashes, {plan.name: plan.count for plan in plans}


def _recipe(
    looked: Sequence[Looked],
    options: MakeOptions,
    tasks: Sequence[DealtTask],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return what the shards' bytes depend on."""
    labels = [[task.name, [[name, classes.index(name)] for name in task.classes]] for task in tasks]
    free = ("workers", "skip_bad", "licence", "scorer", "scenario")
    return {
        "number": RECIPE,
        "options": {key: value for key, value in asdict(options).items() if key not in free},
        "sources": [one.digest for one in looked],
        "left_out": [one.faults for one in looked],
        # The numbers of classes follow from the card that the tasks are put on.
        "tasks": hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
    }


def _put_on_card(
    path: Path,
    content: dict[str, Any],
    tasks: Sequence[DealtTask],
    classes: Sequence[str],
    built: Built,
    train: Source,
    options: MakeOptions,
    append: bool,
) -> None:
    entries, hashes, counts = built
    for entry in entries:
        entry["kind"] = train.kind
        if train.kind == "answer":
            entry["scorer"] = options.scorer
        if append and options.licence:
            entry["description"] = f"licence: {options.licence}"
    if not content:
        content = {
            "name": options.name,
            "scenario": options.scenario or _scenario(tasks),
            "kind": train.kind,
            "stage": "cft",
            **({"licence": options.licence} if options.licence else {}),
            "source": Path(train.where).name,
            **({"templates": [_TEMPLATE]} if train.kind == "classify" else {}),
        }
    content.setdefault("tasks", [])
    if options.scenario not in (None, content["scenario"]):
        raise ValueError(
            f"--scenario is {options.scenario} and card {path} says {content['scenario']}: leave "
            "it out, or change the card"
        )
    if classes:
        content["classes"] = list(classes)
    made = f"Made by: mmcl data make {Path(train.where).name}"
    save_card(path, put_tasks(content, entries, hashes, counts), [made])


def _scenario(tasks: Sequence[DealtTask]) -> str:
    """Tasks with classes of their own are told apart by nobody at test; else nothing is new."""
    named = [name for task in tasks for name in task.classes]
    return "class" if named and len(set(named)) == len(named) else "domain"


def _twins(task: DealtTask) -> int:
    learned = task.train.looked.content[task.train.numbers]
    scored = task.test.looked.content[task.test.numbers]
    return int(np.isin(scored, learned).sum())
