"""RanPAC solves a ridge regression from random projections of frozen features to classes.

Paper: McDonnell et al. 2023, arXiv:2307.02251.
Code followed: none; written from the equations.
Differs: no adapter is trained on the first task; features have length 1 before projection; the
ridge is chosen over all tasks so far, not the last one, so the order of tasks does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mmcl.core import VLM, Batch, Output, Strategy, Task, device_of, require, require_classes
from mmcl.core.distributed import all_reduce_sum
from mmcl.core.seeding import generator, hash_priorities
from mmcl.memory.distributed_fill import pass_sample_ids
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.prototypes import choose_ridge, one_hot, random_projection, solve_ridge

_RIDGES = (
    1e-8,
    1e-7,
    1e-6,
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1e0,
    1e1,
    1e2,
    1e3,
    1e4,
    1e5,
    1e6,
    1e7,
    1e8,
)
_SPLITS = ("fit", "held")


class RanPAC(Strategy):
    """Random projection and ridge regression classifier on a frozen encoder.

    Class scores become ``relu(f W) W_o``. Samples are split 80 to 20 by a hash of (seed, task,
    sample id), or position in the pass where batches have no ids: the larger split fits each
    candidate ridge, the smaller one selects, and the solution is taken over both. A class without
    samples scores -inf. The model's own scores stay before the first task's end, for samples with
    captions, and where there are fewer scores than known classes (an evaluation task with its own
    classes).

    Args:
        projection_dim: dim of the random projection, M; the paper takes 10,000.
        ridges: candidates, above 0.
        seed: seed of the projection and of the split.

    **Remembers** 2 M^2 + 3 M C float64 numbers for C classes (64 MB and 48 kB per class at 2,000).
    The projection is made again from the seed.

    **Asks of the model** ``embed`` and ``freeze``, and class scores: one that answers in words is
    refused. It freezes both towers.
    """

    def __init__(
        self, projection_dim: int = 2000, ridges: Sequence[float] = _RIDGES, seed: int = 0
    ) -> None:
        super().__init__()
        if projection_dim < 1 or not ridges or min(ridges) <= 0:
            raise ValueError(
                f"projection_dim is {projection_dim} and ridges {list(ridges)}: give a "
                "projection_dim of 1 or more and at least one ridge, all above 0"
            )
        self.projection_dim, self.ridges, self.seed = projection_dim, tuple(ridges), seed
        self.sums = Snapshot()
        self._projection: Tensor | None = None

    def attach(self, model: VLM) -> None:
        """Freeze both towers: old sums hold only while features stay as they are."""
        require_classes(model, by=self, instead="LoRA or ExperienceReplay")
        require(model, "embed", "freeze", by=self).freeze("image", "text")

    def transform_output(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Replace the scores by those of the regression."""
        if self.sums.is_empty or batch.input_ids is not None:
            return output
        head, counts = self.sums.get("head"), self.sums.get("counts")
        missing = output.logits.shape[1] - len(counts)
        if missing < 0 or not len(counts):
            return output
        scores = (self._project(model, batch) @ head).masked_fill(counts == 0, -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        # Not in half precision, which would make classes tie.
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        return replace(output, logits=scores.to(wide))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Add the task's samples to the sums and solve again."""
        old = self.sums.tensors
        known = len(old["counts"]) if old else 0
        classes = max(max(task.class_ids, default=-1) + 1, known)
        sums = self._task_sums(model, task, batches, classes)
        for name, value in old.items():
            if name != "head":
                # The old sums fill the corner of the new ones, which have columns for more classes.
                sums[name][tuple(slice(size) for size in value.shape)] += value
        grams = tuple(sums[f"gram {split}"] for split in _SPLITS)
        crosses = tuple(sums[f"cross {split}"] for split in _SPLITS)
        held = int(sums["held"])
        ridge = choose_ridge((grams[0], grams[1]), (crosses[0], crosses[1]), held, self.ridges)
        head = solve_ridge(grams[0] + grams[1], crosses[0] + crosses[1], ridge)
        if head is None:
            raise RuntimeError(
                f"ridge {ridge:g} solves one split but not all of the data: give larger ridges"
            )
        self.sums.take({**sums, "head": head})

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of classes with samples."""
        counts = self.sums.tensors.get("counts")
        return {"classes": 0 if counts is None else int((counts > 0).sum())}

    def _task_sums(
        self, model: VLM, task: Task, batches: Iterable[Batch], classes: int
    ) -> dict[str, Tensor]:
        device, dim = device_of(model), self.projection_dim
        new = partial(torch.zeros, dtype=torch.float64, device=device)
        sums = {f"gram {split}": new((dim, dim)) for split in _SPLITS}
        sums |= {f"cross {split}": new((dim, classes)) for split in _SPLITS}
        sums["counts"] = torch.zeros(classes, dtype=torch.int64, device=device)
        sums["held"] = torch.zeros((), dtype=torch.int64, device=device)
        seen = 0
        for batch in batches:
            projected, targets = self._project(model, batch), one_hot(batch.labels, classes)
            in_loss, is_held = batch.labels >= 0, self._is_held(task, batch, seen)
            seen += len(batch)
            masks = (in_loss & ~is_held, in_loss & is_held)
            for split, is_in in zip(_SPLITS, masks, strict=True):
                sums[f"gram {split}"].addmm_(projected[is_in].T, projected[is_in])
                sums[f"cross {split}"].addmm_(projected[is_in].T, targets[is_in])
            sums["counts"] += targets.sum(0).to(torch.int64)
            sums["held"] += (in_loss & is_held).sum()
        return {name: all_reduce_sum(value) for name, value in sums.items()}

    def _is_held(self, task: Task, batch: Batch, seen: int) -> Tensor:
        numbers = pass_sample_ids(batch, seen).to(batch.labels.device)
        return hash_priorities(self.seed, task.index, numbers) % 5 == 0

    def _project(self, model: VLM, batch: Batch) -> Tensor:
        features = require(model, "embed", by=self).embed(batch, "image")
        return random_projection(features, self._projection_for(features))

    def _projection_for(self, features: Tensor) -> Tensor:
        made = self._projection
        if made is None or len(made) != features.shape[1]:
            shape = (features.shape[1], self.projection_dim)
            draw = generator(self.seed, *shape)
            made = torch.randn(*shape, generator=draw, dtype=torch.float64)
        self._projection = made.to(features.device)
        return self._projection
