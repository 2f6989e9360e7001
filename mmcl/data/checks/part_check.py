"""A part (train or test) of a task, put together from what was found in each of its shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mmcl.data.checks.findings import PartFindings, spread_of
from mmcl.data.checks.shard_check import NAMED, ShardFindings, ShardWork
from mmcl.data.checks.twins import Prints
from mmcl.data.prepare import Part
from mmcl.data.reader import Reader
from mmcl.data.shard import Numbers
from mmcl.data.shards.opening import open_shard

PARTS: tuple[Part, Part] = ("train", "test")
_ANSWERS_KEPT, _ANSWERS_SHOWN = 20_000, 20


@dataclass
class PartSoFar:
    """What is known of a part of a task while its shards come in.

    Attributes:
        names: of all its shards.
        works: of the shards that can be used, or of their pieces, in order.
        samples: that each of them counts.
        in_shard: samples in the shard of each of them.
        prints: of the samples that were looked into, an array for each shard; kept to the end.
        keys: hashes of the keys, an array for each shard; given up at the end of the part.
        contents: hashes of whole samples, likewise.
        sizes: and all below as in ``ShardFindings``, summed up.
        lengths: see there.
        answers: see there; the rare ones of very many are forgotten.
        labels: see there.
        size_bytes: see there.
        bad: see there.
    """

    names: tuple[str, ...]

    works: list[ShardWork] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    in_shard: list[int] = field(default_factory=list)
    prints: list[Prints] = field(default_factory=list)
    keys: list[Prints] = field(default_factory=list)
    contents: list[Prints] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    labels: Numbers | None = None
    size_bytes: int = 0
    bad: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every shard was counted."""
        return self.counted == len(self.names)

    @property
    def counted(self) -> int:
        """Number of shards whose samples were counted."""
        return sum(work.piece[0] == 0 for work in self.works)

    def add(self, work: ShardWork, found: ShardFindings) -> None:
        """Take in what was found in the next shard."""
        self.works.append(work)
        self.samples.append(found.samples)
        self.in_shard.append(found.in_shard)
        self.prints.append(found.prints)
        self.keys.append(found.keys)
        self.contents.append(found.contents)
        self.sizes.update(found.sizes)
        self.lengths.update(found.lengths)
        self.answers.update(found.answers)
        if len(self.answers) > _ANSWERS_KEPT:
            self.answers = Counter(dict(self.answers.most_common(_ANSWERS_KEPT // 2)))
        self.labels = found.labels if self.labels is None else self.labels + found.labels
        self.size_bytes += found.size_bytes
        for sort, (count, lines) in found.bad.items():
            before, named = self.bad.get(sort, (0, []))
            self.bad[sort] = before + count, (named + lines)[:NAMED]

    def sample_name(self, row: int, of_all: bool = False) -> str:
        """Name the sample of a row of all its prints, or (of_all) of all its keys."""
        counts = self.samples if of_all else [len(each) for each in self.prints]
        ends = np.cumsum(counts)
        shard = int(np.searchsorted(ends, row, side="right"))
        own = row - int(ends[shard]) + counts[shard]
        work = self.works[shard]
        if not of_all:
            own = int(work.places(self.in_shard[shard])[own])
        return Reader([open_shard(work.name, work.url, work.place)[1]]).where(own)

    def part_findings(self) -> PartFindings:
        """Sum up what was found."""
        middle = spread_of(self.lengths, lambda length: length)
        return PartFindings(
            shards=len(self.names),
            counted=self.counted,
            samples=sum(self.samples),
            looked=sum(map(len, self.prints)),
            bad=sum(count for count, _ in self.bad.values()),
            size_bytes=self.size_bytes,
            labels=() if self.labels is None else tuple(self.labels.tolist()),
            sizes=spread_of(self.sizes, lambda size: (size[0] * size[1], size)),
            lengths=None if middle is None else middle[1:],
            answers=tuple(self.answers.most_common(_ANSWERS_SHOWN)),
        )
