"""ModalPrompt trains prompt tokens for each task and selects them by image and question.

Paper: Zeng et al. 2024, arXiv:2410.05849.
Code followed: none; written from the equations.
Differs: prompts of earlier tasks are frozen, which the paper implies and does not state; each
sample has its own past prompts; the number of tasks is not needed in advance. The prototype term
leaves out replayed samples, which do not belong to the task of its prototype, and weighs a sample
by its scored tokens as the task loss does, so that it is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mmcl.core import (
    IGNORE_INDEX,
    NO_PROMPTS,
    VLM,
    Batch,
    Output,
    Prompts,
    Strategy,
    Task,
    device_of,
    require,
)
from mmcl.core.seeding import generator, hash_seed
from mmcl.ops.routing import cosine_similarity, gather_prompts, top_k_ascending

_AUX = "modal_prompt"
_INIT_STD = 0.02


class ModalPrompt(Strategy):
    """Dual-modality guided prompts per task, in front of a frozen model's text.

    Each task has ``prompt_length`` prompt tokens and a transform that maps them to a prototype p in
    the embedding of images and questions. A sample's guidance for a task is
    ``0.5 cos(image, p) + 0.5 cos(text, p)``. In training a sample has the current task's prompts
    next to its text and before them the past ones of highest guidance; in evaluation
    (``strategy.eval()``) those of highest guidance, the best next to the text. Adds
    ``align_weight * (2 - cos(image, p) - cos(text, p))`` of the current task to the loss of new
    samples.

    Args:
        prompt_length: tokens of one task's prompt, P.
        transfer: prompts in front of a sample in training, with the current one, 1 or more.
        top_k: prompts in front of a sample in evaluation, 1 or more.
        align_weight: weight of the prototype term, 0 or more.
        seed: seed of the prompts' and transforms' initial values.

    **Remembers** P D + D^2 + D E + D + E float32 numbers for each task, D the language model's
    dim and E the embedding's.

    **Asks of the model** ``generate``, ``embed``, ``embed_dim``, ``prompt_dims`` and ``freeze``;
    images and questions must be embedded in one space, as a routing encoder does. Prompts start at
    word embeddings drawn from ``words``, (V, D), if the model has it, else at N(0, 0.02^2).
    """

    def __init__(
        self,
        prompt_length: int = 10,
        transfer: int = 3,
        top_k: int = 3,
        align_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(prompt_length, transfer, top_k) < 1 or align_weight < 0:
            raise ValueError(
                f"prompt_length is {prompt_length}, transfer {transfer}, top_k {top_k} and "
                f"align_weight {align_weight}: give 1 or more of the first three and an "
                "align_weight of 0 or more"
            )
        self.prompt_length, self.transfer, self.top_k = prompt_length, transfer, top_k
        self.align_weight, self.seed = align_weight, seed
        self.tokens = nn.ParameterList()
        self.transforms = nn.ModuleList()
        self._is_begun = False

    def attach(self, model: VLM) -> None:
        """Freeze the model and make the first task's prompts, unused until it begins."""
        needs = ("generate", "embed", "embed_dim", "prompt_dims", "freeze")
        require(model, *needs, by=self).freeze("image", "text", "projector")
        self._grow(model, 1)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add the task's prompts and transform, and freeze those before them."""
        self._grow(model, task.index + 1)
        for number in range(len(self.tokens)):
            self.tokens[number].requires_grad_(number == task.index)
            self.transforms[number].requires_grad_(number == task.index)
        self._is_begun = True

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return each sample's own prompts."""
        if not self._is_begun:
            return NO_PROMPTS
        features = self._features(model, batch)
        prototypes = self.prototypes()
        fixed = prototypes.detach()
        guidance = cosine_similarity(features, (fixed, fixed), (0.5, 0.5))
        if self.training:
            index = _past_then_current(guidance, self.transfer)
        else:
            index = top_k_ascending(guidance, self.top_k)
        image, text = (functional.cosine_similarity(f, prototypes[-1:]) for f in features)
        return Prompts(
            tokens={("text", 0): gather_prompts(torch.stack(list(self.tokens)), index)},
            aux={_AUX: 2 - image - text, f"{_AUX}_choice": index},
        )

    def prototypes(self) -> Tensor:
        """Return (T, E), the mean of each task's transformed prompts, with gradient.

        In float32 also under autocast and for half-precision weights.
        """
        made = []
        with torch.autocast(self.tokens[0].device.type, enabled=False):
            for transform, tokens in zip(self.transforms, self.tokens, strict=True):
                weights = {name: value.float() for name, value in transform.named_parameters()}
                made.append(functional_call(transform, weights, (tokens.float(),)).mean(0))
        return torch.stack(made)

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the prototype term, as "modal_prompt".

        Samples are weighed by their scored tokens, as in the task loss; replayed ones by 0.
        """
        gaps, tokens = output.prompts.aux[_AUX], (batch.labels != IGNORE_INDEX).sum(1)
        weights = tokens if batch.is_replay is None else tokens.where(~batch.is_replay, 0)
        return {_AUX: self.align_weight * (gaps * weights).sum() / tokens.sum().clamp(min=1)}

    def _features(self, model: VLM, batch: Batch) -> tuple[Tensor, Tensor]:
        able = require(model, "embed", by=self)
        image, text = able.embed(batch, "image").detach(), able.embed(batch, "text").detach()
        dim = cast(nn.Linear, cast(nn.Sequential, self.transforms[0])[-1]).out_features
        if {image.shape[1], text.shape[1]} != {dim}:
            raise ValueError(
                f"image embeddings have dim {image.shape[1]}, question embeddings {text.shape[1]} "
                f"and prototypes {dim}: give the model a routing encoder, which embeds both in one "
                "space"
            )
        return image.float(), text.float()

    def _grow(self, model: VLM, count: int) -> None:
        device = device_of(model)
        for number in range(len(self.tokens), count):
            self.tokens.append(nn.Parameter(self._start(model, number).to(device)))
            self.transforms.append(self._transform(model, number).to(device))

    def _start(self, model: VLM, number: int) -> Tensor:
        draw = generator(self.seed, number)
        dim = require(model, "prompt_dims", by=self).prompt_dims["text"]
        words = getattr(model, "words", None)
        if isinstance(words, Tensor):
            index = torch.randint(len(words), (self.prompt_length,), generator=draw)
            return words[index.to(words.device)].detach().float()
        return torch.empty(self.prompt_length, dim).normal_(0, _INIT_STD, generator=draw)

    def _transform(self, model: VLM, number: int) -> nn.Module:
        able = require(model, "prompt_dims", "embed_dim", by=self)
        dim = able.prompt_dims["text"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.seed, number, 1))
            return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, able.embed_dim))


def _past_then_current(guidance: Tensor, transfer: int) -> Tensor:
    """Return (B, up to transfer) tasks of each sample: the best past ones, then the current."""
    current = guidance.shape[1] - 1
    past = top_k_ascending(guidance[:, :-1], transfer - 1)
    return torch.cat([past, torch.full_like(guidance[:, :1], current, dtype=torch.int64)], 1)
