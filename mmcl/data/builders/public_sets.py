"""Public continual instruction-tuning sets in the folder layout in which they are published.

A set is described by a file in `sets/`: the order of its tasks, where each file may lie, what
judges the answers, licences, and where everything is to be had. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mmcl.data.builders.llava_cards import TOP, load_card, put_tasks, save_card
from mmcl.data.builders.llava_convert import BuiltTask, build_task
from mmcl.data.builders.llava_survey import Told
from mmcl.data.builders.llava_task import LlavaTask, Options
from mmcl.data.lock import exclusive

FOLDER = Path(__file__).parent / "sets"
_TOP_KEYS = ("description", "licence", "source", "citation", "notes")
_SET_KEYS = {"name", "summary", "roots", "get", "tasks", *_TOP_KEYS}
_TASK_KEYS = {
    "name", "train", "test", "references", "images", "test_images", "needs", "scorer",
    "max_new_tokens", "answer_field", "get",
}  # fmt: skip


@dataclass(frozen=True)
class SetTask:
    """One task of a description; every path is a list of places, the first that exists counts.

    Attributes:
        name: of the task.
        train: instruction file to learn from.
        test: instruction file to score on.
        images: folders from which image paths start.
        test_images: the same for the test file; empty = as ``images``.
        references: file with all right answers of the test questions; empty = none.
        needs: picture folders that must be there.
        scorer: what judges the answers.
        max_new_tokens: of an answer.
        answer_field: of the test file.
        get: where to get it, where this differs from the whole set.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    images: tuple[str, ...]
    test_images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    scorer: str = "exact"
    max_new_tokens: int | None = None
    answer_field: str = "answer"
    get: str = ""


@dataclass(frozen=True)
class PublicSet:
    """A description of a set.

    Attributes:
        name: of the stream.
        summary: one line.
        roots: folders below the source in which the set may lie.
        get: where to get it.
        tasks: in their published order.
        top: what goes onto the card as it is.
    """

    name: str
    summary: str
    roots: tuple[str, ...]
    get: str
    tasks: tuple[SetTask, ...]
    top: Mapping[str, Any] = field(default_factory=dict)


def list_sets() -> list[str]:
    """Return the names of the sets that are described here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_set(name: str) -> PublicSet:
    """Read a description.

    Args:
        name: of a set that is described here, or the path of a description of one's own.

    Raises:
        ValueError: if there is none of this name, or it is faulty.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no set {name!r} is described: choose one of {', '.join(list_sets())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = set(raw) - _SET_KEYS
        tasks = tuple(_task(entry) for entry in raw["tasks"])
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}, known: {sorted(_SET_KEYS)}")
        return PublicSet(
            raw["name"], raw.get("summary", ""), _places(raw.get("roots", ".")),
            raw.get("get", ""), tasks, {key: raw[key] for key in _TOP_KEYS if key in raw},
        )  # fmt: skip
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not describe a set ({type(error).__name__}: {reason})"
        ) from (None)


def build_set(
    described: PublicSet,
    source: Path,
    folder: Path,
    options: Options = Options(),  # noqa: B008 (frozen)
    *,
    tasks: Sequence[str] = (),
    progress: Told = lambda *_: None,
) -> tuple[Path, list[BuiltTask]]:
    """Build a set from what was downloaded.

    The card lists the chosen tasks in their published order, and behind them what somebody
    appended. The same call after a kill goes on where it stopped.

    Args:
        described: the set.
        source: folder into which it was downloaded.
        folder: where shards and card will lie.
        options: seed, limit, sizes.
        tasks: names of those to build; empty = all.
        progress: told (what is done, samples done, samples in all).

    Returns:
        The path of the card, and what was built.

    Raises:
        FileNotFoundError: one line for every file and folder that is missing, with where to get it.
        ValueError: if a task is unknown, or as `survey` says.
    """
    chosen = _chosen(described, tasks)
    made_from = locate(replace(described, tasks=tuple(chosen)), source)
    path = folder / f"{described.name}.yaml"
    load_card(path)
    built = [build_task(task, folder, options, progress=progress) for task in made_from]
    own = {task.name for task in described.tasks}
    with exclusive(folder):
        old = load_card(path)
        added = [entry for entry in old.get("tasks", ()) if entry["name"] not in own]
        content = {"name": described.name, **described.top, **TOP}
        counts = {shard: count for one in built for shard, count in one.counts.items()}
        content = put_tasks(content, [one.entry for one in built], _hashes(built), counts)
        kept = {shard for entry in added for part in ("train", "test") for shard in entry[part]}
        content["tasks"] += added
        for key in ("hashes", "counts"):
            content[key] |= {k: v for k, v in (old.get(key) or {}).items() if k in kept}
        for key in set(old) - {*content, *described.top}:
            content[key] = old[key]
        save_card(path, content, [f"Made by: mmcl data build {described.name} --source ..."])
    return path, built


