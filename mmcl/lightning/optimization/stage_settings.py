"""Training settings of a task: those of the module, with those of its stage in their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from mmcl.core import Task
from mmcl.core.card import Stage
from mmcl.core.model import without_adapters
from mmcl.lightning.optimization.lr_schedules import LRSchedule, Schedule
from mmcl.lightning.optimization.optimizers import ParamGroup, parse_param_groups

STAGES: tuple[str, ...] = get_args(Stage)
_SCHEDULE = (
    "warmup_steps", "min_lr_ratio", "constant_lr_ratio", "cooldown_steps", "anneal_steps",
)  # fmt: skip
_ADAMW = ("learning_rate", "weight_decay", "betas")


@dataclass(frozen=True)
class StageSettings:
    """Settings of the tasks of one stage; None = the module's own.

    Args:
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        betas: AdamW's betas.
        lr_schedule: learning-rate schedule. With another one than the module's, its four arguments
            have their defaults and not the module's values.
        warmup_steps: see ``LRSchedule``, as the four that follow.
        min_lr_ratio: last rate divided by the base rate.
        constant_lr_ratio: constant rate of "infinite" divided by the base rate.
        cooldown_steps: steps from the base rate to the constant one.
        anneal_steps: steps of an annealed branch.
        param_groups: settings of parameters, in place of all of the module's.
        trainable: parts of the model ("image", "text", "projector" ...), or names of its parameters
            with wildcards, that are trained in this stage; its others are frozen meanwhile. What a
            strategy adds (adapters, prompts, heads) is trained as the strategy decides; [] = only
            that.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    lr_schedule: Schedule | None = None
    warmup_steps: int | float | None = None
    min_lr_ratio: float | None = None
    constant_lr_ratio: float | None = None
    cooldown_steps: int | float | None = None
    anneal_steps: int | float | None = None
    param_groups: Mapping[str, ParamGroup | float] | None = None
    trainable: Sequence[str] | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """Settings with which a task is trained.

    Args:
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        betas: AdamW's betas.
        schedule: of the learning rate.
        param_groups: pattern -> settings of its parameters.
        trainable: parts and parameters of the model that are trained; None = all that may be.
    """

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    schedule: LRSchedule
    param_groups: Mapping[str, ParamGroup]
    trainable: tuple[str, ...] | None = None

    def of_stage(self, stage: StageSettings) -> TrainingSettings:
        """Return these settings with those of a stage in their place.

        Raises:
            ValueError: if a value is out of range or has no effect.
        """
        given = {f.name: getattr(stage, f.name) for f in fields(stage)}
        given = {name: value for name, value in given.items() if value is not None}
        old = {name: getattr(self.schedule, name) for name in _SCHEDULE}
        kind = given.pop("lr_schedule", self.schedule.kind)
        if kind != self.schedule.kind:
            old = {"warmup_steps": self.schedule.warmup_steps}
        own = {name: given.pop(name) for name in _SCHEDULE if name in given}
        if "param_groups" in given:
            given["param_groups"] = parse_param_groups(given["param_groups"])
        if "trainable" in given:
            given["trainable"] = tuple(given["trainable"])
        return replace(self, schedule=LRSchedule(kind, **{**old, **own}), **given)


def resolve_stages(
    settings: TrainingSettings,
    stages: Mapping[Any, StageSettings | Mapping[str, Any]] | None,
    optimizer: Callable[..., Any] | None = None,
    scheduler: Callable[..., Any] | None = None,
) -> dict[str, TrainingSettings]:
    """Return the settings of each stage that has its own.

    Args:
        settings: of the module.
        stages: stage -> its settings.
        optimizer: of the module, if it replaces AdamW.
        scheduler: of the module, if it replaces ``lr_schedule``.

    Raises:
        ValueError: if a stage or key is unknown, or a value is out of range or has no effect.
    """
    resolved = {}
    for name, stage in (stages or {}).items():
        if name not in STAGES:
            raise ValueError(f"stages has '{name}': the stages of a task are {', '.join(STAGES)}")
        own = StageSettings(**stage) if isinstance(stage, Mapping) else stage
        given = [f.name for f in fields(own) if getattr(own, f.name) is not None]
        replaced = [key for key in given if optimizer is not None and key in _ADAMW]
        replaced += [
            key for key in given if scheduler is not None and key in ("lr_schedule", *_SCHEDULE)
        ]
        if replaced:
            other = "optimizer" if replaced[0] in _ADAMW else "lr_scheduler"
            raise ValueError(
                f"stages gives {name} {', '.join(replaced)}, which model.{other} replaces: leave "
                "one of the two out"
            )
        try:
            resolved[name] = settings.of_stage(own)
        except ValueError as error:
            raise ValueError(f"stages has {name}: {error}") from None
    return resolved


def task_span(tasks: Sequence[Task], index: int, stages: Collection[str]) -> tuple[int, int]:
    """Return the first and the last index of the tasks around one that have its settings.

    Args:
        tasks: of the stream, in training order.
        index: of the task.
        stages: stages with settings of their own; all others share the module's.
    """

    def settings_of(task: Task) -> str:
        return task.stage if task.stage in stages else ""

    own, first, last = settings_of(tasks[index]), index, index
    while first and settings_of(tasks[first - 1]) == own:
        first -= 1
    while last + 1 < len(tasks) and settings_of(tasks[last + 1]) == own:
        last += 1
    return first, last


def freeze_for_stage(
    model: nn.Module, names: Collection[str], trainable: Sequence[str] | None, stage: str
) -> None:
    """Freeze the parameters of a model that a stage does not train, and no others.

    Args:
        model: its parameters are changed.
        names: names of its parameters that may be trained, in any stage.
        trainable: parts of the model, or names with wildcards; None = all of ``names``.
        stage: for the error.

    Raises:
        ValueError: if an entry of ``trainable`` matches none of them.
    """
    declared = getattr(model, "parts", None)
    parts = declared() if callable(declared) else {}
    part_of = {id(p): part for part, parameters in parts.items() for p in parameters}
    bare = {without_adapters(name): p for name, p in model.named_parameters()}
    own = {name: p for name, p in bare.items() if name in names}
    chosen: set[str] = set(own) if trainable is None else set()
    for pattern in trainable or ():
        found = {
            n for n, p in own.items() if pattern == part_of.get(id(p)) or fnmatchcase(n, pattern)
        }
        if not found:
            known = sorted({part_of[id(p)] for p in own.values() if id(p) in part_of})
            raise ValueError(
                f"model.stages.{stage}.trainable has '{pattern}', which "
                f"{_no_match(pattern, [*parts, *bare], [*known, *own])} (parts that may be "
                f"trained: {', '.join(known) or 'none'})"
            )
        chosen |= found
    for name, parameter in own.items():
        parameter.requires_grad_(name in chosen)


@contextmanager
def all_stages_trainable(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Context in which every parameter that some stage trains requires gradients."""
    frozen = [
        p for name, p in model.named_parameters()
        if without_adapters(name) in names and not p.requires_grad
    ]  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _no_match(pattern: str, everything: Sequence[str], trainable: Sequence[str]) -> str:
    if any(pattern == name or fnmatchcase(name, pattern) for name in everything):
        return "the model's own settings or its strategy freeze: let them train it"
    near = get_close_matches(pattern, trainable, n=1, cutoff=0.5)
    return f"is no part of the model: did you mean '{near[0]}'?" if near else "is no part of it"
