"""Data of your own: a torchvision-like dataset in your loop, or an image folder as a stream.

python examples/own_data.py
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import mmcl
from mmcl.cli import main

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 220), "gray": (128,) * 3}


class Squares(Dataset):
    """Dataset of (PIL image, class index), as torchvision's are."""

    def __len__(self) -> int:
        return 8 * len(COLORS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        red, green, blue = list(COLORS.values())[index % len(COLORS)]
        # A few levels brighter each time, so that no two images are equal.
        return Image.new("RGB", (40, 30), (red, green, blue + index // 4)), index % len(COLORS)


def write_image_folder(root: Path) -> Path:
    """Write the dataset as <class>/<number>.png."""
    squares = Squares()
    for index in range(len(squares)):
        image, label = squares[index]
        path = root / list(COLORS)[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


if __name__ == "__main__":
    model = mmcl.OpenCLIP("tiny", pretrained="built-in")
    model.set_classes(list(COLORS), ["a photo of a {} square."])

    # 1. A dataset of (image, label) pairs gives batches by a collate function.
    collate = mmcl.ImageLabelCollate(model.transform(False))
    loader = DataLoader(Squares(), batch_size=16, collate_fn=collate)
    with torch.no_grad():
        right = [model(batch).logits.argmax(1) == batch.labels for batch in loader]
    print(f"zero-shot accuracy: {torch.cat(right).float().mean():.2f}")

    # 2. An image folder becomes a stream of two tasks, with a card that ``mmcl train`` reads.
    with tempfile.TemporaryDirectory() as folder:
        images, out = write_image_folder(Path(folder) / "squares"), Path(folder) / "stream"
        options = ["--classes_per_task", "2", "--test_fraction", "0.25", "--num_workers", "1"]
        assert main(["data", "convert", str(images), "--out", str(out), *options]) == 0
        stream = mmcl.TaskStream.read(next(out.glob("*.yaml")))
        print("tasks:", "; ".join(" and ".join(task.classes) for task in stream))
