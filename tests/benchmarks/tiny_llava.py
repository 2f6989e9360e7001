"""What the built-in tiny LLaVA sees: its greedy answers to questions on pictures it never met.

    python -m tests.benchmarks.tiny_llava [folder of a model] [--rows 150] [--stream data/scenes]

First come questions of its pre-training's kind on newly drawn scenes: the share of whole answers
that are right word for word, by kind of question, and beside it the share that stays right if the
picture of another question is shown, which is what can be guessed. With ``--stream`` its answers on
the stream `scenes`, which asks for other forms, follow: strict, and lenient about the form.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from mmcl.core import IMAGE_TOKEN, Conversation, Task, TaskStream, Turn
from mmcl.data import open_stream
from mmcl.data.batches.collate import Example, collate, make_example
from mmcl.evaluation.scorers import find_scorer
from mmcl.models import ImageTextToText
from mmcl.streams.scene_drawing import draw_scene
from mmcl.streams.scene_pretraining import draw_any

SEED, ROWS, BATCH = 20_261, 150, 128
TASK = Task(0, "questions", task_type="instruction", size=1, test_size=1, scorer="exact")


def questions(
    rows: int = ROWS, seed: int = SEED
) -> dict[str, list[tuple[torch.Tensor, Conversation]]]:
    """Draw scenes and ask about them until every kind of question has its rows.

    Captions are left out: they name things in any order, so many are right.

    Returns:
        kind of question -> pictures (3, 64, 64) uint8 with one question and answer each.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[torch.Tensor, Conversation]]] = {}
    while not found or min(len(kind) for kind in found.values()) < rows:
        scene, asks = draw_any(rng)
        ask = asks[int(rng.integers(len(asks)))]
        kind = found.setdefault(ask.__name__.removeprefix("ask_"), [])
        if len(kind) == rows:
            continue
        question, answer = ask(scene, rng)
        pixels = torch.from_numpy(np.array(draw_scene(scene, rng))).permute(2, 0, 1)
        turns = (Turn("user", f"{IMAGE_TOKEN}\n{question}"), Turn("assistant", answer))
        kind.append((pixels, Conversation(turns, (answer,))))
    found.pop("caption", None)
    return dict(sorted(found.items()))


def answers(
    model: ImageTextToText, asked: list[tuple[torch.Tensor, Conversation]], max_new_tokens: int = 64
) -> list[str]:
    """Return the model's greedy answer to each question."""
    transform = model.transform(False)
    made = [
        Example(transform(pixels, dialogue, 0), -100, 0, number, "", False, dialogue.reference)
        for number, (pixels, dialogue) in enumerate(asked)
    ]
    said: list[str] = []
    for start in range(0, len(made), BATCH):
        batch = collate(made[start : start + BATCH])
        said += model.generate(batch, max_new_tokens=max_new_tokens)
    return said


def skills(model: ImageTextToText, rows: int = ROWS) -> dict[str, tuple[float, float]]:
    """Return kind of question -> share answered rightly with its own and with another picture."""
    found = {}
    for kind, asked in questions(rows).items():
        others = [(asked[number - 1][0], dialogue) for number, (_, dialogue) in enumerate(asked)]
        found[kind] = (share_right(model, asked), share_right(model, others))
    return found


def share_right(model: ImageTextToText, asked: list[tuple[torch.Tensor, Conversation]]) -> float:
    """Return the share of questions that are answered word for word, 0 to 1."""
    said = answers(model, asked)
    return sum(
        one == dialogue.answers[0] for one, (_, dialogue) in zip(said, asked, strict=True)
    ) / len(asked)


def on_stream(model: ImageTextToText, card: Path) -> dict[str, tuple[float, float]]:
    """Return task -> strict and lenient score on its test part, 0 to 1."""
    stream = TaskStream.read(card)
    prepared = open_stream(stream)
    found = {}
    for number, task in enumerate(stream.tasks):
        reader = prepared.reader(number, "test")
        made = [
            make_example(
                reader.read(row), row, task, model.transform(False), seed=0, max_pixels=1 << 24
            )
            for row in range(len(reader))
        ]
        said: list[str] = []
        for start in range(0, len(made), BATCH):
            batch = collate(made[start : start + BATCH])
            said += model.generate(batch, max_new_tokens=task.max_new_tokens)
        right = [made_row.reference.answers for made_row in made if made_row.reference]
        scored = find_scorer(task.scorer).score(said, right)
        found[task.name] = (scored.strict, scored.lenient)
    return found


def main() -> None:
    """Print the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny-llava")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--stream", type=Path)
    given = parser.parse_args()
    model = ImageTextToText(given.model).eval()
    measured = skills(model, given.rows)
    means = [sum(column) / len(measured) for column in zip(*measured.values(), strict=True)]
    print(f"{'questions, in percent':28}{'right':>8}{'other picture':>19}")
    for kind, (seen, guessed) in [*measured.items(), ("mean", means)]:
        print(f"{kind:28}{100 * seen:8.1f}{100 * guessed:19.1f}")
    if given.stream is not None:
        print(f"\n{'stream scenes, untrained':28}{'strict':>8}{'lenient':>19}")
        for name, (strict, lenient) in on_stream(model, given.stream / "scenes.yaml").items():
            print(f"{name:28}{100 * strict:8.1f}{100 * lenient:19.1f}")


if __name__ == "__main__":
    main()
