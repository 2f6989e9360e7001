"""Public continual instruction-tuning benchmarks, built from their published folder layout.

A set is described by a file in `sets/`: the order of its tasks, paths of its files, scorers,
licenses, and where to get it. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mmcl.data.convert.convert import ConvertedTasks, convert_tasks
from mmcl.data.convert.inputs.llava_input import ImageFolders, open_instructions
from mmcl.data.convert.record import ConvertOptions, InputData, ProgressFn
from mmcl.data.remote.file_lock import file_lock
from mmcl.data.shards.stream_writer import load_card, put_tasks, save_card

FOLDER = Path(__file__).parent / "sets"
_CARD_DEFAULTS = {"scenario": "domain", "task_type": "instruction", "stage": "cft"}
_TOP_KEYS = ("description", "license", "source", "citation", "notes")
_SET_KEYS = {"name", "summary", "roots", "get", "tasks", *_TOP_KEYS}


@dataclass(frozen=True)
class SetTask:
    """Task of a set description; each path is a list, of which the first that exists is used.

    Attributes:
        name: of the task.
        train: training instruction file.
        test: test instruction file.
        images: folders from which image paths start.
        test_images: the same for the test file; empty = as ``images``.
        references: file with all reference answers of the test questions; empty = none.
        needs: image folders that must exist.
        scorer: of the answers.
        max_new_tokens: of an answer.
        answer_field: key of the right answer in the test file.
        get: where to get it, if this differs from the whole set.
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
    """Description of a public set.

    Attributes:
        name: of the stream.
        summary: one line.
        roots: folders below the source in which the set may be.
        get: where to get it.
        tasks: in their published order.
        top: keys that are copied to the card.
    """

    name: str
    summary: str
    roots: tuple[str, ...]
    get: str
    tasks: tuple[SetTask, ...]
    top: Mapping[str, Any] = field(default_factory=dict)


def list_sets() -> list[str]:
    """Return the names of the public sets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_set(name: str) -> PublicSet:
    """Read a set description.

    Args:
        name: of a public set, or the path of your own description.

    Raises:
        ValueError: if there is no set of this name, or its description has an error.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no set {name!r}: choose one of {', '.join(list_sets())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = set(raw) - _SET_KEYS
        tasks = tuple(_task(entry) for entry in raw["tasks"])
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}, known: {sorted(_SET_KEYS)}")
        return PublicSet(
            raw["name"], raw.get("summary", ""), _paths(raw.get("roots", ".")),
            raw.get("get", ""), tasks, {key: raw[key] for key in _TOP_KEYS if key in raw},
        )  # fmt: skip
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not describe a set ({type(error).__name__}: {reason})"
        ) from None


def build_set(
    described: PublicSet,
    source: Path,
    folder: Path,
    *,
    tasks: Sequence[str] = (),
    progress: ProgressFn = lambda *_: None,
    **options: Any,
) -> tuple[Path, list[ConvertedTasks]]:
    """Build a set from the downloaded files.

    The card lists the chosen tasks in their published order, then tasks that were appended to it.
    The same call resumes after a kill.

    Args:
        described: the set.
        source: folder into which it was downloaded.
        folder: of shards and card.
        tasks: names of those to build; empty = all.
        progress: called with (what is done, samples done, samples in all).
        options: of `ConvertOptions`, such as ``seed`` and ``max_samples``, the same for each task.

    Returns:
        The path of the card, and what was converted for each task.

    Raises:
        FileNotFoundError: one line for every missing file and folder, with where to get it.
        ValueError: if a task is unknown, or as `convert` says.
    """
    chosen = _chosen(described, tasks)
    task_options = [
        ConvertOptions(task.name, scorer=task.scorer, max_new_tokens=task.max_new_tokens, **options)
        for task in chosen
    ]
    inputs = locate(replace(described, tasks=tuple(chosen)), source)
    path = folder / f"{described.name}.yaml"
    load_card(path)
    converted = [
        convert_tasks(train, test, folder, own, progress=progress)
        for (train, test), own in zip(inputs, task_options, strict=True)
    ]
    with file_lock(folder):
        content = _put_on_card(described, load_card(path), converted)
        save_card(path, content, [f"Made by: mmcl data build {described.name} --source ..."])
    return path, converted


