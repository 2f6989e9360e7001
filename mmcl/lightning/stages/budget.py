"""Budgets of a run: samples, operations and seconds of training, and bytes that are kept."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import pytorch_lightning as pl

from mmcl.evaluation.cost import Ledger, TaskCost

_WORDS = {"train_samples": "samples", "train_flops": "operations", "seconds": "seconds"}


@dataclass(frozen=True)
class ComputeBudget:
    """Limits of training; None = no limit.

    Args:
        train_samples: samples of all optimizer steps on all devices, each time they are seen;
            replayed samples and those of sources count.
        train_flops: floating-point operations of these steps, forward and backward, as in
            ledger.json; passes at the end of a task are not counted.
        seconds: wall time of these steps and of the passes at the end of a task. Where it ends a
            task depends on the machine, so such a run resumes, but not to the bit.

    Raises:
        ValueError: if a limit is not above 0.
    """

    train_samples: int | None = None
    train_flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"budget has {field.name} {value}: give more than 0, or leave it")

    def minus(self, costs: Iterable[TaskCost]) -> ComputeBudget:
        """Return what is left of each limit after tasks.

        Raises:
            BudgetSpent: naming a limit of which nothing is left.
        """
        spent = list(costs)
        used = {
            "train_samples": sum(cost.samples_new + cost.samples_replayed for cost in spent),
            "train_flops": sum(cost.flops or 0.0 for cost in spent),
            "seconds": sum(cost.seconds for cost in spent),
        }
        left = {}
        for name, count in used.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            left[name] = limit - count
            if left[name] <= 0:
                raise BudgetSpent(f"budget.stream.{name}", f"{count:,.4g} of {limit:,.4g}")
        return ComputeBudget(**left)


@dataclass(frozen=True)
class RunBudget:
    """Budget of a run.

    Args:
        task: limits of every task; a task ends with the last step within them.
        stream: limits of all tasks together; the run ends with the last task within them.
        buffer_bytes: bytes of the strategy's state after each task, files included.

    Raises:
        ValueError: if a limit is not above 0.
    """

    task: ComputeBudget = ComputeBudget()
    stream: ComputeBudget = ComputeBudget()
    buffer_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.buffer_bytes is not None and self.buffer_bytes < 1:
            raise ValueError(f"budget.buffer_bytes is {self.buffer_bytes}: give 1 or more")

    @property
    def limits_steps(self) -> bool:
        """Whether the length of a task is limited."""
        return self.task != ComputeBudget() or self.stream != ComputeBudget()

    def expect_bytes(self, task: str, stored: int) -> None:
        """Check the bytes that a strategy keeps after a task.

        Raises:
            BudgetSpent: if they are more than ``buffer_bytes``.
        """
        if self.buffer_bytes is not None and stored > self.buffer_bytes:
            raise BudgetSpent(
                "budget.buffer_bytes",
                f"{stored:,} bytes of the strategy's state after task '{task}', of "
                f"{self.buffer_bytes:,}",
                "give the strategy a smaller buffer (buffer_size, buffer_bytes), or raise it, "
                "under another --run_name",
            )


class BudgetSpent(RuntimeError):
    """Error of a run whose budget is spent; its exit status is 4.

    Args:
        name: of the limit.
        used: what was used of how much.
        advice: what to do.
    """

    exit_status = 4

    def __init__(
        self, name: str, used: str, advice: str = "raise it and give the same command"
    ) -> None:
        super().__init__(f"the budget is spent: {name} ({used}); {advice}")


class TaskLimit:
    """Limits of one task: its own, or what is left of those of the stream.

    Args:
        budget: of the run.
        ledger: costs of the finished tasks.

    Attributes:
        ended_by: the limit that ends the task before its last epoch, "" = none so far.

    Raises:
        BudgetSpent: if nothing is left of a limit of the stream.
    """

    def __init__(self, budget: RunBudget, ledger: Ledger) -> None:
        left = budget.stream.minus(ledger)
        self.ended_by = ""
        self._limits: dict[str, tuple[float, str]] = {}
        for name in _WORDS:
            own, rest = getattr(budget.task, name), getattr(left, name)
            found = [] if own is None else [(own, f"budget.task.{name} {own:,.4g}")]
            if rest is not None:
                found.append((rest, f"the {rest:,.4g} that are left of budget.stream.{name}"))
            if found:
                self._limits[name] = min(found)

    @property
    def limits_steps(self) -> bool:
        """Whether the number of steps is limited, not their time alone."""
        return bool({"train_samples", "train_flops"} & self._limits.keys())

    @property
    def needs_flops(self) -> bool:
        """Whether the operations of a step must be known."""
        return "train_flops" in self._limits

    def limit_steps(
        self, planned: int, samples_after: Callable[[int], int], flops_per_sample: float
    ) -> int:
        """Return the number of steps of the task within the limits.

        Args:
            planned: steps without limits.
            samples_after: number of steps -> samples in them.
            flops_per_sample: operations of a step divided by its samples, 0 = not known yet.

        Raises:
            BudgetSpent: if the limits are less than one step.
        """
        sample_costs = {"train_samples": 1.0}
        if flops_per_sample:
            sample_costs["train_flops"] = flops_per_sample
        for name in sample_costs.keys() & self._limits.keys():
            limit, words = self._limits[name]
            most = int(limit / sample_costs[name])
            steps = bisect_right(range(1, planned + 1), most, key=samples_after)
            if steps == 0:
                step = samples_after(1) * sample_costs[name]
                raise BudgetSpent(words, f"a step takes {step:,.4g}")
            if steps < planned:
                planned, self.ended_by = steps, words
        return planned

    def is_over(self, trainer: pl.Trainer, seconds: float) -> bool:
        """Stop a Trainer on all ranks once a task has taken its seconds; return whether it has."""
        limit, words = self._limits.get("seconds", (None, ""))
        if limit is None:
            return False
        if trainer.strategy.reduce_boolean_decision(seconds >= limit, all=False):
            trainer.should_stop, self.ended_by = True, words
        return bool(trainer.should_stop)


def budget_line(budget: RunBudget, ledger: Ledger) -> str:
    """Return what is used of a budget, as a sentence; "" without a limit of the stream or bytes."""
    total = ledger.total()
    used: dict[str, float] = {
        "train_samples": total.samples_new + total.samples_replayed,
        "train_flops": total.flops or 0.0,
        "seconds": total.seconds,
    }
    parts = [
        f"{used[name]:,.4g} of {limit:,.4g} {word}"
        for name, word in _WORDS.items()
        if (limit := getattr(budget.stream, name)) is not None
    ]
    if budget.buffer_bytes is not None:
        parts.append(f"{total.state_bytes:,} of {budget.buffer_bytes:,} bytes kept")
    return f"budget: {', '.join(parts)}" if parts else ""
