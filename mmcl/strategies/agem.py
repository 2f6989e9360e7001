"""A-GEM projects each gradient so that the loss on the replay buffer does not rise, to first order.

Paper: Chaudhry et al. 2019, arXiv:1812.00420.
Code followed: none; equation 11 is one line.
Differs: the buffer holds equally many samples of every task, chosen by hash when the task ends,
not a ring per class; samples are stored as the pass without augmentation yields them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import (
    IGNORE_INDEX,
    Batch,
    Reference,
    Strategy,
    Task,
    device_of,
    forward,
    trainable_parameters,
)
from mmcl.core.distributed import all_reduce_sum, rank_and_world
from mmcl.core.model import VLM
from mmcl.core.seeding import generator
from mmcl.memory import TensorBuffer
from mmcl.memory.distributed_fill import (
    TOKEN_PADDING,
    batch_columns,
    fill_buffer,
    global_count,
    rank_stride,
    replayed_batch,
)
from mmcl.ops.gradient_projection import agem_projection

_PADDING = {**TOKEN_PADDING, "questions": 0}


class AGEM(Strategy):
    """Averaged gradient episodic memory: gradients projected against that of a replay buffer.

    The gradient is that of the model's trainable parameters, taken as one vector. The reference
    loss is the model's own on buffer samples, with the prompts and heads of all members of a chain.

    Args:
        buffer_size: samples held over all tasks, 0 = not bounded by samples.
        reference_batch_size: samples drawn at every step for the reference gradient, at least 1.
        seed: seed of selection and draws.
        buffer_bytes: buffer size in bytes, 0 = not bounded by bytes.

    **Remembers** per sample the image (3 H W bytes), label and task (16 bytes), 16 bytes for
    priority and group, and 9 bytes per text token of captions, 17 of answers; the question as well
    where the model has a routing encoder. **Asks of the model** nothing.
    """

    def __init__(
        self,
        buffer_size: int = 500,
        reference_batch_size: int = 64,
        seed: int = 0,
        buffer_bytes: int = 0,
    ) -> None:
        super().__init__()
        if reference_batch_size < 1:
            raise ValueError(f"reference_batch_size is {reference_batch_size}: draw at least 1")
        self.reference_batch_size = reference_batch_size
        self.seed = seed
        limits = {"capacity": buffer_size, "capacity_bytes": buffer_bytes}
        self.memory = TensorBuffer(**limits, seed=seed, balanced=True, padded_columns=_PADDING)
        self._steps = 0
        self._has_trainable = True

    def project_gradients(self, model: VLM) -> None:
        """Remove from ``.grad`` the component that points against the buffer's gradient."""
        parameters = list(trainable_parameters(model).values())
        if not len(self.memory) or not parameters:
            return
        reference = self._reference(model, parameters)
        self._steps += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        edited, is_changed = agem_projection(gradients, reference)
        if not is_changed:
            return
        for parameter, gradient in zip(parameters, edited, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                # In place: under DDP a gradient may be a view into its communication bucket.
                parameter.grad.copy_(gradient)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store samples of this task in the buffer, and evict some of older tasks."""
        has_encoder = getattr(model, "routing_encoder", None) is not None
        columns = partial(_columns_of, with_questions=has_encoder)
        fill_buffer(self.memory, batches, task.index, columns, device_of(model))
        self._has_trainable = bool(trainable_parameters(model))

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of samples in the buffer."""
        return {"memory": len(self.memory)}

    def inactive_parts(self) -> tuple[str, ...]:
        """Report an empty buffer, and a model without trainable parameters."""
        found = "the model has no trainable parameters, so no gradient was projected"
        return super().inactive_parts() + (() if self._has_trainable else (found,))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps, which seeds the draws."""
        return {"steps": self._steps}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the number of steps of a checkpoint."""
        self._steps = int(state["steps"])

    def _reference(self, model: VLM, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """Return the gradient of the mean loss over the draw, the same on all ranks."""
        device = device_of(model)
        count = min(self.reference_batch_size, len(self.memory))
        index = self.memory.sample_indices(count, generator(self.seed, self._steps))
        world = rank_and_world()[1]
        # Each rank takes all of a draw smaller than the number of ranks: a rank without samples
        # would miss the sums that others wait for.
        index = rank_stride(index) if len(index) >= world else index
        batch = _batch_of(self.memory.get(index)).to(device)
        with torch.enable_grad():
            loss = model.loss(forward(model, self.root, batch), batch)
            if world > 1:
                # Before the gradient is taken: that of gathered captions sums all ranks' losses.
                counted = _samples_in_loss(batch)
                loss = loss * (counted / max(1, global_count(counted, device)))
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        return [all_reduce_sum(gradient) for gradient in gradients]


def _samples_in_loss(batch: Batch) -> int:
    """Return how many samples, or scored tokens of answers, the loss is a mean of."""
    is_caption = batch.input_ids is not None and not batch.is_generative
    return len(batch) if is_caption else int((batch.labels != IGNORE_INDEX).sum())


def _columns_of(batch: Batch, with_questions: bool) -> dict[str, Tensor]:
    if batch.image_owner is not None:
        raise ValueError(
            "AGEM was given samples that share or lack images and stores one image per sample: "
            "use ExperienceReplay for such data"
        )
    if batch.image_inputs:
        raise ValueError(
            "AGEM was given what the model's own processor makes of images, and it stores images "
            "of one size: give the model image_inputs='square', or use ExperienceReplay"
        )
    columns = batch_columns(batch, "images", "features")
    if with_questions and batch.references:
        texts = [list(reference.question.encode()) for reference in batch.references]
        rows = [torch.tensor(text, dtype=torch.uint8) for text in texts]
        columns["questions"] = pad_sequence(rows, batch_first=True)
    return columns


def _batch_of(columns: Mapping[str, Tensor]) -> Batch:
    batch = replayed_batch(columns)
    if "questions" not in columns:
        return batch
    texts = [bytes(row[row != 0].tolist()).decode() for row in columns["questions"]]
    return replace(batch, references=tuple(Reference(text, ("",)) for text in texts))
