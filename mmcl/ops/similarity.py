"""Similarity of representations: linear CKA of features, cosine similarity of attention maps."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Return the linear centered kernel alignment of two sets of features of the same samples.

    Kornblith et al. 2019, arXiv:1905.00414: with centered columns,
    ``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)``. It does not change under orthogonal transforms
    and isotropic scaling of either side. With more features than samples it is biased towards 1;
    ``unbiased`` puts the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al. 2020,
    arXiv:2010.15327, equation 3) in place of each of the three terms.

    Args:
        x: (N, D) features.
        y: (N, E) features of the same N samples.
        unbiased: needs 4 samples or more; the value may be slightly below 0.

    Returns:
        scalar float64, 0 to 1.

    Raises:
        ValueError: if shapes or values do not allow it: other numbers of samples, too few, values
            that are not finite, or features that are the same for all samples.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (N, D) and "
            "(N, E) of the same N samples"
        )
    least = 4 if unbiased else 2
    if len(x) < least:
        raise ValueError(f"there are {len(x)} samples: give {least} or more")
    left, right = (_centered(name, each) for name, each in (("first", x), ("second", y)))
    if unbiased:
        k, m = left @ left.T, right @ right.T
        cross, *own = (_hsic(a, b) for a, b in ((k, m), (k, k), (m, m)))
    else:
        cross, *own = (
            (a.T @ b).square().sum() for a, b in ((right, left), (left, left), (right, right))
        )
    for name, term in zip(("first", "second"), own, strict=True):
        if not term > 0:
            raise ValueError(f"the {name} features do not vary enough over samples to compare them")
    return cross / (own[0].sqrt() * own[1].sqrt())


def _centered(name: str, features: Tensor) -> Tensor:
    """Return float64 features of zero mean, scaled so that their largest deviation is 1."""
    wide = features.double()
    if not wide.isfinite().all():
        raise ValueError(f"the {name} features have values that are not finite")
    largest = wide.abs().max() if wide.numel() else wide.new_zeros(())
    centered = wide - wide.mean(0)
    spread = centered.abs().max() if wide.numel() else largest
    # What is left of a constant column is the rounding of its mean.
    if not spread > 1e-12 * largest:
        raise ValueError(f"the {name} features are the same for all samples")
    return centered / spread


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC of two (N, N) Gram matrices, N of 4 or more."""
    count = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    trace = (k * m).sum()
    means = k.sum() * m.sum() / ((count - 1) * (count - 2))
    rows = 2 / (count - 2) * (k.sum(0) @ m.sum(0))
    return (trace + means - rows) / (count * (count - 3))


def attention_similarity(a: Tensor, b: Tensor, is_real: Tensor | None = None) -> Tensor:
    """Return the cosine similarity of the attention maps of every sample and head.

    Each map is one vector of its L x S weights.

    Args:
        a: (B, H, L, S) attention weights.
        b: of the same shape.
        is_real: (B, L) False for queries that are padding, which do not count; None = all are real.

    Returns:
        (B, H) in [0, 1] for weights of 0 or more.

    Raises:
        ValueError: if shapes differ.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"attention maps have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same "
            "(B, H, L, S)"
        )
    if is_real is not None:
        a, b = (each * is_real[:, None, :, None] for each in (a, b))
    left, right = a.double().flatten(2), b.double().flatten(2)
    norms = left.square().sum(2).sqrt() * right.square().sum(2).sqrt()
    return (left * right).sum(2) / norms.clamp_min(torch.finfo(torch.float64).tiny)
