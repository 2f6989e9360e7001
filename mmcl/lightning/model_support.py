"""Checks that a model has what a run over a stream needs, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmcl.core import Task, TaskStream
from mmcl.core.model import (
    STEP_MEMBERS,
    MissingMembersError,
    is_generative_model,
    missing_members,
)
from mmcl.lightning.run_dir import RunDirectory

_NAMED_TASKS = 3
"""Tasks named in an error message."""


def check_model_supports_stream(stream: TaskStream, model: object) -> None:
    """Check that a model supports every task and eval-only task of a stream.

    Raises:
        MissingMembersError: if it lacks members that a run over the stream needs.
        ValueError: naming the tasks that it does not support.
    """
    generative = [task for task in stream.all_tasks if task.task_type == "instruction"]
    others = [task for task in stream.all_tasks if task.task_type != "instruction"]
    name = type(model).__name__
    if generative and not is_generative_model(model):
        raise ValueError(
            f"the stream '{stream.name}' has question-answering tasks ({_names(generative)}), and "
            f"{name} cannot generate text: use a model that does, such as "
            "mmcl.models.ImageTextToText, or a stream of classes or captions"
        )
    if others and is_generative_model(model):
        raise ValueError(
            f"the stream '{stream.name}' has tasks of task_type '{others[0].task_type}' "
            f"({_names(others)}), and {name} generates text: use a stream of task_type "
            "'instruction', or a contrastive model, such as mmcl.models.OpenCLIP"
        )
    if missing := missing_run_members(stream, model):
        raise MissingMembersError(model, missing)
    is_cyclic = any(task.repeat_of is not None for task in stream)
    if is_cyclic and getattr(model, "logit_scope", "seen") == "task":
        raise ValueError(
            "data.repeats trains tasks again, and logit_scope 'task' compares samples with the "
            "classes first met in their own task, of which a repeated task has none: use "
            "logit_scope 'seen'"
        )


def missing_run_members(stream: TaskStream, model: object) -> dict[str, list[str]]:
    """Return what a run needs -> names of the members for it that a model lacks."""
    needs: dict[str, tuple[str, ...]] = {"a run": (*STEP_MEMBERS, "transform")}
    if any(task.task_type == "classification" for task in stream.all_tasks):
        needs[f"a stream with classes ('{stream.name}')"] = ("set_classes",)
    found = {what: missing_members(model, members) for what, members in needs.items()}
    return {what: missing for what, missing in found.items() if missing}


def make_supported_module(make_module: Callable[[], Any], stream: TaskStream) -> Any:
    """Make a module, and check that its model has what the strategy and the stream need.

    Args:
        make_module: builds a ContinualModule.
        stream: the stream of the run.

    Raises:
        MissingMembersError: with all members that the model lacks, for either.
        ValueError: naming the tasks that the model does not support.
    """
    try:
        module = make_module()
    except MissingMembersError as error:
        missing = error.missing | missing_run_members(stream, error.model)
        raise MissingMembersError(error.model, missing) from error
    check_model_supports_stream(stream, module.model)
    return module


def pin_template_date(folder: RunDirectory, model: Any) -> None:
    """Let a model's chat template write the day of the run's first start, if it writes one.

    The day is in ``inputs.json``.
    """
    today: str | None = getattr(model, "template_date", None)
    if today is None:
        return
    inputs = folder.inputs()
    day = str(inputs.setdefault("template_date", today))
    if day != today:
        model.set_template_date(day)
    folder.save_inputs(inputs)


def _names(tasks: list[Task]) -> str:
    named = ", ".join(f"'{task.name}'" for task in tasks[:_NAMED_TASKS])
    rest = len(tasks) - _NAMED_TASKS
    return f"{named} and {rest} more" if rest > 0 else named
