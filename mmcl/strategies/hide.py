"""HiDe-LLaVA sums the tasks' LoRA adapters in lower layers and routes to them in the last layer.

Paper: Guo et al. 2025, arXiv:2503.12941. With all layers gated by the question alone it is the
single-machine part of FCIT's DISCO, Guo et al. 2025, arXiv:2503.12897.
Code followed: none; written from the equations.
Differs: lower layers take the sum of B_i A_i, where the released code multiplies the sum of B with
the sum of A and so adds cross terms (``fuse="released"``). Other errors of the released code are
not here: samples of a batch have their own gates, so a batch may have any size; means are float64
sums over all ranks, with an integer count and no random first sample; adapters of tasks that were
not trained have weight 0; the number of tasks is not needed in advance; the last layer is found,
not numbered. Embeddings have length 1 before they are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

from mmcl.core import NO_PROMPTS, VLM, Batch, Prompts, Strategy, Task, require
from mmcl.layers.adapters import TaskAdapters, set_active_adapters
from mmcl.layers.target_layers import TargetModules, select_linears
from mmcl.memory.task_embeddings import TaskPrototypes
from mmcl.ops.routing import cosine_similarity, soft_gates

_GATE = "hide"


class HiDe(Strategy):
    """Hierarchical decoupling: one LoRA adapter per task, summed in lower layers, gated at the top.

    In training all samples of a step, replayed ones too, go through the adapter of the current
    task. In evaluation (``strategy.eval()``) lower layers sum all adapters and gated layers weigh
    them by ``softmax(cosine similarity / temperature)`` over the tasks that have ended. Mid-task,
    evaluation uses the current task's adapter alone, as training does.

    DISCO is ``gate_layers="all", image_weight=0, temperature=0.05``.

    Args:
        rank: r of each adapter.
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the adapters' input in training, 0 to below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        fuse: in lower layers: "sum" = sum of B_i A_i, "released" = (sum of B)(sum of A).
        gate_layers: "last" = the last ``expanded_layers`` are gated, "all" = all layers.
        expanded_layers: number of layers that count as last.
        temperature: temperature of the softmax over tasks, above 0.
        image_weight: weight of the image in the similarity, 0 to 1; the rest is the question's.
        train_projector: train the projector between the towers as well.
        seed: seed of the adapters' initial values.

    **Remembers** a prototype of E float64 numbers for each task and modality. Adapters,
    r (d_in + d_out) numbers for each layer and task, are the model's.

    **Asks of the model** ``generate``, ``target_linears``, ``freeze``, ``gates``, ``embed``.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: TargetModules = "all",
        fuse: Literal["sum", "released"] = "sum",
        gate_layers: Literal["last", "all"] = "last",
        expanded_layers: int = 1,
        temperature: float = 0.1,
        image_weight: float = 0.5,
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if fuse not in ("sum", "released") or gate_layers not in ("last", "all"):
            raise ValueError(
                f"fuse is '{fuse}' and gate_layers '{gate_layers}': choose fuse of 'sum', "
                "'released' and gate_layers of 'last', 'all'"
            )
        if temperature <= 0 or not 0 <= image_weight <= 1 or expanded_layers < 1:
            raise ValueError(
                f"temperature is {temperature}, image_weight {image_weight} and expanded_layers "
                f"{expanded_layers}: give a temperature above 0, an image_weight from 0 to 1 and 1 "
                "or more layers"
            )
        self.fuse, self.gate_layers, self.expanded_layers = fuse, gate_layers, expanded_layers
        self.temperature, self.image_weight = temperature, image_weight
        self.means = TaskPrototypes()
        self._task = 0

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the first task's adapter into its language model.

        Raises:
            ValueError: if the names of its layers have no numbers, so none is last.
        """
        able = require(model, "generate", "target_linears", "freeze", "gates", "embed", by=self)
        if self.gate_layers == "last":
            found = select_linears(able, self.adapters.target_modules, None)
            last_layers(found, self.expanded_layers)
        self.adapters.attach(model, by=self, gates=_GATE)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add an adapter for the task and freeze those before it."""
        self.adapters.begin_task(model, task.index)
        self._task = task.index
        self._activate(model, is_training=True)

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Activate adapters, and in evaluation return the gates of every sample."""
        if not self._activate(model, is_training=self.training):
            return NO_PROMPTS
        features = self.means.features(model, batch, self)
        weights = (self.image_weight, 1 - self.image_weight)
        scores = cosine_similarity(features, self.means.sums, weights)
        is_known = (self.means.counts > 0).to(scores.device)
        return Prompts(gates={_GATE: soft_gates(scores, is_known, self.temperature).float()})

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Compute the task's prototypes: its mean image and question embeddings."""
        self.means.fit(model, task, batches, self)

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the summed adapters of lower layers into the weights inside the block."""
        self._activate(model, is_training=False)
        return self.adapters.merged_adapters(model)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of tasks with a prototype."""
        return {"means": int((self.means.counts > 0).sum())}

    def _activate(self, model: VLM, *, is_training: bool) -> bool:
        """Activate adapters; returns whether samples need gates."""
        layers = self.adapters.layers_of(model)
        if not any(layer.adapters for layer in layers.values()):
            return False
        if is_training or not self.means.has(self._task):
            set_active_adapters(layers.values(), "one", (self._task,))
            return False
        is_all = self.gate_layers == "all"
        gated = set(layers) if is_all else last_layers(layers, self.expanded_layers)
        seen = range(len(self.means.counts))
        fused = [layer for name, layer in layers.items() if name not in gated]
        set_active_adapters(fused, "sum" if self.fuse == "sum" else "fused", seen)
        set_active_adapters([layers[name] for name in gated], "gates", seen)
        return True


def last_layers(names: Iterable[str], count: int) -> set[str]:
    """Return the names whose layer number is among the ``count`` largest.

    A name such as "lm.model.layers.31.mlp.up_proj" has the layer as its first number.

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
