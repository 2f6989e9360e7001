"""Interpolation of two sets of weights (WiSE-FT).

A file of its own, because equations are found by the name of their file.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def interpolate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return the linear interpolation between two sets of weights.

    ``(1 - alpha) * start + alpha * end``; WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903. Exact
    at both ends: 0 gives ``start`` and 1 gives ``end``, bit for bit.

    Args:
        start: name -> weights at ``alpha`` 0.
        end: name -> weights at ``alpha`` 1.
        alpha: 0 to 1.

    Returns:
        name -> tensor, for the floating-point names that both have; integers are left out.

    Raises:
        ValueError: if a name has different shapes.
    """
    between = {}
    for name, old in start.items():
        if name not in end or not old.is_floating_point():
            continue
        new = end[name]
        if old.shape != new.shape:
            raise ValueError(
                f"'{name}' has shape {tuple(old.shape)} in start and {tuple(new.shape)} in end: "
                "leave a weight that grows out of the interpolation"
            )
        between[name] = (1 - alpha) * old + alpha * new.to(old.dtype)
    return between
