"""Joint training uses the data of all tasks so far; the upper bound of continual learning.

Paper: none. The usual upper bound, "multi-task" or "cumulative" in the papers.
Code followed: none.
Differs: old samples are mixed in once per epoch; ``restart`` starts each task from the initial
weights, as papers that train one model on the union do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmcl.core import Batch, ReplayPlan, Strategy, Task, device_of, trainable_parameters
from mmcl.core.model import VLM
from mmcl.memory import Snapshot
from mmcl.memory.distributed_fill import global_count


class Joint(Strategy):
    """Joint training: replay every old sample once in every epoch; the upper bound.

    A custom training loop must call ``replay_plan()`` when it builds a task's loader: it lists the
    samples, and the loader fetches them.

    Args:
        restart: at the start of every task, reset the model's trainable weights to those before the
            first task. Weights that were added later, or changed shape, are left alone.

    **Remembers** 16 bytes per task; with ``restart`` also a copy of the trainable weights.
    **Asks of the model** nothing.
    """

    def __init__(self, restart: bool = False) -> None:
        super().__init__()
        self.restart = restart
        self.initial = Snapshot()
        self._sizes: dict[int, int] = {}

    def begin_task(self, model: VLM, task: Task) -> None:
        """Reset the weights to the initial ones with ``restart``."""
        if not self.restart:
            return
        if self.initial.is_empty:
            self.initial.take(trainable_parameters(model))
            return
        initial = self.initial.tensors
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                if name in initial and initial[name].shape == parameter.shape:
                    parameter.copy_(initial[name])

    def replay_plan(self) -> ReplayPlan | None:
        """Return a replay plan of every sample of every finished task, once per epoch."""
        if not sum(self._sizes.values()):
            return None
        samples = [torch.arange(size) for size in self._sizes.values()]
        tasks = [torch.full((size,), task) for task, size in self._sizes.items()]
        return ReplayPlan(torch.cat(tasks), torch.cat(samples))

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store the task's number of samples, counted in the pass if the card has none."""
        size = task.size
        if not size:
            size = global_count(sum(len(batch) for batch in batches), device_of(model))
        self._sizes[task.index] = size

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of samples to replay."""
        return {"memory": sum(self._sizes.values())}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the size of every finished task."""
        return {"sizes": [[task, size] for task, size in self._sizes.items()]}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the sizes of a checkpoint."""
        self._sizes = {int(task): int(size) for task, size in state["sizes"]}
