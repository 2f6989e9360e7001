"""DER++ replays a buffer of images with their stored logits and labels.

Paper: Buzzega et al. 2020, arXiv:2004.07211.
Code followed: none; loss and the two independent draws are the paper's equation 6.
Differs: logits of classes that did not exist when a sample was stored are not compared (no head of
final size is needed); the reservoir is by hash; images are stored as augmented for the step and not
augmented again; the size of a draw is a ratio of the batch, not a number of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, Batch, Output, Strategy
from mmcl.core.distributed import all_gather_samples, rank_and_world
from mmcl.core.model import VLM, require_classes
from mmcl.core.seeding import generator
from mmcl.memory import TensorBuffer
from mmcl.memory.distributed_fill import (
    global_count,
    global_sample_ids,
    rank_stride,
    replayed_batch,
)


@dataclass(frozen=True)
class _Draws:
    """Draws from the buffer that ``extend_batch`` joined, for ``penalty`` of the same step.

    Attributes:
        start: sample of the joined batch where the first draw begins; the second follows it.
        dark: this rank's samples of the first draw, compared by their logits.
        labeled: this rank's samples of the second draw, compared by their labels.
        known: (first draw of all ranks,) number of logits each sample was stored with.
        count: samples of the second draw of all ranks.
        scale: turns this rank's sum over its samples into its term of the global mean, given that
            the loss is multiplied by the weight of its batch.
    """

    start: int
    dark: Mapping[str, Tensor]
    labeled: Mapping[str, Tensor]
    known: Tensor
    count: int
    scale: float


class DarkReplay(Strategy):
    """Dark experience replay (DER++): distillation of stored logits and cross entropy on a buffer.

    Adds ``alpha * MSE(logits now, stored logits)`` and ``beta * cross entropy``, each on a draw of
    its own. Joined samples are not scored by ``model.loss``. Logits are compared as the model
    returns them; trainable class texts change them as well. For classes, not captions or answers:
    an answer has as many logits as the vocabulary, at every token.

    Args:
        buffer_size: samples held, 0 = not bounded by samples.
        alpha: weight of the logits' term.
        beta: weight of the labels' term; 0 = plain DER, and no second draw.
        draws_per_sample: samples of each draw per new sample of the global batch, above 0; a draw
            is never larger than the buffer.
        seed: seed of selection and draws.
        buffer_bytes: buffer size in bytes, 0 = not bounded by bytes.

    **Remembers** per sample the image (3 H W bytes), 4 bytes per class score, and 40 bytes (label,
    task, number of scores, priority, group). **Asks of the model** class scores: one that answers
    in words is refused.
    """

    def __init__(
        self,
        buffer_size: int = 500,
        alpha: float = 0.3,
        beta: float = 0.5,
        draws_per_sample: float = 1.0,
        seed: int = 0,
        buffer_bytes: int = 0,
    ) -> None:
        super().__init__()
        if draws_per_sample <= 0:
            raise ValueError(
                f"draws_per_sample is {draws_per_sample}, expected above 0: it is the size of each "
                "draw per new sample"
            )
        self.alpha, self.beta, self.seed = alpha, beta, seed
        self.draws_per_sample = draws_per_sample
        self.memory = TensorBuffer(
            buffer_size, capacity_bytes=buffer_bytes, seed=seed, padded_columns=("logits",)
        )
        self._visits = 0
        self._draws: _Draws | None = None

    def attach(self, model: VLM) -> None:
        """Refuse a generative model, whose logits are as many as its vocabulary at every token."""
        require_classes(model, by=self, instead="ExperienceReplay or FeatureReplay")

    def extend_batch(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch with two draws from the buffer behind it, unscored.

        Raises:
            ValueError: if samples are captions, or do not have one image each.
        """
        _expect_images(batch)
        self._draws = None
        if not len(self.memory):
            return batch
        sizes = batch.global_batch
        if sizes is None:
            new, first, parts = global_count(len(batch), batch.labels.device), 0, 1
        else:
            new, first, parts = sizes.samples, sizes.micro_batch, sizes.micro_batches
        drawn = min(len(self.memory), max(1, round(self.draws_per_sample * new)))
        if sizes is not None:
            sizes = replace(sizes, samples=new + drawn * (1 + bool(self.beta)))
            batch = replace(batch, global_batch=sizes)
        # The buffer changes with every micro-batch, so each makes its part of the draw by itself.
        count = len(range(first, drawn, parts))
        if not count or not batch.loss_weight:
            return batch
        draws = [generator(self.seed, self._visits, number) for number in (0, 1)]
        dark = self.memory.sample_indices(count, draws[0])
        labeled = self.memory.sample_indices(count if self.beta else 0, draws[1])
        self._draws = _Draws(
            start=len(batch),
            dark=self.memory.get(rank_stride(dark)),
            labeled=self.memory.get(rank_stride(labeled)),
            known=self.memory.get(dark)["known"],
            count=len(labeled),
            scale=count / drawn * rank_and_world()[1] * parts / batch.loss_weight,
        )
        for stored in (self._draws.dark, self._draws.labeled):
            # The task loss leaves them out.
            labels = torch.full_like(stored["labels"], IGNORE_INDEX)
            unscored = replayed_batch({**stored, "labels": labels}, batch)
            unscored = replace(unscored, in_loss=torch.zeros_like(labels, dtype=torch.bool))
            batch = batch.join(unscored.to(batch.labels.device))
        return batch

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return "dark_logits" and "dark_labels", means over the draws of all ranks."""
        draws, self._draws = self._draws, None
        if draws is None:
            return {}
        middle = draws.start + len(draws.dark["labels"])
        end = middle + len(draws.labeled["labels"])
        dark = _distance(output.logits[draws.start : middle], draws.dark, draws.known)
        terms = {"dark_logits": self.alpha * draws.scale * dark}
        if self.beta:
            labels = draws.labeled["labels"].to(output.logits.device)
            scores = output.logits[middle:end].float()
            entropy = functional.cross_entropy(scores, labels, reduction="sum") / draws.count
            terms["dark_labels"] = self.beta * draws.scale * entropy
        return terms

    def after_step(self, model: VLM, batch: Batch, output: Output) -> None:
        """Offer the step's new samples to the buffer, numbered as one process would number them."""
        is_new = batch.labels != IGNORE_INDEX
        if batch.is_replay is not None:
            is_new &= ~batch.is_replay
        numbers, total = global_sample_ids(is_new, self._visits)
        seen, self._visits = self._visits, self._visits + total
        # Each rank knows what all ranks together would keep, so only that is sent.
        is_kept = self.memory.would_keep(torch.arange(seen, self._visits))
        if batch.images is None or not is_kept.any():
            return
        device = is_new.device
        own = is_kept[numbers - seen]
        index = torch.nonzero(is_new).flatten()[own.to(device)]
        logits = output.logits.detach()[index].float()
        columns = {
            "images": batch.images[index],
            "labels": batch.labels[index],
            "task_ids": batch.task_ids[index],
            "logits": logits,
            "known": torch.full_like(index, logits.shape[1]),
        }
        everyone = {name: all_gather_samples(column) for name, column in columns.items()}
        self.memory.add(everyone, all_gather_samples(numbers[own].to(device)))

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of samples in the buffer."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of samples seen, which numbers samples and seeds the draws."""
        return {"visits": self._visits}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the number of samples seen of a checkpoint."""
        self._visits = int(state["visits"])


def _distance(logits: Tensor, stored: Mapping[str, Tensor], known: Tensor) -> Tensor:
    """Return this rank's term of the mean squared error over all compared logits.

    Logits are (R, C) now, ``stored`` has (R, C') and their number "known" (R,); ``known`` has that
    number for the samples of all ranks.
    """
    classes = min(logits.shape[1], stored["logits"].shape[1])
    target = stored["logits"][:, :classes].to(logits.device)
    is_known = (torch.arange(classes) < stored["known"][:, None]).to(logits.device)
    squares = (logits[:, :classes].float() - target).square()
    return (squares * is_known).sum() / int(known.clamp(max=classes).sum())


def _expect_images(batch: Batch) -> None:
    if batch.input_ids is not None or batch.labels.dim() != 1:
        raise ValueError(
            "DarkReplay was given samples with captions or answers: it compares class scores, "
            "so use ExperienceReplay or FeatureReplay for captions and answers"
        )
    if batch.images is None or batch.image_owner is not None:
        what = "features" if batch.images is None else "samples that share or lack images"
        raise ValueError(
            f"DarkReplay was given {what} and stores one image for each sample: "
            "put it before FeatureReplay in a chain, or leave one of them out"
        )
