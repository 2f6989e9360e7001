"""Whether a stream and a model belong together: questions need a model that answers in words."""

from __future__ import annotations

from mmcl.core import Task, TaskStream
from mmcl.core.model import answers_in_words

_NAMED = 3


def expect_suited(stream: TaskStream, model: object) -> None:
    """Check that a model can do what every task and probe of a stream asks.

    Raises:
        ValueError: naming the tasks that it cannot do.
    """
    asked = [task for task in stream.columns if task.kind == "answer"]
    others = [task for task in stream.columns if task.kind != "answer"]
    kind = type(model).__name__
    if asked and not answers_in_words(model):
        raise ValueError(
            f"the stream '{stream.name}' asks questions ({_names(asked)}), and {kind} cannot "
            "answer in words: take a model that does, such as mmcl.models.ImageTextToText, or a "
            "stream of classes or captions"
        )
    if others and answers_in_words(model):
        raise ValueError(
            f"the stream '{stream.name}' has tasks of kind '{others[0].kind}' ({_names(others)}), "
            f"and {kind} answers in words: take a stream of kind 'answer', or a model that "
            "compares, such as mmcl.models.OpenCLIP"
        )


def _names(tasks: list[Task]) -> str:
    named = ", ".join(f"'{task.name}'" for task in tasks[:_NAMED])
    rest = len(tasks) - _NAMED
    return f"{named} and {rest} more" if rest > 0 else named
