"""HiDe sums the tasks' adapters in lower layers and weighs them row by row in the last.

Paper: HiDe-LLaVA, Guo et al. 2025, arXiv:2503.12941; with all layers gated by the question alone
it is the single-machine part of FCIT's DISCO, Guo et al. 2025, arXiv:2503.12897.
Code followed: none; written from the equations.
Differs: lower layers take the sum of B_i A_i, where the released code multiplies the sum of B with
the sum of A and so adds cross terms (``fuse="released"``). Of the released code's other faults none
is here: rows of a batch are weighed one by one, so a batch may have any size; means are float64
sums over all ranks, with an integer count and no random first sample; slots of tasks that were not
learned weigh nothing; the number of tasks is not needed in advance; the last layer is found, not
numbered. Embeddings have length 1 before they are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Literal, cast

from torch import nn

from mmcl.core import NO_PROMPTS, VLM, Batch, Prompts, Strategy, Task, require
from mmcl.layers import LowRankSlots, folded, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears, grow_slots
from mmcl.layers.choosing import choose_slots
from mmcl.memory.task_means import TaskMeans
from mmcl.ops.routing import likeness, soft_gates

_GATE = "hide"


class HiDe(Strategy):
    """One slot for each task; general layers fuse the slots, the last ones choose softly.

    In training every row of a step, a remembered one too, goes through the slot of the task that is
    learned. In evaluation (``strategy.eval()``) lower layers add up all slots and gated layers
    weigh them by ``softmax(likeness / temperature)`` over the tasks learned so far. Inside a task
    whose pass has not ended, evaluation answers with its slot alone, as training does.

    DISCO is ``gate_layers="all", image_share=0, temperature=0.05``.

    Args:
        rank: r of each slot.
        alpha: None = 2 * rank.
        dropout: of the slot's input in training, 0 to 1.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        fuse: of the lower layers: "sum" = sum of B_i A_i, "released" = (sum of B)(sum of A).
        gate_layers: "last" = the ``expanded_layers`` of largest number are gated, "all" = all.
        expanded_layers: how many layers are last.
        temperature: of the softmax over tasks, above 0.
        image_share: of the picture in the likeness, 0 to 1; the rest is the question's.
        train_projector: let the projector between the towers learn as well.
        seed: of the slots' start.

    **Remembers** a mean of E float64 numbers for each task and modality. Slots, r (d_in + d_out)
    numbers for each layer and task, are the model's.

    **Asks of the model** ``answer``, ``linears``, ``freeze``, ``gates``, ``embed``.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: Which = "all",
        fuse: Literal["sum", "released"] = "sum",
        gate_layers: Literal["last", "all"] = "last",
        expanded_layers: int = 1,
        temperature: float = 0.1,
        image_share: float = 0.5,
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if fuse not in ("sum", "released") or gate_layers not in ("last", "all"):
            raise ValueError(
                f"fuse is '{fuse}' and gate_layers '{gate_layers}': choose fuse of 'sum', "
                "'released' and gate_layers of 'last', 'all'"
            )
        if temperature <= 0 or not 0 <= image_share <= 1 or expanded_layers < 1:
            raise ValueError(
                f"temperature is {temperature}, image_share {image_share} and expanded_layers "
                f"{expanded_layers}: give a temperature above 0, a share from 0 to 1 and 1 or more "
                "layers"
            )
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.layers, self.train_projector, self.seed = layers, train_projector, seed
        self.fuse, self.gate_layers, self.expanded_layers = fuse, gate_layers, expanded_layers
        self.temperature, self.image_share = temperature, image_share
        self.means = TaskMeans()
        self._task = 0

    def attach(self, model: VLM) -> None:
        """Freeze the model and put layers with the first task's slot into its language model.

        Raises:
            TypeError: if the model lacks a member that is asked for.
            ValueError: if the names of its layers have no numbers, so none is last.
        """
        able = require(model, "answer", "linears", "freeze", "gates", "embed", by=self)
        names = frozen_linears(model, self.layers, self.train_projector, self)
        if self.gate_layers == "last":
            last_layers(names, self.expanded_layers)
        scale = self.alpha / self.rank
        install(
            able, names, lambda linear: LowRankSlots(linear, scale, self.dropout, able.gates, _GATE)
        )
        grow_slots(model, 1, self.rank, self.seed)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add a slot for the task and freeze those before it."""
        grow_slots(model, task.index + 1, self.rank, self.seed)
        self._task = task.index
        self._choose(model, learning=True)

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Choose slots, and in evaluation weigh those of gated layers for every row."""
        if not self._choose(model, learning=self.training):
            return NO_PROMPTS
        features = self.means.features(model, batch, self)
        shares = (self.image_share, 1 - self.image_share)
        scores = likeness(features, self.means.sums, shares)
        is_known = (self.means.counts > 0).to(scores.device)
        return Prompts(gates={_GATE: soft_gates(scores, is_known, self.temperature).float()})

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Take the task's mean picture and question."""
        self.means.learn(model, task, batches, self)

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the fused slots of lower layers into the weights for the length of a block."""
        self._choose(model, learning=False)
        return folded(cast(nn.Module, model))

    def holdings(self) -> Mapping[str, int]:
        """Return how many tasks can be recognised."""
        return {"means": int((self.means.counts > 0).sum())}

    def _choose(self, model: VLM, learning: bool) -> bool:
        """Choose what answers; returns whether rows have to be weighed."""
        layers = installed(cast(nn.Module, model), LowRankSlots)
        if not any(layer.slots for layer in layers.values()):
            return False
        if learning or not self.means.knows(self._task):
            choose_slots(layers.values(), "one", (self._task,))
            return False
        is_all = self.gate_layers == "all"
        gated = set(layers) if is_all else last_layers(layers, self.expanded_layers)
        seen = range(len(self.means.counts))
        fused = [layer for name, layer in layers.items() if name not in gated]
        choose_slots(fused, "sum" if self.fuse == "sum" else "fused", seen)
        choose_slots([layers[name] for name in gated], "gates", seen)
        return True


def last_layers(names: Iterable[str], count: int) -> set[str]:
    """Return the names whose layer number is among the ``count`` largest.

    Args:
        names: such as "lm.model.layers.31.mlp.up_proj"; their first number is the layer's.
        count: of layers, not of names.

    Raises:
        ValueError: if a name has no number.
    """
    numbers: dict[str, int] = {}
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if found is None:
            raise ValueError(
                f"'{name}' has no layer number, so no layer is last: use gate_layers='all'"
            )
        numbers[name] = int(found[1])
    last = sorted(set(numbers.values()))[-count:]
    return {name for name, number in numbers.items() if number in last}
