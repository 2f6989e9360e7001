"""Record of a diagnostic of a run: curves, metrics and notes, stored in ``diagnostics/``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation import strict_json
from mmcl.evaluation.continual_metrics import MetricValue

DIAGNOSTICS = "diagnostics"
"""Folder of a run directory with the records of its diagnostics."""
_NAME = re.compile(r"[A-Za-z0-9_@.-]{1,120}")
_MAX_BYTES = 4 * 2**20
_MAX_PANELS = 4
_MAX_POINTS = 10_000
_MAX_FILES = 50


@dataclass(frozen=True)
class Series:
    """Named curve of a panel: one value for each point of the record, None = undefined."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """Panel of a figure.

    Args:
        title: what its values are, such as "loss".
        series: its curves.
        is_score: whether values are fractions that are shown in percent.
    """

    title: str
    series: Sequence[Series]
    is_score: bool = False


@dataclass(frozen=True)
class Diagnostic:
    """Result of a diagnostic: panels of curves over the same points, metrics and notes.

    Args:
        name: of its files: letters, digits, and any of ``_ - . @``.
        title: of its section in the report.
        text: how it was measured.
        x_label: what the points are.
        x_values: position of each point.
        x_names: name of each point; empty = the positions are numbers.
        panels: one to four.
        metrics: its numbers, each with its definition, or the reason why there is none.
        notes: what was left out, and why, a sentence each.
        settings: how it was called, for example ``{"samples": "256"}``.

    Raises:
        ValueError: if the name is not one, or the lengths differ.
    """

    name: str
    title: str
    text: str
    x_label: str
    x_values: Sequence[float]
    panels: Sequence[Panel]
    x_names: Sequence[str] = ()
    metrics: Sequence[MetricValue] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}: give letters, digits and _ - . @")
        if not 1 <= len(self.panels) <= _MAX_PANELS:
            raise ValueError(f"there are {len(self.panels)} panels: give 1 to {_MAX_PANELS}")
        points = len(self.x_values)
        if points > _MAX_POINTS:
            raise ValueError(f"there are {points} points: give at most {_MAX_POINTS}")
        lengths = {each.name: len(each.values) for panel in self.panels for each in panel.series}
        lengths |= {"x_names": len(self.x_names)} if self.x_names else {}
        wrong = [f"{name!r} has {n}" for name, n in lengths.items() if n != points]
        if wrong:
            raise ValueError(f"{wrong[0]} values for {points} points: give one for each point")

    @classmethod
    def read(cls, path: Path) -> Diagnostic:
        """Read a record.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming all errors at once, if it is not a record.
        """
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes: it is no diagnostic")
        return strict_json.load(cls, strict_json.read(path), str(path))

    def write(self, path: Path) -> None:
        """Write the record atomically.

        Raises:
            ValueError: if ``read`` would refuse a value.
        """
        plain = asdict(self)
        strict_json.load(Diagnostic, plain, "this diagnostic")
        write_atomic(path, strict_json.to_bytes(plain))


def diagnostic_files(folder: Path) -> list[Path]:
    """Return the record files of a run directory by name, at most 50."""
    return sorted((folder / DIAGNOSTICS).glob("*.json"))[:_MAX_FILES]
