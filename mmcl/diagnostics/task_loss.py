"""Loss and score of a model on the tasks of a stream, for diagnostics, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmcl.core import Batch, Output, forward
from mmcl.core.batch import IGNORE_INDEX
from mmcl.data import eval_loader
from mmcl.data.stored_sample import Split
from mmcl.evaluation.evaluators import EvalSpec, make_evaluator
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule


@dataclass(frozen=True)
class Measured:
    """Loss of a model on a task, and its score if that was measured too."""

    loss: float
    score: float | None = None


class ProbeData:
    """Batches of a stream's tasks on one device, the same ones in every pass.

    Args:
        data: datamodule of the stream.
        device: where batches are moved to.
        samples: samples of a split, at most: a uniform subset that depends on the task alone;
            None = all.
        precision: makes the context of a forward pass, such as that of autocast.

    Attributes:
        errors: samples that could not be read, a sentence each.

    Raises:
        ValueError: if ``samples`` is below 1.
    """

    def __init__(
        self,
        data: ContinualDataModule,
        device: torch.device | str = "cpu",
        samples: int | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"samples is {samples}: give 1 or more, or leave it out for all")
        self.data, self.device, self.samples = data, torch.device(device), samples
        self.precision = precision
        self.errors: dict[str, None] = {}

    def batches(self, model: Any, number: int, split: Split = "test") -> Iterator[Batch]:
        """Iterate over the batches of a task or eval-only task, without augmentation.

        All occurrences of a repeated task have the same samples, with the task id of ``number``.
        """
        prepared = self.data.prepared
        loader = eval_loader(
            prepared,
            prepared.stream.first_occurrence(number),
            model.transform(False),
            batch=self.data.eval_batch_size,
            workers=self.data.num_workers,
            split=split,
            few=self.samples,
        )
        for batch in loader:
            self.errors |= dict.fromkeys(batch.errors)
            yield replace(batch, task_ids=torch.full_like(batch.task_ids, number)).to(self.device)

    def name(self, number: int) -> str:
        """Return the name of a task or eval-only task."""
        return self.data.stream.evaluated_task(number).name

    def spec(self, row: int, number: int) -> EvalSpec:
        """Return the evaluation of a task after ``row`` tasks, as in the accuracy matrix."""
        return self.data.column(row, self.data.stream.last_trained(number, row))


@torch.no_grad()
def measure_task(
    module: ContinualModule, probes: ProbeData, row: int, number: int, *, with_score: bool = False
) -> Measured:
    """Measure the task loss of a module on the test samples of a task, and its score.

    The loss is that of training without penalties, over the classes that compete in the cell
    (row, number) of the accuracy matrix: a mean over samples, for answers over tokens. A
    contrastive loss compares the samples of a batch, so it depends on ``data.eval_batch_size``.

    Args:
        module: in evaluation mode, on the device of ``probes``.
        probes: of the stream.
        row: number of learned tasks, which decides the classes that compete.
        number: task or eval-only task.
        with_score: measure the score of the accuracy matrix too; answers are generated for it.

    Returns:
        the loss, which may be infinite or NaN, and the score, 0 to 1, or None.
    """
    spec = probes.spec(row, number)
    evaluator = make_evaluator(spec)
    model, total, count = module.model, 0.0, 0
    if spec.names and hasattr(model, "set_classes"):
        model.set_classes(spec.prompt_names or spec.names, spec.task.templates)
    if with_score:
        evaluator.reset(model)
    for batch in probes.batches(model, spec.task.index):
        if not len(batch):
            continue
        with probes.precision():
            loss, items = _batch_loss(module, spec, evaluator.mask_task_ids(batch))
            if with_score:
                evaluator.update(model, module.strategy, batch)
        if items:
            total, count = total + loss * items, count + items
    if not count:
        raise ValueError(f"no test sample of '{spec.task.name}' has a loss: check its shards")
    if with_score:
        evaluator.compute()
    return Measured(total / count, evaluator.value)


def _batch_loss(module: ContinualModule, spec: EvalSpec, batch: Batch) -> tuple[float, int]:
    """Return the mean loss of a batch, and the number of samples or tokens in it."""
    model, strategy = module.model, module.strategy
    if spec.task.is_eval_only:  # as in evaluation, heads of the stream's classes do not apply
        output: Output = model(batch, strategy.prompts(model, batch))
    else:
        output = forward(model, strategy, batch)
    if spec.allowed is not None and batch.input_ids is None:
        closed = torch.ones(output.logits.shape[1], dtype=torch.bool, device=output.logits.device)
        closed[list(spec.allowed)] = False
        output = replace(output, logits=output.logits.masked_fill(closed, -math.inf))
    loss = None if spec.task.is_eval_only else strategy.objective(model, batch, output)
    if loss is None:
        loss = model.loss(output, batch)
    has_labels = batch.is_generative or batch.input_ids is None
    items = int((batch.labels != IGNORE_INDEX).sum()) if has_labels else len(batch)
    return float(loss), items


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean of values, None if there are none or one is undefined."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def finite_or_none(value: float | None) -> float | None:
    """Return a value, None if it is infinite or NaN."""
    return value if value is not None and math.isfinite(value) else None
