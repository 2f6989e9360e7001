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
from itertools import chain
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
from mmcl.core.distributed import all_reduce_sum, rank_and_world
from mmcl.core.model import eval_mode
from mmcl.core.seeding import generator, hash_priorities
from mmcl.layers.adapters import expect_lasting_weights
from mmcl.memory.distributed_fill import (
    collect_metadata,
    global_count,
    pass_sample_ids,
    with_samples_of_all_ranks,
)
from mmcl.memory.selection import smallest_priorities, smallest_priorities_in_range
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.regularization import accumulate_fisher, decayed, quadratic_penalty


class EWC(Strategy):
    """Elastic weight consolidation, online form: a quadratic penalty weighted by the Fisher.

    Adds ``ewc_lambda / 2 * sum F * (theta - theta*)^2`` to the loss. After each task
    ``F = decay * F + F_new``, with F_new the mean over samples of the squared gradient of
    log p(y|x), and theta* are the weights at that time. p is the softmax over the class scores. For
    an answer log p(y|x) is the sum over its scored tokens, each conditioned on the true tokens
    before it. F does not depend on the batch size or the number of processes, up to rounding.

    An image with a caption is compared with ``group`` samples: log p is the mean of that of its
    caption among the group's captions and that of the image among the group's images. The first
    ``group`` of the chosen samples by sample id are the first group, and so on. Unreadable samples
    leave a group smaller; a sample alone in the last group is left out. Samples wait in memory
    until their group is whole, which is soon in a pass in order of the ids.

    Args:
        ewc_lambda: weight of the penalty, the paper's lambda; 0 or more.
        decay: factor of the older Fisher at each task, 0 to 1; gamma of the online form.
        fisher_samples: samples of a task to estimate the Fisher on, chosen by ``seed``; None = all.
        fisher: "empirical" takes the true label, "model" a label drawn from the model's prediction,
            for each sample by its id; of an answer every scored token is drawn, conditioned on the
            true tokens before it; for a caption, one of the group's captions given the image, and
            one of its images given the caption.
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
        exclude: Sequence[str] = ("logit_scale", "logit_bias"),
        group: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ewc_lambda < 0 or not 0 <= decay <= 1:
            raise ValueError(
                f"ewc_lambda is {ewc_lambda} and decay {decay}: give an ewc_lambda of 0 or more "
                "and a decay from 0 (only the last task counts) to 1"
            )
        if group < 2 or (fisher_samples is not None and fisher_samples < 1):
            raise ValueError(
                f"group is {group} and fisher_samples {fisher_samples}: compare captions with 2 or "
                "more samples, and estimate the Fisher on 1 or more"
            )
        if fisher not in ("empirical", "model"):
            raise ValueError(f"fisher is '{fisher}', expected 'empirical' or 'model'")
        self.ewc_lambda, self.decay, self.fisher_samples = ewc_lambda, decay, fisher_samples
        self.fisher, self.exclude, self.group, self.seed = fisher, tuple(exclude), group, seed
        self.importance = Snapshot()
        self.anchors = Snapshot()
        self._has_effect = True

    def begin_task(self, model: VLM, task: Task) -> None:
        """Check that the weights can be compared from task to task.

        Raises:
            ValueError: if they are factors of OSF.
        """
        expect_lasting_weights(model, by=self)

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
        known = self.importance.tensors
        self._has_effect = not known or any(name in known for name in weights)
        fresh = self._fisher(model, task, batches, weights)
        mixed = decayed(known, fresh, self.decay)
        self.importance.take({name: value.float() for name, value in mixed.items()})
        self.anchors.take({**self.anchors.tensors, **weights})

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of parameters with a Fisher."""
        return {"importance": len(self.importance)}

    def inactive_parts(self) -> tuple[str, ...]:
        """Report a missing Fisher, and one of weights that were not trained in the task."""
        found = "no weight with a Fisher was trained, so there was no penalty"
        return super().inactive_parts() + (() if self._has_effect else (found,))

    def _fisher(
        self, model: VLM, task: Task, batches: Iterable[Batch], weights: Mapping[str, Parameter]
    ) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
        parameters = list(weights.values())
        count = torch.zeros((), dtype=torch.int64, device=device_of(model))
        wanted = self._wanted(task, batches, count.device)
        with eval_mode(cast(nn.Module, model)), torch.enable_grad():
            for group in self._groups(batches, wanted, count.device):
                likelihoods = self._likelihoods(model, task, group)
                for number, likelihood in enumerate(likelihoods, 1):
                    is_kept = number < len(likelihoods)
                    slopes = torch.autograd.grad(
                        likelihood, parameters, retain_graph=is_kept, allow_unused=True
                    )
                    accumulate_fisher(sums, dict(zip(weights, slopes, strict=True)))
                count += len(likelihoods)
        total = int(all_reduce_sum(count))
        if total == 0:
            raise RuntimeError(
                f"EWC saw no scored samples of task '{task.name}' with fisher_samples "
                f"{self.fisher_samples}: give end_task the task's training batches, with two or "
                "more captions if it has captions, and a larger fisher_samples if it is small"
            )
        return {name: all_reduce_sum(squares) / total for name, squares in sums.items()}

    def _wanted(self, task: Task, batches: Iterable[Batch], device: torch.device) -> Tensor | None:
        """Return the ids of the ``fisher_samples`` of smallest hash, rising; None = all samples."""
        count = self.fisher_samples
        if count is None or 0 < task.size <= count:
            return None
        if task.size:
            return smallest_priorities_in_range(task.size, count, self.seed, task.index)
        if isinstance(batches, Iterator):
            raise ValueError(
                f"fisher_samples is {count}, task '{task.name}' states no size and its data can be "
                "read only once: give the task a size, or end_task a list or a loader"
            )
        ids = collect_metadata(batches, device)[:, 0]
        priorities = hash_priorities(self.seed, task.index, ids)
        return ids[smallest_priorities(priorities, count)].sort().values

    def _groups(
        self, batches: Iterable[Batch], wanted: Tensor | None, device: torch.device
    ) -> Iterator[Batch]:
        """Yield this rank's scored samples: one by one, or captions in groups.

        Captions with the numbers g * ``group`` to (g + 1) * ``group`` - 1 are group g, of rank g
        modulo W. A group is yielded when it is whole; at the end, what there is of others.
        """
        rank, world = rank_and_world()
        waiting: dict[int, Batch] = {}
        chosen = _chosen(batches, wanted)
        first = next(chosen, None)
        chosen = chain(() if first is None else (first,), chosen)
        if global_count(first is not None and _is_compared(first), device):
            chosen = with_samples_of_all_ranks(chosen, device)
        for batch in chosen:
            ids = cast(Tensor, batch.sample_ids)
            if not _is_compared(batch):
                yield from (batch.take(row) for row in torch.arange(len(ids))[:, None])
                continue
            numbers = ids.cpu() if wanted is None else torch.searchsorted(wanted, ids.cpu())
            groups = numbers // self.group
            for group in sorted(set(groups[groups % world == rank].tolist())):
                own = batch.take((groups == group).nonzero().flatten().to(ids.device))
                waiting[group] = waiting[group].join(own) if group in waiting else own
                if len(waiting[group]) == self.group:
                    yield _in_order(waiting.pop(group))
        yield from (_in_order(left) for _, left in sorted(waiting.items()) if len(left) > 1)

    def _likelihoods(self, model: VLM, task: Task, group: Batch) -> list[Tensor]:
        """Return log p(y|x) of each sample of a group of captions, or of the one other sample."""
        group = _trimmed(group)
        output = forward(model, self.root, group)
        logits = output.logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = cast(Tensor, group.sample_ids).tolist()
        if not _is_compared(group):
            true = group.labels if output.target_ids is None else output.target_ids
            targets = true
            if self.fisher == "model":
                targets = _drawn(logits, generator(self.seed, task.index, ids[0]))
            return [wide.log_softmax(1).gather(1, targets[:, None]).sum()]
        expect_shape("output.logits of captions", logits, len(group), len(group))
        texts, images = wide.log_softmax(1), wide.T.log_softmax(1)
        found = []
        for number, sample_id in enumerate(ids):
            text = image = number
            if self.fisher == "model":
                both = torch.stack([logits[number], logits[:, number]])
                text, image = _drawn(both, generator(self.seed, task.index, sample_id)).tolist()
            found.append((texts[number, text] + images[number, image]) / 2)
        return found