def _put_on_card(
    described: PublicSet, old: Mapping[str, Any], converted: Sequence[ConvertedTasks]
) -> dict[str, Any]:
    """Return the card with the set's tasks, then those that were appended to the old card."""
    own = {task.name for task in described.tasks}
    appended = [entry for entry in old.get("tasks", ()) if entry["name"] not in own]
    content: dict[str, Any] = {"name": described.name, **described.top, **_CARD_DEFAULTS}
    for one in converted:
        content = put_tasks(content, one.entries, one.hashes, one.counts)
    kept = {shard for entry in appended for split in ("train", "test") for shard in entry[split]}
    content["tasks"] += appended
    for key in ("hashes", "counts"):
        content[key] |= {k: v for k, v in (old.get(key) or {}).items() if k in kept}
    for key in set(old) - {*content, *described.top}:
        content[key] = old[key]
    return content


def locate(described: PublicSet, source: Path) -> list[tuple[InputData, InputData]]:
    """Find and open all files of a set.

    Args:
        described: the set, with the tasks that are wanted.
        source: folder into which it was downloaded.

    Returns:
        Input of training samples and input of test samples, for each task.

    Raises:
        FileNotFoundError: one line for every missing file and folder.
        ValueError: if an instruction file cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give the downloaded set as --source")
    bases = [source / root for root in described.roots]
    # The set may have been unpacked into any of these: take the one with most of its files.
    base = min(bases, key=lambda root: len(list(_missing(described, root))))
    missing = [f"{what} (get it: {get})" for what, get in _missing(described, base)]
    if missing:
        listed = "\n".join(f"  - {line}" for line in missing)
        count = "1 thing is" if len(missing) == 1 else f"{len(missing)} things are"
        raise FileNotFoundError(f"{described.name}: {count} missing in {base}:\n{listed}")
    return [_inputs(task, base) for task in described.tasks]


def _inputs(task: SetTask, base: Path) -> tuple[InputData, InputData]:
    train = open_instructions(_first(base, task.train), _folders(base, task.images))
    test = open_instructions(
        _first(base, task.test),
        _folders(base, task.test_images or task.images),
        task.answer_field,
        _first(base, task.references) if task.references else None,
    )
    return train, test


def _missing(described: PublicSet, base: Path) -> Iterator[tuple[str, str]]:
    for task in described.tasks:
        get = task.get or described.get
        for key in ("train", "test", "references"):
            paths = getattr(task, key)
            if paths and not any((base / path).is_file() for path in paths):
                yield f"task '{task.name}': file {' or '.join(paths)}", get
        for folders in filter(None, (task.images, task.test_images)):
            for needed in task.needs:
                if not any((base / folder / needed).is_dir() for folder in folders):
                    where = " or ".join(str(Path(folder) / needed) for folder in folders)
                    yield f"task '{task.name}': image folder {where}", get


def _first(base: Path, paths: Sequence[str]) -> Path:
    return next(base / path for path in paths if (base / path).is_file())


def _folders(base: Path, paths: Sequence[str]) -> ImageFolders:
    return ImageFolders(tuple(base / path for path in paths if (base / path).is_dir()))


def _chosen(described: PublicSet, names: Sequence[str]) -> list[SetTask]:
    known = [task.name for task in described.tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{described.name} has no task {unknown[0]!r}: it has {', '.join(known)}")
    return [task for task in described.tasks if not names or task.name in names]


def _task(raw: Any) -> SetTask:
    unknown = set(raw) - {each.name for each in fields(SetTask)}
    if unknown:
        raise ValueError(f"task {raw.get('name')!r} has unknown keys {sorted(unknown)}")
    keys = ("train", "test", "images", "test_images", "references", "needs")
    return SetTask(**{**raw, **{key: _paths(raw.get(key, ())) for key in keys}})


def _paths(raw: Any) -> tuple[str, ...]:
    return (raw,) if isinstance(raw, str) else tuple(str(path) for path in raw)
