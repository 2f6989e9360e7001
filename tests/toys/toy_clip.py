"""A small VLM that inherits nothing of mmcl: the model of most tests."""

import torch
from torch import nn
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, Output, Task

WIDTH, TOKENS = 16, 4


class StandIn(nn.Module):
    """Pictures of 3x8x8 are cut into 4 patches, mixed by one layer, pooled and compared to class
    embeddings. Prompts enter at the input of the image tower. No dropout, no batch statistics."""

    def __init__(self, classes=6, seed=0):
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.patch = nn.Linear(48, WIDTH)
        self.mix = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout=0.0, batch_first=True, activation="gelu"
        )
        self.names = nn.Embedding(classes, WIDTH)
        torch.random.set_rng_state(state)
        self.prompt_dims = {"image": WIDTH}
        self.gates = {}

    def _pool(self, batch, prompts=NO_PROMPTS):
        if batch.features is not None:
            return functional.normalize(batch.features.float().mean(1), dim=-1)
        images = batch.images.float().div(255)
        patches = functional.unfold(images, 4, stride=4).transpose(1, 2)
        tokens = self.patch(patches)
        extra = prompts.tokens.get(("image", 0))
        if extra is not None:
            tokens = torch.cat([extra, tokens], 1)
        return functional.normalize(self.mix(tokens).mean(1), dim=-1)

    def forward(self, batch, prompts=NO_PROMPTS):
        image = self._pool(batch, prompts)
        text = functional.normalize(self.names.weight, dim=-1)
        return Output(10 * image @ text.T, image, text, prompts)

    def loss(self, output, batch):
        return functional.cross_entropy(output.logits, batch.labels, ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def embed(self, batch, modality):
        return self._pool(batch) if modality == "image" else self.names.weight.detach()

    def encode_image(self, batch):
        if batch.features is not None:
            return batch.features
        images = batch.images.float().div(255)
        tokens = self.patch(functional.unfold(images, 4, stride=4).transpose(1, 2))
        return self.mix(tokens).mean(1, keepdim=True).detach()

    def freeze(self, *towers):
        for tower in towers:
            parts = [self.patch, self.mix] if tower == "image" else [self.names]
            for part in parts:
                part.requires_grad_(False)

    def target_linears(self, which="all"):
        # Not those of the mixing layer: in evaluation torch reads their weights past the modules.
        return {"patch": self.patch}

    def fingerprint(self):
        return "stand-in"


def a_task(index=0, classes=2, size=24):
    """Task ``index`` of a class-incremental stream of ``classes`` new classes each."""
    labels = tuple(range(index * classes, (index + 1) * classes))
    names = tuple(f"class {label}" for label in labels)
    return Task(index, f"task {index}", size=size, classes=names, class_ids=labels, test_size=size)


def a_batch(rows=8, task=0, classes=2, seed=0, start=0):
    """Rows of a task: each class has its own mean picture, plus noise; sample numbers count up."""
    g = torch.Generator().manual_seed(1000 * task + seed + 7)
    labels = torch.arange(rows) % classes + classes * task
    means = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 255
    noise = torch.randn(rows, 3, 8, 8, generator=g) * 20
    images = (means[labels] + noise).clamp(0, 255).to(torch.uint8)
    samples = torch.arange(start, start + rows)
    keys = tuple(f"t{task}-{int(sample)}" for sample in samples)
    return Batch(images, labels, torch.full((rows,), task), sample_ids=samples, keys=keys)


def task_batches(task=0, size=24, rows=8, classes=2):
    """The exact pass over a task, as ``end_task`` is given it."""
    return [a_batch(rows, task, classes, seed=start, start=start) for start in range(0, size, rows)]
