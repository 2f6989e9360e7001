"""A LLaVA of 14,000 random weights and batches of dialogues: the model of generative tests."""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path

import torch

from mmcl.core import Conversation, Task, Turn
from mmcl.data.batches.collate import Example, collate
from mmcl.models import TinyLlava
from mmcl.models.open_clip.loading import TINY

SIDE, WIDTH = 16, 16
COLORS = ("red", "green", "blue", "yellow")
QUESTIONS = ("What colour is it?", "Name the colour of the thing.", "Colour?")
_ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": SIDE, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8,
    },
    "text_cfg": {
        "context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1,
        "tokenizer_kwargs": {"bpe_path": str(TINY / "bpe.txt.gz")},
    },
}  # fmt: skip


@cache
def architecture():
    """Path of a tower's architecture: pictures of 16 x 16, 4 patches, 2 layers."""
    file = Path(tempfile.mkdtemp()) / "stand_in.json"
    file.write_text(json.dumps(_ARCHITECTURE))
    return str(file)


def a_llava(seed=0, **changes):
    """A TinyLlava with 4 picture tokens, one layer of width 16, random weights, frozen tower."""
    return copy.deepcopy(_built(seed, **changes))


@cache
def _built(seed, **changes):
    small = {"hidden_size": WIDTH, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "max_length": 64}
    return TinyLlava(architecture(), None, **{**small, **changes}, seed=seed).eval()


def an_answer_task(index=0, size=24):
    """Task ``index`` of a domain-incremental stream of questions."""
    return Task(
        index, f"task {index}", task_type="instruction", size=size, test_size=size, scorer="exact"
    )


def a_dialogue(task=0, row=0):
    """Question and answer of a row: each task asks in its own words and wants its own form."""
    color = COLORS[row % len(COLORS)]
    answer = (color, f"it is {color}.", color[0].upper())[task % 3]
    question = f"<image>\n{QUESTIONS[task % 3]}"
    return Conversation((Turn("user", question), Turn("assistant", answer)), (answer,))


def a_dialogue_batch(model, rows=8, task=0, seed=0, start=0):
    """Rows of a task: a square of the colour on noise; answers of different lengths."""
    g = torch.Generator().manual_seed(1000 * task + seed + 7)
    transform = model.transform(True)
    shown = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}
    made = []
    for row in range(start, start + rows):
        pixels = torch.randint(0, 60, (3, SIDE, SIDE), generator=g, dtype=torch.uint8)
        pixels[list(shown[COLORS[row % 4]]), 4:12, 4:12] = 250
        dialogue = a_dialogue(task, row)
        made.append(
            Example(
                transform(pixels, dialogue, 0), -100, task, row, f"t{task}-{row}",
                reference=dialogue.reference,
            )
        )  # fmt: skip
    return collate(made)


def dialogue_batches(model, task=0, size=24, rows=8):
    """The exact pass over a task, as ``end_task`` is given it."""
    return [
        a_dialogue_batch(model, min(rows, size - start), task, start, start)
        for start in range(0, size, rows)
    ]
