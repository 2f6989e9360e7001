"""Task embeddings: exact prototypes of each task, and embeddings of a few of its instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import VLM, Batch, Modality, Task, device_of, require
from mmcl.core.distributed import all_reduce_sum
from mmcl.memory.distributed_fill import fill_buffer
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer

Features = tuple[Tensor, ...]


class TaskPrototypes(nn.Module):
    """Task prototypes as sums of unit embeddings; a mean has the direction of its sum.

    Args:
        modalities: that are embedded, of "image" and "text".

    **Remembers** E float64 numbers for each task and modality, and a count of samples.

    **Asks of the model** ``embed``.
    """

    def __init__(self, modalities: Sequence[Modality] = ("image", "text")) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.table = Snapshot()

    def features(self, model: VLM, batch: Batch, by: object) -> Features:
        """Return (B, E) unit embeddings of each modality, without gradient."""
        able = require(model, "embed", by=by)
        found = [able.embed(batch, modality).detach() for modality in self.modalities]
        return tuple(functional.normalize(seen.double(), dim=1) for seen in found)

    @torch.no_grad()
    def fit(
        self,
        model: VLM,
        task: Task,
        batches: Iterable[Batch],
        by: object,
        watch: Callable[[Batch, Features], None] = lambda batch, features: None,
    ) -> None:
        """Compute the sums of a task from one exact pass, over all ranks.

        ``by`` is the strategy, for errors; ``watch`` is called with every batch and its features.

        Raises:
            RuntimeError: if this process has no samples.
        """
        sums: list[Tensor] | None = None
        count = torch.zeros((), dtype=torch.int64)
        for batch in batches:
            features = self.features(model, batch, by)
            own = [seen.sum(0) for seen in features]
            sums = own if sums is None else [a + b for a, b in zip(sums, own, strict=True)]
            count = count.to(own[0].device) + len(batch)
            watch(batch, features)
        if sums is None:
            raise RuntimeError(
                f"{type(by).__name__} saw no samples of task '{task.name}' on this process: give "
                "end_task the task's training batches, or use fewer processes"
            )
        table = {"counts": self.table.with_row("counts", task.index, all_reduce_sum(count))}
        for modality, total in zip(self.modalities, sums, strict=True):
            table[modality] = self.table.with_row(modality, task.index, all_reduce_sum(total))
        self.table.take(table)

    @property
    def counts(self) -> Tensor:
        """Number of samples of each task, (T,) int64, 0 for a task that was skipped."""
        tensors = self.table.tensors
        return tensors["counts"] if tensors else torch.zeros(0, dtype=torch.int64)

    @property
    def sums(self) -> Features:
        """Sums of each task's embeddings, (T, E) float64 for each modality."""
        return tuple(self.table.get(modality) for modality in self.modalities)

    @property
    def is_empty(self) -> bool:
        """Whether no task has ended yet."""
        return self.table.is_empty

    def has(self, task: int) -> bool:
        """Whether a task has ended."""
        return 0 <= task < len(self.counts) and bool(self.counts[task])


MOST_TAGS = 64
"""Tags of one text that are used."""

_WORD = re.compile(r"\w+")


class InstructionEmbeddings(nn.Module):
    """Unit text embeddings of a uniform sample of each task, and the distances between tasks.

    Args:
        count: samples of a task whose texts are embedded, at most.
        seed: seed of their selection.

    **Remembers** 2 E + 8 bytes for each different text of E numbers (float16), ``count`` of a task
    at most, and a distance for every two tasks.

    **Asks of the model** ``embed``; distances are valid only if the text encoder is frozen.
    """

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.count = count
        self.seed = seed
        self.table = Snapshot()
        self._distances: dict[int, dict[int, float]] = {}

    def has(self, task: int) -> bool:
        """Whether a task's texts were embedded."""
        return f"points_{task}" in self.table.tensors

    @torch.no_grad()
    def fit(self, model: VLM, task: Task, batches: Iterable[Batch], by: object) -> None:
        """Embed texts of a task's samples; afterwards all ranks have the same.

        The batches are this rank's stride of a pass over the task or over a uniform sample of it;
        ``by`` is the strategy, for errors.

        Raises:
            ValueError: if samples have neither question nor caption, or there are none.
        """
        able = require(model, "embed", by=by)

        def columns(batch: Batch) -> dict[str, Tensor]:
            _expect_text(batch, task.name)
            return {"text": able.embed(batch, "text").float()}

        found = TensorBuffer(self.count, seed=self.seed)
        fill_buffer(found, batches, task.index, columns, device_of(model))
        if not len(found):
            raise ValueError(
                f"preview was given no samples of task '{task.name}': give it batches of its data"
            )
        unit = functional.normalize(found.columns["text"], dim=1).half()
        points, counts = torch.unique(unit, dim=0, return_counts=True)
        new = {f"points_{task.index}": points, f"counts_{task.index}": counts}
        self.table.take({**self.table.tensors, **new})

    def get(self, task: int) -> tuple[Tensor, Tensor]:
        """Return (N, E) float64 unit embeddings of a task's texts, and (N,) their counts."""
        points = self.table.get(f"points_{task}").double()
        return functional.normalize(points, dim=1), self.table.get(f"counts_{task}")

    def put_distances(self, task: int, distances: Mapping[int, float]) -> None:
        """Store the distances of earlier tasks from a task."""
        self._distances[task] = dict(distances)

    def distances(self, task: int) -> dict[int, float]:
        """Return earlier task -> distance from a task; empty if unknown."""
        return dict(self._distances.get(task, {}))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the distances as plain numbers."""
        listed = [[t, o, far] for t, own in self._distances.items() for o, far in own.items()]
        return {"distances": listed}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the distances of a checkpoint."""
        self._distances = {}
        for task, other, distance in state["distances"]:
            self._distances.setdefault(int(task), {})[int(other)] = float(distance)


def tags_of(batch: Batch) -> Tensor:
    """Return the different words of each sample's question, or tokens of its caption, as tags.

    (B, MOST_TAGS) int64, -1 behind the last.

    Raises:
        ValueError: if samples have neither.
    """
    _expect_text(batch, "")
    if batch.references:
        questions = [_WORD.findall(reference.question.lower()) for reference in batch.references]
        tag_sets = [{_tag(word) for word in words} for words in questions]
    elif batch.input_ids is not None:
        is_real, kept = batch.attention_mask, batch.input_ids
        kept = kept if is_real is None else kept.masked_fill(~is_real, -1)
        tag_sets = [set(tokens) - {-1} for tokens in kept.tolist()]
    tags = torch.full((len(batch), MOST_TAGS), -1)
    for index, own in enumerate(tag_sets):
        few = sorted(own)[:MOST_TAGS]
        tags[index, : len(few)] = torch.tensor(few, dtype=torch.int64)
    return tags


def _tag(word: str) -> int:
    # Python's own hash of a text differs between processes.
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big") >> 1


def _expect_text(batch: Batch, task: str) -> None:
    if len(batch.references) != len(batch) and batch.input_ids is None:
        raise ValueError(
            f"samples of task '{task}' have neither question nor caption, and replay by "
            "instructions compares these: use allocation='task_balanced' and another selection"
        )
