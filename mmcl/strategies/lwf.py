"""LwF distils from the model before the task (the teacher), on the task's own images.

Paper: Li and Hoiem 2016, arXiv:1606.09282.
Code followed: none; written from the equations.
Differs: there is no head to warm up, as a CLIP scores with class texts; the teacher sees the same
augmented images as the student; captions are distilled by the similarity of images and texts, and
answers by the whole distribution of every scored token, not of one word per sample.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmcl.core import (
    VLM,
    Batch,
    Chain,
    Output,
    Strategy,
    Task,
    forward,
    subset_weight,
    trainable_parameters,
)
from mmcl.core.model import eval_mode
from mmcl.layers.adapters import adapters_disabled, base_layers, keep_active_adapters
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.regularization import contrastive_kd_loss, kd_loss


class LwF(Strategy):
    """Learning without forgetting: knowledge distillation from an earlier model on current data.

    Adds ``alpha * T^2 * KL(teacher || student)`` over the classes known before this task, mean over
    the new samples of the global batch. Samples with captions are distilled over the (B, B)
    similarities of the batch, mean of both directions; there B is the samples of one process.
    Answers are distilled over the vocabulary, mean over the scored tokens of the new samples;
    accumulated micro-batches count by their new samples. The teacher is the same model called with
    older weights: no second model is held. In a chain it answers as the whole chain did in
    evaluation: with the prompts, gates and output transforms of that time.

    Args:
        alpha: weight of the distillation.
        temperature: T, softens both distributions.
        teacher: "previous" is the model at the end of the task before; "base" the model that the
            first task began with, without adapters and prompts, from the first task on and over
            all classes.
        distill_on: "new" are the task's own samples; "sources" those of the general or reference
            sets that the card mixes in, as in ZSCL (Zheng et al. 2023, arXiv:2303.06628).

    **Remembers** one copy of the trainable weights, at their own precision, and one number. During
    a task also the state of members of its chain that give prompts or transform outputs. With
    "base" only weights outside of adapters: nothing where only adapters are trainable.

    **Asks of the model** to be a torch module (it is called a second time with the old weights).
    """

    reads_weights = True

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 2.0,
        teacher: Literal["previous", "base"] = "previous",
        distill_on: Literal["new", "sources"] = "new",
    ) -> None:
        super().__init__()
        if alpha < 0 or temperature <= 0:
            raise ValueError(
                f"alpha is {alpha} and temperature {temperature}: give an alpha of 0 or more and a "
                "temperature above 0"
            )
        if teacher not in ("previous", "base"):
            raise ValueError(f"teacher is '{teacher}', expected 'previous' or 'base'")
        if distill_on not in ("new", "sources"):
            raise ValueError(f"distill_on is '{distill_on}', expected 'new' or 'sources'")
        self.alpha, self.temperature, self.distill_on = alpha, temperature, distill_on
        self.is_base = teacher == "base"
        self.teacher = Snapshot()
        self.known = -1
        # Not submodules: their weights are not trained, and their state is in the extra state.
        self._members: list[Strategy] = []

    def before_task(self, model: VLM, task: Task) -> None:
        """Copy the members of the chain that give prompts or transform outputs, as they are."""
        if not self.is_base and task.index:
            self._copy_members(model)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Store the weights that the teacher lacks: all of them, or those that are new.

        Raises:
            ValueError: if ``distill_on`` is "sources" and the task mixes in none.
        """
        if self.distill_on == "sources" and not task.mixture:
            raise ValueError(
                f"LwF needs samples of sources and task '{task.name}' mixes in none: name some "
                "under 'sources' and 'mixture' on the card, or take distill_on='new'"
            )
        if self.is_base and self.known < 0:
            outside = base_layers(cast(nn.Module, model))
            own = tuple(f"{name}." for name in outside)
            weights = trainable_parameters(model).items()
            self.teacher.take({n: p for n, p in weights if not n.startswith(own)})
            self.known = 0
        elif not self.is_base and not self.teacher.is_empty:
            # What the other members did for the task (new adapters, another decomposition of the
            # same weights) changes no output yet, so this is still the previous model.
            self.teacher.take(trainable_parameters(model))

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the distillation loss as "lwf"; with "previous" nothing in the first task."""
        if self.known < 0:
            return {}
        is_distilled = self._is_distilled(batch)
        count = samples = len(batch) if is_distilled is None else int(is_distilled.sum())
        logits = output.logits
        if output.sample_index is not None:
            if is_distilled is not None:
                logits = logits[is_distilled[output.sample_index]]
            count = len(logits)
        sizes = batch.global_batch
        is_new = self.distill_on == "new"
        total = None if sizes is None else sizes.new if is_new else sizes.from_sources
        # A rank without such samples takes part in the sums over ranks.
        weight = self.alpha * subset_weight(batch, count, samples, total)
        if not count:
            return {}
        index = None if is_distilled is None else is_distilled.nonzero().flatten()
        target = self._teacher_logits(model, batch if index is None else batch.take(index))
        if output.sample_index is not None:
            return {"lwf": weight * kd_loss(target.float(), logits.float(), self.temperature)}
        student = logits if index is None else logits[index]
        if batch.input_ids is None:
            known = student.shape[1] if self.is_base else min(self.known, student.shape[1])
            term = kd_loss(target[:, :known], student[:, :known], self.temperature)
        else:
            pairs = student if index is None else student[:, index]
            term = contrastive_kd_loss(target, pairs, self.temperature)
        return {"lwf": weight * term}

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store this model's weights as the next task's teacher, unless the base stays teacher."""
        if not self.is_base:
            self.teacher.take(trainable_parameters(model))
            # Between tasks the members themselves are the teacher's; before_task copies them.
            self._members = []
        self.known = max(self.known, max(task.class_ids, default=-1) + 1)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return of how many parameters and members of the chain the teacher consists."""
        return {} if self.is_base else {"teacher": len(self.teacher) + len(self._used_members())}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of classes known before the current task, -1 without a teacher.

        And the state of the teacher's members.
        """
        members = [dict(member.state_dict()) for member in self._members]
        return {"known": self.known, **({"members": members} if members else {})}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the number of classes of a checkpoint, and the teacher's members.

        Raises:
            RuntimeError: if the checkpoint has other members than were copied.
        """
        self.known = int(state["known"])
        stored = state.get("members", [])
        if stored and len(stored) != len(self._members):
            raise RuntimeError(
                f"the checkpoint's LwF has a teacher of {len(stored)} members and this chain "
                f"copied {len(self._members)}: attach the same chain and begin every task up to "
                "the checkpoint's before loading it"
            )
        self._members = self._members[: len(stored)]
        for member, own in zip(self._members, stored, strict=True):
            member.load_state_dict(own)

    def _is_distilled(self, batch: Batch) -> Tensor | None:
        """Return which samples are distilled, (B,) bool; None = all."""
        if self.distill_on == "new":
            return None if batch.is_replay is None else ~batch.is_replay
        if batch.source_ids is None:
            return torch.zeros_like(batch.task_ids, dtype=torch.bool)
        return batch.source_ids > 0

    def _used_members(self) -> list[Strategy]:
        """Return the members of the chain that give prompts or transform outputs."""
        members = self.root.leaves() if isinstance(self.root, Chain) else []
        hooks = ("prompts", "transform_output")
        return [m for m in members if m is not self and any(m.overrides(hook) for hook in hooks)]

    def _copy_members(self, model: VLM) -> None:
        # A copy shares the model and the chain, should a member refer to them.
        shared = [self.root, *cast(nn.Module, model).modules()]
        self._members = [
            copy.deepcopy(member, {id(one): one for one in shared}).eval()
            for member in self._used_members()
        ]

    def _teacher_logits(self, model: VLM, batch: Batch) -> Tensor:
        module = cast(nn.Module, model)
        with torch.no_grad(), eval_mode(module):
            if self.is_base or not self._members:
                with adapters_disabled(module) if self.is_base else nullcontext():
                    output: Output = functional_call(module, self.teacher.tensors, (batch,))
                return output.logits
            teacher = _Forward(module, [member.to(batch.labels.device) for member in self._members])
            old = {f"model.{name}": tensor for name, tensor in self.teacher.tensors.items()}
            with keep_active_adapters(module):
                output = functional_call(teacher, old, (batch,))
        return output.logits


class _Forward(nn.Module):
    """Module whose call is the forward pass of a model and members of a chain.

    So ``functional_call`` replaces the weights for embeddings that the members ask for as well.
    """

    def __init__(self, model: nn.Module, members: list[Strategy]) -> None:
        super().__init__()
        self.model = model
        self._chain = (Chain(members),)  # a tuple, so that it is no submodule

    def forward(self, batch: Batch) -> Output:
        """Forward pass with the members' prompts and output transforms."""
        return forward(cast(VLM, self.model), self._chain[0], batch)
