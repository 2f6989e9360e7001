"""A model that answers, as a folder of transformers, and three small tasks of coloured squares."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.data.small_stream import coloured, write_tar
from tests.toys.toy_llava import a_llava

SIZES = (8, 8, 8)
TEST_SIZE = 4
SCORERS = ("exact", "contains", "exact")


@cache
def _kept_chat():
    folder = Path(tempfile.mkdtemp()) / "chat"
    a_llava().save(folder)
    return folder


def write_chat(folder):
    """Write the stand-in LLaVA as a folder of transformers; return its path."""
    shutil.copytree(_kept_chat(), folder, dirs_exist_ok=True)
    return folder


def write_quiz(folder, sizes=SIZES, test_size=TEST_SIZE, scorers=SCORERS):
    """Write a domain-incremental stream of questions; return its card."""
    lines = [
        "name: quiz",
        "scenario: domain",
        "task_type: instruction",
        "max_new_tokens: 4",
        "tasks:",
    ]
    for place, (size, scorer) in enumerate(zip(sizes, scorers, strict=True)):
        letter = "abcdef"[place]
        for part, count in (("train", size), ("test", test_size)):
            write_tar(folder / f"{letter}-{part}.tar", coloured(count, place, letter + part))
        lines += [
            f"  - name: ask-{letter}",
            f"    scorer: {scorer}",
            f"    train: {letter}-train.tar",
            f"    test: {letter}-test.tar",
        ]
    card = folder / "quiz.yaml"
    card.write_text("\n".join(lines) + "\n")
    return card


def settings(strategy):
    """A configuration over one epoch of every task, of a desk with ``stream`` and ``chat``."""
    return {
        "seed_everything": 0,
        "model": {
            "model": {
                "class_path": "mmcl.models.ImageTextToText",
                "init_args": {"model": "chat", "max_length": 64},
            },
            "strategy": strategy,
            "learning_rate": 1e-2,
        },
        "data": {"stream": "stream/quiz.yaml", "global_batch_size": 8},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
