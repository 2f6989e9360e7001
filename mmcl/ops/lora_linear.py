"""LoRA linear maps: a frozen weight plus trainable low-rank adapters, with hand-written gradients.

As separate autograd operations an adapter of rank 16 costs several passes over full activations.
Here it is one low-rank product, added into the output in place; the backward pass needs only the
input and its product with A. The frozen weight never gets a gradient; a trainable weight goes
through torch's own linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Frozen = tuple[Tensor, Tensor]
"""A frozen adapter, A (R, d_in) and B (d_out, R): it adds to the output and gets no gradient."""


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    frozen: Frozen | None = None,
) -> Tensor:
    """Return the LoRA linear map ``x W^T + b + scale * (x A^T) B^T``.

    LoRA, Hu et al. 2021, arXiv:2106.09685. Products are computed in the dtype of ``x``, or of
    autocast if it is on; every gradient has the dtype of its tensor.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or None for the adapter alone.
        bias: (d_out,) or None.
        A: (R, d_in).
        B: (d_out, R).
        scale: alpha / r.
        frozen: adapter of past tasks, added with the same scale and without gradient.

    Returns:
        (..., d_out).
    """
    past_A, past_B = (None, None) if frozen is None else frozen
    return _apply(_LowRank, x, weight, bias, A, B, past_A, past_B, scale)


@dataclass(frozen=True)
class LoRAWeights:
    """Weights of one LoRA linear map, as of ``low_rank_linear``; weight and bias are frozen."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def low_rank_linears(x: Tensor, maps: Sequence[LoRAWeights]) -> tuple[Tensor, ...]:
    """Return the outputs (..., d_out_i) of several LoRA linear maps of one input x (..., d_in).

    Each is that of ``low_rank_linear``, up to rounding. All maps share one product with their A's,
    and the gradient of x is summed in one buffer.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    tensors = [tensor for one in maps for tensor in (one.weight, one.bias, one.A, one.B)]
    scales = [one.scale for one in maps]
    outputs: tuple[Tensor, ...] = _SharedLowRank.apply(x, scales, *tensors)
    return outputs


def expert_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    scale: float,
) -> Tensor:
    """Return the gated mixture of LoRA experts, ``x W^T + b + scale * sum_i g_i (x A_i^T) B_i^T``.

    All experts are one product with A and one with B; the gates scale the low-rank features in
    between. As ``low_rank_linear``, but A is (E * r, d_in) and B (d_out, E * r), expert after
    expert; ``gates`` are (B, E), the weight of each expert for a sample, or (B, L, E), for a token.

    Raises:
        ValueError: if the gates do not fit the samples of ``x`` or the number of experts.
    """
    experts = gates.shape[-1]
    if gates.shape[:-1] != x.shape[: gates.dim() - 1] or not 1 < gates.dim() <= x.dim():
        raise ValueError(
            f"gates have shape {tuple(gates.shape)} and x {tuple(x.shape)}: give the gates of "
            "every sample of the batch (repeat them if samples are repeated)"
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
    """Return the routed mixture of LoRA experts, gated by ``w = softmax(x G^T)`` for each token.

    ``x W^T + b + scale * sum_i w_i (x A_i^T) B_i^T``; MoELoRA as in CoIN, Chen et al. 2024,
    arXiv:2403.08350: every token uses all experts. Router and experts share one low-rank product;
    the softmax is computed in float32 or wider. As ``expert_linear``, with the router G (E, d_in).
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
    # As torch's own linear: autocast casts every dtype but float64.
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    is_trainable = any(tensor is not None and tensor.requires_grad for tensor in (weight, bias))
    output: Tensor
    if weight is not None and is_trainable:
        output = function.apply(x, None, None, *rest)
        return _linear(x, weight, bias) + output
    output = function.apply(x, weight, bias, *rest)
    return output


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _out(
    flat: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, B: Tensor
) -> Tensor:
    """Return the output (n, d_out): the frozen map of the tokens plus hidden B^T, in one buffer."""
    if weight is None:
        return hidden @ B.T
    return _linear(flat, weight, bias).addmm_(hidden, B.T)


