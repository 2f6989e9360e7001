"""Instructions: what the rows of each task ask or say, as a few embedded texts of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import VLM, Batch, Task, device_of, require
from mmcl.memory.dealing import fill_rows
from mmcl.memory.rows import Rows
from mmcl.memory.snapshot import Snapshot

MOST_TAGS = 64
"""Tags of one text that are looked at."""

_WORD = re.compile(r"\w+")


class Instructions(nn.Module):
    """Unit embeddings of the texts of a uniform sample of each task's rows, and how far it lies.

    Args:
        count: rows of a task whose texts are embedded, at most.
        seed: of their choice.

    **Remembers** 2 E + 8 bytes for each different text of E numbers (float16), ``count`` of a task
    at most, and a distance for every two tasks.

    **Asks of the model** ``embed``; distances mean something if its text embedding stays as it is.
    """

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.count = count
        self.seed = seed
        self.table = Snapshot()
        self._distances: dict[int, dict[int, float]] = {}

    def knows(self, task: int) -> bool:
        """Tell whether a task's texts were embedded."""
        return f"points_{task}" in self.table.tensors

    @torch.no_grad()
    def learn(self, model: VLM, task: Task, batches: Iterable[Batch], by: object) -> None:
        """Embed texts of a task's rows; all ranks then know the same.

        Args:
            model: that embeds.
            task: whose rows they are.
            batches: this rank's part of a pass over the task or over a uniform sample of it.
            by: the strategy, for errors.

        Raises:
            ValueError: if rows have neither question nor caption, or there are none.
        """
        able = require(model, "embed", by=by)

        def columns(batch: Batch) -> dict[str, Tensor]:
            _expect_text(batch, task.name)
            return {"text": able.embed(batch, "text").float()}

        found = Rows(self.count, seed=self.seed)
        fill_rows(found, batches, task.index, columns, device_of(model))
        if not len(found):
            raise ValueError(
                f"preview was given no rows of task '{task.name}': give it batches of its data"
            )
        unit = functional.normalize(found.columns["text"], dim=1).half()
        points, counts = torch.unique(unit, dim=0, return_counts=True)
        new = {f"points_{task.index}": points, f"counts_{task.index}": counts}
        self.table.take({**self.table.tensors, **new})

    def of(self, task: int) -> tuple[Tensor, Tensor]:
        """Return (N, E) float64 unit embeddings of a task's texts, and (N,) how often each came."""
        points = self.table.get(f"points_{task}").double()
        return functional.normalize(points, dim=1), self.table.get(f"counts_{task}")

    def put_distances(self, task: int, distances: Mapping[int, float]) -> None:
        """Note how far each earlier task lies from a task."""
        self._distances[task] = dict(distances)

    def distances(self, task: int) -> dict[int, float]:
        """Return earlier task -> distance from a task; empty if it is not known."""
        return dict(self._distances.get(task, {}))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the distances as plain numbers."""
        listed = [[t, o, far] for t, own in self._distances.items() for o, far in own.items()]
        return {"distances": listed}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the distances of a checkpoint."""
        self._distances = {}
        for task, other, distance in state["distances"]:
            self._distances.setdefault(int(task), {})[int(other)] = float(distance)


def tags_of(batch: Batch) -> Tensor:
    """Return the different words of each row's question, or the different tokens of its caption.

    Returns:
        (B, MOST_TAGS) int64, -1 behind the last.

    Raises:
        ValueError: if rows have neither.
    """
    _expect_text(batch, "")
    if batch.references:
        said = [_WORD.findall(reference.question.lower()) for reference in batch.references]
        rows = [{_tag(word) for word in words} for words in said]
    elif batch.tokens is not None:
        kept = batch.tokens if batch.mask is None else batch.tokens.masked_fill(~batch.mask, -1)
        rows = [set(row) - {-1} for row in kept.tolist()]
    tags = torch.full((len(batch), MOST_TAGS), -1)
    for place, row in enumerate(rows):
        few = sorted(row)[:MOST_TAGS]
        tags[place, : len(few)] = torch.tensor(few, dtype=torch.int64)
    return tags


def _tag(word: str) -> int:
    # Python's own hash of a text is another in every process.
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big") >> 1


def _expect_text(batch: Batch, task: str) -> None:
    if len(batch.references) != len(batch) and batch.tokens is None:
        raise ValueError(
            f"rows of task '{task}' have neither question nor caption, and replay by instructions "
            "compares these: use allocation='equal_tasks' and another policy for rows with classes"
        )
