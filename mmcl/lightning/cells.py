"""Measuring cells of the matrix and keeping what was said in them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from torch import Tensor

from mmcl.core import Dialogue, Row, write_atomic
from mmcl.data import BadSample
from mmcl.data.row import make_row
from mmcl.lightning.answering import AnswerScorer
from mmcl.lightning.checkpoint_file import all_or_none
from mmcl.lightning.data import ContinualData
from mmcl.lightning.folder import RunFolder
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.scoring import ColumnScorer
from mmcl.metrics import AccuracyMatrix
from mmcl.metrics.answers import Answer, answers_path, write_answers
from mmcl.metrics.leniency import lenient_beside, lenient_file

SAMPLES_SHOWN = 4
PICTURE_SIDE = 128


def record_cells(
    module: ContinualModule,
    data: ContinualData,
    trainer: pl.Trainer,
    matrix: AccuracyMatrix,
    folder: RunFolder,
    row: int,
    columns: Sequence[int],
) -> list[str]:
    """Score some columns of a row and write matrix and answers.

    Args:
        module: as it was after ``row`` tasks.
        data: the stream.
        trainer: a fresh one; it brings the device, the precision and the ranks.
        matrix: is filled and written.
        folder: of the run.
        row: of the matrix.
        columns: of the matrix.

    Returns:
        what could not be read, one sentence each.

    Raises:
        CannotWrite: on every rank, if there is no room for what is written.
        ValueError: if more of a test part than ``data.max_faults`` cannot be read, with the names.
    """
    if not columns:
        return []
    data.setup()
    module.score([data.column(row, column) for column in columns])
    data.trainer = trainer
    data_loaders = _Loaders(data, columns)
    trainer.test(module, datamodule=data_loaders, verbose=False)
    faults: list[str] = []
    for scorer, column in zip(module.scorers, columns, strict=True):
        _expect_few(scorer, data.max_faults)
        matrix.set(row, column, scorer.value)
        faults += scorer.faults
    with all_or_none(trainer):
        if folder.writes:
            _write(data, matrix, folder, row, dict(zip(columns, module.scorers, strict=True)))
    return faults


def _write(
    data: ContinualData,
    matrix: AccuracyMatrix,
    folder: RunFolder,
    row: int,
    scorers: Mapping[int, ColumnScorer],
) -> None:
    for column, scorer in scorers.items():
        said = _answers(data, scorer, column)
        if said:
            write_answers(answers_path(folder.path, row, column), said)
    _write_lenient(matrix, folder, row, scorers)
    # The matrix comes last: a cell that stands in it is not measured again.
    matrix.write(folder.path / "matrix.json")


def _write_lenient(
    matrix: AccuracyMatrix, folder: RunFolder, row: int, scorers: Mapping[int, ColumnScorer]
) -> None:
    """Keep the scores that forgive the form of an answer, as a second matrix."""
    found = {column: s.lenient for column, s in scorers.items() if isinstance(s, AnswerScorer)}
    if found:
        file = lenient_file(folder.path)
        lenient = lenient_beside(matrix, file)
        for column, value in found.items():
            lenient.set(row, column, value)
        lenient.write(file)


def _expect_few(scorer: ColumnScorer, max_faults: float) -> None:
    task, faults = scorer.column.task, scorer.faults
    if len(faults) > max_faults * max(1, task.test_size):
        raise ValueError(
            f"{len(faults)} test samples of '{task.name}' cannot be read, more than "
            f"data.max_faults={max_faults:g} of {task.test_size} allows: {'; '.join(faults[:5])}"
        )


class _Loaders(pl.LightningDataModule):
    """The test loaders of some columns; the datamodule of a scoring run."""

    def __init__(self, data: ContinualData, columns: Sequence[int]) -> None:
        super().__init__()
        self.data, self.columns = data, columns

    def test_dataloader(self) -> list[Any]:
        """Return one loader a column."""
        self.data.trainer = self.trainer
        return self.data.test_loaders(self.columns)


def _answers(data: ContinualData, scorer: ColumnScorer, column: int) -> list[Answer]:
    if isinstance(scorer, AnswerScorer):
        return scorer.answers
    names, said = scorer.column.names, scorer.said
    if "answer" not in said:
        return []
    reader = data.prepared.reader(column, "test")
    rows = zip(
        *(said[name].tolist() for name in ("sample", "truth", "answer", "score")), strict=True
    )
    return [
        Answer(
            key=reader.read(sample).key,
            truth=names[truth],
            answer=names[answer],
            correct=truth == answer,
            score=round(score, 4) if math.isfinite(score) else None,
        )
        for sample, truth, answer, score in rows
    ]


def sample_pictures(data: ContinualData, folder: RunFolder) -> list[dict[str, str]]:
    """Keep a few test pictures of every column for the report.

    Returns:
        one mapping each: task, key, truth, the file name under ``figures/``, and what was asked.
    """
    found = []
    for number, task in enumerate(data.stream.columns):
        if task.kind not in ("classify", "answer"):
            continue
        reader = data.prepared.reader(number, "test")
        names = data.column(number + 1, number).names
        step = max(1, len(reader) // SAMPLES_SHOWN)
        for place in range(0, len(reader), step)[:SAMPLES_SHOWN]:
            try:
                made = make_row(
                    reader.read(place), place, task, _as_it_is, seed=0, max_pixels=1 << 24
                )
            except BadSample:
                continue
            if made.row.image is None:
                continue
            file = f"sample_{number:02d}_{place:05d}.png"
            write_atomic(folder.path / "figures" / file, _png(made.row.image))
            asked = made.reference
            truth = names[made.label] if asked is None else asked.answers[0]
            shown = {"task": task.name, "key": made.key, "truth": truth, "picture": file}
            found.append(shown if asked is None else {**shown, "question": asked.question})
    return found


def _as_it_is(pixels: Tensor | None, text: str | Dialogue | None, seed: int) -> Row:
    return Row(pixels)


def _png(pixels: Tensor) -> bytes:
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    side = PICTURE_SIDE / max(picture.size)
    size = (max(1, round(picture.width * side)), max(1, round(picture.height * side)))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST if side > 1 else Image.Resampling.LANCZOS).save(
        stream, "PNG"
    )
    return stream.getvalue()
