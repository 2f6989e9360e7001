"""Settings in place of a card's: epochs, mixture and replay ratio, by task or stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmcl.core import Task, TaskStream
from mmcl.core.card import SOURCE_TYPES
from mmcl.core.card.schema import nearest
from mmcl.lightning.optimization.stage_settings import STAGES


@dataclass(frozen=True)
class StageData:
    """Data settings of the tasks of one stage, in place of the card's; None = the card's.

    Args:
        epochs: passes over the training data, 1 or more.
        mixture: name of a source of the card -> its fraction of every batch; {} = none.
        replay_ratio: fraction of every batch that is replayed.
    """

    epochs: int | None = None
    mixture: Mapping[str, float] | None = None
    replay_ratio: float | None = None


def apply_settings(
    stream: TaskStream,
    known: Iterable[str],
    task_epochs: Mapping[str, int],
    stages: Mapping[Any, StageData | Mapping[str, Any]],
) -> None:
    """Put the settings of a configuration in place of those of the card.

    Args:
        stream: as the card states it; its tasks are replaced.
        known: names of all tasks of the card.
        task_epochs: task -> its epochs, also in place of those of its stage.
        stages: stage -> settings of its tasks.

    Raises:
        ValueError: if a task, stage or source is unknown, or a value is out of range.
    """
    known = list(known)
    wrong = [name for name, n in task_epochs.items() if name not in known or n < 1]
    if wrong:
        raise ValueError(
            f"data.task_epochs gives '{wrong[0]}' {task_epochs[wrong[0]]} epochs: "
            f"give 1 or more to tasks of the card, {', '.join(known)}"
        )
    settings = {
        name: StageData(**own) if isinstance(own, Mapping) else own for name, own in stages.items()
    }
    for name, own in settings.items():
        _check(stream, name, own)
    numbers = {source.name: source.number for source in stream.sources}

    def changed(task: Task) -> Task:
        own = settings.get(task.stage, StageData())
        if own.epochs is not None:
            task = replace(task, epochs=own.epochs)
        if own.mixture is not None:
            mixture = tuple((numbers[name], share) for name, share in own.mixture.items())
            task = replace(task, mixture=mixture)
        if own.replay_ratio is not None:
            task = replace(task, replay_ratio=own.replay_ratio)
        name = stream[stream.first_occurrence(task.index)].name  # of a repeated task
        if name in task_epochs:
            task = replace(task, epochs=task_epochs[name])
        return task

    stream.tasks = tuple(changed(task) for task in stream.tasks)


def _check(stream: TaskStream, stage: str, own: StageData) -> None:
    if stage not in STAGES:
        raise ValueError(f"data.stages has '{stage}': the stages of a task are {', '.join(STAGES)}")
    where = f"data.stages.{stage}"
    if own.epochs is not None and own.epochs < 1:
        raise ValueError(f"{where}.epochs is {own.epochs}: give 1 or more")
    types = {source.name: source.task.task_type for source in stream.sources}
    for name in own.mixture or ():
        if name not in types:
            hint = nearest(name, list(types)) if types else "the card has no sources"
            raise ValueError(
                f"{where}.mixture has '{name}', which is no source of the card: {hint}"
            )
        for task in stream:
            if task.stage == stage and types[name] not in SOURCE_TYPES.get(task.task_type, ()):
                raise ValueError(
                    f"{where}.mixture has '{name}' of task_type '{types[name]}', and task "
                    f"'{task.name}' has task_type '{task.task_type}': one loss compares all "
                    "samples of a batch"
                )
    shares = [*(own.mixture or {}).values(), own.replay_ratio or 0.0]
    if own.replay_ratio is not None and not 0 < own.replay_ratio < 1:
        raise ValueError(f"{where}.replay_ratio is {own.replay_ratio}: give more than 0, below 1")
    if any(not 0 < share < 1 for share in shares[:-1]) or sum(shares) >= 1:
        raise ValueError(
            f"{where} mixes in {', '.join(f'{share:g}' for share in shares if share)} of every "
            "batch: give fractions above 0 that leave room for new samples"
        )


def unused_stages(stream: TaskStream, settings: Mapping[str, Iterable[str]]) -> list[str]:
    """Return a sentence for each key whose stages no task has.

    Args:
        stream: of the run.
        settings: key of the configuration -> the stages that it has settings for.
    """
    there = {task.stage for task in stream}
    idle = {key: [name for name in stages if name not in there] for key, stages in settings.items()}
    return [
        f"{key} has settings for {', '.join(names)}, and no task is of that stage "
        f"(tasks are {', '.join(sorted(there))})"
        for key, names in idle.items()
        if names
    ]
