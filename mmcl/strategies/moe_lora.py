"""MoELoRA trains a mixture of LoRA experts on all tasks, weighed by a router for every token.

Paper: Chen et al. 2024, arXiv:2403.08350. From CoIN.
Code followed: none; written from the equations.
Differs: nothing in the method; the usage of each expert is measured at a task's end, so that
unused experts are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Strategy, Task, device_of, forward
from mmcl.core.distributed import all_reduce_sum, rank_and_world
from mmcl.core.model import eval_mode
from mmcl.core.seeding import generator
from mmcl.layers import MoELoRALinear, find_layers
from mmcl.layers.adapters import TaskAdapters
from mmcl.layers.target_layers import TargetModules


class MoELoRA(Strategy):
    """Mixture of LoRA experts in every linear layer, all active, weighed by a softmax router.

    ``W x + alpha / rank * sum of w_i B_i A_i x`` with ``w = softmax(G x)`` for each token. Experts
    and routers stay trainable from task to task; with one expert this is LoRA. No single weight is
    equivalent, so nothing is merged.

    Args:
        num_experts: number of experts in every layer, E.
        rank: r of each expert; the paper's 128 ranks are 8 experts of 16.
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the input of experts and router in training, 0 to below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.
        idle_below: an expert whose mean weight over a task's tokens is less is reported as idle.
        samples: first samples of a task that the mean is taken over; 0 = do not measure.
        seed: seed of the initial A and routers.

    **Remembers** E numbers per layer, the mean weights at the last task's end; the model gets
    E (r (d_in + d_out) + d_in) float32 numbers per layer.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``.
    """

    mean_weights: Tensor

    def __init__(
        self,
        num_experts: int = 8,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
        idle_below: float = 0.01,
        samples: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if num_experts < 1 or samples < 0:
            raise ValueError(
                f"num_experts is {num_experts} and samples {samples}: give 1 expert or more and 0 "
                "samples or more"
            )
        self.num_experts, self.idle_below, self.samples = num_experts, idle_below, samples
        self.register_buffer("mean_weights", torch.zeros(0, num_experts))

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject experts into its language model."""
        own = self.adapters

        def make(linear: nn.Linear, index: int) -> MoELoRALinear:
            draw = generator(own.seed, index)
            return MoELoRALinear(linear, self.num_experts, own.rank, own.scale, draw, own.dropout)

        layers = own.inject(model, make, by=self)
        self.mean_weights = torch.zeros(len(layers), self.num_experts, device=device_of(model))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Measure each expert's mean weight over the first samples of the task."""
        rank, world = rank_and_world()
        left = len(range(rank, self.samples, world))
        layers = list(find_layers(cast(nn.Module, model), MoELoRALinear).values())
        sums = torch.zeros(len(layers), self.num_experts + 1, dtype=torch.float64)
        sums = sums.to(device_of(model))
        with eval_mode(cast(nn.Module, model)):
            for batch in batches if left else ():
                first = batch.take(torch.arange(min(left, len(batch)), device=batch.labels.device))
                with _router_sums(layers, first, sums):
                    forward(model, self.root, first)
                left -= len(first)
                if not left:
                    break
        total = all_reduce_sum(sums)
        self.mean_weights = (total[:, :-1] / total[:, -1:].clamp(min=1)).to(self.mean_weights)

    def inactive_parts(self) -> tuple[str, ...]:
        """Report the number of experts with almost no weight."""
        low = (self.mean_weights < self.idle_below) & (self.mean_weights.sum(1, keepdim=True) > 0)
        if not bool(low.any()):
            return ()
        layer, expert = low.nonzero()[0].tolist()
        return (
            f"{int(low.sum())} of {low.numel()} experts weigh less than {self.idle_below} on "
            f"average, the first of them expert {expert} of layer {layer}",
        )


@contextmanager
def _router_sums(layers: list[MoELoRALinear], batch: Batch, sums: Tensor) -> Iterator[None]:
    """Add up the routers' weights inside the block: per layer E sums and the number of tokens."""
    pairs = zip(layers, sums, strict=True)
    hooks = [layer.register_forward_pre_hook(_adder(batch, total)) for layer, total in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(batch: Batch, total: Tensor) -> Callable[[MoELoRALinear, tuple[Any, ...]], None]:
    def add(layer: MoELoRALinear, given: tuple[Any, ...]) -> None:
        x, mask = given[0], batch.attention_mask
        if mask is not None and x.dim() == 3 and len(x) == len(mask):
            # Prompts of another member stand after the first token; none of them is padding.
            mask = nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0), value=True)
            x = x[mask]
        weights = layer.routing(x).flatten(0, -2)
        total[:-1] += weights.sum(0, dtype=torch.float64)
        total[-1] += len(weights)

    return add
