"""The accuracy matrix: what was scored after which task, and what was not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from mmcl.core.atomic import write_atomic
from mmcl.core.task import TaskStream
from mmcl.metrics import jsontext
from mmcl.metrics.matrixcheck import SCENARIOS, faults
from mmcl.metrics.scorers import find_scorer

FIRST_ROW = "zero-shot"
Value = float | None
Cell = tuple[int, int]


@dataclass(frozen=True)
class Column:
    """What one column measures.

    Args:
        name: the task or probe.
        kind: classify, caption, retrieve ...
        score: name of the score, in [0, 1] unless its name says otherwise.
        size: test samples behind each cell.
    """

    name: str
    kind: str = "classify"
    score: str = "accuracy"
    size: int = 0


class AccuracyMatrix:
    """Scores by row (when) and column (what); None where nothing was measured.

    Row 0 is before training, row t is after task t. Column i (from 0) is task i + 1; probes follow
    the tasks. So task i + 1 was just learned in row i + 1: ``matrix.get(i + 1, i)``.

    Args:
        stream: name of the stream.
        scenario: task, class or domain.
        tasks: one column per task, in training order.
        probes: columns that are never trained on.
        rows: row names; default is ``zero-shot`` and the tasks' names.

    Raises:
        ValueError: if there is no task, a name occurs twice, or the rows do not fit the tasks.
    """

    def __init__(
        self,
        stream: str,
        scenario: str,
        tasks: Sequence[Column],
        probes: Sequence[Column] = (),
        rows: Sequence[str] | None = None,
    ) -> None:
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario is {scenario!r}: choose one of {', '.join(SCENARIOS)}")
        if not tasks:
            raise ValueError("a matrix needs a task and got none: give at least one Column")
        self.stream = stream
        self.scenario = scenario
        self.columns = (*tasks, *probes)
        self.tasks = len(tasks)
        self.rows = (FIRST_ROW, *(task.name for task in tasks)) if rows is None else tuple(rows)
        self._refuse_repeated_columns()
        if not 1 <= len(self.rows) <= self.tasks + 1:
            raise ValueError(
                f"{len(self.rows)} rows for {self.tasks} tasks: "
                f"give 1 to {self.tasks + 1} (row 0 is before training)"
            )
        self._values: list[list[Value]] = [[None] * len(self.columns) for _ in self.rows]

    @classmethod
    def for_stream(
        cls, stream: TaskStream, scores: Mapping[str, str] = MappingProxyType({})
    ) -> AccuracyMatrix:
        """Make the empty matrix of a stream.

        Args:
            stream: its tasks and probes become the columns.
            scores: name of the score by kind of task, "accuracy" for a kind that is not named;
                tasks with a scorer are named after its version.

        Raises:
            ValueError: if a task names a scorer that does not exist.
        """
        columns = [
            Column(
                task.name,
                task.kind,
                find_scorer(task.scorer).version
                if task.scorer
                else scores.get(task.kind, "accuracy"),
                task.test_size,
            )
            for task in stream.columns
        ]
        tasks = len(stream.tasks)
        return cls(stream.name, stream.scenario, columns[:tasks], columns[tasks:])

    def with_cells_of(self, file: Path) -> AccuracyMatrix:
        """Fill the cells that a matrix on disk has measured, by names; a missing file fills none.

        The stream may have grown since it was written.
        """
        if file.is_file():
            old = AccuracyMatrix.read(file)
            for row, name in enumerate(old.rows):
                for column, title in enumerate(old.names):
                    if name in self.rows and title in self.names:
                        place = (self.rows.index(name), self.names.index(title))
                        self.set(*place, old.get(row, column))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, tasks first."""
        return tuple(column.name for column in self.columns)

    @property
    def values(self) -> tuple[tuple[Value, ...], ...]:
        """A copy of all cells, row by row."""
        return tuple(tuple(row) for row in self._values)

    @property
    def last_row(self) -> int | None:
        """The last row in which anything was measured, None if nothing was."""
        measured = [r for r, row in enumerate(self._values) if any(v is not None for v in row)]
        return measured[-1] if measured else None

    @property
    def last_complete_row(self) -> int | None:
        """The last row t >= 1 in which tasks 1 to t were all measured, None if there is none."""
        complete = [
            r for r, row in enumerate(self._values) if r and all(v is not None for v in row[:r])
        ]
        return complete[-1] if complete else None

    def set(self, row: int, column: int, value: Value) -> None:
        """Write one cell; None takes a measurement back.

        Raises:
            IndexError: if there is no such row or column.
            ValueError: if the value is not a finite number.
        """
        self._check(row, column)
        if value is not None and not jsontext.is_number(value):
            raise ValueError(
                f"cell ({self.rows[row]}, {self.names[column]}) got {value!r}: "
                f"give a finite number, or None if it was not measured"
            )
        self._values[row][column] = None if value is None else float(value)

    def get(self, row: int, column: int) -> Value:
        """Read one cell, None where nothing was measured.

        Raises:
            IndexError: if there is no such row or column.
        """
        self._check(row, column)
        return self._values[row][column]

    def missing(
        self, rows: Iterable[int] | None = None, columns: Iterable[int] | None = None
    ) -> list[Cell]:
        """List the unmeasured (row, column) cells among these rows and columns, default all."""
        wanted_rows = range(len(self.rows)) if rows is None else rows
        wanted_columns = range(len(self.columns)) if columns is None else tuple(columns)
        cells = [(row, column) for row in wanted_rows for column in wanted_columns]
        return [cell for cell in cells if self.get(*cell) is None]

    def add_column(self, column: Column, *, probe: bool = False) -> int:
        """Let the stream grow by one column: a task goes before the probes, a probe at the end.

        Returns:
            the new column's index. Its cells are unmeasured; the others keep their values.

        Raises:
            ValueError: if a column of that name is there already.
        """
        index = len(self.columns) if probe else self.tasks
        before = self.columns
        self.columns = (*before[:index], column, *before[index:])
        try:
            self._refuse_repeated_columns()
        except ValueError:
            self.columns = before
            raise
        self.tasks += not probe
        for row in self._values:
            row.insert(index, None)
        return index

    def add_row(self, name: str) -> int:
        """Let the run grow by the row of one more learned task.

        Returns:
            the new row's index, all of it unmeasured.

        Raises:
            ValueError: if every task has its row already.
        """
        if len(self.rows) > self.tasks:
            raise ValueError(
                f"row {name!r} would be row {len(self.rows)} of {self.tasks} tasks: "
                f"add the task's column first"
            )
        self.rows = (*self.rows, name)
        self._values.append([None] * len(self.columns))
        return len(self.rows) - 1

    def to_json(self) -> str:
        """Give the text of matrix.json: one line per row, the same bytes for the same scores."""
        head = {
            "scenario": self.scenario,
            "stream": self.stream,
            "rows": list(self.rows),
            "columns": list(self.names),
            "tasks": self.tasks,
            "kinds": [column.kind for column in self.columns],
            "scores": [column.score for column in self.columns],
            "sizes": [column.size for column in self.columns],
        }
        lines = [f"  {_inline(key)}: {_inline(value)}" for key, value in head.items()]
        rows = ",\n".join(f"    {_inline(row)}" for row in self._values)
        return "{\n" + ",\n".join([*lines, f'  "values": [\n{rows}\n  ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "matrix.json") -> AccuracyMatrix:
        """Read the text of matrix.json.

        Raises:
            ValueError: naming every fault at once, if the text is not such a matrix.
        """
        raw = jsontext.parse(text, source)
        found = faults(raw)
        if found:
            raise ValueError(f"{source} is no accuracy matrix: {'; '.join(found)}")
        return cls._from_valid(cast(dict[str, Any], raw))

    @classmethod
    def read(cls, path: Path) -> AccuracyMatrix:
        """Read a matrix file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a matrix.
        """
        return cls.from_json(jsontext.read_text(path), str(path))

    def write(self, path: Path) -> None:
        """Write the matrix file, all of it or nothing."""
        write_atomic(path, self.to_json().encode("utf-8", "backslashreplace"))

    @classmethod
    def _from_valid(cls, raw: dict[str, Any]) -> AccuracyMatrix:
        fields = zip(raw["columns"], raw["kinds"], raw["scores"], raw["sizes"], strict=True)
        columns = [Column(*field) for field in fields]
        tasks = raw["tasks"]
        matrix = cls(raw["stream"], raw["scenario"], columns[:tasks], columns[tasks:], raw["rows"])
        for row, values in enumerate(raw["values"]):
            for column, value in enumerate(values):
                matrix.set(row, column, value)
        return matrix

    def _check(self, row: int, column: int) -> None:
        if not 0 <= row < len(self.rows):
            raise IndexError(f"row {row} of {len(self.rows)}: give 0 to {len(self.rows) - 1}")
        if not 0 <= column < len(self.columns):
            raise IndexError(
                f"column {column} of {len(self.columns)}: give 0 to {len(self.columns) - 1}"
            )

    def _refuse_repeated_columns(self) -> None:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"column {twice[0]!r} occurs twice: give every task and probe one name"
            )


def _inline(value: object) -> str:
    return jsontext.to_bytes(value, indent=None).decode("utf-8").rstrip("\n")
