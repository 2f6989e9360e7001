"""What is trained: models, batches in memory, and the losses a person would write by hand."""

import torch
from torch import nn
from torch.nn import functional

from mmcl.core import NO_PROMPTS, Batch, Output, Task
from mmcl.models import OpenCLIP
from mmcl.ops.regularization import quadratic_penalty
from mmcl.strategies import EWC, ExperienceReplay, Finetune

CLASSES, EWC_WEIGHT = 10, 10.0
METHODS = ("finetune", "rehearsal", "EWC", "EWC, lists")
"""The last is EWC by hand with mmcl's own penalty function, to see the machinery alone."""


class Mlp(nn.Module):
    """A 64-100-100-10 network behind the VLM protocol."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES)
        )

    def forward(self, batch, prompts=NO_PROMPTS):
        return Output(self.net(batch.features.flatten(1)))

    def loss(self, output, batch):
        return functional.cross_entropy(output.logits, batch.labels)


def mlp_loss(model, batch):
    return functional.cross_entropy(model.net(batch.features.flatten(1)), batch.labels)


def clip_loss(model, batch):
    return model.loss(model(batch), batch)


def tiny_clip():
    return OpenCLIP("tiny", pretrained="built-in")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)


MODELS = {"MLP": (Mlp, mlp_loss, sgd), "tiny CLIP": (tiny_clip, clip_loss, fused_adamw)}


def tasks(size):
    """Return two tasks of five classes."""
    names = [f"class {number}" for number in range(CLASSES)]
    return [
        Task(
            index, f"half {index}", size=size, classes=tuple(names[5 * index : 5 * index + 5]),
            class_ids=tuple(range(5 * index, 5 * index + 5)), templates=("a photo of {}.",),
        )
        for index in range(2)
    ]  # fmt: skip


def batches(kind, method, count=50, task=1):
    """Return batches of a task; in rehearsal half of the rows of the second task are old.

    The MLP takes 32 rows, 64 with old ones; the CLIP takes 32 pictures in all.
    """
    draw = torch.Generator().manual_seed(0)
    rehearses = method == "rehearsal" and task > 0
    rows = 64 if kind == "MLP" and rehearses else 32
    old = torch.arange(rows) >= rows // 2 if rehearses else torch.zeros(rows, dtype=torch.bool)
    made = []
    for _ in range(count):
        owner = task * (~old).long()
        labels = torch.randint(5, (rows,), generator=draw) + 5 * owner
        content = {"images": None, "features": torch.rand(rows, 1, 64, generator=draw)}
        if kind != "MLP":
            shape = (rows, 3, 64, 64)
            pixels = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
            content = {"images": pixels}
        sample = torch.randint(1000, (rows,), generator=draw)
        keys = tuple(f"sample-{int(number)}" for number in sample)
        made.append(
            Batch(
                labels=labels,
                task_ids=owner,
                sample_ids=sample,
                is_replay=old,
                keys=keys,
                **content,
            )
        )
    return made


def strategy(method):
    made = {"finetune": Finetune, "rehearsal": ExperienceReplay}
    return made[method]() if method in made else EWC(EWC_WEIGHT)


def by_hand(loss, method, ewc):
    """Return the loss of a bare loop.

    EWC is the sum over parameters that every tutorial shows, ``(F * (p - p_old) ** 2).sum()``.

    Args:
        loss: of the model alone.
        method: one of ``METHODS``.
        ewc: the strategy after the first task, for its Fisher and anchors.
    """
    if not method.startswith("EWC"):
        return loss
    fisher, anchors = ewc.importance.tensors, ewc.anchors.tensors
    if method == "EWC":
        return lambda model, batch: loss(model, batch) + _summed(model, fisher, anchors)
    return lambda model, batch: loss(model, batch) + _listed(model, fisher, anchors)


def _summed(model, fisher, anchors):
    total = 0.0
    for name, parameter in model.named_parameters():
        if name in fisher:
            total = total + (fisher[name] * (parameter - anchors[name]) ** 2).sum()
    return EWC_WEIGHT / 2 * total


def _listed(model, fisher, anchors):
    held = [(name, p) for name, p in model.named_parameters() if name in fisher]
    names = [name for name, _ in held]
    parts = ([p for _, p in held], [anchors[n] for n in names], [fisher[n] for n in names])
    return EWC_WEIGHT * quadratic_penalty(*parts)
