"""Looking through a task's instruction files and pictures, and planning its shards.

The first pass reads every record and the ends of every picture, so that faults are known, counted
and named before anything is written. The second pass writes shards of bounded size; it holds one
instruction file and one picture at a time.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.data.builders.llava_json import LlavaSample, read_records, read_sample
from mmcl.data.builders.llava_pictures import Pictures, inner_path
from mmcl.data.builders.llava_references import References, read_references
from mmcl.data.builders.llava_task import LeftOut, LlavaTask, Options
from mmcl.data.builders.shards import Sample, ShardPlan
from mmcl.data.dialogue import read_dialogue
from mmcl.data.faults import BadSample
from mmcl.data.source import sha256_of

RECIPE = 1  # counts up whenever the same files would give other bytes
_FORMS = {
    "option": re.compile(r"\W*[A-Za-z]\W*"),
    "box": re.compile(
        r"[^\d]*(?:\d+(?:\.\d*)?|\.\d+)(?:\s*,\s*-?(?:\d+(?:\.\d*)?|\.\d+)){3}[^\d]*"
    ),
}
"""What right answers look like where a scorer takes no others; the rest takes any text."""
_BLOCK = 512
_NAMED = 10

Told = Callable[[str, int, int], None]
"""Called with (what is done, samples done, samples in all)."""


@dataclass(frozen=True)
class Surveyed:
    """A task after its first pass.

    Attributes:
        train: plans of its training shards.
        test: plans of its test shards.
        left_out: what cannot be used.
        recipe: everything its bytes depend on.
    """

    train: list[ShardPlan]
    test: list[ShardPlan]
    left_out: list[LeftOut]
    recipe: dict[str, Any]


@dataclass
class _File:
    """An instruction file with its pictures, and what the first pass found in it."""

    path: Path
    pictures: Pictures
    references: References | None = None
    answer_field: str = "answer"
    scorer: str = ""
    sizes: dict[int, int] = field(default_factory=dict)
    shown: dict[int, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    digest: str = ""
    opened: list[Any] | None = None

    def records(self) -> list[Any]:
        """Return the file's records, read again where they were let go."""
        if self.opened is None:
            self.opened = read_records(self.path)
        return self.opened

    def sample(self, position: int) -> LlavaSample:
        raw = self.records()[position]
        answers = [] if self.references is None else self.references(position, raw)
        if self.references is not None and not answers:
            raise BadSample("its right answers are not in the file of references")
        return read_sample(raw, answers, self.answer_field)

    def judged(self, position: int) -> LlavaSample:
        """Return a sample whose right answers its scorer can use.

        Raises:
            BadSample: if it has a fault, or an answer is not of the scorer's form.
        """
        sample = self.sample(position)
        form = _FORMS.get(self.scorer)
        if form is not None:
            for answer in read_dialogue(sample.data).answers:
                if not form.fullmatch(answer):
                    raise BadSample(
                        f"its right answer is {answer[:40]!r}, which the scorer '{self.scorer}' "
                        "cannot use"
                    )
        return sample


def survey(task: LlavaTask, options: Options, told: Told = lambda *_: None) -> Surveyed:
    """Look through a task's files.

    Args:
        task: what it is made from.
        options: how.
        told: called after every sample.

    Raises:
        FileNotFoundError: if an instruction file is missing.
        ValueError: if a file cannot be read, more than ``max_faults`` of its samples are unusable,
            or nothing would be left to learn from or to test on.
    """
    train = _File(task.train, Pictures(task.images))
    _look_through(train, task.name, options, told)
    if task.test is None:
        test, held = train, _held_out(train, options)
    else:
        references = None if task.references is None else read_references(task.references)
        pictures = Pictures(task.test_images or task.images)
        test = _File(task.test, pictures, references, task.answer_field, task.scorer)
        _look_through(test, task.name, options, told)
        held = set(test.sizes)
    kept = [one for one in train.sizes if test is not train or one not in held]
    tested = [one for one in test.sizes if one in held]
    for part, file, positions in (("learn from", train, kept), ("test on", test, tested)):
        if not positions:
            raise ValueError(f"task '{task.name}' has nothing to {part} in {file.path}")
    files = [train] if test is train else [train, test]
    return Surveyed(
        _plans(f"{task.name}-train", train, kept, options),
        _plans(f"{task.name}-test", test, tested, options),
        [one for file in files for one in file.left_out],
        _recipe(task, options, files),
    )


