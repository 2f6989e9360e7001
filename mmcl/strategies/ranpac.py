"""RanPAC trains nothing: it lifts frozen features at random and solves for the classes.

Paper: McDonnell et al. 2023, arXiv:2307.02251.
Code followed: none; written from the equations.
Differs: no adapter is trained on the first task; features have length 1 before they are lifted; the
ridge is chosen over all tasks so far, not the last one, so the order of tasks does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mmcl.core import VLM, Batch, Output, Strategy, Task, device_of, require, require_classes
from mmcl.core.distributed import sum_over_ranks
from mmcl.core.randomness import generator, ranks_of
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.prototypes import choose_ridge, one_hot, solve_ridge, spread

_RIDGES = tuple(10.0**power for power in range(-8, 9))
_PARTS = ("fit", "held")


class RanPAC(Strategy):
    """Ridge regression on randomly lifted features of a frozen encoder.

    Class scores become ``relu(f W) W_o``. Samples are split 80 to 20 by a hash of (seed, task,
    sample number): the larger part fits each candidate ridge, the smaller one chooses, and the
    solution is taken over both. A class without samples scores -inf. The model's own scores stay
    before the first task's end, for rows with captions, and where there are fewer columns than
    known classes (a probe with its own classes).

    Args:
        width: M, of the lifted features; the paper takes 10,000.
        ridges: candidates, above 0.
        seed: of the projection and of the split.

    **Remembers** 2 M^2 + 3 M C float64 numbers for C classes (64 MB and 48 kB a class at 2,000).
    The projection is made again from the seed.

    **Asks of the model** ``embed`` and ``freeze``, and class scores: one that answers in words is
    refused. It freezes both towers.
    """

    def __init__(self, width: int = 2000, ridges: Sequence[float] = _RIDGES, seed: int = 0) -> None:
        super().__init__()
        if width < 1 or not ridges or min(ridges) <= 0:
            raise ValueError(
                f"width is {width} and ridges {list(ridges)}: give a width of 1 or more and at "
                "least one ridge, all above 0"
            )
        self.width, self.ridges, self.seed = width, tuple(ridges), seed
        self.sums = Snapshot()
        self._projection: Tensor | None = None

    def attach(self, model: VLM) -> None:
        """Freeze both towers: old sums hold only while features stay as they are."""
        require_classes(model, by=self, instead="LoRA or ExperienceReplay")
        require(model, "embed", "freeze", by=self).freeze("image", "text")

    def refine(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Score by the regression."""
        if self.sums.is_empty or batch.tokens is not None:
            return output
        head, counts = self.sums.get("head"), self.sums.get("counts")
        missing = output.logits.shape[1] - len(counts)
        if missing < 0 or not len(counts):
            return output
        scores = (self._lift(model, batch) @ head).masked_fill(counts == 0, -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        return replace(output, logits=scores.to(output.logits.dtype))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Add the task's rows to the sums and solve again."""
        old = self.sums.tensors
        known = len(old["counts"]) if old else 0
        classes = max(max(task.labels, default=-1) + 1, known)
        sums = self._task_sums(model, task, batches, classes)
        for name, value in old.items():
            if name != "head":
                # The old sums fill the corner of the new ones, which have columns for more classes.
                sums[name][tuple(slice(size) for size in value.shape)] += value
        grams = tuple(sums[f"gram {part}"] for part in _PARTS)
        crosses = tuple(sums[f"cross {part}"] for part in _PARTS)
        held = int(sums["held"])
        ridge = choose_ridge((grams[0], grams[1]), (crosses[0], crosses[1]), held, self.ridges)
        head = solve_ridge(grams[0] + grams[1], crosses[0] + crosses[1], ridge)
        if head is None:
            raise RuntimeError(
                f"ridge {ridge:g} solves a part of the data but not all of it: give larger ridges"
            )
        self.sums.take({**sums, "head": head})

    def holdings(self) -> Mapping[str, int]:
        """Return how many classes have samples."""
        counts = self.sums.tensors.get("counts")
        return {"classes": 0 if counts is None else int((counts > 0).sum())}

    def _task_sums(
        self, model: VLM, task: Task, batches: Iterable[Batch], classes: int
    ) -> dict[str, Tensor]:
        device, width = device_of(model), self.width
        new = partial(torch.zeros, dtype=torch.float64, device=device)
        sums = {f"gram {part}": new((width, width)) for part in _PARTS}
        sums |= {f"cross {part}": new((width, classes)) for part in _PARTS}
        sums["counts"] = torch.zeros(classes, dtype=torch.int64, device=device)
        sums["held"] = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            lifted, targets = self._lift(model, batch), one_hot(batch.labels, classes)
            is_scored, is_held = batch.labels >= 0, self._is_held(task, batch)
            for part, rows in zip(_PARTS, (is_scored & ~is_held, is_scored & is_held), strict=True):
                sums[f"gram {part}"].addmm_(lifted[rows].T, lifted[rows])
                sums[f"cross {part}"].addmm_(lifted[rows].T, targets[rows])
            sums["counts"] += targets.sum(0).to(torch.int64)
            sums["held"] += (is_scored & is_held).sum()
        return {name: sum_over_ranks(value) for name, value in sums.items()}

    def _is_held(self, task: Task, batch: Batch) -> Tensor:
        if batch.sample is None:
            return torch.zeros_like(batch.task, dtype=torch.bool)
        return ranks_of(self.seed, task.index, batch.sample) % 5 == 0

    def _lift(self, model: VLM, batch: Batch) -> Tensor:
        features = require(model, "embed", by=self).embed(batch, "image")
        return spread(features, self._projection_for(features))

    def _projection_for(self, features: Tensor) -> Tensor:
        made = self._projection
        if made is None or len(made) != features.shape[1]:
            draw = generator(self.seed, features.shape[1], self.width)
            made = torch.randn(features.shape[1], self.width, generator=draw, dtype=torch.float64)
        self._projection = made.to(features.device)
        return self._projection
