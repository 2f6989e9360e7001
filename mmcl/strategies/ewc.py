"""EWC penalizes changes of weights in proportion to their Fisher information on earlier tasks.

Paper: Kirkpatrick et al. 2016, arXiv:1612.00796. One running term instead of one for each task:
Schwarz et al. 2018, arXiv:1805.06370.
Code followed: none; written from the equations.
Differs: the Fisher is made of gradients of single samples, where common code squares batch means
and so shrinks it by the batch size; the logit scale, whose Fisher dwarfs all others, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mmcl.core import (
    IGNORE_INDEX,
    VLM,
    Batch,
    Output,
    Strategy,
    Task,
    device_of,
    expect_shape,
    forward,
    trainable_parameters,
)
from mmcl.core.distributed import all_reduce_sum
from mmcl.core.model import eval_mode
from mmcl.core.seeding import generator, hash_priorities
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.regularization import accumulate_fisher, decayed, quadratic_penalty


class EWC(Strategy):
    """Elastic weight consolidation, online form: a quadratic penalty weighted by the Fisher.

    Adds ``ewc_lambda / 2 * sum F * (theta - theta*)^2`` to the loss. After each task
    ``F = decay * F + F_new``, with F_new the mean over samples of the squared gradient of
    log p(y|x), and theta* are the weights at that time. p is the softmax over the class scores; for
    a sample with a caption it is the softmax over the ``group`` samples it is compared with, in
    both directions, so there F depends a little on the grouping. For an answer log p(y|x) is the
    sum over its scored tokens, each conditioned on the true tokens before it.

    Args:
        ewc_lambda: weight of the penalty, the paper's lambda; 0 or more.
        decay: factor of the older Fisher at each task, 0 to 1; gamma of the online form.
        fisher_samples: samples of a task to estimate the Fisher on, chosen by ``seed``; None = all.
        fisher: "empirical" takes the true label, "model" a label drawn from the model's prediction;
            of an answer every scored token is drawn, conditioned on the true tokens before it.
        exclude: endings of parameter names without penalty.
        group: samples that captions are compared with, 2 or more.
        seed: seed of the choice of samples and labels.

    **Remembers** two float32 numbers for each trainable parameter: F and theta*.

    **Asks of the model** nothing beyond the protocol; it must be a torch module.
    """

    reads_weights = True

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        decay: float = 1.0,
        fisher_samples: int | None = None,
        fisher: Literal["empirical", "model"] = "empirical",
        exclude: Sequence[str] = ("logit_scale",),
        group: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ewc_lambda < 0 or not 0 <= decay <= 1:
            raise ValueError(
                f"ewc_lambda is {ewc_lambda} and decay {decay}: give an ewc_lambda of 0 or more "
                "and a decay from 0 (only the last task counts) to 1"
            )
        if fisher not in ("empirical", "model"):
            raise ValueError(f"fisher is '{fisher}', expected 'empirical' or 'model'")
        self.ewc_lambda, self.decay, self.fisher_samples = ewc_lambda, decay, fisher_samples
        self.fisher, self.exclude, self.group, self.seed = fisher, tuple(exclude), group, seed
        self.importance = Snapshot()
        self.anchors = Snapshot()

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the quadratic penalty as "ewc"; nothing before the first task's end."""
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
        distance = quadratic_penalty(
            weights, [anchors[name] for name in names], [importance[name] for name in names]
        )
        return {"ewc": self.ewc_lambda * distance}

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Add the task's Fisher to the running one and store the weights as anchors."""
        weights = {
            name: parameter
            for name, parameter in trainable_parameters(model).items()
            if not name.endswith(self.exclude)
        }
        if not weights:
            return
        fresh = self._fisher(model, task, batches, weights)
        mixed = decayed(self.importance.tensors, fresh, self.decay)
        self.importance.take({name: value.float() for name, value in mixed.items()})
        self.anchors.take({**self.anchors.tensors, **weights})

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of parameters with a Fisher."""
        return {"importance": len(self.importance)}

    def _fisher(
        self, model: VLM, task: Task, batches: Iterable[Batch], weights: Mapping[str, Parameter]
    ) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
        parameters = list(weights.values())
        count = torch.zeros((), dtype=torch.int64, device=device_of(model))
        with eval_mode(cast(nn.Module, model)), torch.enable_grad():
            for likelihood, is_last in self._likelihoods(model, task, batches):
                slopes = torch.autograd.grad(
                    likelihood, parameters, retain_graph=not is_last, allow_unused=True
                )
                accumulate_fisher(sums, dict(zip(weights, slopes, strict=True)))
                count += 1
        total = int(all_reduce_sum(count))
        if total == 0:
            raise RuntimeError(
                f"EWC saw no scored samples of task '{task.name}' with fisher_samples "
                f"{self.fisher_samples}: give end_task the task's training batches, and a larger "
                "fisher_samples if it is small"
            )
        return {name: all_reduce_sum(squares) / total for name, squares in sums.items()}

    def _likelihoods(
        self, model: VLM, task: Task, batches: Iterable[Batch]
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield log p(y|x) of every chosen sample, and whether it is the last of its graph."""
        for batch in batches:
            index = self._chosen(task, batch)
            is_compared = batch.input_ids is not None and not batch.is_generative
            size = self.group if is_compared else 1
            for start in range(0, len(index), size):
                group = _trimmed(batch.take(index[start : start + size]))
                output = forward(model, self.root, group)
                logits = output.logits
                if not is_compared:
                    true = group.labels if output.target_ids is None else output.target_ids
                    targets = self._targets(task, group, logits, true)[:, None]
                    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    yield wide.log_softmax(1).gather(1, targets).sum(), True
                    continue
                expect_shape("output.logits of captions", logits, len(group), len(group))
                both = (logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2
                for number in range(len(group)):
                    yield both[number], number == len(group) - 1

    def _chosen(self, task: Task, batch: Batch) -> Tensor:
        is_chosen = torch.ones_like(batch.task_ids, dtype=torch.bool)
        if batch.is_generative:
            is_chosen = (batch.labels[:, 1:] != IGNORE_INDEX).any(1)
        elif batch.input_ids is None:
            is_chosen = batch.labels != IGNORE_INDEX
        if (
            self.fisher_samples is not None
            and batch.sample_ids is not None
            and self.fisher_samples < task.size
        ):
            order = hash_priorities(self.seed, task.index, torch.arange(task.size)).argsort()
            wanted = order[: self.fisher_samples].to(batch.sample_ids.device)
            is_chosen = is_chosen & torch.isin(batch.sample_ids, wanted)
        return is_chosen.nonzero().flatten()

    def _targets(self, task: Task, sample: Batch, logits: Tensor, true: Tensor) -> Tensor:
        """Return (S,) labels or tokens whose likelihood is taken, for (S, C) logits of a sample."""
        if self.fisher == "empirical":
            return true
        sample_id = 0 if sample.sample_ids is None else int(sample.sample_ids[0])
        draw = generator(self.seed, task.index, sample_id)
        probabilities = logits.detach().float().softmax(1).double().cpu()
        return torch.multinomial(probabilities, 1, generator=draw)[:, 0].to(logits.device)


def _trimmed(batch: Batch) -> Batch:
    """Return answers without the padding that longer samples of their batch needed."""
    if not batch.is_generative or batch.input_ids is None or batch.attention_mask is None:
        return batch
    end = int(batch.attention_mask.any(0).nonzero().max()) + 1
    return replace(
        batch,
        input_ids=batch.input_ids[:, :end],
        attention_mask=batch.attention_mask[:, :end],
        labels=batch.labels[:, :end],
    )
