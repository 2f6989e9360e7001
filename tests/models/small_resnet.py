"""A CLIP with a small ResNet tower, whose BatchNorm has running statistics."""

import json

import torch

from mmcl.core import Batch
from mmcl.models import OpenCLIP

_RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
    },
}  # fmt: skip
NAMES = ("owl", "jay")


def a_resnet_clip(folder, **changes):
    """An OpenCLIP of the small ResNet with random weights and two classes."""
    file = folder / "mini-resnet.json"
    file.write_text(json.dumps(_RESNET))
    model = OpenCLIP(str(file), random_crop_scale=None, **changes)
    model.set_classes(NAMES, ["a photo of a {}."])
    return model


def photos(count=8, seed=0):
    """Images of two classes: noise around a dark and a bright mean."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 3, 32, 32), generator=draw)
    images = (noise + 100 * labels[:, None, None, None]).to(torch.uint8)
    return Batch(images, labels, torch.zeros(count, dtype=torch.int64))


def statistics(module):
    """Copies of the running statistics of a module."""
    return {name: b.clone() for name, b in module.named_buffers() if "running" in name}
