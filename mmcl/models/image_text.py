"""Image-text-to-text models of transformers (LLaVA and its kind) behind the VLM protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import NO_PROMPTS, UNSCORED, Batch, Modality, Output, Prompts, Transform
from mmcl.models.candidates import likelihoods
from mmcl.models.chat_loading import Loaded, Precision, Style, conversation_of, load_chat
from mmcl.models.entrance import Entrance
from mmcl.models.families import family_of
from mmcl.models.fingerprint import fingerprint_of
from mmcl.models.generation import Refine, best_of, greedy, left_padded, prompt_lengths
from mmcl.models.guide import guided, one_a_row
from mmcl.models.pixels import Pixels
from mmcl.models.squares import Fit, SquareTransform

Part = Literal["image", "text", "projector"]
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class ImageTextToText(nn.Module):
    """A vision tower, a projector and a language model that answers questions on pictures.

    Only the scored positions go through the language head in training, and a batch that is padded
    on the right needs no padding mask under causal attention; both leave every number as it was.

    Args:
        model: "tiny-llava" (ships with mmcl), a local folder as transformers writes them, or a name
            on the hub such as "llava-hf/llava-1.5-7b-hf".
        pretrained: False takes the configuration and random weights from ``seed``.
        base_precision: of the weights: "fp32", "bf16", or "8bit" and "4bit" (a GPU and
            bitsandbytes; only adapters can learn on these).
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
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})

    def _take(
        self, loaded: Loaded, guide: nn.Module | None, style: Style, fit: Fit, size: int | None,
        max_length: int,
    ) -> None:  # fmt: skip
        self.lm, self.processor = loaded.lm, loaded.processor
        self.family = family_of(self.lm)
        self.fit: Fit = fit
        self.pixels = Pixels(self.lm, self.processor, self.family, size)
        self.conversation = conversation_of(loaded, self.pixels.size, style, max_length)
        tokenizer = self.processor.tokenizer
        pad, begin = tokenizer.pad_token_id, tokenizer.bos_token_id
        self.entrance = Entrance(begin, tokenizer.eos_token_id if pad is None else pad)
        self.widths: Mapping[Modality, int] = {"text": self._words().embedding_dim}
        self.gates: dict[str, Tensor] = {}
        self.guide = guide
        if guide is not None:
            guide.requires_grad_(False)
        self._candidates: dict[str, Tensor] = {}
        self._mark: tuple[tuple[str, ...], str] = ((), "")

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
        # Right padding under causal attention changes no real position, so there is no mask.
        hidden, shift = self._hidden(tokens, self.pixels.inputs(self.lm, batch), prompts)
        rows, places = torch.nonzero(labels[:, 1:] != UNSCORED, as_tuple=True)
        begin = self.entrance.begins(tokens[:1])
        moved = torch.where(places >= begin, places + shift, places)
        logits = self.lm.get_output_embeddings()(hidden[rows, moved])
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
        if candidates:
            known = [self._candidate(text).to(rows[0].device) for text in candidates]
            return best_of(likelihoods(self, rows, pictures, prompts, known, refine), candidates)
        tokens, mask = left_padded(self.prompted_rows(rows, prompts), self.pad)
        inputs = {"input_ids": tokens, "attention_mask": mask.long(), **pictures}
        with self.entering(prompts, tokens, mask):
            said = greedy(
                self.lm, {**inputs, **self.pixels.marks(tokens)}, pad=self.pad, ends=self.ends,
                max_new_tokens=max_new_tokens, refine=refine,
            )  # fmt: skip
        texts = self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, E) unit embeddings of pictures or questions, without prompts.

        Of the guide where there is one; else the mean of the tower's features or of the words.
        """
        if self.guide is not None:
            return guided(self.guide, batch, modality)
        if modality == "image":
            return one_a_row(self.encode(batch).float().mean(1), batch)
        rows = self._questions(batch)
        means = [self._words()(row[row != self.pixels.token]).float().mean(0) for row in rows]
        return functional.normalize(torch.stack(means), dim=-1)

    @cached_property
    def embed_width(self) -> int:
        """E, the width of embedded pictures."""
        blank = self.pixels.mean.new_zeros(1, 3, self.pixels.size, self.pixels.size).byte()
        label = torch.zeros(1, dtype=torch.int64, device=blank.device)
        return int(self.embed(Batch(blank, label, label), "image").shape[1])

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        """Return (B, N, D), what enters the projector, or the features that stand in."""
        return self.pixels.features(self.lm, batch) if batch.features is None else batch.features

    def linears(self, which: Literal["all", "attention", "mlp"] = "all") -> dict[str, nn.Linear]:
        """Return the language model's linear layers by their name in this module, no head.

        Args:
            which: "all", those of "attention" (q, k, v, o) or of the "mlp" (gate, up, down).
        """
        wanted = {"all": None, "attention": _ATTENTION, "mlp": _MLP}
        if which not in wanted:
            raise ValueError(f"layers is {which!r}, expected 'all', 'attention' or 'mlp'")
        ends = wanted[which]
        prefix = f"lm.model.{self.family.language}."
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(prefix)
            if ends is None or name.rpartition(".")[2] in ends
        }

    def freeze(self, *parts: Part) -> None:
        """Stop whole parts from learning: "image", "projector" or "text"."""
        for part in parts:
            for parameter in self.tower(part):
                parameter.requires_grad_(False)

    def tower(self, part: Part) -> Iterable[nn.Parameter]:
        """Iterate over the parameters of one part; a projector inside a tower is not the tower."""
        inner = self.lm.model
        projector = list(inner.get_submodule(self.family.projector).parameters())
        if part == "projector":
            return projector
        own = {id(parameter) for parameter in projector}
        if part == "image":
            found = inner.get_submodule(self.family.tower).parameters()
            return [parameter for parameter in found if id(parameter) not in own]
        language = list(inner.get_submodule(self.family.language).parameters())
        return [*language, *self.lm.get_output_embeddings().parameters()]

    def is_frozen(self, part: Part) -> bool:
        """Tell whether nothing in a part learns."""
        return not any(parameter.requires_grad for parameter in self.tower(part))

    def fingerprint(self) -> str:
        """Return the sha256 of frozen weights, their types, sizes and the preprocessing."""
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad}
        key = (f"{self.pixels.size} {self.fit}", *frozen)
        if self._mark[0] != key:
            self._mark = (key, fingerprint_of(key[0], frozen.items()))
        return self._mark[1]

    def transform(self, train: bool) -> Transform:
        """Return what this model does to a sample; the same in training and at test."""
        mean = tuple(int(value) for value in self.pixels.mean.flatten().tolist())
        fill = (mean[0], mean[1], mean[2])
        return SquareTransform(self.conversation, self.pixels.size, self.fit, fill)

    @property
    def pad(self) -> int:
        """Token that stands where there is none."""
        return self.entrance.pad

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        stated = self.lm.generation_config.eos_token_id
        listed = stated if isinstance(stated, list) else [stated]
        found = [*listed, self.processor.tokenizer.eos_token_id]
        return sorted({int(token) for token in found if token is not None})

    def prompted_rows(self, rows: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
        """Return token rows with room for the prompts, behind a begin token."""
        room = self.entrance.room(prompts)
        return [self.entrance.with_room(row[None], room)[0] for row in rows] if room else list(rows)

    @contextmanager
    def entering(self, prompts: Prompts, tokens: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Let prompts and gates enter the forward passes of this context.

        Prompts take the place of the embeddings of the room that was left for them; installed
        layers read the gates, which stay until the next pass for layers that are computed twice.

        Args:
            prompts: of the rows.
            tokens: (B, L) with room for the prompts.
            mask: (B, L) bool, or None where rows begin at their first token.
        """
        self.gates.clear()
        self.gates.update(prompts.gates)
        with self.entrance.open(self._words(), prompts, tokens, mask):
            yield

    def _hidden(
        self, tokens: Tensor, pictures: dict[str, Any], prompts: Prompts
    ) -> tuple[Tensor, int]:
        """Return (B, P + L, D) last hidden states and P, the prompt tokens in front."""
        room = self.entrance.room(prompts)
        tokens = self.entrance.with_room(tokens, room)
        with self.entering(prompts, tokens, None):
            out = self.lm.model(
                input_ids=tokens, use_cache=False, **pictures, **self.pixels.marks(tokens)
            )
        return out.last_hidden_state, room

    def _tokens(self, batch: Batch) -> Tensor:
        if batch.tokens is None or batch.mask is None:
            raise ValueError("rows have no tokens: a model that answers takes tasks of 'answer'")
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
