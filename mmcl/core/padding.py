"""Padding of texts: the pad token of a tokenizer, and which tokens of padded texts are real.

Token 0 may be a real token ("!" is 0 in CLIP's vocabulary, "<s>" in XLM-R's), so padding is never
found by comparing with 0 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad_id_of(tokenizer: Any) -> int:
    """Return the id of the token that a tokenizer pads with.

    It is ``tokenizer.pad_token_id``, as transformers name it, or that of the tokenizer which this
    one wraps as ``tokenizer.tokenizer``, as open_clip's ``HFTokenizer`` does; 0 where neither
    states one, as for CLIP's own ``SimpleTokenizer`` or a plain function.

    Args:
        tokenizer: texts -> (B, L) token ids; None = no tokenizer.
    """
    for each in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        found = getattr(each, "pad_token_id", None)
        if found is not None:
            return int(found)
    return 0


def real_tokens(input_ids: Tensor, pad_id: int) -> Tensor:
    """Return (B, L) bool, True up to the last token of each text that is not the pad token.

    So a pad token inside of a text counts as real, and a text of pad tokens alone has none.

    Args:
        input_ids: (B, L) int64 token ids, padded on the right.
        pad_id: token that the texts are padded with.
    """
    if not input_ids.numel():
        return torch.zeros_like(input_ids, dtype=torch.bool)
    return (input_ids != pad_id).flip(1).cummax(1).values.flip(1)
