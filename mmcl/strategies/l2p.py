"""L2P keeps the model frozen and learns a pool of prompts, chosen for each picture by its key.

Paper: Wang et al. 2022, arXiv:2112.08654.
Code followed: none; written from the equations.
Differs: class scores stay those of the model's class texts (no linear head on prompt outputs); the
choice is always each row's own, where released code may take the majority of the test batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmcl.core import (
    VLM,
    Batch,
    Modality,
    Output,
    Prompts,
    Strategy,
    Task,
    answers_in_words,
    device_of,
    require,
)
from mmcl.core.distributed import sum_over_ranks
from mmcl.core.randomness import generator
from mmcl.ops.prompt_pool import count_choices, gather_prompts, match_keys, pull


class L2P(Strategy):
    """Learning to prompt: prompts of the ``top_k`` nearest keys enter a tower at its input.

    The query is the picture's embedding without prompts, for either tower. Adds ``pull`` times
    minus the likeness of query and chosen keys to the loss (summed over choices, mean over rows).

    Args:
        modality: the tower that prompts enter. Text prompts differ from row to row, so every row
            encodes all class texts anew: B * C texts in a step. A model that answers takes "text",
            in front of each row's own tokens.
        pool: number of prompts and keys, K.
        length: tokens of one prompt, P.
        top_k: prompts chosen for a row, 1 to ``pool``.
        pull: weight of the key term; 0.1 to 1 in published settings.
        freeze: parts that stop learning, of "image", "text" and "projector"; None = both towers,
            and the projector of a model that answers.
        key_width: width of ``model.embed(batch, "image")``; None = ``model.embed_width`` if it
            has one, else the image tower's token width. A model that answers embeds by its guide
            if it has one.
        seed: of the first keys and prompts, uniform in -1 to 1.

    **Remembers** K (P D + E) float32 weights, D the token width and E the embedding width, and K
    counts of how often each entry was chosen in the current task.

    **Asks of the model** ``embed``, ``widths`` and ``freeze``.
    """

    keys: nn.Parameter
    pool: nn.Parameter
    usage: Tensor

    def __init__(
        self,
        modality: Modality = "image",
        pool: int = 10,
        length: int = 5,
        top_k: int = 5,
        pull: float = 0.5,
        freeze: Sequence[str] | None = None,
        key_width: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= pool:
            raise ValueError(
                f"top_k must be 1 to {pool} (the pool size), got {top_k}: choose fewer"
            )
        if length < 1:
            raise ValueError(f"length is {length}, expected 1 or more tokens in a prompt")
        self.modality, self.size, self.length, self.top_k = modality, pool, length, top_k
        self.pull, self.freeze, self.key_width, self.seed = pull, freeze, key_width, seed
        # A chain may hold one pool for each tower, so notes and terms of the text pool have names
        # of their own.
        self._prefix = "" if modality == "image" else f"{modality}_"
        self.register_buffer("usage", torch.zeros(pool, dtype=torch.int64))

    def attach(self, model: VLM) -> None:
        """Freeze the towers and make the pool on the model's device.

        Raises:
            TypeError: if the model lacks a member that is asked for.
            ValueError: if prompts cannot enter the tower.
        """
        able = require(model, "embed", "widths", "freeze", by=self)
        if self.modality not in able.widths:
            raise ValueError(
                f"modality is '{self.modality}', but prompts enter {type(model).__name__} only at "
                f"{sorted(able.widths)}: choose one of these"
            )
        projector = ("projector",) if answers_in_words(model) else ()
        able.freeze(*(("image", "text", *projector) if self.freeze is None else self.freeze))
        width = able.widths[self.modality]
        key_width = self.key_width or getattr(model, "embed_width", None) or able.widths["image"]
        draw, device = generator(self.seed, len(self._prefix)), device_of(model)
        self.keys = _uniform((self.size, key_width), draw, device)
        self.pool = _uniform((self.size, self.length, width), draw, device)
        self.usage = self.usage.to(device)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Count choices afresh."""
        self.usage = torch.zeros_like(self.usage)

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Choose every row's own prompts."""
        if "pool" not in self._parameters:
            raise RuntimeError("L2P has no pool yet: call strategy.attach(model) once, first")
        query = require(model, "embed", by=self).embed(batch, "image").detach()
        match, likeness = match_keys(query.to(self.keys.dtype), self.keys, self.top_k)
        return Prompts(
            tokens={(self.modality, 0): gather_prompts(self.pool, match)},
            notes={f"{self._prefix}match": match, f"{self._prefix}likeness": likeness},
        )

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the key term, as "pull" ("text_pull" for the text tower)."""
        likeness = output.prompts.notes[f"{self._prefix}likeness"]
        return {f"{self._prefix}pull": self.pull * pull(likeness)}

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """Count which entries the step chose, over all processes."""
        chosen = count_choices(output.prompts.notes[f"{self._prefix}match"], self.size)
        self.usage = self.usage + sum_over_ranks(chosen)

    def idle(self) -> tuple[str, ...]:
        """Name the pool entries that no row of the task chose."""
        unused = (self.usage == 0).nonzero().flatten().tolist()
        if not unused:
            return ()
        return (f"pool entries {', '.join(map(str, unused))} of {self.size} were never chosen",)


def _uniform(shape: tuple[int, ...], draw: torch.Generator, device: torch.device) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, generator=draw) * 2 - 1).to(device))
