"""CLMoE routes rows among shared low-rank experts by row and by task, and merges with momentum.

Paper: CL-MoE, Huai et al. 2025, arXiv:2503.00413.
Code followed: none; the merge is the one that the authors' script states, the rest the paper's.
Differs: the instance router reads the frozen embedding of a row's picture and question, not the
hidden state of each token: so a row's gates are the same in training, at the prompt and at every
word of its answer, with or without a cache, and do not depend on its batch. Usage is the mean of
the instance router's weights over one exact pass at the task's end, in float64 over all ranks; the
released code logs it by the clock and never uses it. Task and expert sets are those of each layer,
where the script has one list for all. The script gives experts that led only in the task before the
smaller share of their old weights; the sources do not say why, and we follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Prompts, Strategy, Task, device_of, require
from mmcl.core.distributed import sum_over_ranks
from mmcl.core.randomness import generator
from mmcl.layers import LowRankSlots, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears
from mmcl.layers.frozen import draw_uniform
from mmcl.memory import Snapshot
from mmcl.memory.task_means import Features, TaskMeans
from mmcl.ops.routing import likeness, momentum_shares, top_k_gates, top_k_mask

_GATE = "cl_moe"


class CLMoE(Strategy):
    """A dual router over shared experts, and a momentum merge of the experts after each task.

    Every layer weighs its experts by ``softmax(G x)`` of the row. In evaluation
    (``strategy.eval()``) half of the weight comes from how the layer's experts were used in the
    task that the row looks most like. The ``top_k`` largest weights are kept and sum to 1.

    After each task but the first an expert becomes ``s * old + (1 - s) * new`` with s =
    1 - ``momentum`` where it was among the leading ``top_k`` of the task before and no longer is,
    and s = ``momentum`` elsewhere.

    Args:
        experts: of each layer, E.
        rank: r of each expert.
        alpha: None = 2 * rank.
        top_k: experts that answer for a row, 1 to ``experts``.
        momentum: 0 to 1.
        instance_share: of the row's own weights in evaluation, 0 to 1; the rest is the task's.
        dropout: of the experts' input in training, 0 to 1.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        train_projector: let the projector between the towers learn as well.
        seed: of the experts' and the router's start.

    **Remembers** the router, E M float32 numbers a layer for M numbers of both embeddings; a mean
    of M float64 numbers and E a layer for each task; and the experts as the last task left them.
    Experts, E r (d_in + d_out) numbers a layer, are the model's.

    **Asks of the model** ``answer``, ``linears``, ``freeze``, ``gates``, ``embed``,
    ``embed_width``; without a guide ``widths`` as well.
    """

    router: nn.Parameter

    def __init__(
        self,
        experts: int = 4,
        rank: int = 8,
        alpha: float | None = None,
        top_k: int = 2,
        momentum: float = 0.7,
        instance_share: float = 0.5,
        dropout: float = 0.0,
        layers: Which = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if not 1 <= top_k <= experts:
            raise ValueError(
                f"top_k must be 1 to {experts} (the number of experts), got {top_k}: choose fewer"
            )
        if not 0 <= momentum <= 1 or not 0 <= instance_share <= 1:
            raise ValueError(
                f"momentum is {momentum} and instance_share {instance_share}: give each from 0 to 1"
            )
        self.experts, self.rank, self.top_k, self.momentum = experts, rank, top_k, momentum
        self.alpha = 2 * rank if alpha is None else alpha
        self.instance_share, self.dropout, self.layers = instance_share, dropout, layers
        self.train_projector, self.seed = train_projector, seed
        self.means = TaskMeans()
        self.usage = Snapshot()
        self.before = Snapshot()
        self._names: tuple[str, ...] = ()

    def attach(self, model: VLM) -> None:
        """Freeze the model, put experts into its language model and make the router."""
        asked = ("answer", "linears", "freeze", "gates", "embed", "embed_width")
        able = require(model, *asked, by=self)
        names = frozen_linears(model, self.layers, self.train_projector, self)
        self._names = tuple(names)
        gate = iter(range(len(names)))

        def make(linear: nn.Linear) -> LowRankSlots:
            place = next(gate)
            scale, key = self.alpha / self.rank, f"{_GATE}.{place}"
            layer = LowRankSlots(linear, scale, self.dropout, able.gates, key)
            for expert in range(self.experts):
                layer.add_slot(self.rank, generator(self.seed, expert, place))
            layer.activate("gates")
            return layer

        install(able, names, make)
        width = _row_width(able, self)
        start = draw_uniform(len(names) * self.experts, width, generator(self.seed, -1))
        shaped = start.view(len(names), self.experts, width)
        self.router = nn.Parameter(shaped.to(device_of(model)))

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Weigh the experts of every layer for every row."""
        if "router" not in self._parameters:
            raise RuntimeError("CLMoE has no router yet: call strategy.attach(model) once, first")
        features = self.means.features(model, batch, self)
        weights = self._instance(features)
        if not self.training and not self.means.is_empty:
            known = self.usage.get("usage")[self.nearest_task(features)]
            weights = self.instance_share * weights + (1 - self.instance_share) * known
        gates = top_k_gates(weights, self.top_k).float()
        return Prompts(gates={f"{_GATE}.{place}": own for place, own in enumerate(gates.unbind(1))})

    def nearest_task(self, features: Features) -> Tensor:
        """Return (B,) int64, the ended task whose mean picture and question are most alike."""
        scores = likeness(features, self.means.sums, (0.5, 0.5))
        is_known = (self.means.counts > 0).to(scores.device)
        return scores.masked_fill(~is_known, -torch.inf).argmax(1)

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Measure how the task uses the experts, then merge them with what they were."""
        total = torch.zeros_like(self.router[:, :, 0], dtype=torch.float64)
        chosen = torch.zeros_like(total)

        def watch(batch: Batch, features: Features) -> None:
            weights = self._instance(features)
            total.add_(weights.sum(0))
            chosen.add_(top_k_mask(weights, self.top_k).sum(0))

        old = self.usage.tensors
        ended = [number for number in range(task.index) if self.means.knows(number)]
        self.means.learn(model, task, batches, self, watch)
        now = sum_over_ranks(total) / self.means.counts[task.index]
        if ended:
            self._merge(model, old["usage"][ended[-1]], now)
        usage = now.new_zeros(len(self.means.counts), *now.shape)
        if old:
            usage[: len(old["usage"])] = old["usage"]
        usage[task.index] = now
        self.usage.take({"usage": usage, "chosen": sum_over_ranks(chosen).sum(0)})
        self.before.take(self._experts_of(model))

    def holdings(self) -> Mapping[str, int]:
        """Return how many tasks have a usage."""
        return {"usage": int((self.means.counts > 0).sum())}

    def idle(self) -> tuple[str, ...]:
        """Name the experts that no row of the last task chose, in no layer."""
        chosen = self.usage.tensors.get("chosen")
        unused = [] if chosen is None else (chosen == 0).nonzero().flatten().tolist()
        found = f"experts {', '.join(map(str, unused))} of {self.experts} were never chosen"
        return super().idle() + ((found,) if unused else ())

    def _instance(self, features: Features) -> Tensor:
        """(B, layers, E) float64, what each layer's own router says of a row."""
        scores = torch.einsum("bm,lem->ble", torch.cat(features, 1), self.router.double())
        return scores.softmax(-1)

    def _merge(self, model: VLM, before: Tensor, now: Tensor) -> None:
        """Mix old and new experts; ``before`` and ``now`` are (layers, E) usages."""
        led, leads = top_k_mask(before.to(now), self.top_k), top_k_mask(now, self.top_k)
        shares = momentum_shares(led, leads, self.momentum).flatten().tolist()
        old, new = self.before.tensors, self._experts_of(model)
        for place, (name, weight) in enumerate(new.items()):
            share = shares[place // 2]  # A and B of one expert stand together
            weight.copy_(share * old[name].to(weight) + (1 - share) * weight)

    def _experts_of(self, model: VLM) -> dict[str, Tensor]:
        """A and B of every expert, in the router's order of layers and expert by expert."""
        layers = installed(cast(nn.Module, model), LowRankSlots)
        return {
            f"{name}.{expert}.{side}": getattr(layers[name].slot(expert), side)
            for name in self._names
            for expert in range(self.experts)
            for side in ("A", "B")
        }


def _row_width(model: Any, by: object) -> int:
    """M: a guide embeds both alike, else questions are as wide as the words."""
    if getattr(model, "guide", None) is not None:
        return 2 * int(model.embed_width)
    widths = require(model, "widths", by=by).widths
    return int(model.embed_width) + int(widths["text"])