def _back(
    grad_out: Tensor, weight: Tensor | None, grad_low: Tensor, down: Tensor, shape: torch.Size
) -> Tensor:
    """Return the gradient of x, through the frozen map and through the low-rank product."""
    if weight is None:
        return (grad_low @ down).view(shape)
    return (grad_out @ weight.to(grad_out.dtype)).addmm_(grad_low, down).view(shape)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, past_A, past_B, scale = given
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ _concat(past_A, A, 0).to(x.dtype).T
        out = _out(flat, weight, bias, low * scale, _concat(past_B, B, 1).to(x.dtype))
        ctx.save_for_backward(flat, low, weight, A, B, past_A, past_B)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, A, B, past_A, past_B = ctx.saved_tensors
        grad_out = upstream[0].reshape(-1, B.shape[0])
        past = 0 if past_A is None else past_A.shape[0]
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_low = (grad_out @ _concat(past_B, B, 1).to(flat.dtype)) * ctx.scale
            down = _concat(past_A, A, 0).to(flat.dtype)
            grad_x = _back(grad_out, weight, grad_low, down, ctx.shape)
            grad_low = grad_low[:, past:]
        elif ctx.needs_input_grad[3]:
            grad_low = (grad_out @ B.to(flat.dtype)) * ctx.scale
        if ctx.needs_input_grad[3]:
            grad_A = (grad_low.T @ flat).to(A.dtype)
        if ctx.needs_input_grad[4]:
            grad_B = (grad_out.T @ (low[:, past:] * ctx.scale)).to(B.dtype)
        return grad_x, None, None, grad_A, grad_B, None, None, None


class _SharedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        x, scales, *tensors = given
        weights, biases, As, Bs = (tensors[start::4] for start in range(4))
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ torch.cat(As).to(x.dtype).T
        ranks = [A.shape[0] for A in As]
        outs = []
        for weight, bias, B, scale, hidden in zip(
            weights, biases, Bs, scales, low.split(ranks, 1), strict=True
        ):
            out = _linear(flat, weight, bias).addmm_(hidden, B.to(x.dtype).T, alpha=scale)
            outs.append(out.view(*x.shape[:-1], out.shape[-1]))
        ctx.save_for_backward(flat, low, *weights, *As, *Bs)
        ctx.scales, ctx.ranks, ctx.shape = scales, ranks, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        flat, low, *tensors = ctx.saved_tensors
        count, needed = len(ctx.ranks), ctx.needs_input_grad
        weights, As, Bs = (tensors[start : start + count] for start in range(0, 3 * count, count))
        grads = [None if g is None else g.reshape(-1, g.shape[-1]) for g in upstream]
        grad_low = low.new_zeros(low.shape)
        for grad, B, scale, part in zip(
            grads, Bs, ctx.scales, grad_low.split(ctx.ranks, 1), strict=True
        ):
            if grad is not None:
                part.addmm_(grad, B.to(flat.dtype), beta=0, alpha=scale)
        found: list[Tensor | None] = [None, None]
        if needed[0]:
            grad_x = grad_low @ torch.cat(As).to(flat.dtype)
            for grad, weight in zip(grads, weights, strict=True):
                if grad is not None:
                    grad_x.addmm_(grad, weight.to(grad.dtype))
            found[0] = grad_x.view(ctx.shape)
        grad_A = grad_low.T @ flat if any(needed[4::4]) else None
        for index, (low_part, A, B) in enumerate(zip(low.split(ctx.ranks, 1), As, Bs, strict=True)):
            grad, first = grads[index], sum(ctx.ranks[:index])
            own_A = own_B = None
            if needed[4 + 4 * index] and grad is not None and grad_A is not None:
                own_A = grad_A[first : first + A.shape[0]].to(A.dtype)
            if needed[5 + 4 * index] and grad is not None:
                own_B = (grad.T @ low_part).mul_(ctx.scales[index]).to(B.dtype)
            found += [None, None, own_A, own_B]
        return tuple(found)


