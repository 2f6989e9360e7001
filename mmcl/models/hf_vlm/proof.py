"""Proof at load: a sample through transformers' own processor and forward, and through mmcl.

Families differ in how an image becomes tokens and in what their forward pass needs besides; what
is missing changes the loss without an error. So a model is compared, not looked up in a list.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmcl.core import IGNORE_INDEX, IMAGE_TOKEN, Batch, Conversation, Output, ProcessedSample, Turn
from mmcl.core.model import eval_mode
from mmcl.models.hf_vlm.architectures import Architecture
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer
from mmcl.models.hf_vlm.image_inputs import ImageInputs

_QUESTION, _ANSWER = "What is it?", "It is a small one."
_HEIGHT, _WIDTH = 60, 84
_LARGE = 500_000_000
"""Parameters from which on the first layers of the language model stand for all."""
_LAYERS = 6
_TOLERANCE = {torch.float32: 1e-4}
_ROUGH = 0.1
"""Largest difference of the loss, and of scores in standard deviations, in other precisions."""
_ADVICE = (
    "what it needs besides images and tokens is not known here, and it would be trained wrongly; "
    "use a family of the table in docs/families.md"
)


class ProvenModel(Protocol):
    """The members of ``ImageTextToText`` that the proof uses."""

    lm: Any
    processor: Any
    architecture: Architecture
    image_inputs: ImageInputs
    chat_tokenizer: ChatTokenizer

    def transform(self, train: bool) -> Any:
        """Return the preprocessing of a sample."""
        ...

    def locate_parameters(self) -> None:
        """Locate the modules that a forward pass needs again, after they changed."""
        ...

    def __call__(self, batch: Batch) -> Output:
        """Run a forward pass."""
        ...

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the task loss."""
        ...


@torch.no_grad()
def prove(model: Any) -> None:
    """Compare the tokens and the loss of one sample with those of transformers.

    Of a large model the first layers of the language model are run alone.

    Args:
        model: an ``ImageTextToText``.

    Raises:
        ValueError: if tokens or losses differ, with both.
    """
    proven: ProvenModel = model
    kind = proven.lm.config.model_type
    turns = (Turn("user", f"{IMAGE_TOKEN}{_QUESTION}"), Turn("assistant", _ANSWER))
    conversation = Conversation(turns, (_ANSWER,))
    limited = proven.chat_tokenizer
    proven.chat_tokenizer = replace(limited, max_length=sys.maxsize)
    own = proven.transform(True)(_image(), conversation, 0)
    proven.chat_tokenizer = limited
    batch = _batch(own, next(proven.lm.parameters()).device)
    found = _reference(proven, own, conversation)
    _expect_tokens(proven, found.pop("input_ids"), batch, kind)
    floating = proven.lm.get_input_embeddings().weight.dtype
    moved = {name: value.to(batch.labels.device) for name, value in found.items()}
    inputs = {n: v.to(floating) if v.is_floating_point() else v for n, v in moved.items()}
    with eval_mode(model), _first_layers(proven):
        out = proven.lm(input_ids=batch.input_ids, labels=batch.labels, **inputs)
        own_out = proven(batch)
        theirs, ours = float(out.loss), float(proven.loss(own_out, batch))
    scores = out.logits[0, :-1][batch.labels[0, 1:] != IGNORE_INDEX].float()
    distance = float((own_out.logits.float() - scores).abs().max() / scores.std())
    if not max(distance, abs(ours - theirs)) <= _TOLERANCE.get(floating, _ROUGH):
        raise ValueError(
            f"a test sample has a loss of {theirs:.6g} in transformers and {ours:.6g} in mmcl for "
            f"this model of type '{kind}', and its scores differ by up to {distance:.2g} standard "
            f"deviations: {_ADVICE}"
        )


def _image() -> Tensor:
    """Return (3, H, W) uint8, not square, every row and column another."""
    rows, columns = torch.arange(_HEIGHT)[:, None], torch.arange(_WIDTH)[None]
    return torch.stack([(k * rows * rows + 3 * columns + 40 * k) % 256 for k in (1, 2, 3)]).byte()


def _batch(own: ProcessedSample, device: torch.device) -> Batch:
    if own.input_ids is None or own.labels is None:
        raise ValueError("the transform of a generative model gives tokens and labels")
    tokens = own.input_ids[None]
    batch = Batch(
        None if own.image is None or own.image_inputs else own.image[None], own.labels[None],
        torch.zeros(1, dtype=torch.int64), None, tokens, torch.ones_like(tokens).bool(),
        image_inputs=own.image_inputs,
    )  # fmt: skip
    return batch.to(device)


def _reference(
    proven: ProvenModel, own: ProcessedSample, conversation: Conversation
) -> dict[str, Tensor]:
    """Return what transformers' own processor makes of the sample, without its targets."""
    chat, processor = proven.chat_tokenizer, proven.processor
    is_square = not own.image_inputs
    options = dict(proven.architecture.image_options) if is_square else {}
    image = own.image if is_square else _image()
    if chat.template.encodes_answers_apart:
        texts = {"text": [f"{processor.image_token}{_QUESTION}"], "suffix": [_ANSWER]}
    else:
        text = chat.render(conversation, [chat.template.image_token])
        begin = processor.tokenizer.bos_token
        texts = {"text": [text]}
        options["add_special_tokens"] = not (begin and text.startswith(begin))
    with warnings.catch_warnings():
        # Processors warn of their own calls.
        warnings.simplefilter("ignore")
        found = processor(images=[[image]], **texts, return_tensors="pt", **options)
    unused = ("labels", "attention_mask")
    return {n: v for n, v in found.items() if isinstance(v, Tensor) and n not in unused}


def _expect_tokens(proven: ProvenModel, found: Tensor, batch: Batch, kind: str) -> None:
    theirs, ours = found[0].tolist(), () if batch.input_ids is None else batch.input_ids[0].tolist()
    if theirs == ours:
        return
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    shown = [
        proven.processor.tokenizer.decode(tokens[place : place + 4]) for tokens in (theirs, ours)
    ]
    raise ValueError(
        f"a test sample has {len(theirs)} tokens in transformers and {len(ours)} in mmcl for this "
        f"model of type '{kind}', from token {place} on {shown[0]!r} and {shown[1]!r}: {_ADVICE}"
    )


@contextmanager
def _first_layers(proven: ProvenModel) -> Iterator[None]:
    """Leave the language model of a large model its first layers in this context."""
    language = proven.lm.model.get_submodule(proven.architecture.language)
    layers = getattr(language, "layers", None)
    count = sum(parameter.numel() for parameter in proven.lm.parameters())
    if not isinstance(layers, nn.ModuleList) or count < _LARGE or len(layers) <= _LAYERS:
        yield
        return
    number = language.config.num_hidden_layers
    language.layers, language.config.num_hidden_layers = layers[:_LAYERS], _LAYERS
    proven.locate_parameters()
    try:
        yield
    finally:
        language.layers, language.config.num_hidden_layers = layers, number
        proven.locate_parameters()
