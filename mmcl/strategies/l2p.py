"""L2P trains a pool of prompts for a frozen model, selected for each image by their keys.

Paper: Wang et al. 2022, arXiv:2112.08654.
Code followed: none; written from the equations.
Differs: class scores stay those of the model's class texts (no linear head on prompt outputs); each
sample selects its own prompts, where released code may take the majority of the test batch.
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
    device_of,
    is_generative_model,
    require,
    subset_weight,
)
from mmcl.core.distributed import all_reduce_sum
from mmcl.core.seeding import generator
from mmcl.ops.routing import count_choices, gather_prompts, key_pull_loss, match_keys


class L2P(Strategy):
    """Learning to prompt: a prompt pool of which each sample uses the ``top_k`` nearest by key.

    The query is the image's embedding without prompts, for either tower. Adds ``pull_weight`` times
    minus the cosine similarity of query and selected keys to the loss (summed over keys, mean over
    samples).

    Args:
        modality: the tower that prompts enter. Text prompts differ from sample to sample, so all
            class texts are encoded for every sample: B * C texts in a step. A generative model
            takes "text", in front of each sample's own tokens.
        pool_size: number of prompts and keys, K.
        prompt_length: tokens of one prompt, P.
        top_k: prompts selected for a sample, 1 to ``pool_size``.
        pull_weight: weight of the key term; 0.1 to 1 in published settings.
        freeze: modules to freeze, of "image", "text" and "projector"; None = both towers, and the
            projector of a generative model.
        key_dim: dim of ``model.embed(batch, "image")``; None = ``model.embed_dim`` if it has
            one, else the image tower's token dim. A generative model embeds by its routing encoder
            if it has one.
        seed: seed of the first keys and prompts, uniform in -1 to 1.

    **Remembers** K (P D + E) float32 weights, D the token dim and E the embedding dim, and K
    counts of how often each entry was selected in the current task.

    **Asks of the model** ``embed``, ``prompt_dims`` and ``freeze``.
    """

    keys: nn.Parameter
    pool: nn.Parameter
    usage: Tensor

    def __init__(
        self,
        modality: Modality = "image",
        pool_size: int = 10,
        prompt_length: int = 5,
        top_k: int = 5,
        pull_weight: float = 0.5,
        freeze: Sequence[str] | None = None,
        key_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= pool_size:
            raise ValueError(
                f"top_k must be 1 to {pool_size} (the pool size), got {top_k}: choose fewer"
            )
        if prompt_length < 1:
            raise ValueError(
                f"prompt_length is {prompt_length}, expected 1 or more tokens in a prompt"
            )
        self.modality, self.pool_size, self.top_k = modality, pool_size, top_k
        self.prompt_length = prompt_length
        self.pull_weight, self.freeze, self.key_dim, self.seed = pull_weight, freeze, key_dim, seed
        # A chain may hold one pool for each tower, so the terms of the text pool are named apart.
        self._prefix = "" if modality == "image" else f"{modality}_"
        self.register_buffer("usage", torch.zeros(pool_size, dtype=torch.int64))

    def attach(self, model: VLM) -> None:
        """Freeze the towers and make the pool; a ValueError if prompts cannot enter the tower."""
        able = require(model, "embed", "prompt_dims", "freeze", by=self)
        if self.modality not in able.prompt_dims:
            raise ValueError(
                f"modality is '{self.modality}', but prompts enter {type(model).__name__} only at "
                f"{sorted(able.prompt_dims)}: choose one of these"
            )
        projector = ("projector",) if is_generative_model(model) else ()
        able.freeze(*(("image", "text", *projector) if self.freeze is None else self.freeze))
        dim = able.prompt_dims[self.modality]
        key_dim = self.key_dim or getattr(model, "embed_dim", None) or able.prompt_dims["image"]
        draw, device = generator(self.seed, len(self._prefix)), device_of(model)
        self.keys = _uniform((self.pool_size, key_dim), draw, device)
        self.pool = _uniform((self.pool_size, self.prompt_length, dim), draw, device)
        self.usage = self.usage.to(device)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Reset the usage counts of the pool."""
        self.usage = torch.zeros_like(self.usage)

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return the prompts that each sample selects."""
        if "pool" not in self._parameters:
            raise RuntimeError("L2P has no pool yet: call strategy.attach(model) once, first")
        query = require(model, "embed", by=self).embed(batch, "image").detach()
        match, similarity = match_keys(query.float(), self.keys, self.top_k)
        return Prompts(
            tokens={(self.modality, 0): gather_prompts(self.pool, match)},
            aux={f"{self._prefix}match": match, f"{self._prefix}similarity": similarity},
        )

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the key term, as "pull" ("text_pull" for the text tower)."""
        similarity = output.prompts.aux[f"{self._prefix}similarity"]
        weight = self.pull_weight * subset_weight(batch, len(batch), len(batch))
        return {f"{self._prefix}pull": weight * key_pull_loss(similarity)}

    def after_step(self, model: VLM, batch: Batch, output: Output) -> None:
        """Count the pool entries selected in the step, over all processes."""
        chosen = count_choices(output.prompts.aux[f"{self._prefix}match"], self.pool_size)
        self.usage = self.usage + all_reduce_sum(chosen)

    def inactive_parts(self) -> tuple[str, ...]:
        """Report the pool entries that no sample of the task selected."""
        unused = (self.usage == 0).nonzero().flatten().tolist()
        found = f"pool entries {', '.join(map(str, unused))} of {self.pool_size} were never chosen"
        return (found,) if unused else ()


def _uniform(shape: tuple[int, ...], draw: torch.Generator, device: torch.device) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, generator=draw) * 2 - 1).to(device))
