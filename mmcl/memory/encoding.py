"""Features of the rows of a batch, of which some may have no picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcl.core.batch import Batch


@torch.no_grad()
def picture_features(
    encode: Callable[[Batch], Tensor], batch: Batch, shape: tuple[int, ...] | None
) -> Tensor:
    """Return (B, N, D) of a batch of pictures, zeros for a row without one.

    Args:
        encode: (B, N, D) of rows with one picture each.
        batch: rows with one picture or none.
        shape: N and D, if they are known.

    Raises:
        ValueError: if a row has several pictures, or no row has one and ``shape`` is not known.
    """
    rows, device = len(batch), batch.labels.device
    if batch.images is None:
        if shape is None:
            raise ValueError(
                f"FeatureReplay was given {rows} rows without a picture before any with one: "
                "let the first task show pictures, or use ExperienceReplay"
            )
        return torch.zeros(rows, *shape, device=device)
    if batch.owner is None:
        return encode(batch)
    if int(batch.owner.bincount(minlength=rows).max()) > 1:
        raise ValueError(
            "FeatureReplay was given rows with several pictures and remembers one for each "
            "row: use ExperienceReplay for such data"
        )
    seen = encode(batch.take(batch.owner))
    return seen.new_zeros(rows, *seen.shape[1:]).index_copy(0, batch.owner, seen)