def _is_compared(batch: Batch) -> bool:
    """Whether samples are captions, whose likelihood depends on those that they are compared to."""
    return batch.input_ids is not None and not batch.is_generative


def _is_scored(batch: Batch) -> Tensor:
    """Return which samples have a likelihood, (B,) bool."""
    if batch.is_generative:
        return (batch.labels[:, 1:] != IGNORE_INDEX).any(1)
    if batch.input_ids is None:
        return batch.labels != IGNORE_INDEX
    return torch.ones_like(batch.task_ids, dtype=torch.bool)


def _chosen(batches: Iterable[Batch], wanted: Tensor | None) -> Iterator[Batch]:
    """Yield scored samples of a pass, those in ``wanted``, with their ids; one batch or more."""
    seen = 0
    for batch in batches:
        ids = pass_sample_ids(batch, seen)
        is_chosen = _is_scored(batch).cpu()
        if wanted is not None:
            # Not torch.isin, which sorts both for every batch.
            place = torch.searchsorted(wanted, ids).clamp(max=len(wanted) - 1)
            is_chosen &= wanted[place] == ids
        index = is_chosen.nonzero().flatten().to(batch.labels.device)
        if len(index) or not seen:
            yield replace(batch, sample_ids=ids.to(batch.labels.device)).take(index)
        seen += len(batch)


def _in_order(group: Batch) -> Batch:
    return group.take(cast(Tensor, group.sample_ids).argsort(stable=True))


def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Draw (S,) indices from the softmax of (S, C) logits."""
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
