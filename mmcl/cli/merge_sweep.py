"""A sweep of ``mmcl merge``: every value of a range is merged and scored, the best is exported."""

from __future__ import annotations

import json
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcl.cli.diagnose import StateLoader, other_data
from mmcl.cli.parser import UsageError
from mmcl.core import TaskStream, write_atomic
from mmcl.diagnostics.task_loss import ProbeData
from mmcl.diagnostics.trade_off import best_point, measure_trade_off
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.module import ContinualModule
from mmcl.report.diagnostic_output import draw_trade_off, trade_off_table

MAX_VALUES = 101
_DECIMAL = re.compile(r"[+-]?(\d{1,15}(\.\d{0,15})?|\.\d{1,15})")


@dataclass(frozen=True)
class ValueRange:
    """Values of an option, given as ``start:stop:step``.

    Attributes:
        text: as it was given.
        values: from start to stop, both included, each the closest float of its decimal.
    """

    text: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class LoadedRun:
    """Run of a checkpoint that is merged.

    Attributes:
        run: its opened run.
        tasks: number of tasks that the checkpoint has learned.
        is_export: whether the weights are an export, and the run only one of the same model.
    """

    run: ContinualRun
    tasks: int
    is_export: bool = False

    @property
    def learned(self) -> list[str]:
        """Names of the tasks that the checkpoint has learned, repeated ones once."""
        stream = self.run.data.stream
        return list(dict.fromkeys(_first_name(stream, number) for number in range(self.tasks)))


def number_or_range(text: str) -> float | ValueRange:
    """Parse a number, or a range ``start:stop:step``.

    Raises:
        ArgumentTypeError: if it is neither, or the range is empty or too long.
    """
    if ":" not in text:
        try:
            return float(text)
        except ValueError:
            raise ArgumentTypeError(f"'{text}' is no number and no range start:stop:step") from None
    pieces = text.split(":")
    if len(pieces) != 3 or not all(_DECIMAL.fullmatch(piece) for piece in pieces):
        raise ArgumentTypeError(
            f"the range '{text}' is malformed: give start:stop:step, such as 0:1:0.1"
        )
    start, stop, step = map(Fraction, pieces)
    if step <= 0:
        raise ArgumentTypeError(f"the step of the range '{text}' is {pieces[2]}: give more than 0")
    if stop < start:
        raise ArgumentTypeError(f"the range '{text}' is empty: give a stop of at least the start")
    steps = (stop - start) / step
    if steps.denominator != 1:
        raise ArgumentTypeError(
            f"the range '{text}' does not reach its stop {pieces[1]} in steps of {pieces[2]}: both "
            "ends are included, so give a step that divides it"
        )
    if steps >= MAX_VALUES:
        raise ArgumentTypeError(
            f"the range '{text}' has {steps + 1} values: give a step with {MAX_VALUES} at most"
        )
    return ValueRange(text, tuple(float(start + step * index) for index in range(int(steps) + 1)))


def sweep(
    given: Namespace,
    option: str,
    module: ContinualModule,
    runs: Sequence[LoadedRun],
    merge: Callable[[float], Mapping[str, Tensor]],
    write: Callable[[Mapping[str, Tensor], Path, float], str],
    facts: Mapping[str, Any],
) -> None:
    """Merge and score every value of a range, write the trade-off, and export the best value.

    Args:
        given: the command line.
        option: that has the range.
        module: of the first checkpoint.
        runs: of the checkpoints, in their order.
        merge: merges the weights with a value.
        write: exports weights into a folder, given the value.
        facts: of the record.

    Raises:
        UsageError: if a group of tasks is empty or unknown, or the target is a file.
    """
    if given.out.suffix == ".safetensors":
        raise UsageError(f"{given.out} becomes a folder in a sweep: leave .safetensors out")
    swept = getattr(given, option)
    probes, row = _open_probes(given, runs)
    old, new = _groups(given, probes.data.stream, runs)
    candidates = ((value, merge(value)) for value in swept.values)
    points = measure_trade_off(module.to(probes.device), candidates, probes, row, old=old, new=new)
    names = [list(map(probes.name, group)) for group in (old, new)]
    best = best_point(points)
    value = points[best].value
    record = {
        **facts,
        "option": option,
        "range": swept.text,
        "data": given.data or str(runs[-1].run.folder.path),
        "samples": given.samples,
        "old": names[0],
        "new": names[1],
        "points": [{**asdict(point), "mean": point.mean} for point in points],
        "best": value,
        "unreadable_samples": list(probes.errors),
    }
    table = trade_off_table(option, points, best)
    _write_record(given.out, record, table, draw_trade_off(option, points, best, "png"))
    print(f"old: {', '.join(names[0])}", f"new: {', '.join(names[1])}", *probes.errors, sep="\n")
    print(table, f"files: {given.out}/sweep.json, sweep.md and sweep.png", sep="\n")
    print(f"best: {option} {value:g}, {write(merge(value), given.out / 'model', value)}")


