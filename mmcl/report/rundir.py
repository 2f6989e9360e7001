"""Reading what a run left, whole or half done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from mmcl.metrics import jsontext
from mmcl.metrics.answers import Answer, answers_path, read_answers
from mmcl.metrics.cost import Ledger
from mmcl.metrics.leniency import lenient_beside
from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.metrics.summary import RunSummary

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PICTURE_BYTES = 4 * 2**20
_MOST_SAMPLES = 60
_MOST_CONFIG_BYTES = 2**18
Read = TypeVar("Read")


@dataclass(frozen=True)
class Sample:
    """One test sample and what the model said about it over time.

    Args:
        picture_png: the picture, PNG bytes; empty for a sample of text alone.
        task: name of its task or probe.
        truth: the right answer, or the first of several.
        answers: row name -> answer: before training, when just learned, at the end.
        question: what was asked, empty where the task asks the same of every sample.
    """

    picture_png: bytes
    task: str
    truth: str
    answers: Mapping[str, Answer]
    question: str = ""

    @property
    def right_answers(self) -> tuple[str, ...]:
        """Every right answer once, the most frequent first."""
        given = [answer.right_answers for answer in self.answers.values() if answer.references]
        counted = Counter(given[-1] if given else (self.truth,))
        return tuple(text for text, _ in counted.most_common())


@dataclass
class RunDirectory:
    """The parts of a run's folder; None or empty where the run has not come so far.

    Args:
        folder: the run's.
        matrix: from matrix.json.
        lenient: from lenient.json, of the matrix's shape.
        summary: from summary.json, written when a run ends.
        ledger: from ledger.json.
        config: text of config.yaml.
        samples: from figures/samples.json and answers/.
        notes: what could not be read, a sentence each.
    """

    folder: Path
    matrix: AccuracyMatrix | None = None
    lenient: AccuracyMatrix | None = None
    summary: RunSummary | None = None
    ledger: Ledger | None = None
    config: str | None = None
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunDirectory:
        """Read whatever is there; a part that cannot be read becomes a note.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: give the folder of a run")
        run = cls(folder)
        run.matrix = run._part("matrix.json", AccuracyMatrix.read)
        if run.matrix is not None:
            run.lenient = run._part("lenient.json", partial(lenient_beside, run.matrix))
        run.summary = run._part("summary.json", RunSummary.read)
        run.ledger = run._part("ledger.json", Ledger.read)
        run.config = run._part("config.yaml", _read_config)
        run.samples = run._part("figures/samples.json", run._read_samples) or []
        return run

    def _part(self, name: str, read: Callable[[Path], Read]) -> Read | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return read(path)
        except (ValueError, OSError) as fault:
            self.notes.append(f"left out: {fault}")
            return None

    def _read_samples(self, path: Path) -> list[Sample]:
        raw = jsontext.parse(jsontext.read_text(path), str(path))
        if not isinstance(raw, list) or not all(map(_is_entry, raw)):
            raise ValueError(f"{path} is no list of samples with task, key, truth and picture")
        answers: dict[tuple[int, int], dict[str, Answer]] = {}
        samples = []
        for entry in raw[:_MOST_SAMPLES]:
            picture = self._picture(entry["picture"]) if "picture" in entry else b""
            if picture is not None:
                said = self._answers_to(entry["task"], entry["key"], answers)
                question = entry.get("question", "")
                samples.append(Sample(picture, entry["task"], entry["truth"], said, question))
        return samples

    def _picture(self, name: str) -> bytes | None:
        """Read a picture of the figures folder; a name that leads elsewhere is refused."""
        path = self.folder / "figures" / name
        is_inside = Path(name).name == name and not path.is_symlink()
        if not is_inside or not path.is_file() or path.stat().st_size > _MOST_PICTURE_BYTES:
            self.notes.append(f"left out: picture {name!r} is not a small file in figures/")
            return None
        picture = path.read_bytes()
        if not picture.startswith(_PNG):
            self.notes.append(f"left out: picture {name!r} is not a PNG")
            return None
        return picture

    def _answers_to(
        self, task: str, key: str, read: dict[tuple[int, int], dict[str, Answer]]
    ) -> dict[str, Answer]:
        if self.matrix is None or task not in self.matrix.names:
            return {}
        column = self.matrix.names.index(task)
        last = self.matrix.last_row or 0
        learned = column + 1 if column < self.matrix.tasks else 0
        said = {}
        for row in sorted({0, min(learned, last), last}):
            if (row, column) not in read:
                read[row, column] = self._cell(row, column)
            if key in read[row, column]:
                said[self.matrix.rows[row]] = read[row, column][key]
        return said

    def _cell(self, row: int, column: int) -> dict[str, Answer]:
        path = answers_path(self.folder, row, column).relative_to(self.folder)
        answers = self._part(str(path), read_answers) or []
        return {answer.key: answer for answer in answers}


def _read_config(path: Path) -> str:
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_CONFIG_BYTES} bytes: read it by itself")
    return jsontext.read_text(path)


def _is_entry(entry: object) -> bool:
    """Say whether an entry has its texts; one without a question needs a picture."""
    if not isinstance(entry, dict):
        return False
    keys = {"task", "key", "truth", "question" if "question" in entry else "picture"}
    keys |= {"picture"} & set(entry)
    return all(isinstance(entry.get(key), str) for key in keys)
