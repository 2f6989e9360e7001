"""ModalPrompt learns prompt tokens for each task and picks them by picture and question.

Paper: Zeng et al. 2024, arXiv:2410.05849.
Code followed: none; written from the equations.
Differs: prompts of earlier tasks are frozen, which the paper implies and does not state; every row
has its own past prompts; the number of tasks is not needed in advance. The prototype term leaves
out remembered rows, which do not belong to the task whose prototype it pulls, and counts each row
by its scored tokens as the task loss does, so that it is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import (
    NO_PROMPTS,
    UNSCORED,
    VLM,
    Batch,
    Output,
    Prompts,
    Strategy,
    Task,
    device_of,
    require,
)
from mmcl.core.randomness import generator, mix
from mmcl.ops.prompt_pool import gather_prompts
from mmcl.ops.routing import likeness, nearest_last

_NOTE = "modal_prompt"
_SPREAD = 0.02


class ModalPrompt(Strategy):
    """Dual-modality guided prompts in front of a frozen model's text.

    Each task has ``length`` prompt tokens and a transform that turns them into a prototype p in the
    embedding of pictures and questions. A row's guidance for a task is
    ``0.5 cos(image, p) + 0.5 cos(text, p)``. In training a row has the current task's prompts next
    to its text and before them the past ones of highest guidance; in evaluation
    (``strategy.eval()``) those of highest guidance, the best next to the text. Adds
    ``weight * (2 - cos(image, p) - cos(text, p))`` of the current task to the loss of new rows.

    Args:
        length: tokens of one task's prompt, P.
        transfer: prompts in front of a row in training, the current one included, 1 or more.
        top_k: prompts in front of a row in evaluation, 1 or more.
        weight: of the prototype term.
        seed: of the prompts' and transforms' start.

    **Remembers** P D + D^2 + D E + D + E float32 numbers for each task, D the language model's
    width and E the embedding's.

    **Asks of the model** ``answer``, ``embed``, ``embed_width``, ``widths`` and ``freeze``;
    pictures and questions must be embedded in one space, as a guide does. Prompts start at words
    drawn from ``words``, (V, D), if the model has it, else at N(0, 0.02^2).
    """

    def __init__(
        self,
        length: int = 10,
        transfer: int = 3,
        top_k: int = 3,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(length, transfer, top_k) < 1 or weight < 0:
            raise ValueError(
                f"length is {length}, transfer {transfer}, top_k {top_k} and weight {weight}: give "
                "1 or more of the first three and a weight of 0 or more"
            )
        self.length, self.transfer, self.top_k = length, transfer, top_k
        self.weight, self.seed = weight, seed
        self.tokens = nn.ParameterList()
        self.transforms = nn.ModuleList()
        self._is_begun = False

    def attach(self, model: VLM) -> None:
        """Freeze the model and make the first task's prompts, which wait for it to begin."""
        asked = ("answer", "embed", "embed_width", "widths", "freeze")
        require(model, *asked, by=self).freeze("image", "text", "projector")
        self._grow(model, 1)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add the task's prompts and transform, and freeze those before them."""
        self._grow(model, task.index + 1)
        for number in range(len(self.tokens)):
            self.tokens[number].requires_grad_(number == task.index)
            self.transforms[number].requires_grad_(number == task.index)
        self._is_begun = True

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Line up every row's own prompts."""
        if not self._is_begun:
            return NO_PROMPTS
        features = self._features(model, batch)
        prototypes = self.prototypes()
        fixed = prototypes.detach()
        guidance = likeness(features, (fixed, fixed), (0.5, 0.5))
        if self.training:
            index = _past_then_current(guidance, self.transfer)
        else:
            index = nearest_last(guidance, self.top_k)
        image, text = (functional.cosine_similarity(f, prototypes[-1:]) for f in features)
        return Prompts(
            tokens={("text", 0): gather_prompts(torch.stack(list(self.tokens)), index)},
            notes={_NOTE: 2 - image - text, f"{_NOTE}_choice": index},
        )

    def prototypes(self) -> Tensor:
        """Return (T, E), the mean of each task's transformed prompts, with gradient."""
        made = [f(tokens).mean(0) for f, tokens in zip(self.transforms, self.tokens, strict=True)]
        return torch.stack(made)

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the prototype term, as "modal_prompt".

        Rows count by their scored tokens, as in the task loss; remembered rows do not pull.
        """
        gaps, tokens = output.prompts.notes[_NOTE], (batch.labels != UNSCORED).sum(1)
        pulled = tokens if batch.recalled is None else tokens.where(~batch.recalled, 0)
        return {_NOTE: self.weight * (gaps * pulled).sum() / tokens.sum().clamp(min=1)}

    def _features(self, model: VLM, batch: Batch) -> tuple[Tensor, Tensor]:
        able = require(model, "embed", by=self)
        image, text = able.embed(batch, "image").detach(), able.embed(batch, "text").detach()
        width = cast(nn.Linear, cast(nn.Sequential, self.transforms[0])[-1]).out_features
        if {image.shape[1], text.shape[1]} != {width}:
            raise ValueError(
                f"pictures are embedded {image.shape[1]} wide and questions {text.shape[1]}, and "
                f"prototypes are {width}: give the model a guide, which embeds both in one space"
            )
        return image.float(), text.float()

    def _grow(self, model: VLM, count: int) -> None:
        device = device_of(model)
        for number in range(len(self.tokens), count):
            self.tokens.append(nn.Parameter(self._start(model, number).to(device)))
            self.transforms.append(self._transform(model, number).to(device))

    def _start(self, model: VLM, number: int) -> Tensor:
        draw, width = generator(self.seed, number), require(model, "widths", by=self).widths["text"]
        words = getattr(model, "words", None)
        if isinstance(words, Tensor):
            rows = torch.randint(len(words), (self.length,), generator=draw)
            return words[rows.to(words.device)].detach().float()
        return torch.empty(self.length, width).normal_(0, _SPREAD, generator=draw)

    def _transform(self, model: VLM, number: int) -> nn.Module:
        able = require(model, "widths", "embed_width", by=self)
        width = able.widths["text"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, number, 1))
            return nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, able.embed_width)
            )


def _past_then_current(guidance: Tensor, transfer: int) -> Tensor:
    """(B, up to transfer) tasks of each row: the best past ones, better later, then the last."""
    current = guidance.shape[1] - 1
    past = nearest_last(guidance[:, :-1], transfer - 1)
    return torch.cat([past, torch.full_like(guidance[:, :1], current, dtype=torch.int64)], 1)
