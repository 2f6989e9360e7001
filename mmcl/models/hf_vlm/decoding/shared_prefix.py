"""Questions of one image: the first tokens that they share are read once.

Samples with the same images form a group. System text and image are the same tokens for all of a
group; keys and values of these tokens are computed once and copied to the group's samples, which
read the rest of their questions. A file of its own because it decides which questions may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcl.models.hf_vlm.decoding.image_cache import projected_images, with_projected

_MIN_SAVING = 0.1
"""Share of the tokens that are not read twice below which two passes gain nothing."""


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens that are read once for each of G groups of questions.

    Attributes:
        tokens: (G, P) first P tokens of each group, with all image placeholders.
        inputs: more keywords of the decoder in their pass: the images of each group once.
        groups: (B,) group of each question.
    """

    tokens: Tensor
    inputs: dict[str, Any]
    groups: Tensor

    @property
    def length(self) -> int:
        """Number of shared tokens P."""
        return int(self.tokens.shape[1])


def share_prefix(
    tokens: Tensor, mask: Tensor, image_inputs: dict[str, Any], keys: Sequence[bytes],
    image_token_id: int,
) -> SharedPrefix | None:  # fmt: skip
    """Return the prefix that questions of the same images share; None = none worth a pass.

    Args:
        tokens: (B, L) questions, padded on the right.
        mask: (B, L) bool of real tokens.
        image_inputs: projected images, see ``ImageCache.encode``.
        keys: M digests of the images.
        image_token_id: placeholder token.
    """
    images = projected_images(image_inputs)
    owned = _images_of_samples(images, (tokens == image_token_id).sum(1).tolist())
    if not keys or owned is None:
        return None
    identities = [tuple(keys[row] for row in rows) for rows in owned]
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
    members: list[list[int]] = [[] for _ in numbers]
    for sample, identity in enumerate(identities):
        members[numbers[identity]].append(sample)
    length = _prefix_length(tokens, mask, members)
    is_image = tokens == image_token_id
    saved = length * (len(tokens) - len(members))
    if bool(is_image[:, length:].any()) or saved < _MIN_SAVING * tokens.numel():
        return None
    firsts = [group[0] for group in members]
    rows = [row for sample in firsts for row in owned[sample]]
    chosen = images[rows] if isinstance(images, Tensor) else [images[row] for row in rows]
    groups = torch.tensor([numbers[identity] for identity in identities], device=tokens.device)
    return SharedPrefix(tokens[firsts, :length], with_projected(chosen), groups)


def _images_of_samples(
    images: Tensor | Sequence[Tensor], placeholders: Sequence[int]
) -> list[list[int]] | None:
    """Return the images of each sample by its number of placeholders; None if they do not fit."""
    owned, row = [], 0
    for count in placeholders:
        first = row
        while count > 0 and row < len(images):
            count -= len(images[row])
            row += 1
        if count:
            return None
        owned.append(list(range(first, row)))
    return owned if row == len(images) else None


def _prefix_length(tokens: Tensor, mask: Tensor, members: Sequence[Sequence[int]]) -> int:
    """Return P: the most first tokens that are the same within every group; one is left to read."""
    length = int(mask.sum(1).min()) - 1
    for group in members:
        same = (tokens[list(group)] == tokens[group[0]]).all(0)
        length = min(length, int(same.long().cumprod(0).sum()))
    return length
