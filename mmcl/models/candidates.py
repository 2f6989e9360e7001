"""How likely given answers are, with the question and its picture read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Output, Prompts
from mmcl.models.generation import Refine, Speaker, left_padded

_BYTES = 2**30


@dataclass(frozen=True)
class _Read:
    """Questions that a model has read.

    Attributes:
        cache: keys and values.
        mask: (B, L) real tokens.
        behind: (B,) position of the next token.
        likely: (B, V) log likelihood of the next token.
        axes: of a position; 1, or 3 in models that count time, height and width.
    """

    cache: Any
    mask: Tensor
    behind: Tensor
    likely: Tensor
    axes: int


def likelihoods(
    model: Speaker,
    rows: Sequence[Tensor],
    pictures: dict[str, Any],
    prompts: Prompts,
    candidates: Sequence[Tensor],
    refine: Refine | None = None,
) -> Tensor:
    """Return (B, C) log likelihood of each candidate behind each question, its end included.

    The prefix of a row goes through the model once; its keys and values serve all candidates, in
    groups that take a gibibyte at most.

    Args:
        model: an ``ImageTextToText``.
        rows: B questions, (L_b,) tokens each.
        pictures: of the rows.
        prompts: of the rows.
        candidates: C answers, (K_c,) tokens each.
        refine: changes (S, V) scores, or None.
    """
    read = _read(model, rows, pictures, prompts, refine)
    groups = list(_groups(read, candidates))
    found = []
    for number, group in enumerate(groups):
        is_last = number == len(groups) - 1
        cache = read.cache if is_last else copy.deepcopy(read.cache)
        found.append(_of_a_group(model, read, cache, prompts, group, refine))
    return torch.cat(found, 1)


def best_of(scores: Tensor, candidates: Sequence[str]) -> list[str]:
    """Return the likeliest candidate of each row of (B, C) scores, the first of equal ones."""
    return [candidates[place] for place in scores.argmax(1).tolist()]


def _read(
    model: Speaker, rows: Sequence[Tensor], pictures: dict[str, Any], prompts: Prompts,
    refine: Refine | None,
) -> _Read:  # fmt: skip
    tokens, mask = left_padded(model.prompted_rows(rows, prompts), model.pad)
    places, behind = _positions(model, tokens, mask, pictures)
    with model.entering(prompts, tokens, mask):
        out = model.lm.model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=places, use_cache=True,
            **pictures, **model.pixels.marks(tokens),
        )  # fmt: skip
    owner = torch.arange(len(tokens), device=tokens.device)
    likely = _log_likely(model, out.last_hidden_state[:, -1], owner, prompts, refine)
    axes = 1 if places.ndim == 2 else len(places)
    return _Read(out.past_key_values, mask, behind, likely, axes)


def _positions(
    model: Speaker, tokens: Tensor, mask: Tensor, pictures: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return (B, L) or (3, B, L) positions, and (B,) the position behind each row."""
    behind = mask.sum(1)
    index = getattr(model.lm.model, "get_rope_index", None)
    if index is None:
        return (mask.long().cumsum(1) - 1).clamp(min=0), behind
    grid = pictures.get("image_grid_thw")
    marks = model.pixels.marks(tokens)
    places, shift = index(tokens, image_grid_thw=grid, attention_mask=mask.long(), **marks)
    return places, behind + shift[:, 0]


def _groups(read: _Read, candidates: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Cut the candidates into groups whose keys, values and scores are small enough."""
    kept = sum(t.nbytes for layer in read.cache.layers for t in (layer.keys, layer.values))
    longest = max(len(candidate) for candidate in candidates)
    scores = 4 * read.likely.numel() * longest
    size = max(1, _BYTES // max(1, kept + scores))
    for start in range(0, len(candidates), size):
        yield candidates[start : start + size]


def _of_a_group(
    model: Speaker, read: _Read, cache: Any, prompts: Prompts,
    candidates: Sequence[Tensor], refine: Refine | None,
) -> Tensor:  # fmt: skip
    """Return (B, C) for some candidates; the cache is used up."""
    count, rows = len(candidates), len(read.mask)
    firsts = torch.stack([candidate[0] for candidate in candidates])
    total = read.likely[:, firsts]
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=firsts.device)
    said = pad_sequence(list(candidates), True, model.pad)
    if said.shape[1] == 1:
        return total
    # The last token of an answer is scored and never read.
    given = said[:, :-1].repeat(rows, 1)
    places = torch.arange(given.shape[1], device=given.device)
    is_real = (places + 1 < lengths[:, None]).repeat(rows, 1)
    positions = read.behind.repeat_interleave(count)[:, None] + places
    if read.axes > 1:
        positions = positions.expand(read.axes, -1, -1)
    cache.batch_repeat_interleave(count)
    model.gates.update({n: g.repeat_interleave(count, 0) for n, g in prompts.gates.items()})
    out = model.lm.model(
        input_ids=given,
        attention_mask=torch.cat([read.mask.repeat_interleave(count, 0), is_real], 1).long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    pairs, steps = torch.nonzero(is_real, as_tuple=True)
    wanted = said[pairs % count, steps + 1]
    hidden = out.last_hidden_state[pairs, steps]
    likely = _log_likely(model, hidden, pairs // count, prompts, refine, wanted)
    return total + total.new_zeros(rows * count).index_add(0, pairs, likely).view(rows, count)


def _log_likely(
    model: Speaker, hidden: Tensor, owner: Tensor, prompts: Prompts,
    refine: Refine | None, wanted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return (S, V) log likelihoods of next tokens, or (S,) of the wanted ones."""
    logits: Tensor = model.lm.get_output_embeddings()(hidden).float()
    if refine is not None:
        logits = refine(Output(logits, prompts=prompts, rows=owner)).logits
    if wanted is None:
        return torch.log_softmax(logits, -1)
    return torch.gather(logits, 1, wanted[:, None])[:, 0] - torch.logsumexp(logits, -1)
