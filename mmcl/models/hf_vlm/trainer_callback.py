"""Callback of transformers' Trainer that calls a strategy's hooks around one task.

A file of its own: it has nothing of a model, but needs transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import TrainerCallback

from mmcl.core import VLM, Batch, StepModule, Task, begin_task, device_of, end_task


class HFTrainerCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Callback that runs a strategy's hooks around the task and the steps of a ``Trainer``.

    The Trainer's model is a ``mmcl.StepModule``; its ``data_collator`` returns {"batch": Batch}.
    The task begins when the callback is made, since a Trainer builds its optimizer before its
    callbacks are called: make the callback first. Every task takes a new Trainer. Its own
    checkpoints hold tensors only; save ``module.state_dict()`` by ``torch.save`` between tasks.

    Args:
        module: model and strategy.
        task: the task of this Trainer.
        task_loader: the task's own samples in the dataset's order, each once and without
            augmentation; on several devices, this rank's stride of them. ``task_pass()`` of a
            ``mmcl.replay_loader`` is one.
    """

    def __init__(self, module: StepModule, task: Task, task_loader: Iterable[Batch]) -> None:
        self.module, self.task, self.task_loader = module, task, task_loader
        begin_task(self._model, module.strategy, task)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the strategy project the final gradients."""
        self.module.strategy.project_gradients(self._model)

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Pass an accumulated batch to the strategy."""
        done = self.module.last_step
        if done is None:
            raise RuntimeError(
                "the Trainer took a step without the StepModule: give Trainer(model=module) the "
                "module of this callback"
            )
        self.module.strategy.after_step(self._model, done.batch, done.output)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Pass the finished step to the strategy."""
        self.on_substep_end()

    def on_train_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        """End the task with the strategy's exact pass over its data, in bfloat16 if ``args.bf16``.

        transformers calls this hook outside of autocast.
        """
        device = device_of(self._model).type
        # Cached casts would be stale after a strategy wrote new weights.
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            end_task(self._model, self.module.strategy, self.task, self.task_loader)

    @property
    def _model(self) -> VLM:
        return cast(VLM, self.module.model)