def _write_record(out: Path, record: Mapping[str, Any], table: str, figure: bytes) -> None:
    out.mkdir(parents=True)
    write_atomic(out / "sweep.json", json.dumps(record, indent=2) + "\n")
    write_atomic(out / "sweep.md", table + "\n")
    write_atomic(out / "sweep.png", figure)


def _open_probes(given: Namespace, runs: Sequence[LoadedRun]) -> tuple[ProbeData, int]:
    """Return the tasks to score, and the number of learned tasks whose classes compete."""
    run = runs[-1].run
    loader = StateLoader(run)
    data = run.data
    row = max(1, *(each.tasks for each in runs if each.run.folder.path == run.folder.path))
    if given.data is not None:
        data = other_data(given.data, given.checkpoints[-1], [])
        row = len(data.stream)
    return ProbeData(data, loader.device, given.samples, loader.precision), row


def _groups(
    given: Namespace, stream: TaskStream, runs: Sequence[LoadedRun]
) -> tuple[list[int], list[int]]:
    """Return the numbers of the old and of the new tasks.

    Raises:
        UsageError: if one is empty, a task is unknown, or one is in both.
    """
    if any(each.is_export for each in runs) and not (given.old and given.new):
        raise UsageError(
            "an export does not say which tasks it has learned: give --old and --new, any of "
            f"{', '.join(task.name for task in stream.all_tasks if task.repeat_of is None)}"
        )
    trained = {_first_name(stream, number): number for number in range(len(stream))}
    known = {name: stream.first_occurrence(number) for name, number in trained.items()}
    probes = {
        stream.evaluated_task(number).name: number
        for number in range(len(stream), len(stream.all_tasks))
    }
    earlier = {name for each in runs[:-1] for name in each.learned}
    defaults = {
        "old": [*(name for name in runs[0].learned if name in known), *probes],
        "new": [name for name in runs[-1].learned if name in known and name not in earlier],
    }
    found = []
    for group, default in defaults.items():
        text = getattr(given, group)
        names = default if text is None else text.split(",")
        if not names:
            raise UsageError(
                f"the stream has no {group} tasks to score (old: that {given.checkpoints[0]} has "
                f"learned, new: that only {given.checkpoints[-1]} has): give --old and --new, any "
                f"of {', '.join(known | probes)}"
            )
        found.append(_numbers(names, known | probes, f"--{group}"))
    both = [name for name, number in (known | probes).items() if all(number in g for g in found)]
    if both:
        raise UsageError(f"'{both[0]}' is old and new: give both --old and --new, without overlap")
    return found[0], found[1]


def _numbers(names: Iterable[str], known: Mapping[str, int], option: str) -> list[int]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"{option} has '{unknown[0]}', which is no task of the stream: give any of "
            f"{', '.join(known)}"
        )
    return list(dict.fromkeys(known[name] for name in names))


def _first_name(stream: TaskStream, number: int) -> str:
    return stream.evaluated_task(stream.first_occurrence(number)).name
