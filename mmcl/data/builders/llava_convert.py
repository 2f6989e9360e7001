"""From one LLaVA-style data set to a stream, or to one more task of a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.core.atomic import write_atomic
from mmcl.data.builders.card import card_counts, card_task
from mmcl.data.builders.llava_cards import TOP, find_card, load_card, put_tasks, save_card
from mmcl.data.builders.llava_survey import Told, survey
from mmcl.data.builders.llava_task import LeftOut, LlavaTask, Options
from mmcl.data.builders.shards import build_stream
from mmcl.data.lock import exclusive


@dataclass(frozen=True)
class BuiltTask:
    """A task whose shards are written.

    Attributes:
        entry: what a card says of it.
        hashes: shard -> sha256.
        counts: shard -> samples.
        left_out: samples that could not be used.
    """

    entry: dict[str, Any]
    hashes: Mapping[str, str]
    counts: Mapping[str, int]
    left_out: Sequence[LeftOut]


def convert(
    task: LlavaTask,
    folder: Path,
    options: Options = Options(),  # noqa: B008 (frozen)
    *,
    append: bool = False,
    card: Path | None = None,
    licence: str = "",
    progress: Told = lambda *_: None,
) -> tuple[Path, BuiltTask]:
    """Write a task's shards and put it on a card.

    The same call after a kill goes on where it stopped; after the end it changes nothing.

    Args:
        task: what it is made from.
        folder: where shards and card lie; made if need be.
        options: seed, shares and sizes.
        append: put the task at the end of a card that is there; else the card is ``<name>.yaml``.
        card: to append to; None takes the only one of the folder.
        licence: of the data, for the card.
        progress: told (what is done, samples done, samples in all).

    Returns:
        The path of the card, and what was built.

    Raises:
        FileNotFoundError: if a file, or the card to append to, is missing.
        ValueError: as `survey` says; or if a card of the folder uses shards of this name that were
            made from other files.
    """
    path = (card or find_card(folder)) if append else folder / f"{task.name}.yaml"
    if append and not path.is_file():
        raise FileNotFoundError(f"there is no card {path} to append to")
    if path.parent.resolve() != folder.resolve():
        raise ValueError(f"card {path} is not in {folder}: shards lie beside their card")
    load_card(path)
    built = build_task(task, folder, options, progress=progress)
    with exclusive(folder):
        content = load_card(path) or {"name": task.name, **TOP}
        if licence and not append:
            content["licence"] = licence
        elif licence:
            built.entry["description"] = f"licence: {licence}"
        content.setdefault("tasks", [])
        made = f"Task {task.name} made by: mmcl data convert (from {_sources(task)})"
        save_card(path, put_tasks(content, [built.entry], built.hashes, built.counts), [made])
    return path, built


def build_task(
    task: LlavaTask, folder: Path, options: Options, *, progress: Told = lambda *_: None
) -> BuiltTask:
    """Write the shards of a task, and the list of what was left out beside them.

    Args:
        task: what it is made from.
        folder: where they will lie.
        options: seed, shares and sizes.
        progress: told (what is done, samples done, samples in all).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: as `survey` says, or if a card uses shards of this name from other files.
    """
    found = survey(task, options, progress)
    folder.mkdir(parents=True, exist_ok=True)
    expect_free(folder, task.name, found.recipe)
    hashes: dict[str, str] = {}

    def note(made: Mapping[str, str]) -> Mapping[str, str]:
        hashes.update(made)
        return {}

    build_stream(
        folder,
        task.name,
        [*found.train, *found.test],
        (),
        note,
        recipe=found.recipe,
        progress=lambda done, total: progress(f"writing {task.name}", done, total),
    )
    write_left_out(folder / f"{task.name}.left_out.txt", found.left_out)
    told: dict[str, Any] = {"scorer": task.scorer}
    if task.max_new_tokens is not None:
        told["max_new_tokens"] = task.max_new_tokens
    entry = card_task(task.name, found.train, found.test, **told)
    counts = card_counts([*found.train, *found.test])
    return BuiltTask(entry, hashes, counts, found.left_out)


def _sources(task: LlavaTask) -> str:
    files = (task.train, task.test, task.references)
    return ", ".join(path.name for path in files if path is not None)


def expect_free(folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse to overwrite shards that a card uses and that were made from something else.

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
        text = card.read_text(encoding="utf-8", errors="replace")
        if any(shard in text for shard in shards):
            raise ValueError(
                f"task '{name}' in {folder} was made from other files or options and card "
                f"{card.name} uses it: choose another --out or task name, or delete "
                f"{name}.build.json to have it made anew"
            )


def write_left_out(path: Path, left_out: Sequence[LeftOut]) -> None:
    """Write a line for every sample that was left out; no file if there is none."""
    if left_out:
        write_atomic(path, "".join(f"{fault}\n" for fault in left_out))
    else:
        path.unlink(missing_ok=True)
