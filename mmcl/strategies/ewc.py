"""EWC holds weights near where they stood, each as hard as earlier tasks needed it.

Paper: Kirkpatrick et al. 2016, arXiv:1612.00796; one running term instead of one for each task,
Schwarz et al. 2018, arXiv:1805.06370.
Code followed: none; written from the equations.
Differs: the Fisher is made of gradients of single samples, where common code squares batch means
and so shrinks it by the batch size; the scale of the cosine, whose Fisher dwarfs all, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mmcl.core import (
    UNSCORED,
    VLM,
    Batch,
    Output,
    Strategy,
    Task,
    device_of,
    expect_shape,
    run,
    trainable,
)
from mmcl.core.distributed import sum_over_ranks
from mmcl.core.randomness import generator, ranks_of
from mmcl.core.rest import evaluating
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.importance import add_squares, decayed, pull_back


class EWC(Strategy):
    """Elastic weight consolidation, online form.

    Adds ``weight / 2 * sum F * (theta - theta*)^2`` to the loss. After each task
    ``F = decay * F + F_new``, with F_new the mean over samples of the squared gradient of
    log p(y|x), and theta* are the weights of that moment. p is the softmax over the class scores;
    for a row with a caption it is the softmax over the ``group`` rows it is compared with, both
    ways round, so there F depends a little on which rows meet. For a row that is answered log
    p(y|x) is the sum over its scored tokens, each behind the right ones before it.

    Args:
        weight: of the penalty, the paper's lambda.
        decay: how much of the older Fisher is kept at each task, 0 to 1; gamma of the online form.
        samples: rows of a task that the Fisher is taken over, chosen by ``seed``; None = all.
        fisher: "empirical" takes the true label, "model" a label drawn from the model's answer; of
            an answer every scored token is drawn, behind the right ones before it.
        exclude: endings of parameter names that move freely.
        group: rows that captions are compared with, 2 or more.
        seed: of the choice of samples and labels.

    **Remembers** two float32 numbers for each trainable weight: F and theta*.

    **Asks of the model** nothing beyond the protocol; it must be a torch module.
    """

    def __init__(
        self,
        weight: float = 1.0,
        decay: float = 1.0,
        samples: int | None = None,
        fisher: Literal["empirical", "model"] = "empirical",
        exclude: Sequence[str] = ("logit_scale",),
        group: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if weight < 0 or not 0 <= decay <= 1:
            raise ValueError(
                f"weight is {weight} and decay {decay}: give a weight of 0 or more and a decay "
                "from 0 (only the last task counts) to 1"
            )
        if fisher not in ("empirical", "model"):
            raise ValueError(f"fisher is '{fisher}', expected 'empirical' or 'model'")
        self.weight, self.decay, self.samples = weight, decay, samples
        self.fisher, self.exclude, self.group, self.seed = fisher, tuple(exclude), group, seed
        self.importance = Snapshot()
        self.anchors = Snapshot()

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the pull towards the anchors, as "ewc"; nothing before the first task's end."""
        if self.importance.is_empty:
            return {}
        importance, anchors = self.importance.tensors, self.anchors.tensors
        names, weights = [], []
        for name, parameter in model.named_parameters():
            if name in importance and parameter.requires_grad:
                names.append(name)
                weights.append(parameter)
        if not weights:
            return {}
        distance = pull_back(
            weights, [anchors[name] for name in names], [importance[name] for name in names]
        )
        return {"ewc": self.weight * distance}

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Add the task's Fisher to the running one and move the anchors here."""
        weights = {
            name: parameter
            for name, parameter in trainable(model).items()
            if not name.endswith(self.exclude)
        }
        if not weights:
            return
        fresh = self._fisher(model, task, batches, weights)
        mixed = decayed(self.importance.tensors, fresh, self.decay)
        self.importance.take({name: value.float() for name, value in mixed.items()})
        self.anchors.take({**self.anchors.tensors, **weights})

    def holdings(self) -> Mapping[str, int]:
        """Return how many parameters have an importance."""
        return {"importance": len(self.importance)}

    def _fisher(
        self, model: VLM, task: Task, batches: Iterable[Batch], weights: Mapping[str, Parameter]
    ) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
        parameters = list(weights.values())
        count = torch.zeros((), dtype=torch.int64, device=device_of(model))
        with evaluating(cast(nn.Module, model)), torch.enable_grad():
            for likelihood, is_last in self._likelihoods(model, task, batches):
                slopes = torch.autograd.grad(
                    likelihood, parameters, retain_graph=not is_last, allow_unused=True
                )
                add_squares(sums, dict(zip(weights, slopes, strict=True)))
                count += 1
        rows = int(sum_over_ranks(count))
        if rows == 0:
            raise RuntimeError(
                f"EWC saw no scored rows of task '{task.name}': give end_task the task's training "
                f"batches, and a larger value of samples if it is small (samples={self.samples})"
            )
        return {name: sum_over_ranks(total) / rows for name, total in sums.items()}

    def _likelihoods(
        self, model: VLM, task: Task, batches: Iterable[Batch]
    ) -> Iterator[tuple[Tensor, bool]]:
        """Give log p(y|x) of every chosen row, and whether it is the last of its graph."""
        for batch in batches:
            rows = self._chosen(task, batch)
            is_compared = batch.tokens is not None and not batch.is_answered
            size = self.group if is_compared else 1
            for start in range(0, len(rows), size):
                part = _trimmed(batch.take(rows[start : start + size]))
                output = run(model, self, part)
                logits = output.logits
                if not is_compared:
                    right = part.labels if output.targets is None else output.targets
                    said = self._said(task, part, logits, right)[:, None]
                    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    yield wide.log_softmax(1).gather(1, said).sum(), True
                    continue
                expect_shape("output.logits of captions", logits, len(part), len(part))
                both = (logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2
                for place in range(len(part)):
                    yield both[place], place == len(part) - 1

    def _chosen(self, task: Task, batch: Batch) -> Tensor:
        is_chosen = torch.ones_like(batch.task, dtype=torch.bool)
        if batch.is_answered:
            is_chosen = (batch.labels[:, 1:] != UNSCORED).any(1)
        elif batch.tokens is None:
            is_chosen = batch.labels != UNSCORED
        if self.samples is not None and batch.sample is not None and self.samples < task.size:
            order = ranks_of(self.seed, task.index, torch.arange(task.size)).argsort()
            wanted = order[: self.samples].to(batch.sample.device)
            is_chosen = is_chosen & torch.isin(batch.sample, wanted)
        return is_chosen.nonzero().flatten()

    def _said(self, task: Task, row: Batch, logits: Tensor, right: Tensor) -> Tensor:
        """Return (S,) labels or tokens whose likelihood counts, for (S, C) scores of one row."""
        if self.fisher == "empirical":
            return right
        place = 0 if row.sample is None else int(row.sample[0])
        drawn = generator(self.seed, task.index, place)
        answer = logits.detach().float().softmax(1).double().cpu()
        return torch.multinomial(answer, 1, generator=drawn)[:, 0].to(logits.device)


def _trimmed(batch: Batch) -> Batch:
    """Return rows that are answered without the padding of longer rows they stood among."""
    if not batch.is_answered or batch.tokens is None or batch.mask is None:
        return batch
    end = int(batch.mask.any(0).nonzero().max()) + 1
    return replace(
        batch, tokens=batch.tokens[:, :end], mask=batch.mask[:, :end], labels=batch.labels[:, :end]
    )
