"""A run directory as a real run leaves it, made up so that a person can look at the page."""

import io
import json
import random

import pytest
from PIL import Image, ImageDraw

from mmcl.evaluation import (
    AccuracyMatrix,
    Column,
    Ledger,
    Prediction,
    RunSummary,
    TaskCost,
    compute_all_metrics,
    predictions_path,
    write_predictions,
)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS = tuple(f"{DIGITS[i]}-{DIGITS[i + 1]}" for i in range(0, 10, 2))
CONFIG = "# mmcl --config configs/quickstart.yaml\nstrategy:\n  class_path: ExperienceReplay\n"


def a_matrix(*, tasks=TASKS, eval_only=("colours",), loss=0.04, rows=None, seed=0, stream="digits"):
    draw = random.Random(seed)
    columns = [Column(name, size=72) for name in tasks]
    matrix = AccuracyMatrix(stream, "class", columns, [Column(name, size=50) for name in eval_only])
    for row in range(len(matrix.rows) if rows is None else rows):
        for place in range(len(matrix.columns)):
            learned = place + 1
            if place >= len(tasks):
                value = 0.71 - 0.02 * row + 0.01 * draw.random()
            elif row < learned:
                value = 0.15 + 0.2 * draw.random()
            else:
                value = 0.985 - 0.02 * draw.random() - loss * (row - learned) * draw.random()
            matrix.set(row, place, value)
    return matrix


def an_image(text, seed):
    draw = random.Random(seed)
    image = Image.new("L", (32, 32), 20)
    ImageDraw.Draw(image).text((10 + draw.randrange(4), 8 + draw.randrange(4)), text, fill=240)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_run(
    folder,
    *,
    strategy="ExperienceReplay",
    seed=0,
    loss=0.04,
    stream="digits",
    tasks=TASKS,
    is_finished=True,
):
    matrix = a_matrix(tasks=tasks, loss=loss, seed=seed, stream=stream)
    matrix.write(folder / "matrix.json")
    summary = RunSummary(
        name=folder.name,
        stream=stream,
        scenario="class",
        strategy=strategy,
        model="OpenCLIP tiny",
        seed=seed,
        metrics=tuple(compute_all_metrics(matrix)),
        versions={"mmcl": "0.1.0", "torch": "2.15.0", "open_clip_torch": "3.3.0"},
        hashes={"card": "9c1f" * 16, "weights": "07ab" * 16},
        errors=({"shard": "train-000.tar", "key": "000017", "reason": "broken JPEG"},),
        seconds=93.2,
        finished=is_finished,
    )
    summary.write(folder / "summary.json")
    (folder / "config.yaml").write_text(CONFIG)
    costs = [
        TaskCost(name, 9.0 + 2 * i, 45, 1420, 470 * i, 3.1e12, 812 * 2**20, 944_001, 0, 2**19 * i)
        for i, name in enumerate(tasks, 1)
    ]
    Ledger(costs).write(folder / "ledger.json")
    write_samples(folder, tasks)
    return folder


def write_samples(folder, tasks):
    (folder / "figures").mkdir(exist_ok=True)
    samples = []
    for column, task in enumerate(tasks):
        target = DIGITS[2 * column % 10]
        for row in {0, column + 1, len(tasks)}:
            prediction = target if row == column + 1 or (row and column % 2) else DIGITS[row]
            answers = [Prediction("000", target, prediction, prediction == target, 0.9)]
            write_predictions(predictions_path(folder, row, column), answers)
        name = f"sample_{column}.png"
        (folder / "figures" / name).write_bytes(an_image(str(2 * column), column))
        samples.append({"task": task, "key": "000", "target": target, "image": name})
    (folder / "figures" / "samples.json").write_text(json.dumps(samples))


@pytest.fixture
def make_matrix():
    return a_matrix


@pytest.fixture
def make_run(tmp_path):
    def make(name="digits_er", **how):
        folder = tmp_path / name
        folder.mkdir()
        return write_run(folder, **how)

    return make