def _look_through(file: _File, task: str, options: Options, told: Told) -> None:
    records = file.records()
    chosen = _chosen(len(records), options, f"{file.path.name}/{task}")
    digest = hashlib.sha256()
    for done, position in enumerate(chosen, start=1):
        try:
            sample = file.judged(position)
            size = _member_size(len(sample.data))
            if sample.picture is not None:
                picture = file.pictures.find(sample.picture)
                size += _member_size(picture.size)
                file.shown[position] = inner_path(sample.picture)
                digest.update(f"{position} {picture.extension} {picture.size}\n".encode())
            file.sizes[position] = size
        except BadSample as fault:
            name = _name(records[position])
            file.left_out.append(LeftOut(file.path.name, position, name, str(fault)))
        told(f"looking through {task} ({file.path.name})", done, len(chosen))
    file.digest, file.opened = digest.hexdigest(), None
    _expect_few(task, file, len(chosen), options.max_faults)


def _chosen(count: int, options: Options, group: str) -> Sequence[int]:
    """Return the positions that the limit leaves, in the file's order."""
    if options.limit is None:
        return range(count)
    share = isinstance(options.limit, float) and options.limit <= 1
    kept = max(1, round(options.limit * count)) if share else int(options.limit)
    drawn = np.random.default_rng([options.seed, zlib.crc32(group.encode())]).permutation(count)
    return sorted(drawn[:kept].tolist())


def _held_out(file: _File, options: Options) -> set[int]:
    """Draw pictures, with all their samples, until the share is reached; text stands for itself."""
    groups: dict[str, list[int]] = {}
    for position in file.sizes:
        groups.setdefault(file.shown.get(position, f"/{position}"), []).append(position)
    order = sorted(groups, key=lambda group: _mixed(f"{options.seed}/{group}"))
    wanted = max(1, round(options.hold_out * len(file.sizes)))
    held: set[int] = set()
    for group in order[:-1]:
        if len(held) >= wanted:
            break
        held.update(groups[group])
    return held


def _mixed(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _name(raw: Any) -> str:
    return str(raw.get("id", raw.get("question_id", ""))) if isinstance(raw, dict) else ""


def _expect_few(task: str, file: _File, count: int, max_faults: float) -> None:
    faults = file.left_out
    if len(faults) <= max_faults * count:
        return
    listed = "\n".join(f"  - {fault}" for fault in faults[:_NAMED])
    more = f"\n  - and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    raise ValueError(
        f"task '{task}': {len(faults)} of {count} samples in {file.path} cannot be used, more than "
        f"max_faults {max_faults} allows; correct them, or give --max_faults "
        f"{min(1.0, len(faults) / count + 0.005):.2f} to leave them out:\n{listed}{more}"
    )


def _member_size(content: int) -> int:
    """Return the bytes of a tar member, header and padding included."""
    return _BLOCK + -(-content // _BLOCK) * _BLOCK


def _plans(stem: str, file: _File, positions: Sequence[int], options: Options) -> list[ShardPlan]:
    """Cut the samples into shards; a new one starts where the next sample would be too much."""
    cuts, filled = [0], 0
    for place, position in enumerate(positions):
        if filled and filled + file.sizes[position] > options.shard_bytes:
            cuts.append(place)
            filled = 0
        filled += file.sizes[position]
    cuts.append(len(positions))
    plans = []
    for number, (first, last) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        own = positions[first:last]
        is_last = last == len(positions)
        samples = partial(_samples, stem, file, own, is_last)
        plans.append(ShardPlan(f"{stem}-{number:05d}.tar", len(own), samples))
    return plans


def _samples(stem: str, file: _File, positions: Sequence[int], is_last: bool) -> Iterator[Sample]:
    for position in positions:
        sample = file.sample(position)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", sample.name)[:40].strip("-")
        key = f"{stem}-{position:07d}" + (f"-{name}" if name else "")
        members: dict[str, Any] = {"__key__": key, "json": sample.data}
        if sample.picture is not None:
            picture = file.pictures.find(sample.picture)
            members[picture.extension] = Path(picture.path).read_bytes()
        yield members
    if is_last:
        file.opened = None


def _recipe(task: LlavaTask, options: Options, files: Sequence[_File]) -> dict[str, Any]:
    """Return what the shards' bytes depend on; of pictures their sizes, not every byte."""
    return {
        "number": RECIPE,
        "task": task.name,
        "options": {key: value for key, value in asdict(options).items() if key != "max_faults"},
        "files": [
            {"name": file.path.name, "sha256": sha256_of(file.path), "pictures": file.digest,
             "left_out": len(file.left_out)}
            for file in files
        ],
        "references": "" if task.references is None else sha256_of(task.references),
        "answer_field": task.answer_field,
    }  # fmt: skip
