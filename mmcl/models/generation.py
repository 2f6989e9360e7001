"""Answers of a generative model, one word after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmcl.core import NO_PROMPTS, UNSCORED, Batch, Output, Prompts
from mmcl.models.pixels import Pixels

Refine = Callable[[Output], Output]


class Speaker(Protocol):
    """What answering asks of an ``ImageTextToText``; see there."""

    lm: Any
    processor: Any
    pixels: Pixels
    gates: dict[str, Tensor]
    pad: int
    ends: list[int]

    def prompted_rows(self, rows: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
        """Return token rows with room for the prompts."""
        ...

    def entering(
        self, prompts: Prompts, tokens: Tensor, mask: Tensor | None
    ) -> AbstractContextManager[None]:
        """Let prompts and gates enter the forward passes of a context."""
        ...


class Refined(LogitsProcessor):  # type: ignore[misc]  # not typed
    """Passes the scores of every next token through a strategy's ``refine``."""

    def __init__(self, refine: Refine, prompts: Prompts = NO_PROMPTS) -> None:
        self.refine, self.prompts = refine, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores."""
        rows = torch.arange(len(scores), device=scores.device)
        return self.refine(Output(scores, prompts=self.prompts, rows=rows)).logits


def prompt_lengths(batch: Batch) -> Tensor:
    """Return (B,) how many tokens of each row stand before its last answer.

    Args:
        batch: rows with tokens, a mask and labels (B, L), or with classes, which have no answer.
    """
    if batch.tokens is None or batch.mask is None:
        raise ValueError(
            "rows have no tokens: a model that answers takes tasks of kind 'answer'; use OpenCLIP "
            "for classes and captions"
        )
    lengths = batch.mask.sum(1)
    if not batch.is_answered:
        return lengths
    is_said = batch.labels != UNSCORED
    places = torch.arange(is_said.shape[1], device=is_said.device)
    # The last run of scored tokens begins behind the last unscored token before its own end.
    last = (places * is_said).amax(1)
    gaps = (places + 1) * (~is_said & (places <= last[:, None]))
    return torch.where(is_said.any(1), gaps.amax(1), lengths)


def left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return (B, L) tokens that end together, and a mask of the real ones."""
    tokens = pad_sequence(list(rows), batch_first=True, padding_value=pad, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens, places >= (tokens.shape[1] - lengths)[:, None]


def generated(
    model: Speaker,
    rows: Sequence[Tensor],
    pictures: dict[str, Any],
    prompts: Prompts,
    max_new_tokens: int,
    refine: Refine | None = None,
) -> list[str]:
    """Return B answers, the likeliest word at each step, without end tokens.

    Args:
        model: an ``ImageTextToText``.
        rows: B questions, (L_b,) tokens each.
        pictures: of the rows.
        prompts: of the rows.
        max_new_tokens: of an answer at most.
        refine: changes the (B, V) scores of every next token, or None.
    """
    # What is not stated here would come from the model's own settings: Qwen's punish repetition.
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=model.pad,
        eos_token_id=list(model.ends), use_cache=True, repetition_penalty=1.0,
        no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
        return_dict_in_generate=False,
    )  # fmt: skip
    tokens, mask = left_padded(model.prompted_rows(rows, prompts), model.pad)
    changes = LogitsProcessorList([] if refine is None else [Refined(refine, prompts)])
    with model.entering(prompts, tokens, mask):
        said = model.lm.generate(
            input_ids=tokens, attention_mask=mask.long(), **pictures,
            **model.pixels.marks(tokens), generation_config=settings, logits_processor=changes,
        )  # fmt: skip
    new = said[:, tokens.shape[1] :]
    texts: list[str] = model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]
