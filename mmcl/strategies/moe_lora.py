"""MoELoRA learns all tasks in several small LoRAs that a router weighs for every token.

Paper: Chen et al. 2024 (CoIN), arXiv:2403.08350.
Code followed: none; written from the equations.
Differs: nothing in the method; how much each expert is used is measured at a task's end, so that
experts that do nothing are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Strategy, Task, device_of, run
from mmcl.core.distributed import rank_and_world, sum_over_ranks
from mmcl.core.randomness import generator
from mmcl.core.rest import evaluating
from mmcl.layers import MoELoRALinear, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears


class MoELoRA(Strategy):
    """Experts in every linear layer, all of them in every answer, weighed by a softmax router.

    ``W x + alpha / rank * sum of w_i B_i A_i x`` with ``w = softmax(G x)`` for each token. Experts
    and routers go on learning from task to task; with one expert this is LoRA. There is no one
    weight that answers alike, so nothing is folded.

    Args:
        experts: E in every layer.
        rank: r of each expert; the paper's 128 ranks are 8 experts of 16.
        alpha: None = 2 * rank.
        dropout: of what experts and router see in training, 0 to below 1.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        train_projector: let the projector between the towers learn as well.
        idle_below: an expert whose mean weight over a task's tokens is less is reported as idle.
        samples: rows of a task, its first ones, over which that mean is taken; 0 = do not look.
        seed: of the first A and routers.

    **Remembers** E numbers a layer, the mean weights at the last task's end; the model gets
    E (r (d_in + d_out) + d_in) float32 numbers a layer.

    **Asks of the model** ``linears(which)``, ``freeze(*towers)``.
    """

    shares: Tensor

    def __init__(
        self,
        experts: int = 8,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: Which = "all",
        train_projector: bool = False,
        idle_below: float = 0.01,
        samples: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if experts < 1 or samples < 0:
            raise ValueError(
                f"experts is {experts} and samples {samples}: give 1 expert or more and 0 samples "
                "or more"
            )
        self.experts, self.rank, self.dropout = experts, rank, dropout
        self.alpha = 2 * rank if alpha is None else alpha
        self.layers: Which = layers
        self.train_projector = train_projector
        self.idle_below, self.samples, self.seed = idle_below, samples, seed
        self.register_buffer("shares", torch.zeros(0, experts))

    def attach(self, model: VLM) -> None:
        """Freeze the model and put experts into its language model."""
        names = frozen_linears(model, self.layers, self.train_projector, by=self)
        scale, number = self.alpha / self.rank, count()

        def make(linear: nn.Linear) -> MoELoRALinear:
            draw = generator(self.seed, next(number))
            return MoELoRALinear(linear, self.experts, self.rank, scale, draw, self.dropout)

        install(cast(nn.Module, model), names, make)
        self.shares = torch.zeros(len(names), self.experts, device=device_of(model))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Measure each expert's mean weight over the first rows of the task."""
        rank, world = rank_and_world()
        left = len(range(rank, self.samples, world))
        layers = list(installed(cast(nn.Module, model), MoELoRALinear).values())
        sums = torch.zeros(len(layers), self.experts + 1, dtype=torch.float64)
        sums = sums.to(device_of(model))
        with evaluating(cast(nn.Module, model)):
            for batch in batches if left else ():
                part = batch.take(torch.arange(min(left, len(batch)), device=batch.labels.device))
                with _watched(layers, part, sums):
                    run(model, self, part)
                left -= len(part)
                if not left:
                    break
        total = sum_over_ranks(sums)
        self.shares = (total[:, :-1] / total[:, -1:].clamp(min=1)).to(self.shares)

    def idle(self) -> tuple[str, ...]:
        """Count the experts that hardly any token wants."""
        low = (self.shares < self.idle_below) & (self.shares.sum(1, keepdim=True) > 0)
        if not bool(low.any()):
            return ()
        layer, expert = low.nonzero()[0].tolist()
        return (
            f"{int(low.sum())} of {low.numel()} experts weigh less than {self.idle_below} on "
            f"average, the first of them expert {expert} of layer {layer}",
        )


@contextmanager
def _watched(layers: list[MoELoRALinear], batch: Batch, sums: Tensor) -> Iterator[None]:
    """Add up routers' weights inside the block: E sums and the number of tokens, layer by layer."""
    pairs = zip(layers, sums, strict=True)
    hooks = [layer.register_forward_pre_hook(_adder(batch, row)) for layer, row in pairs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(batch: Batch, row: Tensor) -> Callable[[MoELoRALinear, tuple[Any, ...]], None]:
    def add(layer: MoELoRALinear, given: tuple[Any, ...]) -> None:
        x: Tensor = given[0]
        if batch.mask is not None and x.shape[:-1] == batch.mask.shape:
            x = x[batch.mask]
        weights = layer.routing(x).flatten(0, -2)
        row[:-1] += weights.sum(0, dtype=torch.float64)
        row[-1] += len(weights)

    return add
