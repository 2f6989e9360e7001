"""Joint: train on the data of all tasks so far; what a learner that forgets nothing would reach.

Paper: none; the usual upper bound, "multi-task" or "cumulative" in the papers.
Code followed: none.
Where we differ: old samples are visited once an epoch among the new; ``restart`` starts each task
from the first weights, as papers that train one model on the union do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmcl.core import Batch, Recall, Strategy, Task, device_of, trainable
from mmcl.core.model import VLM
from mmcl.memory import Snapshot, global_rows


class Joint(Strategy):
    """Recall every old sample once in every epoch.

    A loop of the user's own must read ``recall()`` when it builds a task's loader: it names the
    samples, and the loader fetches them.

    Args:
        restart: at the start of every task, put the model's trainable weights back to what they
            were before the first. Weights that arrived later, or changed shape, are left alone.

    **Remembers** 16 bytes per task; with ``restart`` also a copy of the trainable weights.
    **Asks of the model** nothing.
    """

    def __init__(self, restart: bool = False) -> None:
        super().__init__()
        self.restart = restart
        self.initial = Snapshot()
        self._sizes: dict[int, int] = {}

    def begin_task(self, model: VLM, task: Task) -> None:
        """Go back to the first weights, if asked to."""
        if not self.restart:
            return
        if self.initial.is_empty:
            self.initial.take(trainable(model))
            return
        initial = self.initial.tensors
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                if name in initial and initial[name].shape == parameter.shape:
                    parameter.copy_(initial[name])

    def recall(self) -> Recall | None:
        """Return every sample of every finished task, each to be visited once in an epoch."""
        if not sum(self._sizes.values()):
            return None
        samples = [torch.arange(size) for size in self._sizes.values()]
        tasks = [torch.full((size,), task) for task, size in self._sizes.items()]
        return Recall(torch.cat(tasks), torch.cat(samples))

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Note the task's number of samples; counted in the pass if the card does not say."""
        size = task.size
        if not size:
            size = global_rows(sum(len(batch) for batch in batches), device_of(model))
        self._sizes[task.index] = size

    def holdings(self) -> Mapping[str, int]:
        """Return how many samples are to be recalled."""
        return {"memory": sum(self._sizes.values())}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the size of every finished task."""
        return {"sizes": [[task, size] for task, size in self._sizes.items()]}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the sizes of a checkpoint."""
        self._sizes = {int(task): int(size) for task, size in state["sizes"]}
