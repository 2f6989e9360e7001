"""Image-text-to-text models of transformers (LLaVA and its kind) behind the VLM protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import NO_PROMPTS, UNSCORED, Batch, Modality, Output, Prompts, Transform
from mmcl.core.blocks import stacks
from mmcl.core.gates import Gates
from mmcl.core.rest import evaluating
from mmcl.models.candidates import best_of, likelihoods
from mmcl.models.chat_loading import Loaded, Style, conversation_of, ends_of, load_chat
from mmcl.models.checkpointing import compute_twice
from mmcl.models.entrance import Entrance
from mmcl.models.families import family_of
from mmcl.models.fingerprint import Fingerprint, frozen_own
from mmcl.models.generation import Refine, generated, prompt_lengths
from mmcl.models.guide import guided, one_a_row
from mmcl.models.parts import Kind, linears_of, parameters_of, places_of, touching
from mmcl.models.parts import Part as Part
from mmcl.models.pixels import Pixels
from mmcl.models.precision import Precision
from mmcl.models.squares import Fit, SquareTransform


class ImageTextToText(nn.Module):
    """A vision tower, a projector and a language model that answers questions on pictures.

    Only the scored positions go through the language head in training, and a batch that is padded
    on the right needs no padding mask under causal attention; both leave every number as it was.

    Args:
        model: "tiny-llava" (ships with mmcl), a local folder as transformers writes them, or a name
            on the hub such as "llava-hf/llava-1.5-7b-hf".
        pretrained: False takes the configuration and random weights from ``seed``.
        base_precision: of the weights: "fp32", "bf16", or "8bit" and "4bit" (a GPU and
            bitsandbytes): then the language model is quantised, which only adapters can learn on,
            and the rest is bf16.
        frozen: parts that do not learn, of "image" (vision tower), "projector" and "text"
            (language model).
        guide: a CLIP such as ``OpenCLIP`` whose embeddings route and compare; None = pooled
            features of the model's own towers. It never learns.
        style: "model" speaks in the chat template of the model, "vicuna_v1" as LLaVA-1.5.
        fit: how a picture becomes square: "pad", "crop" or "stretch", in training and at test.
        size: side of the square; None = as the model was made for.
        max_length: tokens of a row at most.
        gradient_checkpointing: compute layers twice to save memory.
        seed: of random weights.
    """

    def __init__(
        self,
        model: str = "tiny-llava",
        pretrained: bool = True,
        base_precision: Precision = "fp32",
        frozen: Sequence[Part] = ("image",),
        guide: nn.Module | None = None,
        style: Style = "model",
        fit: Fit = "pad",
        size: int | None = None,
        max_length: int = 2048,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        loaded = load_chat(model, pretrained, base_precision, seed)
        self._take(loaded, guide, style, fit, size, max_length)
        self.freeze(*frozen)
        if gradient_checkpointing:
            compute_twice(self.lm, self.gates)

    def _take(
        self, loaded: Loaded, guide: nn.Module | None, style: Style, fit: Fit, size: int | None,
        max_length: int,
    ) -> None:  # fmt: skip
        self.lm, self.processor = loaded.lm, loaded.processor
        self.family = family_of(self.lm)
        self.fit: Fit = fit
        self.pixels = Pixels(self.lm, self.processor, self.family, size)
        self.conversation = conversation_of(loaded, self.pixels.size, style, max_length)
        self.ends = ends_of(loaded)
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None else int(pad)
        begins = self.conversation.first_token == tokenizer.bos_token_id
        self.entrance = Entrance(int(begins), self.pad)
        self.widths: Mapping[Modality, int] = {"text": self._words().embedding_dim}
        self.gates: dict[str, Tensor] = Gates()
        self.guide = guide
        if guide is not None:
            guide.requires_grad_(False)
        self._candidates: dict[str, Tensor] = {}
        self._own = frozenset(name for name, _ in self.named_parameters())
        self._fingerprint = Fingerprint()
        # Walking through a tower takes as long as a layer of a small model.
        looking: tuple[Part, ...] = ("image", "projector")
        self._looking = [places_of(self.lm, self.tower(part)) for part in looking]

    def forward(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Score the words of the answers.

        Returns:
            ``logits`` (S, V) of the scored positions only, with their ``rows`` and ``targets``.
        """
        tokens, labels = self._tokens(batch), batch.labels
        if not batch.is_answered:
            raise ValueError(
                f"labels are {tuple(labels.shape)}, expected (B, L): a model that answers learns "
                "from tasks of kind 'answer'"
            )
        pictures = self.pixels.inputs(self.lm, batch)
        room = self.entrance.room(prompts)
        given = self.entrance.with_room(tokens, room)
        # Right padding under causal attention changes no real position, so there is no mask.
        with self.entering(prompts, given, None):
            out = self.lm.model(
                input_ids=given, use_cache=False, **pictures, **self.pixels.marks(given)
            )
        rows, places = torch.nonzero(labels[:, 1:] != UNSCORED, as_tuple=True)
        moved = places + room * (places >= self.entrance.begins) if room else places
        hidden = out.last_hidden_state.flatten(0, 1)
        scored = hidden.index_select(0, rows * given.shape[1] + moved)
        logits = self.lm.get_output_embeddings()(scored)
        logits = touching(logits, *(self._looking[:1] if pictures else self._looking))
        return Output(logits, None, None, prompts, rows, labels[rows, places + 1])

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return cross entropy, mean over the scored tokens, as transformers'."""
        if output.targets is None:
            raise ValueError("output has no targets: it must come from a batch with answers")
        logits = output.logits.float()
        if not len(logits):
            return logits.sum()  # zero, with a graph
        return functional.cross_entropy(logits, output.targets)

    @torch.no_grad()
    def answer(
        self, batch: Batch, prompts: Prompts = NO_PROMPTS, *, refine: Refine | None = None,
        candidates: Sequence[str] = (), max_new_tokens: int = 64,
    ) -> list[str]:  # fmt: skip
        """Say something for every row; what stands behind the last question is not looked at.

        Args:
            batch: (B, L) tokens with a mask; labels tell where the answer begins.
            prompts: as in ``forward``.
            refine: changes the (B, V) scores of every next token, or None.
            candidates: if given, the likeliest of these texts is the answer.
            max_new_tokens: of an answer at most.

        Returns:
            B texts without end tokens.
        """
        rows = self._questions(batch)
        pictures = self.pixels.inputs(self.lm, batch)
        with evaluating(self):
            if not candidates:
                return generated(self, rows, pictures, prompts, max_new_tokens, refine)
            known = [self._candidate(text).to(batch.labels.device) for text in candidates]
            scores = likelihoods(self, rows, pictures, prompts, known, refine)
        return best_of(scores, candidates)

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, E) unit embeddings of pictures or questions, without prompts.

        Of the guide where there is one; else the mean of the tower's features or of the words. A
        row without a picture has the zero vector.
        """
        if self.guide is not None:
            return guided(self.guide, batch, modality)
        if modality == "image":
            return self._seen(batch)
        rows = self._questions(batch)
        means = [self._words()(row[row != self.pixels.token]).float().mean(0) for row in rows]
        return functional.normalize(torch.stack(means), dim=-1)

    @cached_property
    def embed_width(self) -> int:
        """E, the width of embedded pictures."""
        if self.guide is not None:
            return int(self.guide.embed_width)  # type: ignore[arg-type]
        return int(self.pixels.blank(self.lm).shape[-1])

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        """Return (B, N, D), what enters the projector, or the features that stand in.

        Raises:
            ValueError: if features cannot stand in for pictures in this kind of model, or some row
                has not exactly one picture.
        """
        if batch.features is not None:
            return batch.features
        self.pixels.expect_replay(self.lm.config.model_type)
        pictures = 0 if batch.images is None else len(batch.images)
        if pictures != len(batch):
            raise ValueError(
                f"{len(batch)} rows have {pictures} pictures: features stand in for one picture a "
                "row; encode the rows that have one, or use raw replay (ExperienceReplay)"
            )
        return self.pixels.features(self.lm, batch)

    def linears(self, which: Kind = "all") -> dict[str, nn.Linear]:
        """Return the language model's linear layers by their name in this module, no head.

        Args:
            which: "all", those of "attention" (q, k, v, o) or of the "mlp" (gate, up, down).
        """
        return linears_of(self, f"lm.model.{self.family.language}.", which)

    def freeze(self, *parts: Part) -> None:
        """Stop whole parts from learning: "image", "projector" or "text"."""
        for part in parts:
            for parameter in self.tower(part):
                parameter.requires_grad_(False)

    def tower(self, part: Part) -> Iterable[nn.Parameter]:
        """Return the parameters of one part; "projector" is all between picture and language."""
        return parameters_of(self.lm, self.family, part)

    def is_frozen(self, part: Part) -> bool:
        """Tell whether nothing in a part learns."""
        return not any(parameter.requires_grad for parameter in self.tower(part))

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the language model, which every step runs, with pictures or not."""
        language = self.lm.model.get_submodule(self.family.language)
        return [layer for stack in stacks(language) for layer in stack]

    def fingerprint(self) -> str:
        """Return the sha256 of frozen weights, their types, sizes and the preprocessing."""
        frozen = frozen_own(self, self._own)
        return self._fingerprint.of(f"{self.pixels.facts} {self.fit}", frozen.items())

    def transform(self, train: bool) -> Transform:
        """Return what this model does to a sample; the same in training and at test."""
        red, green, blue = (int(value) for value in self.pixels.mean)
        return SquareTransform(self.conversation, self.pixels.size, self.fit, (red, green, blue))

    def prompted_rows(self, rows: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
        """Return token rows with room for the prompts, behind a begin token."""
        room = self.entrance.room(prompts)
        return [self.entrance.with_room(row[None], room)[0] for row in rows] if room else list(rows)

    @contextmanager
    def entering(self, prompts: Prompts, tokens: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Let prompts and gates enter the forward passes of this context.

        Prompts take the place of the embeddings of the room that was left for them; installed
        layers read the gates, which stay until the next pass.

        Args:
            prompts: of the rows.
            tokens: (B, L) with room for the prompts.
            mask: (B, L) bool, or None where rows begin at their first token.
        """
        self.gates.clear()
        self.gates.update(prompts.gates)
        with self.entrance.open(self._words(), prompts, tokens, mask):
            yield

    def _seen(self, batch: Batch) -> Tensor:
        """Return (B, D) unit means of what enters the projector, zero for rows without picture."""
        if batch.features is not None:
            return functional.normalize(batch.features.float().mean(1), dim=-1)
        if batch.images is None or not len(batch.images):
            return torch.zeros(len(batch), self.embed_width, device=batch.labels.device)
        return one_a_row(self.pixels.features(self.lm, batch).float().mean(1), batch)

    def _tokens(self, batch: Batch) -> Tensor:
        if batch.tokens is None or batch.mask is None:
            raise ValueError(
                "rows have no tokens: a model that answers takes tasks of kind 'answer'; use "
                "OpenCLIP for classes and captions"
            )
        return batch.tokens.masked_fill(~batch.mask, self.pad)

    def _questions(self, batch: Batch) -> list[Tensor]:
        tokens = self._tokens(batch)
        lengths = prompt_lengths(batch).tolist()
        return [row[:length] for row, length in zip(tokens, lengths, strict=True)]

    def _candidate(self, text: str) -> Tensor:
        if text not in self._candidates:
            self._candidates[text] = self.conversation.answer_tokens(text)
        return self._candidates[text]

    def _words(self) -> Any:
        return self.lm.get_input_embeddings()
