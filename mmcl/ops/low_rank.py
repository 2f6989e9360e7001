"""Frozen linear maps with a thin learned correction, each with its gradient written by hand.

As separate autograd operations a correction of rank 16 costs several passes over activations of
full width. Here it is one thin product, added into the output in place, and what is kept for the
way back is the input and its thin image. The frozen weight never gets a gradient; a weight that
learns after all goes through torch's own linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Frozen = tuple[Tensor, Tensor]
"""A pair (R, d_in) and (d_out, R) that takes part in the answer and gets no gradient."""


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    frozen: Frozen | None = None,
) -> Tensor:
    """Return ``x W^T + b + scale * (x A^T) B^T``, and the same for a frozen pair beside (A, B).

    LoRA, Hu et al. 2021, arXiv:2106.09685. Products are taken in the dtype of ``x``, or of
    autocast where it is on; gradients come back in the dtype of what they belong to.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or None for the correction alone.
        bias: (d_out,) or None.
        A: (R, d_in).
        B: (d_out, R).
        scale: alpha / r.
        frozen: older pair that is added with the same scale, without gradient.

    Returns:
        (..., d_out).
    """
    past_A, past_B = (None, None) if frozen is None else frozen
    return _apply(_LowRank, x, weight, bias, A, B, past_A, past_B, scale)


def expert_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    scale: float,
) -> Tensor:
    """Return ``x W^T + b + scale * sum over experts of gate * (x A_i^T) B_i^T``.

    All experts are one thin and one wide product: gates are spread over the ranks in between.

    Args:
        x: (B, L, d_in), or any (..., d_in).
        weight: (d_out, d_in), or None for the correction alone.
        bias: (d_out,) or None.
        A: (E * r, d_in), expert after expert.
        B: (d_out, E * r), in the same order.
        gates: (B, E), one weight of each expert for a row, or (B, L, E), one for a token.
        scale: alpha / r.

    Returns:
        (..., d_out).

    Raises:
        ValueError: if the gates do not fit the rows of ``x`` or the experts.
    """
    experts = gates.shape[-1]
    if gates.shape[:-1] != x.shape[: gates.dim() - 1] or not 1 < gates.dim() <= x.dim():
        raise ValueError(
            f"gates have shape {tuple(gates.shape)} and x {tuple(x.shape)}: give a row of gates "
            "for every row of the batch (repeat them where rows are repeated)"
        )
    if A.shape[0] % max(experts, 1) or not experts:
        raise ValueError(
            f"gates weigh {experts} experts and A has {A.shape[0]} ranks: give one gate for each "
            "expert, and experts of equal rank"
        )
    return _apply(_Experts, x, weight, bias, A, B, gates, scale)


def routed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    G: Tensor,
    scale: float,
) -> Tensor:
    """Return ``x W^T + b + scale * sum_i w_i (x A_i^T) B_i^T`` with ``w = softmax(x G^T)``.

    MoELoRA as in CoIN, Chen et al. 2024, arXiv:2403.08350: every token has all experts, weighed.
    Router and experts share one thin product; the softmax is taken in float32 or wider.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or None for the correction alone.
        bias: (d_out,) or None.
        A: (E * r, d_in), expert after expert.
        B: (d_out, E * r), in the same order.
        G: (E, d_in), the router.
        scale: alpha / r.

    Returns:
        (..., d_out).
    """
    return _apply(_Routed, x, weight, bias, A, B, G, scale)


def _apply(
    function: type[torch.autograd.Function],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    device = x.device.type
    # What torch's own linear would see: autocast changes all but float64.
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    learns = any(part is not None and part.requires_grad for part in (weight, bias))
    answer: Tensor
    if weight is not None and learns:
        answer = function.apply(x, None, None, *rest)
        return _linear(x, weight, bias) + answer
    answer = function.apply(x, weight, bias, *rest)
    return answer


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _out(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, B: Tensor
) -> Tensor:
    """(n, d_out): the frozen map of the rows plus hidden B^T, in one buffer."""
    if weight is None:
        return hidden @ B.T
    return _linear(rows, weight, bias).addmm_(hidden, B.T)


def _back(
    upstream: Tensor, weight: Tensor | None, slope: Tensor, down: Tensor, shape: torch.Size
) -> Tensor:
    """Gradient of x: through the frozen map, and through the thin product."""
    if weight is None:
        return (slope @ down).view(shape)
    return (upstream @ weight.to(upstream.dtype)).addmm_(slope, down).view(shape)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, past_A, past_B, scale = given
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ _beside(past_A, A, 0).to(x.dtype).T
        out = _out(rows, weight, bias, thin * scale, _beside(past_B, B, 1).to(x.dtype))
        ctx.save_for_backward(rows, thin, weight, A, B, past_A, past_B)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, thin, weight, A, B, past_A, past_B = ctx.saved_tensors
        given = upstream[0].reshape(-1, B.shape[0])
        past = 0 if past_A is None else past_A.shape[0]
        slope_x = slope_A = slope_B = None
        if ctx.needs_input_grad[0]:
            slope = (given @ _beside(past_B, B, 1).to(rows.dtype)) * ctx.scale
            slope_x = _back(given, weight, slope, _beside(past_A, A, 0).to(rows.dtype), ctx.shape)
            slope = slope[:, past:]
        elif ctx.needs_input_grad[3]:
            slope = (given @ B.to(rows.dtype)) * ctx.scale
        if ctx.needs_input_grad[3]:
            slope_A = (slope.T @ rows).to(A.dtype)
        if ctx.needs_input_grad[4]:
            slope_B = (given.T @ (thin[:, past:] * ctx.scale)).to(B.dtype)
        return slope_x, None, None, slope_A, slope_B, None, None, None


def _beside(past: Tensor | None, now: Tensor, dim: int) -> Tensor:
    return now if past is None else torch.cat([past.to(now.dtype), now], dim)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, gates, scale = given
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ A.to(x.dtype).T
        # One row of gates stands for as many tokens as it has below it.
        ctx.groups = (gates.shape[:-1].numel(), x.shape[gates.dim() - 1 : -1].numel())
        hidden = _gated(thin, gates, ctx.groups) * scale
        out = _out(rows, weight, bias, hidden, B.to(x.dtype))
        ctx.save_for_backward(rows, thin, weight, A, B, gates)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, thin, weight, A, B, gates = ctx.saved_tensors
        given = upstream[0].reshape(-1, B.shape[0])
        slope_x = slope_A = slope_B = slope_gates = None
        slope_hidden = (given @ B.to(rows.dtype)) * ctx.scale
        slope = _gated(slope_hidden, gates, ctx.groups)
        if ctx.needs_input_grad[0]:
            slope_x = _back(given, weight, slope, A.to(rows.dtype), ctx.shape)
        if ctx.needs_input_grad[3]:
            slope_A = (slope.T @ rows).to(A.dtype)
        if ctx.needs_input_grad[4]:
            hidden = _gated(thin, gates, ctx.groups) * ctx.scale
            slope_B = (given.T @ hidden).to(B.dtype)
        if ctx.needs_input_grad[5]:
            experts, rank = gates.shape[-1], A.shape[0] // gates.shape[-1]
            by_expert = (slope_hidden * thin).view(*ctx.groups, experts, rank)
            slope_gates = by_expert.sum((1, 3)).view(gates.shape).to(gates.dtype)
        return slope_x, None, None, slope_A, slope_B, slope_gates, None


def _gated(thin: Tensor, gates: Tensor, groups: tuple[int, int]) -> Tensor:
    """Multiply (n, E * r) by the gates of each row, spread over tokens and ranks."""
    experts = gates.shape[-1]
    weights = gates.to(thin.dtype).reshape(groups[0], 1, experts, 1)
    split = thin.view(*groups, experts, thin.shape[1] // experts)
    return (split * weights).view(thin.shape)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, G, scale = given
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ torch.cat([A, G.to(A.dtype)]).to(x.dtype).T
        routed = _route(thin[:, A.shape[0] :])
        hidden = _weighed(thin[:, : A.shape[0]], routed * scale)
        out = _out(rows, weight, bias, hidden, B.to(x.dtype))
        ctx.save_for_backward(rows, thin, routed, weight, A, B, G)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, thin, routed, weight, A, B, G = ctx.saved_tensors
        given = upstream[0].reshape(-1, B.shape[0])
        ranks, experts = A.shape[0], G.shape[0]
        thin = thin[:, :ranks]
        slope_x = slope_A = slope_G = slope_B = None
        slope_hidden = given @ B.to(rows.dtype)
        by_expert = (slope_hidden * thin).view(-1, experts, ranks // experts).sum(2)
        by_expert = by_expert.to(torch.promote_types(thin.dtype, torch.float32)) * ctx.scale
        wide = routed.to(by_expert.dtype)
        slope_logits = wide * (by_expert - (wide * by_expert).sum(1, keepdim=True))
        slope_thin = _weighed(slope_hidden, routed * ctx.scale)
        slope = torch.cat([slope_thin, slope_logits.to(rows.dtype)], 1)
        if ctx.needs_input_grad[0]:
            down = torch.cat([A, G.to(A.dtype)]).to(rows.dtype)
            slope_x = _back(given, weight, slope, down, ctx.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
            both = slope.T @ rows
            slope_A, slope_G = both[:ranks].to(A.dtype), both[ranks:].to(G.dtype)
        if ctx.needs_input_grad[4]:
            slope_B = (given.T @ _weighed(thin, routed * ctx.scale)).to(B.dtype)
        return slope_x, None, None, slope_A, slope_B, slope_G, None


def _route(logits: Tensor) -> Tensor:
    """Softmax over experts (n, E), exact to float32 also where the logits are half as wide."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(1, dtype=wide).to(logits.dtype)


def _weighed(thin: Tensor, weights: Tensor) -> Tensor:
    """Multiply (n, E * r) by (n, E), spread over the ranks of each expert."""
    split = thin.reshape(*weights.shape, thin.shape[1] // weights.shape[1])
    return (split * weights[..., None]).flatten(1)
