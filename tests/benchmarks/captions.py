"""Fine-tuning CLIP on captions: mmcl's step beside a loop as open_clip's training script writes it.

The loop is the script's ``train_one_epoch`` without scheduler, scaler and logging, with the AdamW
that its ``main`` builds for a ViT, and texts at the full context of 77 as its tokenizer gives them.
"""

import json
import math
from pathlib import Path

import pytorch_lightning as pl
import torch
from open_clip import ClipLoss
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, Batch
from mmcl.models import OpenCLIP

ROWS, CONTEXT, WORDS, RATE = 32, 77, 4096, 1e-5
SETTINGS = {"lr": RATE, "betas": (0.9, 0.98), "eps": 1e-6}
ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64, "patch_size": 16, "width": 160, "layers": 4, "head_width": 32,
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": WORDS, "width": 128, "heads": 4, "layers": 4,
    },
}  # fmt: skip


def small_clip(folder):
    """Make a random CLIP with open_clip's real context; every weight learns."""
    file = Path(folder) / "mmcl-benchmark.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenCLIP(str(file), train_logit_scale=True)


def caption_batches(count=20):
    """Return pictures with different captions of 8 to 20 tokens, cut to the batch's longest."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        pixels = torch.randint(256, (ROWS, 3, 64, 64), generator=draw, dtype=torch.uint8)
        lengths = torch.randint(8, 21, (ROWS,), generator=draw)
        tokens = torch.randint(1, WORDS - 2, (ROWS, int(lengths.max())), generator=draw)
        place = torch.arange(tokens.shape[1])
        tokens[:, 0] = WORDS - 2
        tokens[torch.arange(ROWS), lengths - 1] = WORDS - 1
        mask = place < lengths[:, None]
        labels = torch.full((ROWS,), IGNORE_INDEX)
        task = torch.ones(ROWS, dtype=torch.int64)
        made.append(Batch(pixels, labels, task, input_ids=tokens * mask, attention_mask=mask))
    return made


def our_optimizer(parameters):
    """AdamW as ``ContinualModule`` builds it, with open_clip's numbers (its eps is not torch's)."""
    learning = list(parameters)
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, **SETTINGS)


class Losses(pl.Callback):
    """Keeps the losses of the module."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.last_step.loss.detach())


class OpenClipLoop:
    """The plain loop.

    Args:
        model: mmcl's wrapper; only the open_clip model in it is used.
        batches: what the loader will give; pictures are normalised and texts padded beforehand.
    """

    def __init__(self, model, batches):
        self.clip = model.clip
        self.ready = {
            id(batch): (model._pixels(batch), _full(batch.input_ids)) for batch in batches
        }
        self.losses = []

    def __call__(self, loader):
        """Train on a loader."""
        self.clip.train()
        loss, optimizer = ClipLoss(), open_clip_optimizer(self.clip)
        for batch in loader:
            images, texts = self.ready[id(batch)]
            optimizer.zero_grad()
            total = loss(*self.clip(images, texts))
            total.backward()
            optimizer.step()
            with torch.no_grad():
                self.clip.logit_scale.clamp_(0, math.log(100))
            self.losses.append(total.detach())


def open_clip_optimizer(clip):
    """AdamW as open_clip's ``main`` builds it for a ViT."""
    gains, rest = [], []
    for name, parameter in clip.named_parameters():
        is_gain = parameter.ndim < 2 or any(
            part in name for part in ("bn", "ln", "bias", "logit_scale")
        )
        (gains if is_gain else rest).append(parameter)
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    return torch.optim.AdamW(groups, **SETTINGS)


def _full(tokens):
    return functional.pad(tokens, (0, CONTEXT - tokens.shape[1]))
