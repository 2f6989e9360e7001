"""Stand-in models of a few thousand weights and their batches: a dual encoder, and a LLaVA."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import (
    IGNORE_INDEX,
    NO_PROMPTS,
    Batch,
    Conversation,
    Modality,
    Output,
    Prompts,
    Task,
    Turn,
)
from mmcl.data.batches.collate import Example, collate

WIDTH, TOKENS = 16, 4
"""Dim and number of image tokens of both models."""


class DualEncoder(nn.Module):
    """Dual encoder of 8 x 8 images: 4 patches, one layer that mixes them, class embeddings.

    Prompts enter at the input of the image tower. It has no dropout and no batch statistics, and
    inherits nothing of mmcl.

    Args:
        classes: number of classes.
        seed: seed of the weights.
    """

    def __init__(self, classes: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch = nn.Linear(48, WIDTH)
            self.mix = nn.TransformerEncoderLayer(
                WIDTH, 2, 32, dropout=0.0, batch_first=True, activation="gelu"
            )
            self.names = nn.Embedding(classes, WIDTH)
        self.prompt_dims = {"image": WIDTH}
        self.gates: dict[str, Tensor] = {}

    def _tokens(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise ValueError("the batch has neither images nor features: give one of them")
        images = batch.images.float().div(255)
        tokens: Tensor = self.patch(functional.unfold(images, 4, stride=4).transpose(1, 2))
        return tokens

    def _pool(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Tensor:
        if batch.features is not None:
            return functional.normalize(batch.features.float().mean(1), dim=-1)
        tokens, added = self._tokens(batch), prompts.tokens.get(("image", 0))
        if added is not None:
            tokens = torch.cat([added, tokens], 1)
        return functional.normalize(self.mix(tokens).mean(1), dim=-1)

    def forward(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Return 10 times the cosine similarity of images and class embeddings."""
        image = self._pool(batch, prompts)
        text = functional.normalize(self.names.weight, dim=-1)
        return Output(10 * image @ text.T, image, text, prompts)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the samples in the loss."""
        return functional.cross_entropy(output.logits, batch.labels, ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, D) image embeddings, or (C, D) class embeddings."""
        return self._pool(batch) if modality == "image" else self.names.weight.detach()

    def encode_image(self, batch: Batch) -> Tensor:
        """Return (B, 1, D) pooled output of the image tower, or the batch's features."""
        if batch.features is not None:
            return batch.features
        pooled: Tensor = self.mix(self._tokens(batch)).mean(1, keepdim=True).detach()
        return pooled

    def freeze(self, *towers: Modality) -> None:
        """Freeze whole towers."""
        for tower in towers:
            for part in (self.patch, self.mix) if tower == "image" else (self.names,):
                part.requires_grad_(False)

    def target_linears(self, which: str = "all") -> dict[str, nn.Linear]:
        """Return the only linear layer that is called as a module, also in evaluation."""
        # In evaluation torch reads the weights of the mixing layer past its modules.
        return {"patch": self.patch}

    def fingerprint(self) -> str:
        """Return the same text for all weights."""
        return "stand-in"


def class_task(index: int = 0, classes: int = 2, size: int = 24) -> Task:
    """Return task ``index`` of a class-incremental stream of ``classes`` new classes each."""
    labels = tuple(range(index * classes, (index + 1) * classes))
    names = tuple(f"class {label}" for label in labels)
    return Task(index, f"task {index}", size=size, classes=names, class_ids=labels, test_size=size)


def class_batch(
    rows: int = 8, task: int = 0, classes: int = 2, seed: int = 0, start: int = 0
) -> Batch:
    """Return ``rows`` samples of a task: the mean image of their class, plus noise.

    Args:
        rows: B, the number of samples.
        task: index of the task.
        classes: classes of a task.
        seed: seed of the noise.
        start: sample id of the first sample.
    """
    draw = torch.Generator().manual_seed(1000 * task + seed + 7)
    labels = torch.arange(rows) % classes + classes * task
    means = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 255
    noise = torch.randn(rows, 3, 8, 8, generator=draw) * 20
    images = (means[labels] + noise).clamp(0, 255).to(torch.uint8)
    samples = torch.arange(start, start + rows)
    keys = tuple(f"t{task}-{int(sample)}" for sample in samples)
    return Batch(images, labels, torch.full((rows,), task), sample_ids=samples, keys=keys)


