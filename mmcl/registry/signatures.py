"""Signature and fingerprint of a base model, and the comparison of two bases for an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmcl.models.fingerprint import fingerprint_of
from mmcl.models.open_clip.pretrained_facts import description
from mmcl.registry.records import Signature


@dataclass(frozen=True)
class FitCheck:
    """One line of ``mmcl upgrade check``.

    Attributes:
        what: "shapes", "tokenizer", "processor", "image token" or "chat template".
        fits: whether the adapter fits in this respect.
        detail: what differs, or what was compared.
    """

    what: str
    fits: bool
    detail: str


def signature_of(model: Any) -> Signature:
    """Return the signature of an ``OpenCLIP`` or an ``ImageTextToText`` without adapters."""
    shapes = _sha256([(name, list(t.shape)) for name, t in base_weights(model).items()])
    tokenizer = _sha256(vocabulary_of(model)) if vocabulary_of(model) else ""
    processor = _sha256(processor_of(model))
    if not hasattr(model, "chat_tokenizer"):
        return Signature(shapes, tokenizer, processor)
    template = _sha256(model.chat_tokenizer.template.source)
    token = int(model.image_inputs.image_token_id)
    return Signature(shapes, tokenizer, processor, token, template)


def fingerprint(model: Any) -> str:
    """Return the sha256 of all weights and buffers of a base model.

    Unlike ``model.fingerprint()`` it depends neither on what is frozen nor on settings of use, such
    as the size to which images are made.
    """
    return fingerprint_of("base model", base_weights(model).items())


def base_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights and buffers of a base model by name, sorted."""
    inner = model.clip if hasattr(model, "clip") else model.lm
    return dict(sorted(inner.state_dict().items()))


def vocabulary_of(model: Any) -> dict[str, int]:
    """Return token -> id of a model's tokenizer, empty without one."""
    if hasattr(model, "processor"):
        return dict(model.processor.tokenizer.get_vocab())
    tokenizer = getattr(model, "_tokenizer", None)
    inner: Any = getattr(tokenizer, "tokenizer", None)  # open_clip's wrapper of transformers' own
    if inner is not None and hasattr(inner, "get_vocab"):
        return dict(inner.get_vocab())
    return dict(getattr(tokenizer, "encoder", {}))


def processor_of(model: Any) -> str:
    """Return the preprocessing of a model as a text."""
    if hasattr(model, "image_inputs"):
        return f"{model.image_inputs.description} {model.image_aspect_ratio}"
    facts = [_numbers(model._mean), _numbers(model._std)]
    return f"{description(model.clip)} mean {facts[0]} std {facts[1]}"


def compare(old: Any, new: Any, touched: Collection[str]) -> list[FitCheck]:
    """Compare two base models for an adapter of the old one.

    Args:
        old: base model that the adapter was trained on.
        new: base model that it shall be moved to.
        touched: names of the weights that the adapter changes, as in ``base_weights``.

    Returns:
        One line for each of shapes, tokenizer and processor, for generative models also for image
        token and chat template.
    """
    checks = [FitCheck("shapes", *_compare_shapes(base_weights(old), base_weights(new), touched))]
    checks.append(FitCheck("tokenizer", *_compare_tokens(vocabulary_of(old), vocabulary_of(new))))
    texts = processor_of(old), processor_of(new)
    alike = texts[0] == texts[1]
    checks.append(FitCheck("processor", alike, "equal" if alike else f"{texts[0]} | {texts[1]}"))
    is_chat = [hasattr(model, "chat_tokenizer") for model in (old, new)]
    if all(is_chat):
        tokens = [int(model.image_inputs.image_token_id) for model in (old, new)]
        detail = f"{tokens[0]}" if tokens[0] == tokens[1] else f"{tokens[0]} became {tokens[1]}"
        checks.append(FitCheck("image token", tokens[0] == tokens[1], detail))
        sources = [model.chat_tokenizer.template.source for model in (old, new)]
        alike = sources[0] == sources[1]
        checks.append(FitCheck("chat template", alike, "equal" if alike else "other text"))
    return checks


def first_difference(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], touched: Collection[str]
) -> str:
    """Return the first of the touched weights whose shape differs, in words; "" if none does."""
    for name in sorted(touched):
        if name not in new:
            return f"'{name}' is {tuple(old[name].shape)} in the old base and missing in the new"
        if old[name].shape != new[name].shape:
            shapes = tuple(old[name].shape), tuple(new[name].shape)
            return f"'{name}' is {shapes[0]} in the old base and {shapes[1]} in the new"
    return ""


def _compare_shapes(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], touched: Collection[str]
) -> tuple[bool, str]:
    difference = first_difference(old, new, touched)
    if difference:
        return False, difference
    others = sum(name not in new or new[name].shape != t.shape for name, t in old.items())
    if not touched:
        return True, "a head in closed form is solved again, on features of any dim"
    rest = f"; {others} weights that it does not touch differ" if others else ""
    return True, f"all {len(touched)} weights of the adapter fit{rest}"


def _compare_tokens(old: Mapping[str, int], new: Mapping[str, int]) -> tuple[bool, str]:
    if old == new:
        return True, f"{len(old)} tokens, equal"
    return False, "; ".join(_token_changes(old, new))


def _token_changes(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[str]:
    if len(old) != len(new):
        yield f"{len(old)} tokens became {len(new)}"
    changed = next((t for t in sorted(old, key=lambda t: old[t]) if new.get(t) != old[t]), None)
    if changed is not None:
        now = new.get(changed, "missing")
        yield f"token {changed!r} is {old[changed]} in the old base and {now} in the new"


def _numbers(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values.flatten().tolist()]


def _sha256(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
