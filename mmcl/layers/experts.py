"""MoELoRALinear: a frozen linear layer corrected by experts that a router weighs token by token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmcl.layers.frozen import corrected, draw_uniform, learning_dtype, widths_of
from mmcl.ops.low_rank import routed_linear

_SPREAD = 0.01


class MoELoRALinear(nn.Module):
    """W x + scale * sum_i w_i B_i A_i x with w = softmax(G x): every token has all experts.

    CoIN, Chen et al. 2024, arXiv:2403.08350. A starts at N(0, 0.01^2), B at zero, the router as a
    linear layer does; so a new layer answers as its base. One expert is plain LoRA.

    Args:
        base: maps (..., d_in) to (..., d_out); it is frozen.
        experts: E, 1 or more.
        rank: r of each expert.
        scale: alpha / r.
        generator: a CPU generator; the draw is the same on every device.
        dropout: share of x that experts and router do not see in training, 0 to 1.

    **Remembers** ``A`` (E * r, d_in), ``B`` (d_out, E * r) and ``router`` (E, d_in), expert after
    expert.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if experts < 1 or rank < 1:
            raise ValueError(f"experts is {experts} and rank {rank}: give 1 or more of each")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = widths_of(base)
        self.experts, self.rank, self.scale, self.dropout = experts, rank, scale, dropout
        dtype, device = learning_dtype(self.weight), self.weight.device
        A = torch.empty(experts * rank, self.in_features).normal_(0, _SPREAD, generator=generator)
        router = draw_uniform(experts, self.in_features, generator)
        self.A = nn.Parameter(A.to(device, dtype))
        self.B = nn.Parameter(
            torch.zeros(self.out_features, experts * rank, dtype=dtype, device=device)
        )
        self.router = nn.Parameter(router.to(device, dtype))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, where other code expects one."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, where other code expects one."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Return A_i (r, d_in) and B_i (d_out, r) as views."""
        own = slice(number * self.rank, (number + 1) * self.rank)
        return self.A[own], self.B[:, own]

    def routing(self, x: Tensor) -> Tensor:
        """Return the router's weights.

        Args:
            x: (..., d_in).

        Returns:
            (..., E), each row a distribution.
        """
        return (x @ self.router.to(x.dtype).T).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Answer with all experts.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out).
        """
        dropout = self.dropout if self.training else 0.0
        learned = (self.A, self.B, self.router, self.scale)
        return corrected(self.base, x, dropout, routed_linear, *learned)

    def extra_repr(self) -> str:
        """Say how many experts of which rank."""
        return f"experts={self.experts}, rank={self.rank}, scale={self.scale}"
