"""How likely given answers are, with the question and its picture read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Output, Prompts
from mmcl.models.generation import Refine, left_padded

if TYPE_CHECKING:
    from mmcl.models.image_text import ImageTextToText


def likelihoods(
    model: ImageTextToText,
    rows: Sequence[Tensor],
    pictures: dict[str, Any],
    prompts: Prompts,
    candidates: Sequence[Tensor],
    refine: Refine | None = None,
) -> Tensor:
    """Return (B, C) log likelihood of each candidate behind each question, its end included.

    The prefix of a row goes through the model once and its keys and values serve all candidates;
    models whose positions do not count up by one score every pair from the start.

    Args:
        model: an ``ImageTextToText``.
        rows: B questions, (L_b,) tokens each.
        pictures: of the rows.
        prompts: of the rows.
        candidates: C answers, (K_c,) tokens each.
        refine: changes (S, V) scores, or None.
    """
    if not model.family.has_plain_positions:
        return plain_likelihoods(model, rows, pictures, prompts, candidates, refine)
    rows = model.prompted_rows(rows, prompts)
    tokens, mask = left_padded(rows, model.pad)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    with model.entering(prompts, tokens, mask):
        read = model.lm.model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=places, use_cache=True,
            **pictures,
        )  # fmt: skip
    count, answers = len(candidates), pad_sequence(list(candidates), True, model.pad)
    cache, last = read.past_key_values, read.last_hidden_state[:, -1]
    repeated = answers.repeat(len(rows), 1)
    is_real = _real(candidates).to(tokens.device).repeat(len(rows), 1)
    cache.batch_repeat_interleave(count)
    _repeat_gates(model, count)
    behind = mask.sum(1).repeat_interleave(count)[:, None]
    read_on = model.lm.model(
        input_ids=repeated,
        attention_mask=torch.cat([mask.repeat_interleave(count, 0), is_real], 1).long(),
        position_ids=behind + torch.arange(repeated.shape[1], device=tokens.device),
        past_key_values=cache,
        use_cache=True,
    )
    hidden = torch.cat([last.repeat_interleave(count, 0)[:, None], read_on.last_hidden_state], 1)
    return _summed(model, hidden[:, :-1], repeated, is_real, refine).view(len(rows), count)


def plain_likelihoods(
    model: ImageTextToText,
    rows: Sequence[Tensor],
    pictures: dict[str, Any],
    prompts: Prompts,
    candidates: Sequence[Tensor],
    refine: Refine | None = None,
) -> Tensor:
    """Return the same, every question and candidate read together from the start."""
    rows = model.prompted_rows(rows, prompts)
    found = []
    for candidate in candidates:
        tokens, mask = left_padded([torch.cat([row, candidate]) for row in rows], model.pad)
        with model.entering(prompts, tokens, mask):
            read = model.lm.model(
                input_ids=tokens, attention_mask=mask.long(), use_cache=False, **pictures,
                **model.pixels.marks(tokens),
            )  # fmt: skip
        size = len(candidate)
        hidden = read.last_hidden_state[:, -size - 1 : -1]
        said = candidate.expand(len(rows), -1)
        found.append(_summed(model, hidden, said, torch.ones_like(said).bool(), refine))
    return torch.stack(found, 1)


def _real(candidates: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.ones_like(c, dtype=torch.bool) for c in candidates], True)


def _repeat_gates(model: ImageTextToText, count: int) -> None:
    for name, gate in list(model.gates.items()):
        model.gates[name] = gate.repeat_interleave(count, 0)


def _summed(
    model: ImageTextToText, hidden: Tensor, said: Tensor, is_real: Tensor, refine: Refine | None
) -> Tensor:
    """Return (R,) sums of log likelihoods over the real tokens of R answers, (R, K)."""
    rows, places = torch.nonzero(is_real, as_tuple=True)
    logits = model.lm.get_output_embeddings()(hidden[rows, places]).float()
    if refine is not None:
        logits = refine(Output(logits, rows=rows, targets=said[rows, places])).logits
    likely = logits.log_softmax(-1).gather(1, said[rows, places][:, None])[:, 0]
    return torch.zeros(len(said), device=hidden.device).index_add(0, rows, likely)
