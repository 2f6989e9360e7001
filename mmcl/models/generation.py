"""Answers of a generative model: words one after another, or the likeliest of given ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmcl.core import UNSCORED, Batch, Output

Refine = Callable[[Output], Output]


class Refined(LogitsProcessor):  # type: ignore[misc]  # not typed
    """Passes the scores of every next token through a strategy's ``refine``."""

    def __init__(self, refine: Refine) -> None:
        self.refine = refine

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores."""
        rows = torch.arange(len(scores), device=scores.device)
        return self.refine(Output(scores, rows=rows)).logits


def prompt_lengths(batch: Batch) -> Tensor:
    """Return (B,) how many tokens of each row stand before its last answer.

    Args:
        batch: rows with tokens, a mask and labels (B, L), or with classes, which have no answer.
    """
    if batch.tokens is None or batch.mask is None:
        raise ValueError("rows without tokens cannot be answered: use a stream of kind 'answer'")
    lengths = batch.mask.sum(1)
    if not batch.is_answered:
        return lengths
    is_said = batch.labels != UNSCORED
    places = torch.arange(is_said.shape[1], device=is_said.device)
    # The last run of scored tokens begins behind the last unscored token before its own end.
    last = (places * is_said).max(1).values
    gaps = (places + 1) * (~is_said & (places <= last[:, None]))
    return torch.where(is_said.any(1), gaps.max(1).values, lengths)


def left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return (B, L) tokens that end together, and a mask of the real ones."""
    tokens = pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence(
        [torch.ones_like(row, dtype=torch.bool) for row in rows],
        batch_first=True, padding_value=False, padding_side="left",
    )  # fmt: skip
    return tokens, mask


def greedy(
    lm: Any, inputs: dict[str, Any], *, pad: int, ends: Sequence[int], max_new_tokens: int,
    refine: Refine | None,
) -> Tensor:  # fmt: skip
    """Return (B, up to max_new_tokens) new tokens, the likeliest at each step, with a cache.

    Args:
        lm: of transformers.
        inputs: of its ``generate``, tokens padded on the left.
        pad: token behind the end of shorter answers.
        ends: tokens that end an answer.
        max_new_tokens: of an answer at most.
        refine: changes the scores of every next token, or None.
    """
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad,
        eos_token_id=list(ends), use_cache=True,
    )  # fmt: skip
    refined = LogitsProcessorList([] if refine is None else [Refined(refine)])
    said = lm.generate(**inputs, generation_config=settings, logits_processor=refined)
    return said[:, inputs["input_ids"].shape[1] :]  # type: ignore[no-any-return]


def best_of(scores: Tensor, candidates: Sequence[str]) -> list[str]:
    """Return the likeliest candidate of each row of (B, C) scores."""
    return [candidates[place] for place in scores.argmax(1).tolist()]
