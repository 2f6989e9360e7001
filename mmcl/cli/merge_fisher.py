"""Fisher diagonals of ``mmcl merge --method fisher``: on what a checkpoint has learned.

Matena and Raffel 2021, arXiv:2111.09832.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.cli.diagnose import StateLoader, other_data
from mmcl.cli.merge_sweep import LoadedRun
from mmcl.core import Batch
from mmcl.core.model import without_adapters
from mmcl.diagnostics.interpolated_weights import merged_weights
from mmcl.diagnostics.task_loss import ProbeData
from mmcl.lightning.module import ContinualModule
from mmcl.strategies.ewc import EWC


def fisher_of(
    module: ContinualModule, run: LoadedRun, checkpoint: str, data: str | None, samples: int | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the Fisher diagonal of a checkpoint on training samples of the tasks it has learned.

    Args:
        module: of the checkpoint, in evaluation mode.
        run: of the checkpoint.
        checkpoint: as the user gave it.
        data: card or run that has the tasks, None = the checkpoint's run.
        samples: of each task, at most; None = all.

    Returns:
        name of a weight in an export -> diagonal, the mean over the tasks; and the tasks' names.

    Raises:
        ValueError: if the checkpoint has learned none of the tasks, or is an export.
    """
    if run.is_export:
        raise ValueError(
            f"{checkpoint} is an export, which does not say what it has learned, and fisher "
            "measures on that: give its run instead"
        )
    loader = StateLoader(run.run)
    opened = run.run.data if data is None else other_data(data, checkpoint, [])
    stream = opened.stream
    names = [stream.evaluated_task(number).name for number in range(len(stream))]
    numbers = [names.index(name) for name in run.learned if name in names]
    if not numbers:
        raise ValueError(
            f"{checkpoint} has learned {', '.join(run.learned) or 'no task'}, and the stream has "
            f"{', '.join(names)}: its Fisher information needs a task that it has learned; give a "
            "later checkpoint, or --data with a card of its tasks"
        )
    probes = ProbeData(opened, loader.device, samples, loader.precision)
    row = run.tasks if data is None else len(stream)
    found = measure_fisher(module.to(loader.device), probes, row, numbers)
    return found, [probes.name(number) for number in numbers]


def measure_fisher(
    module: ContinualModule, probes: ProbeData, row: int, numbers: list[int]
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of all weights, with adapters merged into them.

    The mean over tasks of the mean over samples of the squared gradient of log p(y|x), where y is
    drawn from the model's prediction, as in the strategy ``EWC``.

    Args:
        module: in evaluation mode, on the device of ``probes``.
        probes: of the stream.
        row: number of learned tasks, which decides the classes that compete.
        numbers: tasks to measure on, 1 or more.

    Returns:
        name of a weight in an export -> diagonal on the CPU, float32, in the weight's shape.
    """
    model = module.model
    prefix = "lm." if getattr(model, "clip", None) is None else "clip."
    ewc = EWC(fisher="model", exclude=())
    with merged_weights(module) as own, _trainable(model, own):
        for number in numbers:
            spec = probes.spec(row, number)
            if spec.names and hasattr(model, "set_classes"):
                model.set_classes(spec.prompt_names or spec.names, spec.task.templates)
            with probes.precision():
                ewc.end_task(model, spec.task, _numbered(probes, model, number))
        first_name = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        measured = ewc.importance.tensors
        return {
            without_adapters(name).removeprefix(prefix): measured[first_name[id(p)]].cpu()
            / len(numbers)
            for name, p in model.named_parameters(remove_duplicate=False)
            if p.requires_grad and name.startswith(prefix)
        }


def _numbered(probes: ProbeData, model: Any, number: int) -> Iterator[Batch]:
    """Yield training batches with consecutive sample ids, so that a subset forms whole groups."""
    seen = 0
    for batch in probes.batches(model, number, "train"):
        ids = torch.arange(seen, seen + len(batch), device=batch.labels.device)
        yield replace(batch, sample_ids=ids)
        seen += len(batch)


@contextmanager
def _trainable(model: nn.Module, own: dict[str, Tensor]) -> Iterator[None]:
    """Let gradients flow to the floating-point weights in ``own`` alone, inside the block."""
    every = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameter.requires_grad for name, parameter in every.items()}
    try:
        for name, parameter in every.items():
            is_own = without_adapters(name) in own
            parameter.requires_grad_(is_own and parameter.is_floating_point())
        yield
    finally:
        for name, parameter in every.items():
            parameter.requires_grad_(before[name])
