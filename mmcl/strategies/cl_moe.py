"""CL-MoE routes samples among shared LoRA experts by instance and by task, merged with momentum.

Paper: Huai et al. 2025, arXiv:2503.00413.
Code followed: none; the merge is the one that the authors' script states, the rest the paper's.
Differs: the instance router reads the frozen embedding of a sample's image and question, not the
hidden state of each token: so a sample's gates are the same in training, at the prompt and at every
generated token, with or without a cache, and do not depend on its batch. Usage is the mean of the
instance router's weights over one exact pass at the task's end, in float64 over all ranks; the
released code logs it by the clock and never uses it. Leading experts are those of each layer, where
the script has one list for all. The script keeps less of the old weights of experts that led only
in the task before; the sources do not say why, and we follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Prompts, Strategy, Task, device_of, require
from mmcl.core.distributed import all_reduce_sum
from mmcl.core.seeding import generator
from mmcl.layers.adapters import TaskAdapters, set_active_adapters
from mmcl.layers.lora_layers import kaiming_uniform
from mmcl.layers.target_layers import TargetModules
from mmcl.memory import Snapshot
from mmcl.memory.task_embeddings import Features, TaskPrototypes
from mmcl.ops.routing import cosine_similarity, ema_weights, top_k_gates, top_k_mask

_GATE = "cl_moe"


class CLMoE(Strategy):
    """Mixture of LoRA experts with a dual router, and a momentum merge of experts after each task.

    Every layer weighs its experts by ``softmax(G x)``, x the sample's embedding. In evaluation
    (``strategy.eval()``) half of the weight is the usage of the layer's experts in the task of
    highest cosine similarity. The ``top_k`` largest weights are kept and sum to 1.

    After each task but the first an expert becomes ``s * old + (1 - s) * new`` with s =
    1 - ``momentum`` where it was among the leading ``top_k`` of the task before and no longer is,
    and s = ``momentum`` elsewhere.

    Args:
        num_experts: number of experts in each layer, E.
        rank: r of each expert.
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        top_k: active experts of a sample, 1 to ``num_experts``.
        momentum: weight of the old experts, 0 to 1.
        instance_weight: weight of the instance router in evaluation, 0 to 1; the rest is the
            task's.
        dropout: of the experts' input in training, 0 to below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.
        seed: seed of the experts' and the router's initial values.

    **Remembers** the router, E M float32 numbers per layer for M numbers of both embeddings; a
    prototype of M float64 numbers and E numbers per layer for each task; and a copy of the experts
    at the last task's end. Experts, E r (d_in + d_out) numbers per layer, are the model's.

    **Asks of the model** ``generate``, ``target_linears``, ``freeze``, ``gates``, ``embed``,
    ``embed_dim``; without a routing encoder ``prompt_dims`` as well.
    """

    rewrites_weights = True
    router: nn.Parameter
    part = "router"

    def __init__(
        self,
        num_experts: int = 4,
        rank: int = 8,
        alpha: float | None = None,
        top_k: int = 2,
        momentum: float = 0.7,
        instance_weight: float = 0.5,
        dropout: float = 0.0,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k must be 1 to {num_experts} (num_experts), got {top_k}: choose fewer"
            )
        if not 0 <= momentum <= 1 or not 0 <= instance_weight <= 1:
            raise ValueError(
                f"momentum is {momentum} and instance_weight {instance_weight}: give each from 0 "
                "to 1"
            )
        self.num_experts, self.top_k, self.momentum = num_experts, top_k, momentum
        self.instance_weight, self.seed = instance_weight, seed
        self.means = TaskPrototypes()
        self.usage = Snapshot()
        self.before = Snapshot()
        self._names: tuple[str, ...] = ()

    def attach(self, model: VLM) -> None:
        """Freeze the model, inject experts into its language model and make the router."""
        needs = ("generate", "target_linears", "freeze", "gates", "embed", "embed_dim")
        able = require(model, *needs, by=self)
        gates = f"{_GATE}.{{index}}"
        layers = self.adapters.attach(model, by=self, gates=gates, adapters=self.num_experts)
        set_active_adapters(layers.values(), "gates", range(self.num_experts))
        self._names = tuple(layers)
        dim = _embedding_dim(able, self)
        start = kaiming_uniform(len(layers) * self.num_experts, dim, generator(self.seed, -1))
        shaped = start.view(len(layers), self.num_experts, dim)
        self.router = nn.Parameter(shaped.to(device_of(model)))

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return the gates of every layer's experts for every sample."""
        if "router" not in self._parameters:
            raise RuntimeError("CLMoE has no router yet: call strategy.attach(model) once, first")
        features = self.means.features(model, batch, self)
        weights = self._instance(features)
        if not self.training and not self.means.is_empty:
            known = self.usage.get("usage")[self.nearest_task(features)]
            weights = self.instance_weight * weights + (1 - self.instance_weight) * known
        gates = top_k_gates(weights, self.top_k).float()
        return Prompts(gates={f"{_GATE}.{index}": own for index, own in enumerate(gates.unbind(1))})

    def nearest_task(self, features: Features) -> Tensor:
        """Return (B,) int64, the ended task of highest cosine similarity to its prototypes."""
        scores = cosine_similarity(features, self.means.sums, (0.5, 0.5))
        is_known = (self.means.counts > 0).to(scores.device)
        return scores.masked_fill(~is_known, -torch.inf).argmax(1)

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Measure the task's usage of the experts, then merge them with their old weights."""
        total = torch.zeros_like(self.router[:, :, 0], dtype=torch.float64)
        chosen = torch.zeros_like(total)

        def watch(batch: Batch, features: Features) -> None:
            weights = self._instance(features)
            total.add_(weights.sum(0))
            chosen.add_(top_k_mask(weights, self.top_k).sum(0))

        old = self.usage.tensors
        ended = [number for number in range(task.index) if self.means.has(number)]
        self.means.fit(model, task, batches, self, watch)
        now = all_reduce_sum(total) / self.means.counts[task.index]
        if ended:
            self._merge(model, old["usage"][ended[-1]], now)
        usage = self.usage.with_row("usage", task.index, now)
        self.usage.take({"usage": usage, "chosen": all_reduce_sum(chosen).sum(0)})
        self.before.take(self._experts_of(model))

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of tasks with a usage."""
        return {"usage": int((self.means.counts > 0).sum())}

    def inactive_parts(self) -> tuple[str, ...]:
        """Report the experts that no sample of the last task chose in any layer."""
        chosen = self.usage.tensors.get("chosen")
        unused = [] if chosen is None else (chosen == 0).nonzero().flatten().tolist()
        found = f"experts {', '.join(map(str, unused))} of {self.num_experts} were never chosen"
        return super().inactive_parts() + ((found,) if unused else ())

    def _instance(self, features: Features) -> Tensor:
        """Return (B, layers, E) float64, the weights of each layer's instance router."""
        scores = torch.einsum("bm,lem->ble", torch.cat(features, 1), self.router.double())
        return scores.softmax(-1)

    def _merge(self, model: VLM, before: Tensor, now: Tensor) -> None:
        """Merge old and new experts; ``before`` and ``now`` are (layers, E) usages."""
        led, leads = top_k_mask(before.to(now), self.top_k), top_k_mask(now, self.top_k)
        fractions = ema_weights(led, leads, self.momentum).flatten().tolist()
        old, new = self.before.tensors, self._experts_of(model)
        for index, (name, weight) in enumerate(new.items()):
            fraction = fractions[index // 2]  # A and B of one expert are neighbors
            weight.copy_(fraction * old[name].to(weight) + (1 - fraction) * weight)

    def _experts_of(self, model: VLM) -> dict[str, Tensor]:
        """Return A and B of every expert, in the router's order of layers, then experts."""
        layers = self.adapters.layers_of(model)
        return {
            f"{name}.{expert}.{side}": getattr(layers[name].adapter(expert), f"lora_{side}")
            for name in self._names
            for expert in range(self.num_experts)
            for side in ("A", "B")
        }


def _embedding_dim(model: Any, by: object) -> int:
    """Return M, image and question dims together; a question without encoder has the text dim."""
    if getattr(model, "routing_encoder", None) is not None:
        return 2 * int(model.embed_dim)
    dims = require(model, "prompt_dims", by=by).prompt_dims
    return int(model.embed_dim) + int(dims["text"])
