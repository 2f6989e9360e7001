"""LwF keeps the answers of the model it was before the task, on the task's own pictures.

Paper: Li and Hoiem 2016, arXiv:1606.09282.
Code followed: none; written from the equations.
Differs: there is no head to warm up, as a CLIP scores with class texts; the teacher sees the same
augmented pictures as the student; rows with captions keep the likeness of pictures and texts, and
answers keep the whole distribution of every scored token, not of one word a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmcl.core import VLM, Batch, Output, Strategy, Task, trainable
from mmcl.core.rest import evaluating
from mmcl.layers.bypass import adapted, bypassed
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.distillation import distil, distil_pairs


class LwF(Strategy):
    """Learning without forgetting: distil from an earlier model on current rows.

    Adds ``alpha * T^2 * KL(teacher || student)`` over the classes known before this task, mean over
    the new rows of the batch. Rows with captions are distilled over the (B, B) likeness of the
    batch, mean of both directions; there B is the rows of one process. Rows that are answered are
    distilled over the vocabulary, mean over the scored tokens of the new rows. The teacher is this
    very model called with older weights: no second one is held.

    Args:
        alpha: weight of the distillation.
        temperature: T, softens both answers.
        teacher: "previous" is the model at the end of the task before; "base" the model that the
            first task began with, adapters switched off, from the first task on and over all
            classes. In a chain LwF stands behind what adapts the model.
        rows: "new" are the task's own; "sources" those of the general or reference sets that the
            card mixes in, as ZSCL distils (Zheng et al. 2023, arXiv:2303.06628).

    **Remembers** one copy of the trainable weights, at their own precision, and one number. With
    "base" only of weights outside of adapters, so where only adapters learn it is nothing.

    **Asks of the model** to be a torch module (it is called a second time with the old weights).
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 2.0,
        teacher: Literal["previous", "base"] = "previous",
        rows: Literal["new", "sources"] = "new",
    ) -> None:
        super().__init__()
        if alpha < 0 or temperature <= 0:
            raise ValueError(
                f"alpha is {alpha} and temperature {temperature}: give an alpha of 0 or more and a "
                "temperature above 0"
            )
        if teacher not in ("previous", "base"):
            raise ValueError(f"teacher is '{teacher}', expected 'previous' or 'base'")
        if rows not in ("new", "sources"):
            raise ValueError(f"rows is '{rows}', expected 'new' or 'sources'")
        self.alpha, self.temperature, self.rows = alpha, temperature, rows
        self.is_base = teacher == "base"
        self.teacher = Snapshot()
        self.known = -1

    def begin_task(self, model: VLM, task: Task) -> None:
        """Note the weights that the teacher lacks: all of them, or those that are new.

        Raises:
            ValueError: if rows of sources are asked for and the task mixes in none.
        """
        if self.rows == "sources" and not task.mix:
            raise ValueError(
                f"LwF distils on rows of sources and task '{task.name}' mixes in none: name some "
                "under 'sources' and 'mix' on the card, or take rows='new'"
            )
        if self.is_base and self.known < 0:
            outside = adapted(cast(nn.Module, model))
            own = tuple(f"{name}." for name in outside)
            learning = trainable(model).items()
            self.teacher.take({n: p for n, p in learning if not n.startswith(own)})
            self.known = 0
        elif not self.is_base and not self.teacher.is_empty:
            # What a strategy adds for a task changes no answer yet: the teacher has it as it came.
            self.teacher.take({**trainable(model), **self.teacher.tensors})

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the distillation as "lwf"; of the previous model nothing in the first task."""
        if self.known < 0 or not len(batch):
            return {}
        rows, scores = None, output.logits
        is_asked = self._asked(batch)
        if is_asked is not None:
            rows = is_asked.nonzero().flatten()
            if not len(rows):
                return {}
            if output.rows is not None:
                scores = scores[is_asked[output.rows]]
            batch = batch.take(rows)
        if output.rows is not None:
            if not len(scores):
                return {}
            taught = self._ask_teacher(model, batch)
            term = distil(taught.float(), scores.float(), self.temperature)
            return {"lwf": self.alpha * term}
        answer = scores if rows is None else scores[rows]
        taught = self._ask_teacher(model, batch)
        if batch.tokens is None:
            known = answer.shape[1] if self.is_base else min(self.known, answer.shape[1])
            term = distil(taught[:, :known], answer[:, :known], self.temperature)
        else:
            pairs = answer if rows is None else answer[:, rows]
            term = distil_pairs(taught, pairs, self.temperature)
        return {"lwf": self.alpha * term}

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Make this model the teacher of the next task, unless the first one goes on teaching."""
        if not self.is_base:
            self.teacher.take(trainable(model))
        self.known = max(self.known, max(task.labels, default=-1) + 1)

    def holdings(self) -> Mapping[str, int]:
        """Return how many parameters the teacher has of its own."""
        return {} if self.is_base else {"teacher": len(self.teacher)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of classes known before the current task, -1 without a teacher."""
        return {"known": self.known}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of classes of a checkpoint."""
        self.known = int(state["known"])

    def _asked(self, batch: Batch) -> Tensor | None:
        """Return which rows are distilled, (B,) bool; None = all."""
        if self.rows == "new":
            return None if batch.recalled is None else ~batch.recalled
        if batch.source is None:
            return torch.zeros_like(batch.task, dtype=torch.bool)
        return batch.source > 0

    def _ask_teacher(self, model: VLM, batch: Batch) -> Tensor:
        module = cast(nn.Module, model)
        asked = bypassed(module) if self.is_base else nullcontext()
        with torch.no_grad(), evaluating(module), asked:
            answer: Output = functional_call(module, self.teacher.tensors, (batch,))
        return answer.logits
