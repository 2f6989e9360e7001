"""Generation of answers: greedy, or the most probable candidate, with a strategy's prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, Output, Prompts
from mmcl.models.hf_vlm.architectures import output_logits
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer
from mmcl.models.hf_vlm.decoding.greedy_decoding import (
    GreedyDecoder,
    OutputTransform,
    Questions,
    UnsupportedCacheError,
    expect_whole_cache,
    pad_right,
)
from mmcl.models.hf_vlm.decoding.shared_prefix import share_prefix
from mmcl.models.hf_vlm.image_inputs import ImageInputs
from mmcl.models.hf_vlm.last_block import LastBlock


class GenerativeModel(Protocol):
    """Generative model: the members of ``ImageTextToText`` that generation and scoring use."""

    lm: Any
    processor: Any
    image_inputs: ImageInputs
    chat_tokenizer: ChatTokenizer
    gates: dict[str, Tensor]
    pad_token_id: int
    end_token_ids: list[int]
    last_block: LastBlock
    decoder: GreedyDecoder

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
        output = Output(scores, prompts=self.prompts, sample_index=samples)
        return self.transform_output(output).logits


def expect_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return tokens (B, L) and their mask (B, L); a ValueError if the batch has none."""
    if batch.input_ids is None or batch.attention_mask is None:
        raise ValueError(
            "the batch has no tokens: a generative model takes tasks of task_type 'instruction'; "
            "use OpenCLIP for classes and captions"
        )
    return batch.input_ids, batch.attention_mask


def prompt_lengths(batch: Batch) -> Tensor:
    """Return (B,) number of tokens before the last answer of each sample; classes have none."""
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
    image_keys: Sequence[bytes] = (),
) -> list[str]:
    """Return B greedily generated answers of at most ``max_new_tokens``, without end tokens.

    Other arguments are those of ``candidate_log_probs``.
    """
    read = _questions(model, questions, image_inputs, prompts, image_keys)

    def reference(count: int) -> tuple[Tensor, Tensor]:
        return _reference(model, questions, image_inputs, prompts, count)

    ends = model.end_token_ids
    new = model.decoder.answers(
        model, read, prompts, max_new_tokens, ends, transform_output, reference
    )
    if new is None:
        settings = _settings(model, max_new_tokens, ends)
        new = _generate(model, questions, image_inputs, prompts, settings, transform_output)
    return [model.chat_tokenizer.decode(answer) for answer in new]


def _questions(
    model: GenerativeModel, questions: Sequence[Tensor], image_inputs: dict[str, Any],
    prompts: Prompts, image_keys: Sequence[bytes] = (),
) -> Questions:  # fmt: skip
    tokens, mask = pad_right(model.with_placeholders(questions, prompts), model.pad_token_id)
    types = model.image_inputs.token_type_ids(tokens)
    inputs = {**image_inputs, **types}
    positions, next_position = _positions(model, tokens, mask, image_inputs)
    axes = 1 if positions.ndim == 2 else len(positions)
    if axes > 1:
        inputs["position_ids"] = positions
    if "token_type_ids" in types:  # attention in both directions would see the padding
        inputs["attention_mask"] = mask.long()
    shared = None
    # Prompts differ by sample; types of tokens and positions of several axes by what follows.
    if not (types or prompts.tokens or prompts.gates) and axes == 1:
        token_id = model.image_inputs.image_token_id
        shared = share_prefix(tokens, mask, image_inputs, image_keys, token_id)
    return Questions(tokens, mask, inputs, next_position, axes, shared)


def _settings(
    model: GenerativeModel, max_new_tokens: int, ends: Sequence[int], **more: Any
) -> GenerationConfig:
    # Whatever is not set here comes from the model's own settings: Qwen's penalize repetition.
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
        pad_token_id=model.pad_token_id, eos_token_id=list(ends), use_cache=True,
        repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
        **{"return_dict_in_generate": False, **more},
    )  # fmt: skip


def _generate(
    model: GenerativeModel, questions: Sequence[Tensor], image_inputs: dict[str, Any],
    prompts: Prompts, settings: GenerationConfig, transform_output: OutputTransform | None,
) -> Any:  # fmt: skip
    """Return the new tokens (B, K) by transformers' ``generate``, or its output if it is a dict."""
    tokens, mask = left_pad(model.with_placeholders(questions, prompts), model.pad_token_id)
    processors = LogitsProcessorList()
    if transform_output is not None:
        processors.append(StrategyLogitsProcessor(transform_output, prompts))
    with model.entering(prompts, tokens, mask):
        found = model.lm.generate(
            input_ids=tokens, attention_mask=mask.long(), **image_inputs,
            **model.image_inputs.token_type_ids(tokens), generation_config=settings,
            logits_processor=processors,
        )  # fmt: skip
    return found[:, tokens.shape[1] :] if isinstance(found, Tensor) else found


