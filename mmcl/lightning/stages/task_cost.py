"""Cost of a task: what its steps counted, and what it left in memory."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

import torch

from mmcl.core import Task
from mmcl.evaluation.cost import TaskCost
from mmcl.lightning.module import ContinualModule


@dataclass
class TaskCounters:
    """Counters of a task's cost so far, stored in its mid-task checkpoints.

    ``rows`` counts the samples of all steps over all devices, ``new`` those of the task itself;
    ``notes`` are the sentences of samples of which the model took a part, as keys.
    """

    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    new: int = 0
    flops_per_sample: float = 0.0
    errors: list[str] = field(default_factory=list)
    notes: dict[str, bool] = field(default_factory=dict)


def task_cost(
    task: Task, module: ContinualModule, counts: TaskCounters, parameters_before: int
) -> TaskCost:
    """Return the cost of a finished task, for the ledger.

    Args:
        task: its name is that of the entry.
        module: after the task.
        counts: of its steps.
        parameters_before: parameters of the module before the task.
    """
    learns = module.has_trainable
    trainable = [p for p in module.parameters() if learns and p.requires_grad]
    return TaskCost(
        task=task.name,
        seconds=round(counts.seconds, 3),
        steps=counts.steps if learns else 0,
        samples_new=counts.new if learns else 0,
        samples_replayed=counts.rows - counts.new if learns else 0,
        flops=counts.flops_per_sample * counts.rows if learns else None,
        peak_memory_bytes=peak_memory(module.device),
        trainable_parameters=sum(p.numel() for p in trainable),
        # A strategy may free what an earlier task had, as OSF does.
        parameters_added=max(0, sum(p.numel() for p in module.parameters()) - parameters_before),
        state_bytes=module.strategy.state_bytes(),
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device so far in bytes, or on a CPU of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
