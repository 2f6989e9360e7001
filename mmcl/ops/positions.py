"""Where a low-rank product is large, kept as one bit for each entry, and how large it is there.

The product itself, (d_out, d_in), is never held while training: it is looked at in blocks of rows
of bounded size. Per block that is three thin products, on one order for all time, so the result is
the same bits on every run, which atomic additions at gathered places are not; and its cost does
not grow with the number of places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 22  # entries that are looked at together: 16 MB of float32


def largest(product: Tensor, share: float) -> Tensor:
    """Mark the entries of largest size.

    Args:
        product: (d_out, d_in).
        share: of all entries, rounded to a whole number of them; zeros are never marked.

    Returns:
        (d_out, d_in) bool; of equal entries the first ones in memory are marked.
    """
    sizes = product.abs().flatten()
    count = round(share * sizes.numel())
    marked = torch.zeros_like(sizes, dtype=torch.bool)
    if count:
        least = sizes.topk(count).values[-1]
        ties = (sizes == least).nonzero().flatten()
        marked = sizes > least
        marked[ties[: count - int(marked.sum())]] = True
    return (marked & (sizes > 0)).view(product.shape)


def pack_bits(marks: Tensor) -> Tensor:
    """Pack (N, W) bools into (N, ceil(W / 8)) bytes, the first one in the lowest bit."""
    rows, width = marks.shape
    full = torch.nn.functional.pad(marks, (0, -width % 8)).view(rows, -1, 8)
    packed = torch.zeros(full.shape[:2], dtype=torch.uint8, device=marks.device)
    for bit in range(8):
        packed |= full[:, :, bit].to(torch.uint8) << bit
    return packed


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """Undo ``pack_bits``.

    Args:
        packed: (N, ceil(width / 8)) uint8.
        width: W.

    Returns:
        (N, W) bool.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> bits) & 1).bool().flatten(1)[:, :width]


def mean_size_at(A: Tensor, B: Tensor, packed: Tensor) -> Tensor:
    """Return the mean of |B A| over the marked entries, 0 where none is marked.

    RegLoRA, Chen et al. 2025, arXiv:2505.02486. Computed in float32 or wider, also under autocast;
    what is kept for the way back is of the size of A and B.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        packed: (d_out, ceil(d_in / 8)) uint8, see ``pack_bits``.

    Returns:
        A scalar with gradient to A and B; that of an entry that is zero is zero.
    """
    value: Tensor = _MeanSize.apply(A, B, packed)
    return value


class _MeanSize(torch.autograd.Function):
    """The gradient is made on the way forward, where every block of the product is at hand."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, packed: Tensor) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            wide = torch.promote_types(A.dtype, torch.float32)
            down, up = A.to(wide), B.to(wide)
            total = torch.zeros((), dtype=wide, device=A.device)
            count = torch.zeros((), dtype=torch.int64, device=A.device)
            slope_A, slopes_B = torch.zeros_like(down), []
            rows = max(1, _BLOCK // A.shape[1])
            for part, bits in zip(torch.split(up, rows), torch.split(packed, rows), strict=True):
                marks = unpack_bits(bits, A.shape[1])
                product = (part @ down) * marks
                total += product.abs().sum()
                count += marks.sum()
                sign = product.sign_()
                slope_A.addmm_(part.T, sign)
                slopes_B.append(sign @ down.T)
            number = count.clamp(min=1)
            ctx.save_for_backward(slope_A.div_(number), torch.cat(slopes_B).div_(number))
            ctx.dtypes = A.dtype, B.dtype
            return total / number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        slope_A, slope_B = ctx.saved_tensors
        to_A, to_B = ctx.dtypes
        return (upstream[0] * slope_A).to(to_A), (upstream[0] * slope_B).to(to_B), None
