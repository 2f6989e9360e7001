"""Summary of a run: metrics, versions, hashes, bad samples and warnings, in summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmcl.core.atomic_write import write_atomic
from mmcl.core.task import Scenario
from mmcl.evaluation import strict_json
from mmcl.evaluation.metric import MetricValue
from mmcl.evaluation.strict_json import Amount

Error = str | Mapping[str, str]


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Args:
        name: of the run.
        stream: name of the stream.
        scenario: task, class or domain.
        strategy: such as ``ExperienceReplay``.
        model: such as ``OpenCLIP ViT-B-16``.
        seed: of the run.
        metrics: of the run, undefined ones with their reason.
        versions: library -> version.
        hashes: file -> sha256: card, weights ...
        errors: bad samples, each a sentence or a mapping such as shard, key, reason.
        warnings: sentences for the user, such as that a strategy had no effect.
        seconds: wall time of everything.
        finished: whether all tasks are learned and all cells measured.
    """

    name: str
    stream: str
    scenario: Scenario
    strategy: str
    model: str
    seed: int
    metrics: Sequence[MetricValue] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    errors: Sequence[Error] = ()
    warnings: Sequence[str] = ()
    seconds: Amount = 0.0
    finished: bool = False

    def metric(self, name: str) -> MetricValue | None:
        """Return the metric of that name, None if the run has none."""
        return next((each for each in self.metrics if each.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values of summary.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: object, source: str = "summary.json") -> RunSummary:
        """Make a summary from the plain values of summary.json.

        Raises:
            ValueError: naming all errors at once, if they are not a summary.
        """
        return strict_json.load(cls, raw, source)

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Read summary.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a summary.
        """
        return cls.from_dict(strict_json.read(path), str(path))

    def write(self, path: Path) -> None:
        """Write summary.json atomically.

        Raises:
            ValueError: if ``read`` would refuse a value.
        """
        plain = self.to_dict()
        RunSummary.from_dict(plain, "this summary")
        write_atomic(path, strict_json.to_bytes(plain))