def locate(described: PublicSet, source: Path) -> list[LlavaTask]:
    """Find all files of a set.

    Args:
        described: the set, with the tasks that are wanted.
        source: folder into which it was downloaded.

    Raises:
        FileNotFoundError: one line for everything that is missing.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give the downloaded set as --source")
    bases = [source / root for root in described.roots]
    # The folder may have been unpacked into any of these; the one with most of the set is meant.
    base = min(bases, key=lambda root: len(list(_missing(described, root))))
    missing = [f"{what} (get it: {get})" for what, get in _missing(described, base)]
    if missing:
        listed = "\n".join(f"  - {line}" for line in missing)
        count = "1 thing is" if len(missing) == 1 else f"{len(missing)} things are"
        raise FileNotFoundError(f"{described.name}: {count} missing in {base}:\n{listed}")
    return [
        LlavaTask(
            name=task.name,
            train=_first(base, task.train),
            images=_folders(base, task.images),
            test=_first(base, task.test),
            test_images=_folders(base, task.test_images),
            references=_first(base, task.references) if task.references else None,
            answer_field=task.answer_field,
            scorer=task.scorer,
            max_new_tokens=task.max_new_tokens,
        )
        for task in described.tasks
    ]


def _missing(described: PublicSet, base: Path) -> Iterator[tuple[str, str]]:
    for task in described.tasks:
        get = task.get or described.get
        for part in ("train", "test", "references"):
            places = getattr(task, part)
            if places and not any((base / place).is_file() for place in places):
                yield f"task '{task.name}': file {' or '.join(places)}", get
        for folders in filter(None, (task.images, task.test_images)):
            for need in task.needs:
                if not any((base / folder / need).is_dir() for folder in folders):
                    where = " or ".join(str(Path(folder) / need) for folder in folders)
                    yield f"task '{task.name}': picture folder {where}", get


def _first(base: Path, places: Sequence[str]) -> Path:
    return next(base / place for place in places if (base / place).is_file())


def _folders(base: Path, places: Sequence[str]) -> tuple[Path, ...]:
    return tuple(base / place for place in places if (base / place).is_dir())


def _chosen(described: PublicSet, names: Sequence[str]) -> list[SetTask]:
    known = [task.name for task in described.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{described.name} has no task {unknown[0]!r}: it has {', '.join(known)}")
    return [task for task in described.tasks if not names or task.name in names]


def _hashes(built: Sequence[BuiltTask]) -> dict[str, str]:
    return {shard: sha256 for one in built for shard, sha256 in one.hashes.items()}


def _task(raw: Any) -> SetTask:
    unknown = set(raw) - _TASK_KEYS
    if unknown:
        raise ValueError(f"task {raw.get('name')!r} has unknown keys {sorted(unknown)}")
    places = ("train", "test", "images", "test_images", "references", "needs")
    return SetTask(**{**raw, **{key: _places(raw.get(key, ())) for key in places}})


def _places(raw: Any) -> tuple[str, ...]:
    return (raw,) if isinstance(raw, str) else tuple(str(place) for place in raw)
