"""First pass over an input: every record is read and checked, and only numbers are kept of it."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic_write import write_atomic
from mmcl.data.convert.record import (
    SPLITS,
    Chunk,
    ConvertOptions,
    InputData,
    InvalidRecord,
    ProgressFn,
    Record,
    SkippedRecord,
)
from mmcl.data.decode import decode_image, expect_limits
from mmcl.data.image_formats import image_members, read_header
from mmcl.data.parallel import ParallelMap
from mmcl.data.shards.llava_json import expect_scorable, has_visible_text
from mmcl.data.shards.reader import subset_size
from mmcl.data.shards.tar import BLOCK, padded
from mmcl.data.stored_sample import BadSample, IntArray

MAX_LISTED = 10_000
"""Bad samples that are listed; more are only counted."""

_EDGE = 1 << 16
_TRAIN, _TEST, _VALIDATION = map(SPLITS.index, ("train", "test", "validation"))
_USED = {"training": "are trained on", "test": "are the test samples", "": "are left out"}


@dataclass
class _Scan:
    """What is known of n records after a pass, 41 bytes for each.

    Attributes:
        count: n.
        size: (n,) bytes of each record in a shard, 0 if it is bad or was not read.
        content: (n,) uint64 hash of its image or images, or of its text if it has none.
        sample: (n,) uint64 hash of all its members.
        image_bytes: (n,) bytes of its images, 0 if it has none.
        task: (n,) int32 index into names of tasks.
        label: (n,) int32 index into names of classes.
        split: (n,) int8 index into ``SPLITS``.
    """

    count: int

    def __post_init__(self) -> None:
        self.size = np.zeros(self.count, dtype=np.int64)
        self.content = np.zeros(self.count, dtype=np.uint64)
        self.sample = np.zeros(self.count, dtype=np.uint64)
        self.image_bytes = np.zeros(self.count, dtype=np.int64)
        self.task = np.zeros(self.count, dtype=np.int32)
        self.label = np.zeros(self.count, dtype=np.int32)
        self.split = np.zeros(self.count, dtype=np.int8)

    def __len__(self) -> int:
        """Return n."""
        return self.count


@dataclass
class ScanResult(_Scan):
    """Scan result of an input.

    Attributes:
        source: the input.
        tasks: names of tasks as met.
        labels: names of classes as met.
        left_out: the first ``MAX_LISTED`` bad records.
        num_read: records that were read, n unless ``max_samples`` is set.
        num_bad: how many of these are bad.
        remarks: sentence -> records that it is about.
        unused: keys of records that are not used.
        num_deep: images among the others whose values have more than 8 bits.
        digest: sha256 of everything that was read, in hex.
    """

    source: InputData
    tasks: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    left_out: list[SkippedRecord] = field(default_factory=list)
    num_read: int = 0
    num_bad: int = 0
    remarks: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    num_deep: int = 0
    digest: str = ""


@dataclass
class _ChunkScan(_Scan):
    """Scan result of one chunk; names are numbered in order of appearance."""

    tasks: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    unusable: list[tuple[int, InvalidRecord]] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    num_deep: int = 0
    digest: bytes = b""


def scan_input(
    source: InputData,
    options: ConvertOptions,
    progress: ProgressFn,
    parallel_map: ParallelMap = map,
    scorer: str = "",
) -> ScanResult:
    """Scan an input once.

    Args:
        source: to read.
        options: ``max_samples`` and ``seed`` choose what is read.
        progress: called after every chunk.
        parallel_map: ``map``, or one over processes.
        scorer: that has to accept the answers of all records but those for training; "" = any.

    Raises:
        RuntimeError: if a file changed meanwhile.
    """
    total = sum(map(len, source.chunks))
    chosen = _chosen_numbers(source, total, options)
    tasks: dict[str, int] = {name: index for index, name in enumerate(source.tasks)}
    labels: dict[str, int] = {name: index for index, name in enumerate(source.classes)}
    scan = ScanResult(total, source)
    digest = hashlib.sha256()
    for glance in parallel_map(partial(scan_chunk, scorer=scorer), _subsets(source, chosen)):
        own = chosen[scan.num_read : scan.num_read + glance.count]
        scan.size[own], scan.content[own] = glance.size, glance.content
        scan.sample[own], scan.image_bytes[own] = glance.sample, glance.image_bytes
        scan.split[own] = glance.split
        scan.task[own] = _renumbered(glance.task, glance.tasks, tasks)
        scan.label[own] = _renumbered(glance.label, glance.labels, labels)
        for index, bad in glance.unusable[: MAX_LISTED - len(scan.left_out)]:
            scan.left_out.append(SkippedRecord(source.where, int(own[index]), bad.name, bad.reason))
        digest.update(glance.digest)
        scan.remarks.update(glance.remarks)
        scan.unused |= glance.unused
        scan.num_read += glance.count
        scan.num_bad += len(glance.unusable)
        scan.num_deep += glance.num_deep
        progress(f"reading {source.where}", scan.num_read, len(chosen))
    scan.tasks, scan.labels, scan.digest = list(tasks), list(labels), digest.hexdigest()
    return scan


def take_splits(train: ScanResult, test: ScanResult | None = None) -> list[str]:
    """Decide what each stated split is used for; samples that are used for nothing are left out.

    Validation samples are the test split where there is no test split, and never training samples.
    Where a test input is given, its own test or validation split is used, or all of it if it
    states none, and of the first input only what may be trained on.

    Args:
        train: scan of the input; splits of records are changed.
        test: scan of a separate test input.

    Returns:
        A sentence for each input that states splits.
    """
    return [
        f"splits of {scan.source.where}: {', '.join(uses)}"
        for scan, is_only in ((train, test is None), (test, False))
        if scan is not None and (uses := _use_splits(scan, is_only, scan is test))
    ]


def _use_splits(scan: ScanResult, is_only: bool, is_test: bool) -> list[str]:
    counts = np.bincount(scan.split[scan.size > 0], minlength=len(SPLITS))
    scored = _TEST if counts[_TEST] else _VALIDATION
    use = {_TRAIN: "training", scored: "test"} if is_only else {_TRAIN: "training"}
    if is_test:
        use = {scored: "test"} if counts[scored] else {_TRAIN: "test"}
    uses = []
    for split in (_TRAIN, _VALIDATION, _TEST):
        if not counts[split]:
            continue
        uses.append(f"{counts[split]:,} {SPLITS[split]} samples {_USED[use.get(split, '')]}")
        if split not in use:
            scan.size[scan.split == split] = 0
    if is_only and scored == _VALIDATION:
        scan.split[scan.split == _VALIDATION] = _TEST
    return uses


def _chosen_numbers(source: InputData, total: int, options: ConvertOptions) -> IntArray:
    """Return the rising numbers of the records that ``max_samples`` leaves."""
    count = subset_size(total, options.max_samples)
    if count == total:
        return np.arange(total)
    group = f"{Path(source.where).name}/{options.name}".encode("utf-8", "surrogateescape")
    drawn = np.random.default_rng([options.seed, zlib.crc32(group)]).permutation(total)
    return np.sort(drawn[:count])


def _subsets(source: InputData, chosen: IntArray) -> Iterator[Chunk]:
    """Yield the chunks with only their chosen records, without empty ones."""
    first = 0
    for chunk in source.chunks:
        last = first + len(chunk)
        own = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, last)]
        if len(own):
            yield chunk if len(own) == len(chunk) else chunk.subset(own - first)
        first = last


def scan_chunk(chunk: Chunk, scorer: str = "") -> _ChunkScan:
    """Scan a chunk; see `scan_input`."""
    glance, digest = _ChunkScan(len(chunk)), hashlib.sha256()
    for index, record in enumerate(_checked(chunk, scorer)):
        if isinstance(record, InvalidRecord):
            glance.unusable.append((index, record))
            digest.update(b"-")
            continue
        members = sorted(record.members.items())
        names = image_members(record.members)
        images = [record.members[name] for name in names]
        glance.num_deep += any(read_header(data).bits > 8 for data in images)
        content = images_digest(images or [b"".join(data for _, data in members)])
        glance.content[index] = int.from_bytes(content[:8], "big")
        glance.sample[index] = members_hash(record.members, content if images else b"")
        glance.image_bytes[index] = sum(map(len, images))
        for name, data in members:
            glance.size[index] += BLOCK + padded(len(data))
            held = content if name in names else data
            digest.update(f"{name} {len(held)} ".encode() + held)
        stated = (record.name, record.task, record.label, record.split)
        digest.update(repr(stated).encode("utf-8", "surrogateescape"))
        glance.task[index] = glance.tasks.setdefault(record.task, len(glance.tasks))
        glance.label[index] = glance.labels.setdefault(record.label, len(glance.labels))
        glance.split[index] = SPLITS.index(record.split)
        glance.remarks.update(record.remarks)
        glance.unused.update(record.unused)
    glance.digest = digest.digest()
    return glance


def images_digest(images: Sequence[bytes]) -> bytes:
    """Return the sha256 of an image, of several that of all their digests in order."""
    digests = [hashlib.sha256(image).digest() for image in images]
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def members_hash(members: Mapping[str, bytes], image_digest: bytes) -> int:
    """Return a hash of the members of a sample but its class, given the digest of its images."""
    digest, images = hashlib.sha256(image_digest), image_members(members)
    for name, data in sorted(members.items()):
        if name not in images and name != "cls":
            digest.update(f"{name} {len(data)} ".encode() + data)
    return int.from_bytes(digest.digest()[:8], "big")


def _checked(chunk: Chunk, scorer: str) -> Iterator[Record | InvalidRecord]:
    """Yield the records of a chunk, with broken images and unscorable answers as bad records."""
    for record in chunk.read():
        if isinstance(record, Record):
            try:
                for name in image_members(record.members):
                    expect_whole(name.rpartition(".")[2], record.members[name])
                if "txt" in record.members:
                    _expect_visible(record.members["txt"])
                if "json" in record.members and record.split != "train":
                    expect_scorable(record.members["json"], scorer)
            except BadSample as error:
                yield InvalidRecord(record.name, str(error))
                continue
        yield record


def _expect_visible(text: bytes) -> None:
    if not has_visible_text(text.decode("utf-8", "replace")):
        raise BadSample("its text is empty, it has only blanks or invisible characters")


def expect_whole(extension: str, data: bytes) -> None:
    """Check an image by its header and its end, and by decoding it if the end is odd.

    Formats that are rare, and whose end says nothing, are always decoded.

    Raises:
        BadSample: if it is broken, or beyond a limit of the run's reading.
    """
    expect_limits(data)
    if extension == "webp":
        is_whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    else:
        end = {"jpg": b"\xff\xd9", "png": b"IEND"}.get(extension)
        is_whole = end is not None and end in data[-_EDGE:]
    if not is_whole:
        decode_image(data)


def _renumbered(
    own: npt.NDArray[np.int32], names: dict[str, int], known: dict[str, int]
) -> npt.NDArray[np.int32]:
    """Convert indices into a chunk's names to indices into the names of the whole input."""
    table: Sequence[int] = [known.setdefault(name, len(known)) for name in names] or [0]
    return np.array(table, dtype=np.int32)[own]


def write_left_out(path: Path, scans: Sequence[ScanResult]) -> tuple[list[SkippedRecord], Path]:
    """List the bad samples in a file, which is removed if there are none."""
    left_out = [bad for scan in scans for bad in scan.left_out]
    if left_out:
        write_atomic(path, "".join(f"{bad}\n" for bad in left_out))
    else:
        path.unlink(missing_ok=True)
    return left_out, path


def image_notes(scans: Sequence[ScanResult]) -> list[str]:
    """Return a sentence on images whose values have more than 8 bits, if there are any."""
    num_deep = sum(scan.num_deep for scan in scans)
    if not num_deep:
        return []
    return [
        f"{num_deep:,} images have more than 8 bits a value: they are stored as they are and read "
        "with 8, of 16 bits the high ones (docs/data.md, Image formats)"
    ]
