"""Small shards and streams for the tests of mmcl.data."""

import io
import json
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

from mmcl.core import ProcessedSample, TaskStream


def picture(number=0, task_type="PNG", size=(8, 6), mode="RGB"):
    """The bytes of a picture of noise, its own for every number."""
    width, height = size
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, task_type)
    return file.getvalue()


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """Write (name or TarInfo, content) pairs as they are, in this order."""
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def labelled(count, classes=(0, 1), start=0, name="s"):
    """Members of ``count`` good samples, labels in turn, in two languages as well."""
    members = []
    for number in range(start, start + count):
        key, label = f"{name}{number:03d}", classes[number % len(classes)]
        members += [
            (f"{key}.png", picture(number + zlib.crc32(name.encode()) % 1000)),
            (f"{key}.cls", str(label).encode()),
            (f"{key}.de.txt", f"Bild {number}".encode()),
            (f"{key}.txt", (f"picture {number}" + " again" * (number % 3)).encode()),
        ]
    return members


def write_stream(folder, sizes=(10, 7, 5), test_size=5, task_type="classification", **changes):
    """Write a stream of tasks of two classes each, and read its card.

    ``changes`` replaces members: {"a-train.tar": members} with the shard's name without ``.tar``
    and with ``_`` for ``-``.
    """
    lines = ["name: small", "scenario: class", f"task_type: {task_type}", "tasks:"]
    classes = [f"c{n}" for n in range(2 * len(sizes))]
    lines.insert(1, f"classes: [{', '.join(classes)}]")
    for place, size in enumerate(sizes):
        letter, own = "abcdef"[place], (2 * place, 2 * place + 1)
        for part, count in (("train", size), ("test", test_size)):
            members = labelled(count, own, name=f"{letter}{part}")
            members = changes.get(f"{letter}_{part}", members)
            write_tar(folder / f"{letter}-{part}.tar", members)
        lines += [
            f"  - name: task-{letter}",
            f"    classes: [{', '.join(classes[label] for label in own)}]",
            f"    train: {letter}-train.tar",
            f"    test: {letter}-test.tar",
        ]
    (folder / "small.yaml").write_text("\n".join(lines) + "\n")
    return TaskStream.read(folder / "small.yaml")


COLOURS = ("red", "green", "blue", "yellow")
ASKED = ("What colour is it?", "Name the colour of the thing.", "Colour?")


def dialogue(asked, said, **more):
    """The bytes of a ``.json`` member."""
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return json.dumps({"conversations": turns, **more}).encode()


def coloured(count, task=0, name="s"):
    """Members of ``count`` samples to be answered: a square of a colour on noise."""
    shown = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}
    members = []
    for number in range(count):
        key, colour = f"{name}{number:03d}", COLOURS[number % 4]
        pixels = np.random.default_rng(number + zlib.crc32(name.encode()) % 1000).integers(
            0, 60, (16, 16, 3), dtype=np.uint8
        )
        for channel in shown[colour]:
            pixels[4:12, 4:12, channel] = 250
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        said = (colour, f"it is {colour}", colour[0].upper())[task % 3]
        content = dialogue(f"<image>\n{ASKED[task % 3]}", said, answers=[said, said.upper()])
        members += [(f"{key}.png", file.getvalue()), (f"{key}.json", content)]
    return members


def write_answer_stream(folder, sizes=(10, 7, 5), test_size=5, **changes):
    """Write a stream of tasks of one question each, and read its card; ``changes`` as above."""
    lines = [
        "name: small", "scenario: domain", "task_type: instruction",
        "scorer: exact", "max_new_tokens: 6",
        "tasks:",
    ]  # fmt: skip
    for place, size in enumerate(sizes):
        letter = "abcdef"[place]
        for part, count in (("train", size), ("test", test_size)):
            members = coloured(count, place, name=f"{letter}{part}")
            members = changes.get(f"{letter}_{part}", members)
            write_tar(folder / f"{letter}-{part}.tar", members)
        lines += [
            f"  - name: task-{letter}",
            f"    train: {letter}-train.tar",
            f"    test: {letter}-test.tar",
        ]
    (folder / "small.yaml").write_text("\n".join(lines) + "\n")
    return TaskStream.read(folder / "small.yaml")


class CutAndNoise:
    """A transform: cut to 4 x 4, add noise drawn from the seed, spell the text in bytes."""

    def __call__(self, pixels, text, seed):
        noise = np.random.default_rng(seed).integers(0, 4, (3, 4, 4), dtype=np.uint8)
        image = pixels[:, :4, :4] // 2 + torch.from_numpy(noise)
        return ProcessedSample(image, None if text is None else torch.tensor(list(text.encode())))


def same(left, right):
    """Tell whether two batches are equal in every field."""
    for name, value in vars(left).items():
        other = getattr(right, name)
        alike = value.equal(other) if hasattr(value, "equal") else value == other
        if not alike:
            return False
    return True
