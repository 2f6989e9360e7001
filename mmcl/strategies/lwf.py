"""LwF keeps the answers of the model it was before the task, on the task's own pictures.

Paper: Li and Hoiem 2016, arXiv:1606.09282.
Code followed: none; written from the equations.
Differs: there is no head to warm up, as a CLIP scores with class texts; the teacher sees the same
augmented pictures as the student; rows with captions keep the likeness of pictures and texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmcl.core import VLM, Batch, Output, Strategy, Task, trainable
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.distillation import distil, distil_pairs
from mmcl.ops.evaluation import evaluating


class LwF(Strategy):
    """Learning without forgetting: distil from the previous model on current rows.

    Adds ``alpha * T^2 * KL(teacher || student)`` over the classes known before this task, mean over
    the new rows of the batch. Rows with captions are distilled over the (B, B) likeness of the
    batch, mean of both directions; there B is the rows of one process.

    Args:
        alpha: weight of the distillation.
        temperature: T, softens both answers.

    **Remembers** one copy of the trainable weights, at their own precision, and one number.

    **Asks of the model** to be a torch module (it is called a second time with the old weights).
    """

    def __init__(self, alpha: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()
        if alpha < 0 or temperature <= 0:
            raise ValueError(
                f"alpha is {alpha} and temperature {temperature}: give an alpha of 0 or more and a "
                "temperature above 0"
            )
        self.alpha, self.temperature = alpha, temperature
        self.teacher = Snapshot()
        self.known = 0

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the distillation as "lwf"; nothing before the first task's end."""
        if self.teacher.is_empty or not len(batch):
            return {}
        rows = None
        if batch.recalled is not None:
            rows = (~batch.recalled).nonzero().flatten()
            if not len(rows):
                return {}
            batch = batch.take(rows)
        answer = output.logits if rows is None else output.logits[rows]
        taught = self._ask_teacher(model, batch)
        if batch.tokens is None:
            known = min(self.known, answer.shape[1])
            term = distil(taught[:, :known], answer[:, :known], self.temperature)
        else:
            pairs = answer if rows is None else answer[:, rows]
            term = distil_pairs(taught, pairs, self.temperature)
        return {"lwf": self.alpha * term}

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Make this model the teacher of the next task."""
        self.teacher.take(trainable(model))
        self.known = max(self.known, max(task.labels, default=-1) + 1)

    def holdings(self) -> Mapping[str, int]:
        """Return how many parameters the teacher has of its own."""
        return {"teacher": len(self.teacher)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of classes known before the current task."""
        return {"known": self.known}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of classes of a checkpoint."""
        self.known = int(state["known"])

    def _ask_teacher(self, model: VLM, batch: Batch) -> Tensor:
        module = cast(nn.Module, model)
        with torch.no_grad(), evaluating(module):
            answer: Output = functional_call(module, self.teacher.tensors, (batch,))
        return answer.logits