def _reference(
    model: GenerativeModel, questions: Sequence[Tensor], image_inputs: dict[str, Any],
    prompts: Prompts, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``count`` tokens (B, K) and their scores (B, K, V) by ``generate``, without an end."""
    unreachable = [model.lm.get_output_embeddings().weight.shape[0]]
    settings = _settings(
        model, count, unreachable, return_dict_in_generate=True, output_logits=True
    )
    found = _generate(model, questions, image_inputs, prompts, settings, None)
    return found.sequences[:, -count:], torch.stack(found.logits, 1)


_GROUP_BYTES = 2**30


@dataclass(frozen=True)
class _Prefix:
    """Questions after a forward pass.

    Attributes:
        cache: keys and values.
        mask: (B, L) real tokens.
        next_position: (B,) position of the next token.
        log_probs: (B, V) log probability of the next token.
        axes: of a position; 1, or 3 in models that count time, height and width.
    """

    cache: Any
    mask: Tensor
    next_position: Tensor
    log_probs: Tensor
    axes: int


def candidate_log_probs(
    model: GenerativeModel,
    questions: Sequence[Tensor],
    image_inputs: dict[str, Any],
    prompts: Prompts,
    candidates: Sequence[Tensor],
    transform_output: OutputTransform | None = None,
    image_keys: Sequence[bytes] = (),
) -> Tensor:
    """Return (B, C) log probability of each candidate answer to each question, with its end.

    A question goes through the model once; its keys and values serve all candidates, in groups of
    at most one gibibyte.

    Args:
        model: an ``ImageTextToText``.
        questions: B questions, (L_b,) tokens each.
        image_inputs: arguments of the forward pass, see ``ImageInputs.forward_kwargs``.
        prompts: of the samples.
        candidates: C answers, (K_c,) tokens each.
        transform_output: changes (S, V) scores, or None.
        image_keys: digests of the images, see ``ImageCache.encode``; () = no tokens are shared.
    """
    room = max(len(candidate) for candidate in candidates)
    prefix = _encode_shared(
        model, questions, image_inputs, prompts, transform_output, image_keys, room
    ) or _encode_prefix(model, questions, image_inputs, prompts, transform_output)
    groups = list(_groups(prefix, candidates))
    found = []
    for group in groups:
        cache = prefix.cache if group is groups[-1] else copy.deepcopy(prefix.cache)
        found.append(_score_group(model, prefix, cache, prompts, group, transform_output))
    return torch.cat(found, 1)


def _encode_shared(
    model: GenerativeModel, questions: Sequence[Tensor], image_inputs: dict[str, Any],
    prompts: Prompts, transform_output: OutputTransform | None, image_keys: Sequence[bytes],
    room: int,
) -> _Prefix | None:  # fmt: skip
    """Encode questions that share tokens, padded on the right; None = they share none."""
    read = _questions(model, questions, image_inputs, prompts, image_keys)

    def reference(count: int) -> tuple[Tensor, Tensor]:
        return _reference(model, questions, image_inputs, prompts, count)

    if read.shared is None or not model.decoder.is_proven(model, read, prompts, reference):
        return None
    with model.entering(prompts, read.tokens, None):
        hidden, cache = model.decoder.first_pass(model, read)
    try:
        expect_whole_cache(cache, read.tokens.shape[1] + room)
    except UnsupportedCacheError:
        return None
    samples = torch.arange(len(hidden), device=hidden.device)
    log_probs = _log_probs(model, hidden, samples, prompts, transform_output)
    return _Prefix(cache, read.mask, read.next_position, log_probs, read.axes)


def _encode_prefix(
    model: GenerativeModel, questions: Sequence[Tensor], image_inputs: dict[str, Any],
    prompts: Prompts, transform_output: OutputTransform | None,
) -> _Prefix:  # fmt: skip
    tokens, mask = left_pad(model.with_placeholders(questions, prompts), model.pad_token_id)
    positions, next_position = _positions(model, tokens, mask, image_inputs)
    inputs = {
        "input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions,
        "use_cache": True, **image_inputs, **model.image_inputs.token_type_ids(tokens),
    }  # fmt: skip
    samples = torch.arange(len(tokens), device=tokens.device)
    last = torch.full_like(samples, tokens.shape[1] - 1)
    with model.entering(prompts, tokens, mask):
        hidden, out = model.last_block.hidden_states(inputs, samples, last)
    log_probs = _log_probs(model, hidden, samples, prompts, transform_output)
    axes = 1 if positions.ndim == 2 else len(positions)
    return _Prefix(getattr(out, model.decoder.cache_name), mask, next_position, log_probs, axes)


def _positions(
    model: GenerativeModel, tokens: Tensor, mask: Tensor, image_inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return (B, L) or (3, B, L) positions, and (B,) the next position of each sample."""
    lengths = mask.sum(1)
    rope_index = getattr(model.lm.model, "get_rope_index", None)
    if rope_index is None:
        return (mask.long().cumsum(1) - 1).clamp(min=0), lengths
    grid = image_inputs.get("image_grid_thw")
    types = model.image_inputs.token_type_ids(tokens)
    positions, shift = rope_index(tokens, image_grid_thw=grid, attention_mask=mask.long(), **types)
    return positions, lengths + shift[:, 0]


def _groups(prefix: _Prefix, candidates: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Split the candidates into groups whose keys, values and scores are small enough."""
    # LFM2's convolutions keep a state, which is small, in place of keys and values.
    attention = [layer for layer in prefix.cache.layers if hasattr(layer, "keys")]
    cached = sum(t.nbytes for layer in attention for t in (layer.keys, layer.values))
    longest = max(len(candidate) for candidate in candidates)
    scores = 4 * prefix.log_probs.numel() * longest
    size = max(1, _GROUP_BYTES // max(1, cached + scores))
    for start in range(0, len(candidates), size):
        yield candidates[start : start + size]


def _score_group(
    model: GenerativeModel, prefix: _Prefix, cache: Any, prompts: Prompts,
    candidates: Sequence[Tensor], transform_output: OutputTransform | None,
) -> Tensor:  # fmt: skip
    """Return (B, C) for some candidates; the cache is used up."""
    count, samples = len(candidates), len(prefix.mask)
    first_tokens = torch.stack([candidate[0] for candidate in candidates])
    total = prefix.log_probs[:, first_tokens]
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=total.device)
    answers = pad_sequence(list(candidates), True, model.pad_token_id)
    if answers.shape[1] == 1:
        return total
    # The last token of an answer is scored but is no input.
    inputs = answers[:, :-1].repeat(samples, 1)
    index = torch.arange(inputs.shape[1], device=inputs.device)
    is_real = (index + 1 < lengths[:, None]).repeat(samples, 1)
    positions = prefix.next_position.repeat_interleave(count)[:, None] + index
    if prefix.axes > 1:
        positions = positions.expand(prefix.axes, -1, -1)
    # As ``batch_repeat_interleave``, which the cache of LFM2's convolutions does not have.
    cache.reorder_cache(torch.arange(samples, device=total.device).repeat_interleave(count))
    model.gates.update({n: g.repeat_interleave(count, 0) for n, g in prompts.gates.items()})
    out = model.lm.model(
        input_ids=inputs,
        attention_mask=torch.cat([prefix.mask.repeat_interleave(count, 0), is_real], 1).long(),
        position_ids=positions,
        use_cache=True,
        **{model.decoder.cache_name: cache},
    )
    pairs, steps = torch.nonzero(is_real, as_tuple=True)
    targets = answers[pairs % count, steps + 1]
    hidden = out.last_hidden_state[pairs, steps]
    log_probs = _log_probs(model, hidden, pairs // count, prompts, transform_output, targets)
    sums = total.new_zeros(samples * count).index_add(0, pairs, log_probs)
    return total + sums.view(samples, count)


def _log_probs(
    model: GenerativeModel, hidden: Tensor, samples: Tensor, prompts: Prompts,
    transform_output: OutputTransform | None, targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return (S, V) log probabilities of next tokens, or (S,) those of the targets."""
    logits = output_logits(model.lm, hidden).float()
    if transform_output is not None:
        logits = transform_output(Output(logits, prompts=prompts, sample_index=samples)).logits
    if targets is None:
        return torch.log_softmax(logits, -1)
    return torch.gather(logits, 1, targets[:, None])[:, 0] - torch.logsumexp(logits, -1)
