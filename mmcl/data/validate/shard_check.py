"""Validation of one shard: every sample decoded as in training, its errors and counts as arrays."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mmcl.core import Conversation, Pixels, ProcessedSample, Task, each_image
from mmcl.data.batches.collate import make_example
from mmcl.data.image_formats import image_members
from mmcl.data.shards.llava_json import expect_scorable
from mmcl.data.shards.open_stream import OpenOptions, open_shard, task_type_error
from mmcl.data.shards.reader import Reader, Shard, evenly_spaced
from mmcl.data.shards.sample_fields import SampleFields
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import (
    NAMED,
    BadSample,
    BadShard,
    IntArray,
    Sample,
    Split,
    hash_bytes,
)

Fingerprints = npt.NDArray[np.uint64]
"""(n, 3): two halves of an image's hash (0 without one), then the hash of its questions (0 without
any: classes and captions). A sample that cannot be read has three zeros."""
BadSamples = tuple[int, list[str]]
"""How many bad samples of one sort there are, and the first ``NAMED`` of them in full."""
_SORTS = 40
_ANSWERS, _LONGEST_ANSWER, _ANSWERS_KEPT = 500, 120, 20_000
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


def sample_fingerprint(image: bytes, question: bytes) -> tuple[int, int, int]:
    """Return the fingerprint, a row of ``Fingerprints``, of images and all questions about them."""
    halves = hash_bytes(image, 16) if image else 0
    return halves >> 64, halves & (1 << 64) - 1, hash_bytes(question) if question else 0


@dataclass(frozen=True)
class ShardJob:
    """Job of validating one shard, or one of several equal chunks of it.

    Attributes:
        task: whose samples it holds.
        split: train or test split of the task.
        name: of the shard as the card has it.
        url: of the shard.
        options: how it is opened.
        max_samples: 200 = decode at most 200 samples, 0.02 = that fraction of them; None = all.
        max_pixels: of the largest image that is decoded.
        by_pixels: compare images by their pixels instead of their files.
        chunk: (k, m): decode only chunk k of m equal ones; chunk 0 also verifies the whole shard.
    """

    task: Task
    split: Split
    name: str
    url: str
    options: OpenOptions
    max_samples: float | int | None
    max_pixels: int
    by_pixels: bool
    chunk: tuple[int, int] = (0, 1)

    def indices(self, count: int) -> IntArray:
        """Return the indices of the samples to decode in a shard of ``count``."""
        number, chunks = self.chunk
        indices = evenly_spaced(count, self.max_samples)
        start, end = (len(indices) * edge // chunks for edge in (number, number + 1))
        return indices[start:end]


@dataclass
class SampleCounts:
    """Counts and errors of decoded samples, of a shard or of a whole split.

    Attributes:
        size_bytes: of the tar files; of samples in options, those that were decoded.
        labels: samples of each class of the task; none where samples have no class.
        sizes: (width, height) of images -> how many.
        lengths: characters of a text or dialogue -> how many.
        answers: right answer -> how many, the most frequent ones.
        bad: sort of error -> samples that have it.
    """

    size_bytes: int = 0
    labels: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    bad: dict[str, BadSamples] = field(default_factory=dict)

    def add_bad(self, sort: str, lines: list[str], count: int = 1) -> None:
        """Add bad samples of one sort, ``lines`` being the first of them."""
        before, named = self.bad.get(sort, (0, []))
        self.bad[sort] = before + count, (named + lines)[:NAMED]

    def merge(self, other: SampleCounts) -> None:
        """Add the counts of the next shard."""
        self.size_bytes += other.size_bytes
        self.labels = other.labels + (self.labels if len(self.labels) else 0)
        self.sizes.update(other.sizes)
        self.lengths.update(other.lengths)
        self.answers.update(other.answers)
        if len(self.answers) > _ANSWERS_KEPT:
            self.answers = Counter(dict(self.answers.most_common(_ANSWERS_KEPT // 2)))
        for sort, (count, lines) in other.bad.items():
            self.add_bad(sort, lines, count)


@dataclass
class ShardFindings:
    """Result of validating a shard of n samples, k of which were decoded.

    Attributes:
        error: why the shard as a whole cannot be used, "" if it can.
        samples: n; 0 where another chunk of the shard counts them.
        in_shard: n.
        keys: (n,) hashes of the keys.
        fingerprints: (k, 3) fingerprints; zeros where a sample cannot be read.
        contents: (k,) hashes of everything in a sample, 0 where it cannot be read.
        counts: of the samples that were decoded.
        members: extension -> how often it occurs in the shard.
        used: members that the task uses.
        is_sorted: whether the members of every sample are adjacent.
    """

    error: str = ""
    samples: int = 0
    in_shard: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    fingerprints: Fingerprints = field(default_factory=lambda: np.zeros((0, 3), np.uint64))
    contents: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    counts: SampleCounts = field(default_factory=SampleCounts)
    members: dict[str, int] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    is_sorted: bool = True


def check_shard(job: ShardJob) -> ShardFindings:
    """Validate a shard and decode its samples as training does.

    Returns:
        the result; for a shard that cannot be used, ``error`` and nothing else.
    """
    is_first = job.chunk[0] == 0
    try:
        shard = open_shard(job.name, job.url, job.options, verify_hash=is_first)
        return _scan(job, shard, is_first)
    except BadShard as error:
        return ShardFindings(error=str(error))
    except OSError as error:
        return ShardFindings(error=f"cannot be read ({error})")
    except RuntimeError as error:
        return ShardFindings(error=f"could not be read to its end: {error}")


@dataclass(frozen=True)
class DecodedSample:
    """Decoded sample, as training would take it.

    Attributes:
        pixels: (3, H, W) uint8, several of them, or None.
        text: caption or dialogue, None where only a class counts.
        label: column of the class, or IGNORE_INDEX.
    """

    pixels: Pixels
    text: str | Conversation | None
    label: int


def decode_as_training(sample: Sample, task: Task, max_pixels: int) -> DecodedSample:
    """Decode a sample by the rules of training.

    Raises:
        BadSample: whatever ``make_example`` finds wrong with it.
    """
    seen: list[tuple[Pixels, str | Conversation | None]] = []

    def keep(pixels: Pixels, text: str | Conversation | None, seed: int) -> ProcessedSample:
        seen.append((pixels, text))
        return ProcessedSample(None)

    made = make_example(sample, 0, task, keep, seed=0, max_pixels=max_pixels)
    pixels, text = seen[0]
    return DecodedSample(pixels, text, made.label)


def _scan(job: ShardJob, shard: Shard, is_first: bool) -> ShardFindings:
    """Decode the samples of a job and collect what they hold."""
    found, reader = ShardFindings(in_shard=len(shard)), Reader([shard])
    task_error, fields = task_type_error(job.task), SampleFields.of(job.task)
    error = "" if task_error else shard.field_error(fields)
    if error:
        raise BadShard(error)
    if isinstance(shard, TarShard) and not task_error:
        found.is_sorted, found.used = shard.index.is_sorted, tuple(shard.members(fields))
        found.members = shard.index.counts() if is_first else {}
    columns = job.task.class_ids if job.task.task_type == "classification" else ()
    class_index = {column: index for index, column in enumerate(columns)}
    counts = found.counts
    counts.labels = np.zeros(len(columns), np.int64)
    if is_first:
        found.samples, found.keys = len(shard), shard.key_hashes()
        counts.size_bytes = shard.index.size if isinstance(shard, TarShard) else 0
    indices = np.zeros(0, np.int64) if task_error else job.indices(len(shard))
    found.fingerprints = np.zeros((len(indices), 3), np.uint64)
    found.contents = np.zeros(len(indices), np.uint64)
    for number, index in enumerate(indices.tolist()):
        try:
            sample = shard.read(index, fields)
            decoded = decode_as_training(sample, job.task, job.max_pixels)
            if job.split == "test" and job.task.scorer:
                expect_scorable(sample.members["json"], job.task.scorer)
        except BadSample as error:
            # Errors of one sort differ in names, numbers and details only.
            words = _VARYING.sub("", str(error)).split("(")[0].split(":")[0].split()
            sort = " ".join(words)
            is_new = sort not in counts.bad and len(counts.bad) >= _SORTS
            line = f"{reader.describe(index)}: {error}"
            counts.add_bad("other errors" if is_new else sort, [line])
            continue
        found.fingerprints[number] = _fingerprint(sample, decoded, job.by_pixels)
        members = [(name.encode(), data) for name, data in sorted(sample.members.items())]
        found.contents[number] = hash_bytes(b"\0".join(each for pair in members for each in pair))
        if not isinstance(shard, TarShard):
            counts.size_bytes += sum(map(len, sample.members.values()))
        _count(decoded, counts, class_index)
    found.counts.answers = Counter(dict(counts.answers.most_common(_ANSWERS)))
    return found


def _count(decoded: DecodedSample, counts: SampleCounts, class_index: dict[int, int]) -> None:
    if isinstance(decoded.text, Conversation):
        counts.answers[decoded.text.answers[0].strip()[:_LONGEST_ANSWER]] += 1
        counts.lengths[sum(len(turn.text) for turn in decoded.text.turns)] += 1
    elif decoded.text is not None:
        counts.lengths[len(decoded.text)] += 1
    if decoded.label in class_index:
        counts.labels[class_index[decoded.label]] += 1
    for image in each_image(decoded.pixels):
        counts.sizes[image.shape[2], image.shape[1]] += 1


def _fingerprint(sample: Sample, decoded: DecodedSample, by_pixels: bool) -> tuple[int, int, int]:
    files = [sample.members[name] for name in image_members(sample.members)]
    if by_pixels:
        rows = [one.permute(1, 2, 0).contiguous().numpy() for one in each_image(decoded.pixels)]
        files = [f"{one.shape}".encode() + one.tobytes() for one in rows]
    # Lengths keep two images apart from one of both their bytes.
    image = files[0] if len(files) == 1 else b"".join(b"%d " % len(file) + file for file in files)
    question = ""
    if isinstance(decoded.text, Conversation):
        questions = (turn.text for turn in decoded.text.turns if turn.role != "assistant")
        question = "\0".join(questions)
    return sample_fingerprint(image, question.encode("utf-8", "surrogatepass"))
