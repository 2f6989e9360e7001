"""Files of a run directory: their names, the summary, and a reader for a run at any stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card import Scenario
from mmcl.evaluation import strict_json
from mmcl.evaluation.class_metrics import read_confusions
from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.cost import Ledger
from mmcl.evaluation.diagnostic_record import Diagnostic, diagnostic_files
from mmcl.evaluation.matrix import AccuracyMatrix, Cell
from mmcl.evaluation.predictions import Prediction, predictions_path, read_predictions
from mmcl.evaluation.retrieval import RetrievalScores
from mmcl.evaluation.strict_json import Amount

CONFIG = "config.yaml"
MATRIX = "matrix.json"
LENIENT = "lenient.json"
RETRIEVAL = "retrieval.json"
SUMMARY = "summary.json"
LEDGER = "ledger.json"
REPORT = "report.html"
CLASSES = "classes.csv"
CONFUSION = "confusion.csv"
RECALLS = "retrieval.csv"
FIGURES = "figures"
SAMPLES = "figures/samples.json"
EVALUATION = "evaluation"

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_IMAGE_BYTES = 4 * 2**20
_MAX_SAMPLES = 60
_MAX_CONFIG_BYTES = 2**18
Read = TypeVar("Read")
Error = str | Mapping[str, str]


def align_lenient_matrix(matrix: AccuracyMatrix, file: Path) -> AccuracyMatrix:
    """Make a lenient matrix of the same shape from a file, without cells that ``matrix`` lacks."""
    lenient = matrix.empty_copy().with_cells_of(file)
    for cell in matrix.missing():
        lenient.set(*cell, None)
    return lenient


def read_lenient(matrix: AccuracyMatrix, folder: Path) -> AccuracyMatrix | None:
    """Read a run's lenient scores of the cells that a matrix has measured.

    Args:
        matrix: strict scores; cells that it lacks are left out of the result.
        folder: run directory.

    Returns:
        a matrix of the same shape, None if the run has no lenient scores.

    Raises:
        ValueError: if the file is not a matrix.
    """
    file = folder / LENIENT
    return align_lenient_matrix(matrix, file) if file.is_file() else None


def read_retrieval(matrix: AccuracyMatrix, folder: Path) -> list[RetrievalScores]:
    """Read the recalls both ways of the cells of captions that a matrix has measured.

    Args:
        matrix: the scores; cells that it lacks are left out.
        folder: run directory.

    Returns:
        by row and column, empty if the run has no captions.

    Raises:
        ValueError: if the file is not a list of recalls.
    """
    file = folder / RETRIEVAL
    if not file.is_file():
        return []
    raw = strict_json.read(file)
    if not isinstance(raw, list):
        raise ValueError(f"{file} is not valid: expected a list of recalls")
    found = [strict_json.load(RetrievalScores, each, str(file)) for each in raw]
    of_cell = {(each.after, each.task): each for each in found}
    unmeasured = set(matrix.missing())
    cells = [
        (row, column) for row in range(len(matrix.rows)) for column in range(len(matrix.names))
    ]
    names = [(matrix.rows[r], matrix.names[c]) for r, c in cells if (r, c) not in unmeasured]
    return [of_cell[name] for name in names if name in of_cell]


def write_retrieval(
    matrix: AccuracyMatrix, folder: Path, scores: Sequence[RetrievalScores]
) -> None:
    """Put recalls of cells into a run's file; those of other measured cells stay."""
    new = {(each.after, each.task) for each in scores}
    kept = [e for e in read_retrieval(matrix, folder) if (e.after, e.task) not in new]
    plain = [asdict(each) for each in (*kept, *scores)]
    write_atomic(folder / RETRIEVAL, strict_json.to_bytes(plain))


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Args:
        name: of the run.
        stream: name of the stream.
        scenario: task, class or domain.
        strategy: such as ``ExperienceReplay``.
        model: such as ``OpenCLIP ViT-B-16``.
        seed: of the run.
        metrics: of the run, undefined ones with their reason.
        versions: library -> version.
        hashes: file -> sha256: card, weights ...
        errors: bad samples, each a sentence or a mapping such as shard, key, reason.
        warnings: sentences for the user, such as that a strategy had no effect.
        seconds: wall time of everything.
        finished: whether all tasks are learned and all cells measured.
    """

    name: str
    stream: str
    scenario: Scenario
    strategy: str
    model: str
    seed: int
    metrics: Sequence[MetricValue] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    errors: Sequence[Error] = ()
    warnings: Sequence[str] = ()
    seconds: Amount = 0.0
    finished: bool = False

    def metric(self, name: str) -> MetricValue | None:
        """Return the metric of that name, None if the run has none."""
        return next((each for each in self.metrics if each.name == name), None)

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Read summary.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming all errors at once, if it is not a summary.
        """
        return strict_json.load(cls, strict_json.read(path), str(path))

    def write(self, path: Path) -> None:
        """Write summary.json atomically.

        Raises:
            ValueError: if ``read`` would refuse a value.
        """
        plain = asdict(self)
        strict_json.load(RunSummary, plain, "this summary")
        write_atomic(path, strict_json.to_bytes(plain))


@dataclass(frozen=True)
class SamplePredictions:
    """One test sample and the model's predictions of it over training.

    Args:
        image_png: the image, PNG bytes; empty for a sample of text alone.
        task: name of its task.
        target: the right answer, or the first of several.
        predictions: row name -> prediction: before training, when just learned, at the end.
        question: the sample's question, empty where all samples of the task have the same.
    """

    image_png: bytes
    task: str
    target: str
    predictions: Mapping[str, Prediction]
    question: str = ""

    @property
    def right_answers(self) -> tuple[str, ...]:
        """Every right answer once, the most frequent first."""
        given = [answer.right_answers for answer in self.predictions.values() if answer.references]
        counted = Counter(given[-1] if given else (self.target,))
        return tuple(text for text, _ in counted.most_common())