def class_batches(task: int = 0, size: int = 24, rows: int = 8, classes: int = 2) -> list[Batch]:
    """Return one exact pass over a task of class labels, as ``end_task`` is given it."""
    return [
        class_batch(rows, task, classes, seed=start, start=start) for start in range(0, size, rows)
    ]


IMAGE_SIZE = 16
COLORS = ("red", "green", "blue", "yellow")
QUESTIONS = ("What colour is it?", "Name the colour of the thing.", "Colour?")
_CHANNELS = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}


def tower_architecture() -> dict[str, Any]:
    """Return open_clip's architecture of the vision tower: 16 x 16 images, 4 patches, 2 layers."""
    from mmcl.models.open_clip.loading import TINY

    vision = {"image_size": IMAGE_SIZE, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1}
    words = {"tokenizer_kwargs": {"bpe_path": str(TINY / "bpe.txt.gz")}}
    return {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {**text, **words}}


def small_llava(seed: int = 0, **changes: Any) -> Any:
    """Return a TinyLlava of 14,000 random weights: 4 image tokens, one layer, a frozen tower.

    Args:
        seed: seed of the weights.
        changes: other arguments of ``mmcl.models.TinyLlava``.
    """
    return copy.deepcopy(_small_llava(seed, **changes))


@cache
def _small_llava(seed: int, **changes: Any) -> Any:
    from mmcl.models.tiny_llava.build import TinyLlava

    small = {"hidden_size": WIDTH, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "max_length": 64}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "stand_in.json"
        file.write_text(json.dumps(tower_architecture()))
        return TinyLlava(str(file), None, **{**small, **changes}, seed=seed).eval()


def answer_task(index: int = 0, size: int = 24) -> Task:
    """Return task ``index`` of a domain-incremental stream of questions."""
    return Task(
        index, f"task {index}", task_type="instruction", size=size, test_size=size, scorer="exact"
    )


def answer_conversation(task: int = 0, row: int = 0) -> Conversation:
    """Return question and answer of a sample; each task has its own words and form of answer."""
    color = COLORS[row % len(COLORS)]
    answer = (color, f"it is {color}.", color[0].upper())[task % 3]
    question = f"<image>\n{QUESTIONS[task % 3]}"
    return Conversation((Turn("user", question), Turn("assistant", answer)), (answer,))


def answer_batch(model: Any, rows: int = 8, task: int = 0, seed: int = 0, start: int = 0) -> Batch:
    """Return ``rows`` samples of a task: the question of a square of a color, on noise.

    Args:
        model: has ``transform``.
        rows: B, the number of samples; their answers have different lengths.
        task: index of the task.
        seed: seed of the noise.
        start: sample id of the first sample.
    """
    draw = torch.Generator().manual_seed(1000 * task + seed + 7)
    transform: Any = model.transform(True)
    examples = []
    for row in range(start, start + rows):
        shape = (3, IMAGE_SIZE, IMAGE_SIZE)
        pixels = torch.randint(0, 60, shape, generator=draw, dtype=torch.uint8)
        pixels[list(_CHANNELS[COLORS[row % 4]]), 4:12, 4:12] = 250
        conversation = answer_conversation(task, row)
        sample, reference = transform(pixels, conversation, 0), conversation.reference
        examples.append(Example(sample, -100, task, row, f"t{task}-{row}", reference=reference))
    return collate(examples)


def answer_batches(model: Any, task: int = 0, size: int = 24, rows: int = 8) -> list[Batch]:
    """Return one exact pass over a task of questions, as ``end_task`` is given it."""
    return [
        answer_batch(model, min(rows, size - start), task, start, start)
        for start in range(0, size, rows)
    ]
