"""Penalties on LoRA adapters: orthogonality (O-LoRA), and size at masked entries (RegLoRA).

A mask stores one bit for each entry. The product (d_out, d_in) is never held whole in training: it
is computed in blocks of bounded size, always in the same order. So the result has the same bits in
every run, which atomic additions do not guarantee, whatever the number of masked entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Measure = Literal["absolute", "squared"]


def orthogonality_loss(past: Tensor, now: Tensor, measure: Measure = "absolute") -> Tensor:
    """Return the orthogonality loss: mean absolute or squared entry of ``past now^T``.

    O-LoRA, Wang et al. 2023, arXiv:2310.14152; both are their A transposed. Computed in float32 or
    wider, also under autocast, because entries of size 1/sqrt(d_in) would be lost in half
    precision.

    Args:
        past: (R, d_in) A of the past tasks, gets no gradient.
        now: (r, d_in) A of the current task.
        measure: size of an entry, "absolute" or "squared".

    Returns:
        Scalar, at least 0; 0 if all rows are orthogonal.
    """
    with torch.autocast(now.device.type, enabled=False):
        wide = torch.promote_types(now.dtype, torch.float32)
        products = past.detach().to(wide) @ now.to(wide).T
        return (products.abs() if measure == "absolute" else products.square()).mean()


def mean_over_layers(terms: Iterable[Tensor]) -> Tensor:
    """Return the mean of one scalar for each layer; there must be at least one."""
    return torch.stack(list(terms)).mean()


_BLOCK = 1 << 22  # entries of a block: 16 MB of float32


def top_fraction_mask(product: Tensor, fraction: float) -> Tensor:
    """Return the mask of a fraction of entries: those of largest absolute value.

    Args:
        product: (d_out, d_in).
        fraction: of all entries, 0 to 1, rounded to a whole number; zeros are never masked.

    Returns:
        (d_out, d_in) bool; of equal entries the first ones in memory are True.
    """
    sizes = product.abs().flatten()
    count = round(fraction * sizes.numel())
    marked = torch.zeros_like(sizes, dtype=torch.bool)
    if count:
        least = sizes.topk(count).values[-1]
        ties = (sizes == least).nonzero().flatten()
        marked = sizes > least
        marked[ties[: count - int(marked.sum())]] = True
    return (marked & (sizes > 0)).view(product.shape)


def pack_bits(marks: Tensor) -> Tensor:
    """Pack a mask (N, W) into bytes (N, ceil(W / 8)) uint8, the first entry in the lowest bit."""
    rows, width = marks.shape
    full = torch.nn.functional.pad(marks, (0, -width % 8)).view(rows, -1, 8)
    packed = torch.zeros(full.shape[:2], dtype=torch.uint8, device=marks.device)
    for bit in range(8):
        packed |= full[:, :, bit].to(torch.uint8) << bit
    return packed


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """Unpack a mask (N, W = ``width``) bool, the inverse of ``pack_bits``."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> bits) & 1).bool().flatten(1)[:, :width]


def masked_mean_abs(A: Tensor, B: Tensor, packed: Tensor) -> Tensor:
    """Return the mean of |B A| over the masked entries; 0 if none is masked.

    RegLoRA, Chen et al. 2025, arXiv:2505.02486. Computed in float32 or wider, also under autocast;
    tensors saved for the backward pass have the sizes of A and B.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        packed: (d_out, ceil(d_in / 8)) uint8 mask, see ``pack_bits``.

    Returns:
        Scalar with gradient to A and B; the gradient of |x| at 0 is 0.
    """
    value: Tensor = _MaskedMeanAbs.apply(A, B, packed)
    return value


class _MaskedMeanAbs(torch.autograd.Function):
    """Masked mean whose gradient is computed in the forward pass, block by block with the value."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, packed: Tensor) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            wide = torch.promote_types(A.dtype, torch.float32)
            down, up = A.to(wide), B.to(wide)
            total = torch.zeros((), dtype=wide, device=A.device)
            count = torch.zeros((), dtype=torch.int64, device=A.device)
            grad_A, grads_B = torch.zeros_like(down), []
            rows = max(1, _BLOCK // A.shape[1])
            for block, bits in zip(torch.split(up, rows), torch.split(packed, rows), strict=True):
                marks = unpack_bits(bits, A.shape[1])
                product = (block @ down) * marks
                total += product.abs().sum()
                count += marks.sum()
                sign = product.sign_()
                grad_A.addmm_(block.T, sign)
                grads_B.append(sign @ down.T)
            number = count.clamp(min=1)
            ctx.save_for_backward(grad_A.div_(number), torch.cat(grads_B).div_(number))
            ctx.dtypes = A.dtype, B.dtype
            return total / number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_A, grad_B = ctx.saved_tensors
        to_A, to_B = ctx.dtypes
        return (upstream[0] * grad_A).to(to_A), (upstream[0] * grad_B).to(to_B), None
