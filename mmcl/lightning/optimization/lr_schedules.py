"""Learning-rate schedules over a task and over the tasks of a stream, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mmcl.core import Task

Schedule = Literal["constant", "cosine", "rewarm_cosine", "infinite", "meta"]
_OVER_TASKS = ("infinite", "meta")
_DEFAULTS: dict[str, dict[str, float]] = {
    "rewarm_cosine": {"min_lr_ratio": 0.1},
    "infinite": {
        "min_lr_ratio": 0.1, "constant_lr_ratio": 0.5, "cooldown_steps": 0.25, "anneal_steps": 0.1,
    },
    "meta": {"min_lr_ratio": 0.0},
}  # fmt: skip
"""Schedule -> its own arguments with their defaults; another one is refused."""


@dataclass(frozen=True)
class SchedulePosition:
    """Position of a task in the tasks that share a schedule.

    Args:
        start: share of the span's samples before this task, in [0, 1).
        share: share of the span's samples that this task has, in (0, 1].
        is_first: whether the span begins with this task.
        last: index of the span's last task.
    """

    start: float = 0.0
    share: float = 1.0
    is_first: bool = True
    last: int = 0


@dataclass(frozen=True)
class LRSchedule:
    """Learning-rate schedule: the factor of the base rate at every step, so it has no state.

    n is the number of finished steps of the task, N its steps, w the steps of the warm-up, and m
    ``min_lr_ratio``. In the warm-up the factor is (n + 1) / w. After it:

    * ``constant``: 1.
    * ``cosine``, as in open_clip: (1 + cos(pi x)) / 2 with x = (n - w) / (N - w).
    * ``rewarm_cosine``: m + (1 - m) (1 + cos(pi x)) / 2 with x = (n - w) / (N - 1 - w): every task
      is warmed up again and decayed to m in its last step (Ibrahim et al. 2024, arXiv:2403.08763).
    * ``infinite`` (the same paper), with c = ``constant_lr_ratio`` and d cool-down steps: in the
      first task of its span c + (1 - c) (1 + cos(pi (n - w) / d)) / 2 until step w + d, then c;
      in every later task c from its first step. After each task an annealed branch of a =
      ``anneal_steps`` steps is trained from it, with c (m / c) ** (k / a) in its steps k = 1 to a.
      The branch is evaluated and released; the next task is trained from the weights before it.
    * ``meta``: m + (1 - m) (1 + cos(pi P)) / 2 with P = (samples of the span's earlier tasks + n /
      N of this one's) / (samples of the span), a sample counted once per epoch: one cosine over all
      tasks, whose warm-up is a factor of it in the first task only.

    A span is a run of consecutive tasks with the same settings, see ``ContinualModule.stages``.

    Args:
        kind: of the schedule.
        warmup_steps: steps of linear warm-up; below 1 a share of the task's steps, rounded up as in
            transformers.
        min_lr_ratio: last rate divided by the base rate, in [0, 1).
        constant_lr_ratio: rate of the constant part divided by the base rate, in (0, 1].
        cooldown_steps: steps from the base rate to the constant one; below 1 a share.
        anneal_steps: steps of the annealed branch of each task; below 1 a share of its steps.

    Raises:
        ValueError: if a value is out of range, or has no effect on this kind.
    """

    kind: Schedule = "constant"
    warmup_steps: int | float = 0
    min_lr_ratio: float | None = None
    constant_lr_ratio: float | None = None
    cooldown_steps: int | float | None = None
    anneal_steps: int | float | None = None

    def __post_init__(self) -> None:
        own: dict[str, Any] = _DEFAULTS.get(self.kind, {})
        for name in [field.name for field in fields(self)][2:]:
            value = getattr(self, name)
            if value is not None and name not in own:
                used = ", ".join(kind for kind, has in _DEFAULTS.items() if name in has)
                raise ValueError(
                    f"{name} is {value} and lr_schedule '{self.kind}', which does not use it: "
                    f"leave it out, or use lr_schedule {used}"
                )
            if value is None and name in own:
                object.__setattr__(self, name, own[name])
        expect_steps("warmup_steps", self.warmup_steps)
        for name in ("cooldown_steps", "anneal_steps"):
            expect_steps(name, getattr(self, name) or 0)
        if self.min_lr_ratio is not None and not 0 <= self.min_lr_ratio < 1:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}, expected 0 or more, below 1")
        if self.kind == "rewarm_cosine" and not self.warmup_steps:
            raise ValueError(
                "lr_schedule is 'rewarm_cosine' and warmup_steps 0: give the steps of the "
                "re-warming, such as 0.01 of a task's, or use lr_schedule 'cosine'"
            )
        if self.constant_lr_ratio is not None:
            low, high = self.min_lr_ratio or 0.0, self.constant_lr_ratio
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"min_lr_ratio is {low} and constant_lr_ratio {high}: the annealing is "
                    "exponential from the constant rate to the last one, so give 0 < min_lr_ratio "
                    "<= constant_lr_ratio <= 1"
                )
            if not self.anneal_steps:
                raise ValueError(
                    "anneal_steps is 0 and lr_schedule 'infinite', whose annealed branches are "
                    "what is evaluated: give a number of steps, or a share of a task's, such as 0.1"
                )

    @property
    def is_active(self) -> bool:
        """Whether the rate is ever another than the base rate."""
        return self.kind != "constant" or self.warmup_steps > 0

    @property
    def needs_steps(self) -> bool:
        """Whether the number of a task's steps must be known."""
        return self.kind != "constant" or 0 < self.warmup_steps < 1

    @property
    def spans_tasks(self) -> bool:
        """Whether the rate depends on the position of the task in the stream."""
        return self.kind in _OVER_TASKS

    def branch_steps(self, steps: int) -> int:
        """Return the steps of the annealed branch after a task of ``steps`` steps, 0 = none."""
        return _count(self.anneal_steps or 0, steps) if self.kind == "infinite" else 0

    def factor(self, step: int, steps: int, position: SchedulePosition | None = None) -> float:
        """Return the factor of the base learning rate in one step.

        Args:
            step: finished optimizer steps of this task, from 0; of an annealed branch: the task's
                ``steps`` and those of the branch.
            steps: optimizer steps of the task, without its branch.
            position: of the task in its span, None = alone.
        """
        position = position or SchedulePosition()
        warmup = _count(self.warmup_steps, steps)
        lowest = self.min_lr_ratio or 0.0
        is_warm = not self.spans_tasks or position.is_first
        ramp = (step + 1) / warmup if step < warmup and is_warm else 1.0
        if self.kind == "meta":
            progress = position.start + position.share * min(1.0, step / max(1, steps))
            return ramp * _cosine(progress, lowest)
        if self.kind == "infinite" and step >= steps:
            constant, branch = float(self.constant_lr_ratio or 1), self.branch_steps(steps)
            return constant * math.pow(lowest / constant, (step - steps + 1) / max(1, branch))
        if step < warmup and is_warm:
            return ramp
        if self.kind == "infinite":
            constant, cooldown = float(self.constant_lr_ratio or 1), self._cooldown(steps)
            if not position.is_first or step - warmup >= cooldown:
                return constant
            return _cosine((step - warmup) / cooldown, constant)
        if self.kind == "constant":
            return 1.0
        last = steps - 1 if self.kind == "rewarm_cosine" else steps
        return _cosine((step - warmup) / max(1, last - warmup), lowest)

    def expect_room(self, steps: int, task: str) -> None:
        """Check that warm-up and cool-down fit into the first task of an infinite schedule.

        Raises:
            ValueError: naming the steps.
        """
        if self.kind != "infinite":
            return
        needed = _count(self.warmup_steps, steps) + self._cooldown(steps)
        if needed > steps:
            raise ValueError(
                f"warmup_steps and cooldown_steps make {needed} steps, and task '{task}', with "
                f"which the infinite schedule begins, has {steps}: give smaller numbers, or shares "
                "of its steps below 1"
            )

    def _cooldown(self, steps: int) -> int:
        return _count(self.cooldown_steps or 0, steps)


def _cosine(progress: float, lowest: float) -> float:
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _count(steps: int | float, total: int) -> int:
    """Return a number of steps; below 1 it is a share of ``total``, rounded up."""
    return math.ceil(steps * total) if steps < 1 else int(steps)


def expect_steps(name: str, steps: int | float) -> None:
    """Check a whole number of steps, or a share of a task's steps below 1.

    Raises:
        ValueError: if it is neither.
    """
    if steps < 0 or (steps > 1 and steps % 1) or math.isnan(steps):
        raise ValueError(
            f"{name} is {steps}: give a number of steps, or a share of a task's steps below 1, "
            "such as 0.03"
        )


def schedule_position(
    tasks: Sequence[Task], first: int, last: int, index: int, epochs: int
) -> SchedulePosition:
    """Return the position of a task in its span.

    Args:
        tasks: of the stream, with their sizes.
        first: index of the span's first task.
        last: index of the span's last task.
        index: of the task.
        epochs: of tasks that state none.

    Raises:
        ValueError: if the size of a task is not known, so that the span has no end.
    """
    span = tasks[first : last + 1]
    unknown = [task.name for task in span if not task.size]
    if unknown:
        raise ValueError(
            f"lr_schedule 'meta' needs the samples of all tasks, and those of '{unknown[0]}' are "
            "not known: state its size on the card, or use lr_schedule 'infinite'"
        )
    samples = [task.size * (task.epochs or epochs) for task in span]
    total, before = sum(samples), sum(samples[: index - first])
    share = samples[index - first] / total
    return SchedulePosition(before / total, share, is_first=index == first, last=last)
