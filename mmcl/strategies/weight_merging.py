"""WeightMerging merges after each task the weights of all tasks so far (average, EMA, TIES, ...).

Paper: Marczak et al. 2024, arXiv:2407.06322.
Code followed: none; written from the equations.
Differs: methods besides MagMax (task arithmetic, arXiv:2212.04089; TIES, arXiv:2306.01708; DARE,
arXiv:2311.03099); a task starts from the merged weights or the first ones, theirs from the last
task's own; TIES keeps exactly its fraction of entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Strategy, Task, trainable_parameters
from mmcl.layers.adapters import adapter_layers, expect_lasting_weights
from mmcl.memory.snapshot import Snapshot
from mmcl.ops import model_merging as merging

Method = Literal["average", "ema", "task_arithmetic", "ties", "dare", "magmax"]


class WeightMerging(Strategy):
    """Model merging after each task, of full-tuned weights.

    "average" is the mean of the weights at the end of each task, "ema" their moving average
    ``(1 - share) * mean + share * weights`` (LAE, Gao et al. 2023, arXiv:2303.10070). The others
    add merged task vectors to the weights before the first task. A task vector of "ties" and
    "magmax" is the difference to these first weights; one of "task_arithmetic" and "dare", which
    sum, is the difference to the weights from which the task started, so that no change counts
    twice.

    Adapters are refused: a merge of products B A is no adapter of their rank. Merge their
    checkpoints with ``mmcl merge``, which merges products.

    Args:
        method: how the weights are merged.
        start: weights from which a task starts: "merged", or "base" = those before the first task.
        share: of "ema", weight of the newest task, 0 to 1.
        scale: of the methods with task vectors, factor of the merged vector.
        density: of "ties", fraction of entries of each task vector that stay, 0 < density <= 1.
        drop_rate: of "dare", fraction of entries dropped, 0 to less than 1.
        seed: of "dare", seed of the dropped entries.

    **Remembers** the trainable weights before the first task and before this one, and the mean
    ("average", "ema") or the weights of each task (the others), at their own precision.

    **Asks of the model** nothing beyond the protocol.
    """

    reads_weights = rewrites_weights = True

    def __init__(
        self,
        method: Method = "ema",
        start: Literal["merged", "base"] = "merged",
        share: float = 0.5,
        scale: float = 1.0,
        density: float = 0.2,
        drop_rate: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method not in get_args(Method):
            raise ValueError(f"method is '{method}', expected one of {', '.join(get_args(Method))}")
        if start not in ("merged", "base"):
            raise ValueError(f"start is '{start}', expected 'merged' or 'base'")
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, expected 0 to 1 (only the newest task)")
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected more than 0, at most 1")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected 0 to less than 1")
        self.method, self.start, self.share, self.scale = method, start, share, scale
        self.density, self.drop_rate, self.seed = density, drop_rate, seed
        self.base, self.before, self.tasks = Snapshot(), Snapshot(), Snapshot()
        self.register_buffer("merged_tasks", torch.zeros((), dtype=torch.long))
        self.merged_tasks: Tensor

    def begin_task(self, model: VLM, task: Task) -> None:
        """Write the weights that the task starts from, and copy them.

        Raises:
            ValueError: if the model has adapters, or other weights are trained than before.
        """
        adapters = list(adapter_layers(cast(nn.Module, model)))
        if adapters:
            raise ValueError(
                f"WeightMerging cannot merge the adapter of layer '{adapters[0]}': a merge of "
                "products B A is no adapter of their rank; fine-tune in full, use WiseFT, or merge "
                "checkpoints with mmcl merge"
            )
        expect_lasting_weights(model, by=self)
        weights = trainable_parameters(model)
        if self.base.is_empty:
            self.base.take(weights)
        self._expect_same(weights)
        if self.start == "base":
            _write(weights, self.base.tensors)
        self.before.take(weights)

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Write the merge of all tasks so far into the model."""
        weights = trainable_parameters(model)
        self._expect_same(weights)
        count = int(self.merged_tasks) + 1
        if self.method in ("average", "ema"):
            share = 1 / count if self.method == "average" else self.share
            # The mean starts at the first weights: without a task merged, "average" replaces them.
            merged = merging.wise((self.base if count == 1 else self.tasks).tensors, weights, share)
            self.tasks.take(merged)
        else:
            self.tasks.take(self.tasks.tensors | self._task_weights(weights, count - 1))
            merged = self._merge([self._stored(index) for index in range(count)])
        self.merged_tasks.fill_(count)
        _write(weights, merged)

    def _task_weights(self, weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Return the weights of a task under the names of its entries in ``tasks``."""
        own: Mapping[str, Tensor] = weights
        if self.method in ("task_arithmetic", "dare") and self.start == "merged":
            base, before = self.base.tensors, self.before.tensors
            own = {name: base[name] + (w - before[name]) for name, w in weights.items()}
        return {f"{index}/{name}": tensor for name, tensor in own.items()}

    def _stored(self, index: int) -> dict[str, Tensor]:
        prefix = f"{index}/"
        stored = self.tasks.tensors.items()
        return {n.removeprefix(prefix): t for n, t in stored if n.startswith(prefix)}

    def _merge(self, others: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        base = self.base.tensors
        if self.method == "task_arithmetic":
            return merging.task_arithmetic(base, others, self.scale)
        if self.method == "ties":
            return merging.ties(base, others, self.density, self.scale)
        if self.method == "magmax":
            return merging.magmax(base, others, self.scale)
        return merging.dare(base, others, self.drop_rate, self.seed, self.scale)

    def _expect_same(self, weights: Mapping[str, Tensor]) -> None:
        """Check that the trainable weights are those of the first task.

        Raises:
            ValueError: naming the first weight that is not.
        """
        base = self.base.tensors
        for name in [*weights, *base]:
            if name not in base or name not in weights or base[name].shape != weights[name].shape:
                raise ValueError(
                    f"WeightMerging merges the same weights in every task, and '{name}' is not "
                    "trained in the first and in this task at one shape: train the same parts in "
                    "every task"
                )

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the numbers of tensors copied."""
        return {"base": len(self.base), "before": len(self.before), "tasks": len(self.tasks)}


@torch.no_grad()
def _write(weights: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(new[name])