@dataclass(frozen=True)
class _SampleEntry:
    """Keys and types of an entry of figures/samples.json."""

    task: str
    key: str
    target: str
    image: str = ""
    question: str = ""

    def __post_init__(self) -> None:
        if not self.image and not self.question:
            raise ValueError("it has neither 'image' nor 'question'")


@dataclass
class RunFiles:
    """Contents of a run directory; None or empty where a file is not there yet.

    Args:
        folder: run directory.
        matrix: from matrix.json.
        lenient: from lenient.json, of the matrix's shape.
        retrieval: from retrieval.json, of measured cells.
        summary: from summary.json, written when a run ends.
        ledger: from ledger.json.
        config: text of config.yaml.
        samples: from figures/samples.json and answers/.
        confusions: from answers/, of measured cells of the stream's classification tasks: (target,
            predicted class) -> test samples.
        diagnostics: from diagnostics/.
        notes: what could not be read, a sentence each.
    """

    folder: Path
    matrix: AccuracyMatrix | None = None
    lenient: AccuracyMatrix | None = None
    retrieval: list[RetrievalScores] = field(default_factory=list)
    summary: RunSummary | None = None
    ledger: Ledger | None = None
    config: str | None = None
    samples: list[SamplePredictions] = field(default_factory=list)
    confusions: dict[Cell, Counter[tuple[str, str]]] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read the files that are there; one that cannot be read becomes a note.

        Raises:
            FileNotFoundError: if there is no such directory.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: give a run directory")
        run = cls(folder)
        run.matrix = run._read(MATRIX, AccuracyMatrix.read)
        if run.matrix is not None:
            run.lenient = run._read(LENIENT, partial(align_lenient_matrix, run.matrix))
            read = partial(read_retrieval, run.matrix)
            run.retrieval = run._read(RETRIEVAL, lambda path: read(path.parent)) or []
        run.summary = run._read(SUMMARY, RunSummary.read)
        run.ledger = run._read(LEDGER, Ledger.read)
        run.config = run._read(CONFIG, _read_config)
        run.samples = run._read(SAMPLES, run._read_samples) or []
        run._read_confusions()
        names = [str(file.relative_to(folder)) for file in diagnostic_files(folder)]
        records = [run._read(name, Diagnostic.read) for name in names]
        run.diagnostics = [record for record in records if record is not None]
        return run

    def _read(self, name: str, read: Callable[[Path], Read]) -> Read | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return read(path)
        except (ValueError, OSError) as error:
            note = f"left out: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return None

    def _read_confusions(self) -> None:
        if self.matrix is None:
            return
        unmeasured = set(self.matrix.missing())
        for column, task in enumerate(self.matrix.columns[: self.matrix.tasks]):
            for row in range(len(self.matrix.rows)):
                if task.task_type != "classification" or (row, column) in unmeasured:
                    continue
                path = predictions_path(self.folder, row, column).relative_to(self.folder)
                counts = self._read(str(path), read_confusions)
                if counts is not None:
                    self.confusions[row, column] = counts

    def _read_samples(self, path: Path) -> list[SamplePredictions]:
        raw = strict_json.read(path)
        if not isinstance(raw, list):
            raise ValueError(f"{path} is not valid: expected a list of samples")
        optional = ("image", "question")
        entries = [strict_json.load(_SampleEntry, each, str(path), optional) for each in raw]
        cells: dict[tuple[int, int], dict[str, Prediction]] = {}
        samples = []
        for entry in entries[:_MAX_SAMPLES]:
            image = self._image(entry.image) if entry.image else b""
            if image is not None:
                predictions = self._predictions(entry.task, entry.key, cells)
                samples.append(
                    SamplePredictions(image, entry.task, entry.target, predictions, entry.question)
                )
        return samples

    def _image(self, name: str) -> bytes | None:
        """Read an image of the figures folder; a name that leads elsewhere is refused."""
        path = self.folder / FIGURES / name
        is_inside = Path(name).name == name and not path.is_symlink()
        if not is_inside or not path.is_file() or path.stat().st_size > _MAX_IMAGE_BYTES:
            self.notes.append(f"left out: image {name!r} is not a small file in {FIGURES}/")
            return None
        image = path.read_bytes()
        if not image.startswith(_PNG):
            self.notes.append(f"left out: image {name!r} is not a PNG")
            return None
        return image

    def _predictions(
        self, task: str, key: str, cells: dict[tuple[int, int], dict[str, Prediction]]
    ) -> dict[str, Prediction]:
        """Find a sample's predictions before training, when just learned, and at the end."""
        if self.matrix is None or task not in self.matrix.names:
            return {}
        column = self.matrix.names.index(task)
        last = self.matrix.last_row or 0
        learned = column + 1 if column < self.matrix.tasks else 0
        found = {}
        for row in sorted({0, min(learned, last), last}):
            if (row, column) not in cells:
                path = predictions_path(self.folder, row, column).relative_to(self.folder)
                answers = self._read(str(path), read_predictions) or []
                cells[row, column] = {answer.key: answer for answer in answers}
            if key in cells[row, column]:
                found[self.matrix.rows[row]] = cells[row, column][key]
        return found


def _read_config(path: Path) -> str:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: open it by itself")
    return strict_json.read_text(path)
