"""Runs of one few-shot task: training, scores at every n steps, and floating-point operations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import begin_task, device_of, step, write_atomic
from mmcl.data import BadSample
from mmcl.data.batches.collate import collate, make_example
from mmcl.evaluation import AccuracyMatrix, strict_json
from mmcl.evaluation.cost import Ledger
from mmcl.evaluation.strict_json import Count
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.evaluate import evaluate_row, save_sample_images
from mmcl.lightning.resume import load_state
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.summarize import summarize
from mmcl.report import write_report

CURVE = "curve.json"
_MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class CurvePoint:
    """Score after some optimizer steps.

    Attributes:
        step: optimizer steps.
        score: 0 to 1, None if it is not defined.
    """

    step: Count
    score: float | None


@dataclass(frozen=True)
class LearningCurve:
    """Scores of a run on its test samples, at every n steps.

    Attributes:
        points: by step; the first is before training, the last after it.
        flops: floating-point operations of the whole training, a teacher's included.
    """

    points: Sequence[CurvePoint]
    flops: float

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.points[-1].step

    @property
    def last_score(self) -> float | None:
        """Score after the last step."""
        return self.points[-1].score

    def steps_to(self, target: float | None) -> int | None:
        """Return the step of the first evaluation at or above a score; None if there is none."""
        if target is None:
            return None
        reached = (p.step for p in self.points if p.score is not None and p.score >= target)
        return next(reached, None)


def run_config(
    model: Mapping[str, Any], strategy: Mapping[str, Any], card: Path, *, learning_rate: float,
    batch_size: int, samples: int, steps: int, evaluate_every: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the configuration of a run over the few samples, with a checkpoint every n steps."""
    batch = min(batch_size, samples)
    checkpoints = {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {
            "filename": "{step:08d}", "auto_insert_metric_name": False,
            "every_n_train_steps": evaluate_every, "save_top_k": -1, "save_weights_only": True,
            "enable_version_counter": False,
        },
    }  # fmt: skip
    return {
        "seed_everything": seed,
        "model": {
            "model": dict(model), "strategy": dict(strategy), "learning_rate": learning_rate,
        },
        "data": {"stream": str(card), "global_batch_size": batch},
        "checkpoint_every_n_steps": evaluate_every,
        "trainer": {
            "max_epochs": math.ceil(steps / math.ceil(samples / batch)), "max_steps": steps,
            "callbacks": [checkpoints],
        },
    }  # fmt: skip


def make_run(
    config: Mapping[str, Any], folder: Path, changes: Sequence[str] = (), *,
    log: Callable[[str], None] = lambda sentence: None,
) -> tuple[ContinualRun, ContinualCLI]:  # fmt: skip
    """Build a run in a folder from its configuration, and options that override it."""
    file = folder.parent / f"{folder.name}.yaml"
    write_atomic(file, yaml.safe_dump(dict(config), sort_keys=False))
    words = ["--config", str(file), "--output_dir", str(folder.parent), "--run_name", folder.name]
    cli = ContinualCLI([*words, *changes], program="mmcl recycle")
    run = ContinualRun(
        cli.make_module, cli.make_trainer, cli.make_data(), folder, seed=cli.seed,
        checkpoint_every_n_steps=int(cli.config["checkpoint_every_n_steps"]),
        keep_best=cli.config["keep_best"], log=log, loggers=cli.make_loggers(),
        show_progress=cli.config["trainer"]["enable_progress_bar"] is not False,
    )  # fmt: skip
    return run, cli


def train(run: ContinualRun, cli: ContinualCLI) -> AccuracyMatrix:
    """Train a run, or resume it, and write its summary and report as ``mmcl train`` does."""
    with run.folder.lock():
        run.folder.check_config(cli.plain())
        matrix = run.run()
        if run.is_first:
            images = save_sample_images(run.data, run.folder)
            summarize(run, cli.plain(), matrix, images)
            write_report(run.folder.path)
    return matrix


def measure_curve(run: ContinualRun, matrix: AccuracyMatrix) -> LearningCurve:
    """Score the checkpoints of a finished run, and remove them; a measured curve is read again.

    Args:
        run: of one task, from ``run_config``.
        matrix: its scores before and after training.
    """
    folder = run.folder.path
    if (folder / CURVE).is_file():
        found: LearningCurve = strict_json.load(
            LearningCurve, strict_json.read(folder / CURVE), str(folder / CURVE)
        )
        return found
    cost = Ledger.read(folder / "ledger.json").total()
    points = {0: matrix.values[0][0], cost.steps: matrix.values[1][0]}
    kept = folder / "checkpoints" / "task_00"
    for file in sorted(kept.glob("*.ckpt")):
        count = int(file.stem)
        if count not in points:
            points[count] = _score_checkpoint(run, file)
    ordered = [CurvePoint(count, points[count]) for count in sorted(points)]
    curve = LearningCurve(ordered, float(cost.flops or 0.0))
    write_atomic(folder / CURVE, strict_json.to_bytes(asdict(curve)))
    shutil.rmtree(kept, ignore_errors=True)
    return curve


def score(config: Mapping[str, Any], changes: Sequence[str] = ()) -> float | None:
    """Return the score of an untrained run on the test samples of its only task, 0 to 1."""
    with TemporaryDirectory() as folder:
        run, _ = make_run(config, Path(folder) / "run", changes)
        return run.evaluate([0], [0]).values[0][0]


def step_flops(run: ContinualRun, count: int) -> float:
    """Return the floating-point operations of one training step of a run that was not started.

    Forward and backward pass of a batch of ``count`` samples, as its ledger counts them.
    """
    module = run.load_after(0)
    data, model = run.data, module.model
    task, reader = data.stream[0], data.prepared.reader(0, "train")
    transform = model.transform(True)
    examples = []
    for number in range(min(len(reader), count)):
        try:
            sample = reader.read(number)
            examples.append(
                make_example(sample, number, task, transform, seed=0, max_pixels=_MAX_PIXELS)
            )
        except BadSample:
            continue
    begin_task(model, module.strategy, task)
    data.set_model_classes(model)
    module.train()
    batch = collate(examples).to(device_of(model))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(step(model, module.strategy, batch).loss)
    return float(counter.get_total_flops())


@torch.no_grad()
def _score_checkpoint(run: ContinualRun, file: Path) -> float | None:
    module = run.load_after(1)
    load_state(module, file)
    matrix = AccuracyMatrix.for_stream(run.data.stream, {})
    with TemporaryDirectory() as folder:
        trainer = run.make_trainer(callbacks=[], default_root_dir=folder, logger=False)
        evaluate_row(module, run.data, trainer, matrix, RunDirectory(Path(folder)), 1, [0])
    return matrix.values[1][0]