def _concat(past: Tensor | None, now: Tensor, dim: int) -> Tensor:
    return now if past is None else torch.cat([past.to(now.dtype), now], dim)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, gates, scale = given
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ A.to(x.dtype).T
        # (number of gates, tokens that each of them applies to)
        ctx.groups = (gates.shape[:-1].numel(), x.shape[gates.dim() - 1 : -1].numel())
        hidden = _gated(low, gates, ctx.groups) * scale
        out = _out(flat, weight, bias, hidden, B.to(x.dtype))
        ctx.save_for_backward(flat, low, weight, A, B, gates)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, A, B, gates = ctx.saved_tensors
        grad_out = upstream[0].reshape(-1, B.shape[0])
        grad_x = grad_A = grad_B = grad_gates = None
        grad_hidden = (grad_out @ B.to(flat.dtype)) * ctx.scale
        grad_low = _gated(grad_hidden, gates, ctx.groups)
        if ctx.needs_input_grad[0]:
            grad_x = _back(grad_out, weight, grad_low, A.to(flat.dtype), ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_A = (grad_low.T @ flat).to(A.dtype)
        if ctx.needs_input_grad[4]:
            hidden = _gated(low, gates, ctx.groups) * ctx.scale
            grad_B = (grad_out.T @ hidden).to(B.dtype)
        if ctx.needs_input_grad[5]:
            experts, rank = gates.shape[-1], A.shape[0] // gates.shape[-1]
            by_expert = (grad_hidden * low).view(*ctx.groups, experts, rank)
            grad_gates = by_expert.sum((1, 3)).view(gates.shape).to(gates.dtype)
        return grad_x, None, None, grad_A, grad_B, grad_gates, None


def _gated(low: Tensor, gates: Tensor, groups: tuple[int, int]) -> Tensor:
    """Multiply low-rank features (n, E * r) by the gates, broadcast over tokens and ranks."""
    experts = gates.shape[-1]
    weights = gates.to(low.dtype).reshape(groups[0], 1, experts, 1)
    split = low.view(*groups, experts, low.shape[1] // experts)
    return (split * weights).view(low.shape)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, A, B, G, scale = given
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ torch.cat([A, G.to(A.dtype)]).to(x.dtype).T
        gates = _route(low[:, A.shape[0] :])
        hidden = _weighted(low[:, : A.shape[0]], gates * scale)
        out = _out(flat, weight, bias, hidden, B.to(x.dtype))
        ctx.save_for_backward(flat, low, gates, weight, A, B, G)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, gates, weight, A, B, G = ctx.saved_tensors
        grad_out = upstream[0].reshape(-1, B.shape[0])
        ranks, experts = A.shape[0], G.shape[0]
        low = low[:, :ranks]
        grad_x = grad_A = grad_G = grad_B = None
        grad_hidden = grad_out @ B.to(flat.dtype)
        by_expert = (grad_hidden * low).view(-1, experts, ranks // experts).sum(2)
        by_expert = by_expert.to(torch.promote_types(low.dtype, torch.float32)) * ctx.scale
        wide = gates.to(by_expert.dtype)
        grad_logits = wide * (by_expert - (wide * by_expert).sum(1, keepdim=True))
        grad_experts = _weighted(grad_hidden, gates * ctx.scale)
        grad_low = torch.cat([grad_experts, grad_logits.to(flat.dtype)], 1)
        if ctx.needs_input_grad[0]:
            down = torch.cat([A, G.to(A.dtype)]).to(flat.dtype)
            grad_x = _back(grad_out, weight, grad_low, down, ctx.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
            both = grad_low.T @ flat
            grad_A, grad_G = both[:ranks].to(A.dtype), both[ranks:].to(G.dtype)
        if ctx.needs_input_grad[4]:
            grad_B = (grad_out.T @ _weighted(low, gates * ctx.scale)).to(B.dtype)
        return grad_x, None, None, grad_A, grad_B, grad_G, None


def _route(logits: Tensor) -> Tensor:
    """Return the softmax over experts (n, E), computed in float32 for half-precision logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(1, dtype=wide).to(logits.dtype)


def _weighted(low: Tensor, weights: Tensor) -> Tensor:
    """Multiply low-rank features (n, E * r) by weights (n, E), broadcast over ranks."""
    split = low.reshape(*weights.shape, low.shape[1] // weights.shape[1])
    return (split * weights[..., None]).flatten(1)
