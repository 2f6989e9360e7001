"""Scoring one cell of the matrix: what a model at some row says of some column's test data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core import Batch, Output, Strategy, Task, TaskStream, run
from mmcl.core.distributed import gather_rows, gather_texts
from mmcl.core.randomness import ranks_of
from mmcl.metrics.retrieval import recall_at_k


@dataclass(frozen=True)
class Column:
    """What a cell asks.

    Attributes:
        task: whose test data are scored.
        names: class names that compete, in column order of the logits.
        allowed: columns that may win, None = all (class- and domain-incremental).
        tells_task: True where the model may know the task of a row (task-incremental).
    """

    task: Task
    names: tuple[str, ...]
    allowed: tuple[int, ...] | None = None
    tells_task: bool = False

    @property
    def score(self) -> str:
        """Name of the score: accuracy, recall@1 for captions, the scorer's name for answers."""
        if self.task.scorer:
            return self.task.scorer
        return "recall@1" if self.task.kind in ("caption", "retrieve") else "accuracy"


def asked_of(stream: TaskStream, row: int, column: int) -> Column:
    """Return what the cell (row, column) asks; it depends on no later task than the two.

    Class-incremental: every class met until the row's or the column's task competes, whichever is
    later. Task-incremental: only the task's own. Probes: their own.
    """
    task = stream.column(column)
    if task.is_probe:
        return Column(task, task.classes)
    names = stream.classes_until(max(row - 1, column))
    told = stream.scenario == "task"
    return Column(task, names, task.labels if told else None, told)


class ColumnScorer:
    """Collects what a model says of a column and turns it into one number.

    Attributes:
        value: the score, 0 to 1, the same on all ranks; None before ``finish``.
        said: sample numbers, truths, answers and scores in sample order, after ``finish``.
    """

    def __init__(self, column: Column) -> None:
        self.column = column
        self.value: float | None = None
        self.said: dict[str, Tensor] = {}
        self.faults: list[str] = []
        self._rows: list[dict[str, Tensor]] = []
        self._device = torch.device("cpu")

    def begin(self, model: Any) -> None:
        """Show the model the classes of this column."""
        self._rows = []
        if self.column.names and hasattr(model, "set_classes"):
            model.set_classes(self.column.names, self.column.task.templates)

    def add(self, model: Any, strategy: Strategy, batch: Batch) -> None:
        """Score a batch; the strategy is told the task only where the scenario says so."""
        self.faults += batch.faults
        if not len(batch):
            return
        batch = self.told(batch)
        if self.column.task.is_probe:
            # A probe has classes of its own: heads learned for the stream's classes do not apply.
            output = model(batch, strategy.prompts(model, batch))
        else:
            output = run(model, strategy, batch)
        if self.column.score == "recall@1":
            rows = _embeddings(output, batch)
        else:
            rows = _best(output.logits, batch.labels, self.column.allowed)
        rows["sample"] = batch.sample if batch.sample is not None else torch.arange(len(batch))
        self._device = batch.labels.device
        self._rows.append({name: tensor.detach().cpu() for name, tensor in rows.items()})

    def told(self, batch: Batch) -> Batch:
        """Return the batch with its task numbers only where the scenario lets the model know."""
        if self.column.tells_task:
            return batch
        return replace(batch, task=torch.full_like(batch.task, -1))

    def finish(self) -> None:
        """Gather the rows of all ranks and compute the score."""
        self.faults = gather_texts(self.faults, self._device)
        rows = self._gathered()
        if not rows or not len(rows["sample"]):
            raise ValueError(
                f"no test sample of '{self.column.task.name}' could be read: check its shards"
            )
        if "answer" in rows:
            self.value = float((rows["answer"] == rows["truth"]).double().mean())
        else:
            found = recall_at_k(rows["image"], rows["text"], rows["caption"], ks=(1,))
            self.value = (found.image_to_text[1] + found.text_to_image[1]) / 2
        kept = ("sample", "truth", "answer", "score")
        self.said = {name: rows[name] for name in kept if name in rows}

    def _gathered(self) -> dict[str, Tensor]:
        names = self._rows[0].keys() if self._rows else ()
        own = {name: torch.cat([row[name] for row in self._rows]) for name in names}
        self._rows = []
        gathered = {n: gather_rows(tensor.to(self._device)).cpu() for n, tensor in own.items()}
        if not gathered:
            return {}
        order = torch.argsort(gathered["sample"])
        return {name: tensor[order] for name, tensor in gathered.items()}


def _best(logits: Tensor, labels: Tensor, allowed: tuple[int, ...] | None) -> dict[str, Tensor]:
    if allowed is not None:
        keep = torch.full((logits.shape[1],), float("-inf"), device=logits.device)
        keep[list(allowed)] = 0
        logits = logits + keep
    best = logits.max(1)
    return {"answer": best.indices, "truth": labels, "score": best.values.float()}


def _embeddings(output: Output, batch: Batch) -> dict[str, Tensor]:
    if output.image is None or output.text is None or batch.tokens is None:
        raise ValueError("retrieval needs a picture and a text embedding for every row, got None")
    place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) << 32
    caption = (ranks_of(1, 0, batch.tokens + place) * (batch.tokens != 0)).sum(1)
    return {"image": output.image.float(), "text": output.text.float(), "caption": caption}
