"""DarkReplay (DER++): hold old pictures to the scores they once got, and to their labels.

Paper: Buzzega et al. 2020, Dark Experience for General Continual Learning, arXiv:2004.07211.
Code followed: none; loss and the two independent draws are the paper's equation 6.
Where we differ: scores of classes that did not exist when a row was stored are not compared (no
head of final size is asked for); the reservoir goes by hash; pictures are stored as the step saw
them and are not augmented again; draws are a ratio of the batch, not a number of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import UNSCORED, Batch, Output, Strategy
from mmcl.core.distributed import gather_rows
from mmcl.core.model import VLM, require_classes
from mmcl.core.randomness import generator
from mmcl.memory import Rows, global_rows, own_stride, visit_numbers


@dataclass(frozen=True)
class _Draws:
    """What ``replay`` joined, for ``penalty`` of the same step.

    Attributes:
        start: row of the joined batch where the first draw begins; the second follows it.
        dark: this rank's rows of the first draw, compared by their scores.
        labelled: this rank's rows of the second draw, compared by their labels.
        known: (first draw of all ranks,) scores each row was stored with.
        count: rows of the second draw of all ranks.
        scale: makes this rank's sum over its rows a part of the global mean, given that the loss
            is weighted by this rank's part of the new rows.
    """

    start: int
    dark: Mapping[str, Tensor]
    labelled: Mapping[str, Tensor]
    known: Tensor
    count: int
    scale: float


class DarkReplay(Strategy):
    """Add alpha * MSE(scores now, scores then) and beta * cross entropy, each on its own draw.

    Joined rows are unscored for ``model.loss``. The class scores are compared as the model gives
    them; with class texts that train they move for that reason too. For classes, not captions or
    answers: a row that is answered has as many scores as there are words, at every token.

    Args:
        samples: rows remembered, 0 = not bounded by rows.
        alpha: weight of the scores' term.
        beta: weight of the labels' term; 0 = plain DER, and no second draw.
        ratio: rows of each draw per new row, above 0; a draw is never larger than the memory.
        seed: of choice and draws.
        memory_bytes: bytes remembered, 0 = not bounded by bytes.

    **Remembers** per row the picture (3 H W bytes), 4 bytes per class score, and 40 bytes (label,
    task, number of scores, marks). **Asks of the model** class scores: one that answers in words
    is refused.
    """

    def __init__(
        self,
        samples: int = 500,
        alpha: float = 0.3,
        beta: float = 0.5,
        ratio: float = 1.0,
        seed: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        super().__init__()
        if ratio <= 0:
            raise ValueError(f"ratio is {ratio}, expected above 0: it is draws per new row")
        self.alpha = alpha
        self.beta = beta
        self.ratio = ratio
        self.seed = seed
        self.memory = Rows(samples, capacity_bytes=memory_bytes, seed=seed, growing=("logits",))
        self._visits = 0
        self._draws: _Draws | None = None

    def attach(self, model: VLM) -> None:
        """Refuse a model whose scores are as many as its words, at every token of every row."""
        require_classes(model, by=self, instead="ExperienceReplay or FeatureReplay")

    def replay(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch with two draws behind it, unscored.

        Raises:
            ValueError: if rows are captions, or not one picture each.
        """
        _expect_pictures(batch)
        self._draws = None
        if not len(self.memory):
            return batch
        new = global_rows(len(batch), batch.labels.device)
        count = min(len(self.memory), max(1, round(self.ratio * new)))
        first = self.memory.choose(count, generator(self.seed, self._visits, 0))
        second = self.memory.choose(
            count if self.beta else 0, generator(self.seed, self._visits, 1)
        )
        self._draws = _Draws(
            start=len(batch),
            dark=self.memory.take(own_stride(first)),
            labelled=self.memory.take(own_stride(second)),
            known=self.memory.take(first)["known"],
            count=len(second),
            scale=new / len(batch),
        )
        for rows in (self._draws.dark, self._draws.labelled):
            batch = batch.join(_unscored(rows, batch))
        return batch

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return "dark_logits" and "dark_labels", means over the draws of all ranks."""
        draws, self._draws = self._draws, None
        if draws is None:
            return {}
        middle = draws.start + len(draws.dark["labels"])
        end = middle + len(draws.labelled["labels"])
        dark = _distance(output.logits[draws.start : middle], draws.dark, draws.known)
        terms = {"dark_logits": self.alpha * draws.scale * dark}
        if self.beta:
            labels = draws.labelled["labels"].to(output.logits.device)
            scores = output.logits[middle:end].float()
            entropy = functional.cross_entropy(scores, labels, reduction="sum") / draws.count
            terms["dark_labels"] = self.beta * draws.scale * entropy
        return terms

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """Offer the step's new rows, numbered as one process would number them."""
        is_new = batch.labels != UNSCORED
        if batch.recalled is not None:
            is_new &= ~batch.recalled
        numbers, total = visit_numbers(is_new, self._visits)
        seen, self._visits = self._visits, self._visits + total
        # What all ranks together would keep is known to each, so only that travels.
        is_kept = self.memory.accepts(torch.arange(seen, self._visits))
        if batch.images is None or not is_kept.any():
            return
        device = is_new.device
        own = is_kept[numbers - seen]
        rows = torch.nonzero(is_new).flatten()[own.to(device)]
        logits = output.logits.detach()[rows].float()
        columns = {
            "images": batch.images[rows],
            "labels": batch.labels[rows],
            "task": batch.task[rows],
            "logits": logits,
            "known": torch.full_like(rows, logits.shape[1]),
        }
        everyone = {name: gather_rows(column) for name, column in columns.items()}
        self.memory.insert(everyone, gather_rows(numbers[own].to(device)))

    def holdings(self) -> Mapping[str, int]:
        """Return how many rows are remembered."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of rows seen, which numbers visits and seeds the draws."""
        return {"visits": self._visits}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of rows of a checkpoint."""
        self._visits = int(state["visits"])


def _distance(logits: Tensor, rows: Mapping[str, Tensor], known: Tensor) -> Tensor:
    """Return this rank's part of the mean square over all compared scores.

    Args:
        logits: (R, C) of this rank's rows now.
        rows: their "logits" (R, C') and "known" (R,) from the memory.
        known: (all ranks' rows,) scores to compare for each.
    """
    width = min(logits.shape[1], rows["logits"].shape[1])
    stored = rows["logits"][:, :width].to(logits.device)
    is_known = (torch.arange(width) < rows["known"][:, None]).to(logits.device)
    squares = (logits[:, :width].float() - stored).square()
    return (squares * is_known).sum() / int(known.clamp(max=width).sum())


def _unscored(rows: Mapping[str, Tensor], batch: Batch) -> Batch:
    """Return remembered rows as a batch that the task loss leaves out."""
    count = len(rows["labels"])
    remembered = Batch(
        images=rows["images"],
        labels=torch.full_like(rows["labels"], UNSCORED),
        task=rows["task"],
        recalled=torch.ones(count, dtype=torch.bool),
        keys=("",) * count if batch.keys else (),
    )
    return remembered.to(batch.labels.device)


def _expect_pictures(batch: Batch) -> None:
    if batch.tokens is not None or batch.labels.dim() != 1:
        raise ValueError(
            "DarkReplay was given rows with a text of their own (captions or answers): it compares "
            "class scores, so use ExperienceReplay or FeatureReplay for captions and answers"
        )
    if batch.images is None or batch.owner is not None:
        what = "features" if batch.images is None else "rows that share or lack pictures"
        raise ValueError(
            f"DarkReplay was given {what} and remembers one picture for each row: "
            "put it before FeatureReplay in a chain, or leave one of them out"
        )
