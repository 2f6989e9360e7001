"""AGEM: never step where the loss on remembered rows would rise, to first order.

Paper: Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM, arXiv:1812.00420.
Code followed: none; equation 11 is one line.
Where we differ: the memory holds equally many of every task, chosen by hash when the task ends,
not a ring per class; rows are as the un-augmented pass gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmcl.core import UNSCORED, Batch, Strategy, Task, device_of, run, trainable
from mmcl.core.distributed import rank_and_world, sum_over_ranks
from mmcl.core.model import VLM
from mmcl.core.randomness import generator
from mmcl.memory import Rows, fill_rows, global_rows, own_stride
from mmcl.ops.gradients import project_away

_OPTIONAL = ("images", "features", "tokens", "mask")
_GROWING = {"tokens": 0, "mask": 0, "labels": UNSCORED}


class AGEM(Strategy):
    """Project each gradient off the direction that hurts the memory.

    The gradient is that of the model's trainable parameters, taken as one vector. The reference
    loss is the model's own on remembered rows, without the prompts or heads of other members of a
    chain.

    Args:
        samples: rows remembered over all tasks, 0 = not bounded by rows.
        reference_rows: rows drawn at every step for the reference gradient, at least 1.
        seed: of choice and draws.
        memory_bytes: bytes remembered, 0 = not bounded by bytes.

    **Remembers** per row the picture (3 H W bytes), label and task (16 bytes), 16 bytes of marks,
    and 9 bytes per text token of captions, 17 of answers. **Asks of the model** nothing.
    """

    def __init__(
        self,
        samples: int = 500,
        reference_rows: int = 64,
        seed: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        super().__init__()
        if reference_rows < 1:
            raise ValueError(f"reference_rows is {reference_rows}: draw at least 1")
        self.reference_rows = reference_rows
        self.seed = seed
        self.memory = Rows(
            samples, capacity_bytes=memory_bytes, seed=seed, balanced=True, growing=_GROWING
        )
        self._steps = 0

    def project(self, model: VLM) -> None:
        """Take out of ``.grad`` what points against the memory's gradient."""
        parameters = list(trainable(model).values())
        if not len(self.memory) or not parameters:
            return
        reference = self._reference(model, parameters)
        self._steps += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        edited, is_changed = project_away(gradients, reference)
        if not is_changed:
            return
        for parameter, gradient in zip(parameters, edited, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                # In place: under DDP a gradient may be a view into its communication bucket.
                parameter.grad.copy_(gradient)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store rows of this task, and give up rows of older ones for them."""
        fill_rows(self.memory, batches, task.index, _columns_of, device_of(model))

    def holdings(self) -> Mapping[str, int]:
        """Return how many rows are remembered."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps done, which seeds the draws."""
        return {"steps": self._steps}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of steps of a checkpoint."""
        self._steps = int(state["steps"])

    def _reference(self, model: VLM, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """Return the gradient of the mean loss over the draw, the same on all ranks."""
        device = device_of(model)
        count = min(self.reference_rows, len(self.memory))
        places = self.memory.choose(count, generator(self.seed, self._steps))
        world = rank_and_world()[1]
        # A draw smaller than the number of ranks is taken whole by each: a rank without rows
        # would miss the sums that others wait for.
        places = own_stride(places) if len(places) >= world else places
        batch = _batch_of(self.memory.take(places)).to(device)
        with torch.enable_grad():
            loss = model.loss(run(model, self, batch), batch)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        if world == 1:
            return gradients
        # The loss is a mean over rows, of answers over scored tokens.
        counted = int((batch.labels != UNSCORED).sum()) if batch.is_answered else len(batch)
        part = counted / max(1, global_rows(counted, device))
        return [sum_over_ranks(gradient * part) for gradient in gradients]


def _columns_of(batch: Batch) -> dict[str, Tensor]:
    if batch.owner is not None:
        raise ValueError(
            "AGEM was given rows that share or lack pictures and remembers one picture for each "
            "row: use ExperienceReplay for such data"
        )
    columns = {"labels": batch.labels, "task": batch.task}
    for name in _OPTIONAL:
        value = getattr(batch, name)
        if value is not None:
            columns[name] = value
    if batch.tokens is not None and batch.mask is None:
        columns["mask"] = torch.ones_like(batch.tokens, dtype=torch.bool)
    return columns


def _batch_of(rows: Mapping[str, Tensor]) -> Batch:
    return Batch(
        images=rows.get("images"),
        labels=rows["labels"],
        task=rows["task"],
        tokens=rows.get("tokens"),
        mask=rows.get("mask"),
        features=rows.get("features"),
        recalled=torch.ones(len(rows["labels"]), dtype=torch.bool),
    )
