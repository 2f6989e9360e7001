"""Gates: limits of scores and metrics that a model must keep to be accepted after a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmcl.core.card.card_reader import parse_yaml
from mmcl.core.card.schema import nearest
from mmcl.evaluation.continual_metrics import MetricValue, compute_all_metrics
from mmcl.evaluation.matrix import AccuracyMatrix

Since = Literal["start", "best", "learned"]
_LIMITS = ("max_drop", "min", "max")
_ROUNDING = 1e-9
"""Points by which a value that is exactly a limit may miss it."""


@dataclass(frozen=True)
class Gate:
    """Limit of a task's score, or of a metric of the run; all numbers are in percentage points.

    Args:
        task: name of a task or eval-only task; its score after each trained task.
        metric: name of a metric of summary.json, such as "forgetting"; instead of ``task``.
        max_drop: most points that the score may be below its reference.
        since: that reference: the score before training ("start"), the best one so far ("best"), or
            the one after the task itself was learned ("learned").
        min: least value.
        max: largest value.

    Raises:
        ValueError: if it names no or two subjects, or no limit.
    """

    task: str | None = None
    metric: str | None = None
    max_drop: float | None = None
    since: Since = "start"
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if (self.task is None) == (self.metric is None):
            raise ValueError(
                f"a gate has task {self.task!r} and metric {self.metric!r}: give one of them"
            )
        if all(getattr(self, name) is None for name in _LIMITS):
            raise ValueError(f"gate {self.name} has no limit: give max_drop, min or max")
        if self.metric is not None and (self.max_drop is not None or self.since != "start"):
            raise ValueError(
                f"gate {self.name} is of a metric, which has no drop: give min or max, without "
                "max_drop and since"
            )
        if self.since not in ("start", "best", "learned"):
            raise ValueError(f"gate {self.name} has since {self.since!r}: start, best or learned")
        if self.since != "start" and self.max_drop is None:
            raise ValueError(f"gate {self.name} has since '{self.since}' and no max_drop")

    @property
    def name(self) -> str:
        """Its subject."""
        return repr(self.task or self.metric)


@dataclass(frozen=True)
class GateResult:
    """Result of one limit of a gate after a task.

    Args:
        subject: task or metric.
        limit: the limit in words.
        measured: what was measured, in words; the reason if nothing was.
        is_kept: whether the limit is kept; None = it could not be compared.
    """

    subject: str
    limit: str
    measured: str
    is_kept: bool | None

    @property
    def sentence(self) -> str:
        """The result in words."""
        return f"{self.subject}: {self.measured}, and the limit is {self.limit}"


def parse_gates(raw: Iterable[Gate | Mapping[str, Any]], where: str = "gates") -> list[Gate]:
    """Return gates from plain mappings.

    Raises:
        ValueError: naming the first wrong gate, with the nearest key.
    """
    gates = []
    for number, entry in enumerate(raw or ()):
        if isinstance(entry, Gate):
            gates.append(entry)
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}[{number}] is {entry!r}, expected a mapping: task, max_drop")
        for key, value in entry.items():
            if key not in Gate.__dataclass_fields__:
                hint = nearest(key, Gate.__dataclass_fields__)
                raise ValueError(f"{where}[{number}] has the unknown key {key!r}: {hint}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in _LIMITS and value is not None and not is_number:
                raise ValueError(f"{where}[{number}] has {key} {value!r}, expected a number")
        gates.append(Gate(**entry))
    return gates


def read_gates(file: Path) -> list[Gate]:
    """Read a YAML file with a list of gates, or with one under ``gates``.

    Raises:
        ValueError: naming what is wrong.
    """
    raw = parse_yaml(file.read_text(encoding="utf-8"))
    if isinstance(raw, Mapping):
        raw = raw.get("gates")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise ValueError(f"{file} has no list of gates: write - {{task: NAME, max_drop: 2.0}}")
    return parse_gates(raw, str(file))


def expect_known(gates: Iterable[Gate], matrix: AccuracyMatrix) -> None:
    """Check that a stream has every task and metric of some gates.

    Raises:
        ValueError: with the nearest name.
    """
    metrics = {_plain(metric.name) for metric in compute_all_metrics(matrix, 0)}
    for gate in gates:
        if gate.task is not None and gate.task not in matrix.names:
            raise ValueError(
                f"a gate names task '{gate.task}', which the stream does not have: "
                f"{nearest(gate.task, matrix.names)}"
            )
        if gate.metric is not None and _plain(gate.metric) not in metrics:
            raise ValueError(
                f"a gate names metric '{gate.metric}', which a run does not have: "
                f"{nearest(_plain(gate.metric), sorted(metrics))}"
            )
        is_trained = gate.task in matrix.names[: matrix.tasks]
        if gate.since == "learned" and not is_trained:
            raise ValueError(
                f"gate {gate.name} has since 'learned', and that task is never trained: start, best"
            )


def check_gates(gates: Iterable[Gate], matrix: AccuracyMatrix, row: int) -> list[GateResult]:
    """Compare a row of a matrix with the limits of gates.

    Args:
        gates: known, see ``expect_known``.
        matrix: scores as fractions of 1.
        row: number of trained tasks, 1 or more.

    Returns:
        one result for every limit.
    """
    metrics = {_plain(metric.name): metric for metric in compute_all_metrics(matrix, row)}
    results = []
    for gate in gates:
        if gate.metric is not None:
            value, reason = _points(metrics[_plain(gate.metric)])
            results += _bounds(gate, value, reason)
            continue
        column = matrix.names.index(str(gate.task))
        score = matrix.get(row, column)
        value = None if score is None else 100 * score
        results += _bounds(gate, value, "it was not measured")
        if gate.max_drop is not None:
            results.append(_drop(gate, matrix, row, column, value))
    return results


def _bounds(gate: Gate, value: float | None, reason: str) -> list[GateResult]:
    subject = gate.task or f"{gate.metric}"
    limits = ((gate.min, "at least", 1), (gate.max, "at most", -1))
    return [
        GateResult(
            subject, f"{words} {limit:g}", f"{value:.2f}", sign * (value - limit) >= -_ROUNDING
        )
        if value is not None
        else GateResult(subject, f"{words} {limit:g}", reason, None)
        for limit, words, sign in limits
        if limit is not None
    ]


def _drop(
    gate: Gate, matrix: AccuracyMatrix, row: int, column: int, value: float | None
) -> GateResult:
    limit = f"a drop of {gate.max_drop:g} from its {_REFERENCES[gate.since]}"
    reference = _reference(gate.since, matrix, row, column)
    if value is None or reference is None:
        is_early = gate.since == "learned" and row <= column
        reason = "the task is not learned yet" if is_early else "it was not measured"
        return GateResult(str(gate.task), limit, reason, None)
    drop = 100 * reference - value
    measured = (
        f"{value:.2f}, {abs(drop):.2f} {'below' if drop >= 0 else 'above'} {100 * reference:.2f}"
    )
    # A drop of exactly the limit is kept, whatever the rounding of its difference.
    return GateResult(str(gate.task), limit, measured, drop <= float(gate.max_drop or 0) + 1e-9)


_REFERENCES = {
    "start": "score before training", "best": "best score before", "learned": "score when learned",
}  # fmt: skip


def _reference(since: Since, matrix: AccuracyMatrix, row: int, column: int) -> float | None:
    if since == "start":
        return matrix.get(0, column)
    if since == "learned":
        return matrix.get(column + 1, column) if row > column else None
    known = [score for r in range(row) if (score := matrix.get(r, column)) is not None]
    return max(known, default=None)


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _points(metric: MetricValue) -> tuple[float | None, str]:
    is_ratio = metric.name.startswith("retention")
    value = metric.value
    return (None if value is None else value * (1 if is_ratio else 100)), metric.reason or ""
