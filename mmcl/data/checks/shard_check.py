"""One shard gone through sample by sample, in whichever process; what comes back is arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmcl.core import Dialogue, Row, Task
from mmcl.data.checks.findings import called
from mmcl.data.checks.twins import Prints, hash_of, print_of
from mmcl.data.faults import BadSample, BadShard
from mmcl.data.prepare import Part
from mmcl.data.reader import Reader
from mmcl.data.row import READ_KINDS, make_row
from mmcl.data.shard import Numbers, Sample, Shard
from mmcl.data.shards.index import IMAGES, is_read
from mmcl.data.shards.opening import Place, expect_hash, open_shard
from mmcl.data.shards.tar_shard import TarShard

NAMED = 5
_SORTS = 40
_ANSWERS, _LONGEST_ANSWER = 500, 120
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass(frozen=True)
class ShardWork:
    """What is to be done with a shard.

    Attributes:
        task: whose samples it holds.
        part: of the task.
        name: of the shard as the card has it.
        url: where it lies.
        place: how it is opened.
        look: 200 = look into so many samples, 0.02 = into that share; None = into all.
        max_pixels: of the largest picture that is decoded.
        by_pixels: tell pictures by their pixels instead of their files.
        piece: k of m: of the samples to look into, only this one of m equal pieces; piece 0 also
            verifies the shard as a whole.
    """

    task: Task
    part: Part
    name: str
    url: str
    place: Place
    look: float | int | None
    max_pixels: int
    by_pixels: bool
    piece: tuple[int, int] = (0, 1)

    def places(self, count: int) -> Numbers:
        """Return the places to look into in a shard of ``count`` samples."""
        number, pieces = self.piece
        places = places_looked_at(count, self.look)
        edges = [len(places) * edge // pieces for edge in (number, number + 1)]
        return places[edges[0] : edges[1]]


@dataclass
class ShardFindings:
    """What was found in a shard of n samples, k of which were looked into.

    Attributes:
        fault: why the shard as a whole cannot be used, "" if it can.
        size_bytes: of its file; of the samples looked into where they lie in place.
        samples: n; 0 where another piece of the shard counts them.
        in_shard: n.
        keys: (n,) hashes of the keys.
        places: (k,) places of the samples that were looked into.
        prints: (k, 3) fingerprints; zeros where a sample cannot be read.
        contents: (k,) hashes of everything in a sample, 0 where it cannot be read.
        labels: (classes of the task,) samples of each; none where rows are not classified.
        sizes: (width, height) of pictures -> how many.
        lengths: letters of a text or dialogue -> how many.
        answers: right answer -> how many, the most frequent ones.
        bad: sort of fault -> how many, and the first of them in full.
    """

    fault: str = ""
    size_bytes: int = 0
    samples: int = 0
    in_shard: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    places: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    prints: Prints = field(default_factory=lambda: np.zeros((0, 3), np.uint64))
    contents: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    labels: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    bad: dict[str, tuple[int, list[str]]] = field(default_factory=dict)


def check_shard(work: ShardWork) -> ShardFindings:
    """Verify a shard and look into its samples as training does.

    Returns:
        what was found; a shard that cannot be used has ``fault`` and nothing else.
    """
    try:
        origin, shard = open_shard(work.name, work.url, work.place)
        if work.piece[0] == 0:
            expect_hash(origin, work.place.sha256)
        if len(shard) == 0:
            raise BadShard(
                "holds no samples: members are named <key>.png, <key>.cls, <key>.txt and so on"
            )
        size_bytes = shard.index.size if isinstance(shard, TarShard) else 0
        return _Look(work, shard).all_samples(size_bytes)
    except BadShard as fault:
        return ShardFindings(fault=str(fault))
    except OSError as error:
        return ShardFindings(fault=f"cannot be read ({error})")
    except RuntimeError as error:
        return ShardFindings(fault=f"could not be gone through: {error}")


def unreadable(task: Task) -> str:
    """Return why no sample of a task could be read, "" if they can."""
    where = called(task)
    kinds = READ_KINDS if task.index >= 0 else (*READ_KINDS, "picture")
    if task.kind not in kinds:
        return (
            f"{where} is of kind '{task.kind}', expected {', '.join(kinds)}: "
            "this version reads no others"
        )
    if task.kind not in ("classify", "picture") and not is_read(task.text.lower()):
        return (
            f"{where} takes its text from .{task.text}, expected .txt or a member that ends "
            "in .txt, such as .de.txt"
        )
    return ""


@dataclass(frozen=True)
class Looked:
    """What training would take from a sample.

    Attributes:
        pixels: (3, H, W) uint8, None without a picture.
        text: caption or dialogue, None where only a class counts.
        label: column of the class, or UNSCORED.
    """

    pixels: Tensor | None
    text: str | Dialogue | None
    label: int


def look_at(sample: Sample, task: Task, max_pixels: int) -> Looked:
    """Decode a sample by the rules of training.

    Raises:
        BadSample: whatever ``make_row`` finds wrong with it.
    """
    seen: list[tuple[Tensor | None, str | Dialogue | None]] = []

    def keep(pixels: Tensor | None, text: str | Dialogue | None, seed: int) -> Row:
        seen.append((pixels, text))
        return Row(None)

    made = make_row(sample, 0, task, keep, seed=0, max_pixels=max_pixels)
    pixels, text = seen[0]
    return Looked(pixels, text, made.label)


class _Look:
    """Goes through the samples of one shard and gathers what it finds."""

    def __init__(self, work: ShardWork, shard: Shard) -> None:
        self.work, self.shard, self.reader = work, shard, Reader([shard])
        self.found = ShardFindings()
        columns = work.task.labels if work.task.kind == "classify" else ()
        self.column_place = {column: place for place, column in enumerate(columns)}

    def all_samples(self, size_bytes: int) -> ShardFindings:
        found, count = self.found, len(self.shard)
        found.in_shard = count
        if self.work.piece[0] == 0:
            found.size_bytes, found.samples = size_bytes, count
            found.keys = self.shard.key_hashes()
        if not unreadable(self.work.task):
            found.places = self.work.places(count)
        found.prints = np.zeros((len(found.places), 3), np.uint64)
        found.contents = np.zeros(len(found.places), np.uint64)
        found.labels = np.zeros(len(self.column_place), np.int64)
        for row, place in enumerate(found.places.tolist()):
            try:
                self.one_sample(row, self.shard.read(place))
            except BadSample as bad:
                self.note(place, str(bad))
        found.answers = Counter(dict(found.answers.most_common(_ANSWERS)))
        return found

    def one_sample(self, row: int, sample: Sample) -> None:
        looked = look_at(sample, self.work.task, self.work.max_pixels)
        found = self.found
        if not isinstance(self.shard, TarShard):
            found.size_bytes += sum(map(len, sample.members.values()))
        picture = _shown(sample, looked, self.work.by_pixels)
        asked = ""
        if isinstance(looked.text, Dialogue):
            asked = "\0".join(turn.text for turn in looked.text.turns[::2])
            answer = looked.text.answers[0].strip()[:_LONGEST_ANSWER]
            found.answers[answer] += 1
            found.lengths[sum(len(turn.text) for turn in looked.text.turns)] += 1
        elif looked.text is not None:
            found.lengths[len(looked.text)] += 1
        if looked.label in self.column_place:
            found.labels[self.column_place[looked.label]] += 1
        if looked.pixels is not None:
            found.sizes[looked.pixels.shape[2], looked.pixels.shape[1]] += 1
        found.prints[row] = print_of(picture, asked.encode("utf-8", "surrogatepass"))
        found.contents[row] = hash_of(b"\0".join(_contents(sample)))

    def note(self, place: int, reason: str) -> None:
        """Keep a bad sample: in full if it is among the first of its sort."""
        sort = " ".join(_VARYING.sub("", reason).split("(")[0].split(":")[0].split())
        if sort not in self.found.bad and len(self.found.bad) >= _SORTS:
            sort = "other faults"
        count, lines = self.found.bad.get(sort, (0, []))
        if count < NAMED:
            lines = [*lines, f"{self.reader.where(place)}: {reason}"]
        self.found.bad[sort] = count + 1, lines


def places_looked_at(count: int, look: float | int | None) -> Numbers:
    """Return places spread evenly over ``count`` samples: all, so many, or a share of them."""
    kept = count
    if isinstance(look, float) and look <= 1:
        kept = max(1, round(look * count))
    elif look is not None:
        kept = int(look)
    if kept >= count or count == 0:
        return np.arange(count, dtype=np.int64)
    return np.arange(kept, dtype=np.int64) * count // max(1, kept)


def picture_of(sample: Sample) -> bytes:
    """Return the picture's file, empty if a sample has none."""
    return next((sample.members[kind] for kind in IMAGES if kind in sample.members), b"")


def _shown(sample: Sample, looked: Looked, by_pixels: bool) -> bytes:
    if looked.pixels is None or not by_pixels:
        return picture_of(sample)
    rows = looked.pixels.permute(1, 2, 0).contiguous().numpy()
    return f"{rows.shape}".encode() + rows.tobytes()


def _contents(sample: Sample) -> Iterator[bytes]:
    for extension in sorted(sample.members):
        yield extension.encode()
        yield sample.members[extension]
