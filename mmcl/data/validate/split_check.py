"""Split (train or test) of a task under validation: the results of its shards, added up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mmcl.data.protocols import Split
from mmcl.data.shards.open_stream import open_shard
from mmcl.data.shards.reader import Reader
from mmcl.data.validate.duplicates import Fingerprints, joined
from mmcl.data.validate.results import SplitFindings, value_range
from mmcl.data.validate.shard_check import SampleCounts, ShardFindings, ShardJob

SPLITS: tuple[Split, Split] = ("train", "test")
_ANSWERS_SHOWN = 20


@dataclass
class SplitAccumulator:
    """Accumulator over the shards of a split.

    Attributes:
        names: of all its shards.
        shards: job and result of each shard that can be used, or of its chunks, in order. Their
            fingerprints are kept to the end, hashes of keys and contents until the split ends.
        counts: over all of them.
    """

    names: tuple[str, ...]
    shards: list[tuple[ShardJob, ShardFindings]] = field(default_factory=list)
    counts: SampleCounts = field(default_factory=SampleCounts)

    @property
    def counted(self) -> int:
        """Number of shards whose samples were counted."""
        return sum(job.chunk[0] == 0 for job, _ in self.shards)

    @property
    def samples(self) -> int:
        """Number of samples in the counted shards."""
        return sum(found.samples for _, found in self.shards)

    @property
    def decoded(self) -> int:
        """Number of samples that were decoded."""
        return sum(len(found.fingerprints) for _, found in self.shards)

    @property
    def fingerprints(self) -> Fingerprints:
        """(n, 3) fingerprints of the samples that were decoded."""
        return joined([found.fingerprints for _, found in self.shards])

    def add(self, job: ShardJob, found: ShardFindings) -> None:
        """Add the result of the next shard."""
        self.counts.merge(found.counts)
        found.counts = SampleCounts()
        self.shards.append((job, found))

    def sample_name(self, index: int) -> str:
        """Return "<key> in <shard>" of an index into all fingerprints."""
        number, own = _shard_at([len(found.fingerprints) for _, found in self.shards], index)
        job, found = self.shards[number]
        return _reader(job).describe(int(job.indices(found.in_shard)[own]))

    def key_name(self, index: int) -> tuple[str, str]:
        """Return key and shard of an index into the hashes of all keys."""
        number, own = _shard_at([found.samples for _, found in self.shards], index)
        job = self.shards[number][0]
        return _reader(job).describe(own).removesuffix(f" in {job.name}"), job.name

    def summarize(self) -> SplitFindings:
        """Summarize the split."""
        counts = self.counts
        lengths = value_range(counts.lengths, lambda length: length)
        return SplitFindings(
            shards=len(self.names),
            counted=self.counted,
            samples=self.samples,
            decoded=self.decoded,
            bad=sum(count for count, _ in counts.bad.values()),
            size_bytes=counts.size_bytes,
            labels=tuple(counts.labels.tolist()),
            sizes=value_range(counts.sizes, lambda size: (size[0] * size[1], size)),
            lengths=None if lengths is None else lengths[1:],
            answers=tuple(counts.answers.most_common(_ANSWERS_SHOWN)),
        )


def _shard_at(counts: list[int], index: int) -> tuple[int, int]:
    """Return the shard of an index into all shards, and its index in there."""
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, index, side="right"))
    return number, index - int(ends[number]) + counts[number]


def _reader(job: ShardJob) -> Reader:
    return Reader([open_shard(job.name, job.url, job.options)[1]])
