"""Greedy generation of answers, with a strategy's prompts and output transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, Output, Prompts
from mmcl.models.hf_vlm.image_inputs import ImageInputs

OutputTransform = Callable[[Output], Output]


class GenerativeModel(Protocol):
    """Generative model: the members of ``ImageTextToText`` that generation and scoring use."""

    lm: Any
    processor: Any
    image_inputs: ImageInputs
    gates: dict[str, Tensor]
    pad_token_id: int
    end_token_ids: list[int]

    def with_placeholders(self, texts: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
        """Return token sequences with placeholders for the prompts."""
        ...

    def entering(
        self, prompts: Prompts, tokens: Tensor, mask: Tensor | None
    ) -> AbstractContextManager[None]:
        """Apply prompts and gates in the forward passes of a context."""
        ...


class StrategyLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # not typed
    """Logits processor that passes the scores of every next token through ``transform_output``."""

    def __init__(self, transform_output: OutputTransform, prompts: Prompts = NO_PROMPTS) -> None:
        self.transform_output, self.prompts = transform_output, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) scores."""
        samples = torch.arange(len(scores), device=scores.device)
        return self.transform_output(
            Output(scores, prompts=self.prompts, sample_index=samples)
        ).logits


def expect_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return tokens (B, L) and their mask (B, L).

    Raises:
        ValueError: if the batch has none.
    """
    if batch.input_ids is None or batch.attention_mask is None:
        raise ValueError(
            "the batch has no tokens: a generative model takes tasks of task_type 'instruction'; "
            "use OpenCLIP for classes and captions"
        )
    return batch.input_ids, batch.attention_mask


def prompt_lengths(batch: Batch) -> Tensor:
    """Return (B,) number of tokens before the last answer of each sample.

    Args:
        batch: with tokens, a mask and labels (B, L), or with classes, which have no answer.
    """
    _, mask = expect_tokens(batch)
    lengths = mask.sum(1)
    if not batch.is_generative:
        return lengths
    in_answer = batch.labels != IGNORE_INDEX
    index = torch.arange(in_answer.shape[1], device=in_answer.device)
    # The last answer starts after the last token outside answers that precedes its end.
    last = (index * in_answer).amax(1)
    starts = (index + 1) * (~in_answer & (index <= last[:, None]))
    return torch.where(in_answer.any(1), starts.amax(1), lengths)


def left_pad(texts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return left-padded tokens (B, L) of B sequences, and a mask (B, L) of the real ones."""
    tokens = pad_sequence(list(texts), batch_first=True, padding_value=pad, padding_side="left")
    lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens, index >= (tokens.shape[1] - lengths)[:, None]


def generate_with_strategy(
    model: GenerativeModel,
    questions: Sequence[Tensor],
    image_inputs: dict[str, Any],
    prompts: Prompts,
    max_new_tokens: int,
    transform_output: OutputTransform | None = None,
) -> list[str]:
    """Return B greedily generated answers, without end tokens.

    Args:
        model: an ``ImageTextToText``.
        questions: B questions, (L_b,) tokens each.
        image_inputs: arguments of the forward pass, see ``ImageInputs.forward_kwargs``.
        prompts: of the samples.
        max_new_tokens: largest number of tokens of an answer.
        transform_output: changes the (B, V) scores of every next token, or None.
    """
    # Whatever is not set here comes from the model's own settings: Qwen's penalize repetition.
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
        pad_token_id=model.pad_token_id, eos_token_id=list(model.end_token_ids), use_cache=True,
        repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
        return_dict_in_generate=False,
    )  # fmt: skip
    tokens, mask = left_pad(model.with_placeholders(questions, prompts), model.pad_token_id)
    processors = LogitsProcessorList(
        [] if transform_output is None else [StrategyLogitsProcessor(transform_output, prompts)]
    )
    with model.entering(prompts, tokens, mask):
        sequences = model.lm.generate(
            input_ids=tokens, attention_mask=mask.long(), **image_inputs,
            **model.image_inputs.token_type_ids(tokens), generation_config=settings,
            logits_processor=processors,
        )  # fmt: skip
    new = sequences[:, tokens.shape[1] :]
    texts: list[str] = model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]
