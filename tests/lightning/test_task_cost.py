"""What a task adds to the ledger."""

import torch

from mmcl.core import Task
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.stages.task_cost import TaskCounters, task_cost
from mmcl.strategies import Finetune
from tests.toys.toy_clip import StandIn


def test_a_task_counts_the_parameters_that_it_added_and_none_where_it_freed_some():
    module = ContinualModule(StandIn(), Finetune())
    size = sum(parameter.numel() for parameter in module.parameters())
    counts = TaskCounters(seconds=1.5, steps=3, rows=24, new=16, flops_per_sample=2.0)
    for before, added in ((size - 7, 7), (size, 0), (size + 5, 0)):
        cost = task_cost(Task(0, "a"), module, counts, before)
        assert cost.parameters_added == added
    assert (cost.steps, cost.samples_new, cost.samples_replayed, cost.flops) == (3, 16, 8, 48.0)


def test_a_task_of_a_frozen_model_takes_no_step():
    module = ContinualModule(StandIn().requires_grad_(False), Finetune())
    cost = task_cost(Task(0, "a"), module, TaskCounters(steps=1, rows=8, new=8), 0)
    assert (cost.steps, cost.samples_new, cost.flops) == (0, 0, None)
    assert torch.device("cpu") == module.device
