"""Zero-shot accuracy of the built-in tiny CLIP on scikit-learn's digits, which it never saw.

    python -m tests.benchmarks.zero_shot

All 1,797 scans, ten classes, three templates, each scan resized as the model does it.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from mmcl.core import Batch
from mmcl.models import OpenCLIP

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "the handwritten number {}.",
    "a scan of a handwritten {}.",
)


def scans() -> tuple[Tensor, Tensor]:
    """Return (1797, 3, 8, 8) uint8 pictures, light ink on dark, and (1797,) labels."""
    found = load_digits()
    pixels = torch.from_numpy(found.images / 16 * 255).round().to(torch.uint8)
    return pixels[:, None].expand(-1, 3, -1, -1), torch.from_numpy(found.target)


def zero_shot(pixels: Tensor, labels: Tensor) -> float:
    """Return the share of pictures that the built-in model names rightly, 0 to 1."""
    model = OpenCLIP("tiny", pretrained="built-in").eval()
    model.set_classes(NAMES, TEMPLATES)
    resize = model.transform(False)
    answers = []
    with torch.inference_mode():
        for part in pixels.split(256):
            images = torch.stack([resize(picture, None, 0).image for picture in part])
            none = torch.zeros(len(part), dtype=torch.int64)
            answers.append(model(Batch(images, none, none)).logits.argmax(1))
    return float((torch.cat(answers) == labels).double().mean())


def main() -> None:
    """Print both figures."""
    pixels, labels = scans()
    print(f"light ink on dark, as scanned: {100 * zero_shot(pixels, labels):.1f} %")
    print(f"inverted:                      {100 * zero_shot(255 - pixels, labels):.1f} %")
    print("chance:                        10.0 %")


if __name__ == "__main__":
    main()
