"""Evaluation of matrix cells: scores go into the matrix, predictions into files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from torch import Tensor

from mmcl.core import Conversation, Pixels, ProcessedSample, write_atomic
from mmcl.data import BadSample
from mmcl.data.batches.collate import make_example
from mmcl.data.validate.preview import side_by_side
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.evaluators import Evaluator, GenerationEvaluator
from mmcl.evaluation.predictions import Prediction, predictions_path, write_predictions
from mmcl.evaluation.retrieval import RetrievalScores
from mmcl.evaluation.run_files import LENIENT, align_lenient_matrix, write_retrieval
from mmcl.lightning.checkpoints.checkpoint_io import raise_on_all_ranks
from mmcl.lightning.datamodule import ContinualDataModule, check_bad_fraction
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.run_dir import RunDirectory

SAMPLES_PER_TASK = 4
THUMBNAIL_SIZE = 128


def evaluate_row(
    module: ContinualModule,
    data: ContinualDataModule,
    trainer: pl.Trainer,
    matrix: AccuracyMatrix,
    folder: RunDirectory,
    row: int,
    columns: Sequence[int],
) -> list[str]:
    """Evaluate some columns of a matrix row, and write the matrix and the predictions.

    The module is in its state after ``row`` tasks; the Trainer is new.

    Returns:
        one sentence for each sample that could not be read.

    Raises:
        WriteError: on every rank, if there is no room for the files.
        ValueError: if a larger fraction of a test split than ``data.max_bad_fraction`` cannot be
            read.
    """
    if not columns:
        return []
    data.setup()
    # The occurrences of a repeated task have one test split: it is evaluated once, as the last one
    # that was trained, and the score is that of each of them.
    firsts = dict.fromkeys(data.stream.first_occurrence(column) for column in columns)
    missing = [column for column in firsts if column in columns or matrix.get(row, column) is None]
    evaluated = {column: data.stream.last_trained(column, row) for column in missing}
    module.score([data.column(row, number) for number in evaluated.values()])
    data.trainer = trainer
    if evaluated:
        loaders = _TestLoaders(data, list(evaluated.values()))
        trainer.test(module, datamodule=loaders, verbose=False)
    scorers = dict(zip(evaluated, module.scorers, strict=True))
    for column, scorer in scorers.items():
        task = scorer.column.task
        samples = f"test samples of '{task.name}'"
        check_bad_fraction(scorer.errors, samples, task.test_size, data.max_bad_fraction)
        matrix.set(row, column, scorer.value)
    for column in columns:
        matrix.set(row, column, matrix.get(row, data.stream.first_occurrence(column)))
    with raise_on_all_ranks(trainer):
        if folder.writes:
            _write_row(data, matrix, folder, row, scorers)
    return [error for scorer in scorers.values() for error in scorer.errors]


def _write_row(
    data: ContinualDataModule,
    matrix: AccuracyMatrix,
    folder: RunDirectory,
    row: int,
    scorers: Mapping[int, Evaluator],
) -> None:
    """Write the predictions, lenient scores and recalls of evaluated columns, and the matrix."""
    for column, scorer in scorers.items():
        predictions = _answers(data, scorer, column)
        if predictions:
            write_predictions(predictions_path(folder.path, row, column), predictions)
    _write_lenient(data, matrix, folder, row, scorers)
    recalls = [
        RetrievalScores.of(scorer.retrieval, matrix.rows[row], matrix.names[column])
        for column, scorer in scorers.items()
        if scorer.retrieval is not None
    ]
    if recalls:
        write_retrieval(matrix, folder.path, recalls)
    # The matrix comes last: a cell in it is not evaluated again.
    matrix.write(folder.path / "matrix.json")


def _write_lenient(
    data: ContinualDataModule,
    matrix: AccuracyMatrix,
    folder: RunDirectory,
    row: int,
    scorers: Mapping[int, Evaluator],
) -> None:
    """Write the lenient scores as a second matrix."""
    scores = {
        column: s.lenient for column, s in scorers.items() if isinstance(s, GenerationEvaluator)
    }
    file = folder.path / LENIENT
    if scores or (data.repeats > 1 and file.is_file()):
        lenient = align_lenient_matrix(matrix, file)
        for column, value in scores.items():
            lenient.set(row, column, value)
        for column in range(len(data.stream)):
            origin = data.stream.first_occurrence(column)
            if origin != column and matrix.get(row, column) is not None:
                lenient.set(row, column, lenient.get(row, origin))
        lenient.write(file)


class _TestLoaders(pl.LightningDataModule):
    """Datamodule with the test loaders of some matrix columns."""

    def __init__(self, data: ContinualDataModule, columns: Sequence[int]) -> None:
        super().__init__()
        self.data, self.columns = data, columns

    def test_dataloader(self) -> list[Any]:
        """Return one loader per column."""
        self.data.trainer = self.trainer
        return self.data.test_loaders(self.columns)


def _answers(data: ContinualDataModule, scorer: Evaluator, column: int) -> list[Prediction]:
    if isinstance(scorer, GenerationEvaluator):
        return scorer.answers
    names, predictions = scorer.column.names, scorer.predictions
    if "answer" not in predictions:
        return []
    reader = data.prepared.reader(column, "test")
    fields = ("sample", "truth", "answer", "score")
    samples = zip(*(predictions[name].tolist() for name in fields), strict=True)
    return [
        Prediction(
            key=reader.read(sample_id).key,
            target=names[truth],
            text=names[answer],
            correct=truth == answer,
            score=round(score, 4) if math.isfinite(score) else None,
        )
        for sample_id, truth, answer, score in samples
    ]


def save_sample_images(data: ContinualDataModule, folder: RunDirectory) -> list[dict[str, str]]:
    """Save a few test images of every column for the report.

    Returns:
        one mapping per image: task, key, target, file name under ``figures/``, and the question.
    """
    entries = []
    for number, task in enumerate(data.stream.all_tasks):
        if task.task_type not in ("classification", "instruction") or task.repeat_of is not None:
            continue
        reader = data.prepared.reader(number, "test")
        names = data.column(number + 1, number).names
        step = max(1, len(reader) // SAMPLES_PER_TASK)
        for index in range(0, len(reader), step)[:SAMPLES_PER_TASK]:
            try:
                made = make_example(
                    reader.read(index), index, task, _shown, seed=0, max_pixels=1 << 24
                )
            except BadSample:
                continue
            if made.processed.image is None:
                continue
            file = f"sample_{number:02d}_{index:05d}.png"
            write_atomic(folder.path / "figures" / file, _png(made.processed.image))
            reference = made.reference
            target = names[made.label] if reference is None else reference.answers[0]
            entry = {"task": task.name, "key": made.key, "target": target, "image": file}
            if reference is not None:
                entry["question"] = reference.question
            entries.append(entry)
    return entries


def _shown(pixels: Pixels, text: str | Conversation | None, seed: int) -> ProcessedSample:
    return ProcessedSample(side_by_side(pixels))


def _png(pixels: Tensor) -> bytes:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = THUMBNAIL_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize(size, resampling).save(buffer, "PNG")
    return buffer.getvalue()
