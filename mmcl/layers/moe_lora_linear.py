"""MoELoRALinear: a frozen linear layer with LoRA experts that a router weighs for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcl.layers.multi_lora import FrozenLinear, adapter_dtype, kaiming_uniform
from mmcl.ops.lora_linear import routed_linear

_INIT_STD = 0.01


class MoELoRALinear(FrozenLinear):
    """W x + scale * sum_i w_i B_i A_i x with w = softmax(G x): all experts, weighed per token.

    CoIN, Chen et al. 2024, arXiv:2403.08350. A starts at N(0, 0.01^2), B at zero, the router as a
    linear layer does; so the output of a new layer is that of its base. One expert is plain LoRA.

    Args:
        base: as in ``FrozenLinear``.
        num_experts: E, 1 or more.
        rank: r of each expert.
        scale: alpha / r.
        generator: a CPU generator; the draw is the same on every device.
        dropout: fraction of x that experts and router do not see in training, 0 to 1.

    **Remembers** ``A`` (E * r, d_in), ``B`` (d_out, E * r) and ``router`` (E, d_in), expert after
    expert.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
        dropout: float = 0.0,
    ) -> None:
        if num_experts < 1 or rank < 1:
            raise ValueError(
                f"num_experts is {num_experts} and rank {rank}: give 1 or more of each"
            )
        super().__init__(base, scale, dropout)
        self.num_experts, self.rank = num_experts, rank
        dtype, device = adapter_dtype(self.weight), self.weight.device
        A = torch.empty(num_experts * rank, self.in_features).normal_(
            0, _INIT_STD, generator=generator
        )
        router = kaiming_uniform(num_experts, self.in_features, generator)
        self.A = nn.Parameter(A.to(device, dtype))
        self.B = nn.Parameter(
            torch.zeros(self.out_features, num_experts * rank, dtype=dtype, device=device)
        )
        self.router = nn.Parameter(router.to(device, dtype))

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Return A_i (r, d_in) and B_i (d_out, r) as views."""
        own = slice(number * self.rank, (number + 1) * self.rank)
        return self.A[own], self.B[:, own]

    def routing(self, x: Tensor) -> Tensor:
        """Return the router's weights of the experts.

        Args:
            x: (..., d_in).

        Returns:
            (..., E), a distribution for each token.
        """
        return (x @ self.router.to(x.dtype).T).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the base plus that of all experts.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out).
        """
        return self.add_delta(x, routed_linear, self.A, self.B, self.router, self.scale)

    def extra_repr(self) -> str:
        """Return number and rank of the experts."""
        return f"num_experts={self.num_experts}, rank={self.rank}, scale={self.scale}"
