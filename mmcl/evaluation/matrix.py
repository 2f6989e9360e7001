"""Accuracy matrix of a run: the score of every task after every task, None if not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card import Ability, Knowledge, Scenario, Shift, Stage
from mmcl.core.task import TaskStream
from mmcl.evaluation import strict_json
from mmcl.evaluation.scorers import find_scorer
from mmcl.evaluation.strict_json import Count

FIRST_ROW = "zero-shot"
SCENARIOS: tuple[str, ...] = get_args(Scenario)
Value = float | None
Cell = tuple[int, int]


@dataclass(frozen=True)
class Column:
    """Column of the accuracy matrix: the task, trained or eval-only, that it measures.

    Args:
        name: of the task.
        task_type: classification, captioning, retrieval ...
        score: name of the score, in [0, 1] unless its name says otherwise.
        size: test samples behind each cell.
        repeat_of: name of the task that it repeats, whose scores it has, "" = of none.
        stage: of a trained task: "cpt", "dap" or "cft"; None = not stated.
        knowledge: of an eval-only task: "invariant", "updated" or "new" facts; None = not stated.
        ability: of an eval-only task: "general", "instruction" or "safety"; None = not stated.
    """

    name: str
    task_type: str = "classification"
    score: str = "accuracy"
    size: int = 0
    repeat_of: str = ""
    # A run from before a card stated these is still a run of the same stream.
    stage: Stage | None = field(default=None, compare=False)
    knowledge: Knowledge | None = field(default=None, compare=False)
    ability: Ability | None = field(default=None, compare=False)


class AccuracyMatrix:
    """Scores by row (after which task) and column (of which task); None if not measured.

    Row 0 is before training, row t is after task t. Column i (from 0) is task i + 1; eval-only
    tasks follow. So task i + 1 was just learned in row i + 1: ``matrix.get(i + 1, i)``.

    Args:
        stream: name of the stream.
        scenario: task, class or domain.
        tasks: one column per task, in training order.
        eval_only: one column per eval-only task, which is never trained on.
        rows: row names; default is ``zero-shot`` and the tasks' names.
        shift: what changes from task to task: "temporal", "content" or "language"; None = not
            stated.

    Raises:
        ValueError: if there is no task, a name occurs twice, or the rows do not fit the tasks.
    """

    def __init__(
        self,
        stream: str,
        scenario: str,
        tasks: Sequence[Column],
        eval_only: Sequence[Column] = (),
        rows: Sequence[str] | None = None,
        shift: Shift | None = None,
    ) -> None:
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario is {scenario!r}: choose one of {', '.join(SCENARIOS)}")
        if not tasks:
            raise ValueError("a matrix needs a task and got none: give at least one Column")
        self.stream = stream
        self.scenario = scenario
        self.shift = shift
        self.columns = (*tasks, *eval_only)
        self.tasks = len(tasks)
        self.rows = (FIRST_ROW, *(task.name for task in tasks)) if rows is None else tuple(rows)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} occurs twice: give every task a name of its own")
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
        """Make the empty accuracy matrix of a stream.

        Args:
            stream: its tasks and eval-only tasks become the columns.
            scores: task type -> name of its score, "accuracy" for other types; a task with a
                scorer has that scorer's version.

        Raises:
            ValueError: if a task names a scorer that does not exist.
        """
        has_probes = any(task.ability for task in stream.eval_only_tasks)
        columns = [
            Column(
                task.name,
                task.task_type,
                find_scorer(task.scorer).version
                if task.scorer
                else scores.get(task.task_type, "accuracy"),
                task.test_size,
                "" if task.repeat_of is None else stream[task.repeat_of].name,
                stage=task.stage if has_probes and not task.is_eval_only else None,
                knowledge=task.knowledge,
                ability=task.ability,
            )
            for task in stream.all_tasks
        ]
        tasks = len(stream.tasks)
        return cls(
            stream.name, stream.scenario, columns[:tasks], columns[tasks:], shift=stream.shift
        )

    def empty_copy(self) -> AccuracyMatrix:
        """Make a matrix of the same rows and columns in which nothing is measured."""
        tasks, eval_only = self.columns[: self.tasks], self.columns[self.tasks :]
        return AccuracyMatrix(self.stream, self.scenario, tasks, eval_only, self.rows, self.shift)

    def with_cells_of(self, file: Path) -> AccuracyMatrix:
        """Copy the measured cells of a matrix file by row and column name, none if it is missing.

        The stream may have grown since the file was written.
        """
        if file.is_file():
            old = AccuracyMatrix.read(file)
            for row, name in enumerate(old.rows):
                for column, title in enumerate(old.names):
                    if name in self.rows and title in self.names:
                        cell = (self.rows.index(name), self.names.index(title))
                        self.set(*cell, old.get(row, column))
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, tasks first."""
        return tuple(column.name for column in self.columns)

    @property
    def values(self) -> tuple[tuple[Value, ...], ...]:
        """Copy of all cells, row by row."""
        return tuple(tuple(row) for row in self._values)

    @property
    def last_row(self) -> int | None:
        """Last row in which anything was measured, None if nothing was."""
        measured = [r for r, row in enumerate(self._values) if any(v is not None for v in row)]
        return measured[-1] if measured else None

    @property
    def last_complete_row(self) -> int | None:
        """Last row t >= 1 in which tasks 1 to t were all measured, None if there is none."""
        complete = [
            r for r, row in enumerate(self._values) if r and all(v is not None for v in row[:r])
        ]
        return complete[-1] if complete else None

    def set(self, row: int, column: int, value: Value) -> None:
        """Set one cell; None deletes a measurement.

        Raises:
            IndexError: if there is no such row or column.
            ValueError: if the value is not a finite number.
        """
        self._check(row, column)
        if value is not None and not strict_json.is_number(value):
            raise ValueError(
                f"cell ({self.rows[row]}, {self.names[column]}) got {value!r}: "
                f"give a finite number, or None if it was not measured"
            )
        self._values[row][column] = None if value is None else float(value)

    def get(self, row: int, column: int) -> Value:
        """Return one cell, None if it was not measured.

        Raises:
            IndexError: if there is no such row or column.
        """
        self._check(row, column)
        return self._values[row][column]

    def measured_names(self) -> frozenset[str]:
        """Return the names of the columns with a measured cell."""
        columns = zip(self.names, zip(*self._values, strict=True), strict=True)
        return frozenset(name for name, cells in columns if set(cells) != {None})

    def missing(self, rows: Iterable[int] | None = None) -> list[Cell]:
        """List the unmeasured (row, column) cells of these rows, default all."""
        wanted = range(len(self.rows)) if rows is None else rows
        cells = [(row, column) for row in wanted for column in range(len(self.columns))]
        return [cell for cell in cells if self.get(*cell) is None]

    def to_json(self) -> str:
        """Return the text of matrix.json: one line per row, the same bytes for the same scores."""
        head = {
            "scenario": self.scenario,
            "stream": self.stream,
            "rows": list(self.rows),
            "columns": list(self.names),
            "tasks": self.tasks,
            "task_types": [column.task_type for column in self.columns],
            "scores": [column.score for column in self.columns],
            "sizes": [column.size for column in self.columns],
        }
        if any(repeats := [column.repeat_of for column in self.columns]):
            head["repeats"] = repeats
        # Keys that few cards declare are written only where they are.
        declared = {
            "shift": self.shift,
            "stages": [column.stage for column in self.columns],
            "knowledge": [column.knowledge for column in self.columns],
            "abilities": [column.ability for column in self.columns],
        }
        for key, value in declared.items():
            if value and not (isinstance(value, list) and set(value) == {None}):
                head[key] = value
        lines = [f"  {_inline(key)}: {_inline(value)}" for key, value in head.items()]
        rows = ",\n".join(f"    {_inline(row)}" for row in self._values)
        return "{\n" + ",\n".join([*lines, f'  "values": [\n{rows}\n  ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "matrix.json") -> AccuracyMatrix:
        """Read the text of matrix.json.

        Raises:
            ValueError: naming all errors at once, if it is not a matrix.
        """
        raw = strict_json.parse(text, source)
        return strict_json.load(_MatrixFile, raw, source, _OPTIONAL).matrix()

    @classmethod
    def read(cls, path: Path) -> AccuracyMatrix:
        """Read a matrix file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a matrix.
        """
        return cls.from_json(strict_json.read_text(path), str(path))

    def write(self, path: Path) -> None:
        """Write the matrix file atomically."""
        write_atomic(path, self.to_json().encode("utf-8", "backslashreplace"))

    def _check(self, row: int, column: int) -> None:
        if not 0 <= row < len(self.rows):
            raise IndexError(f"row {row} of {len(self.rows)}: give 0 to {len(self.rows) - 1}")
        if not 0 <= column < len(self.columns):
            raise IndexError(
                f"column {column} of {len(self.columns)}: give 0 to {len(self.columns) - 1}"
            )


_OPTIONAL = ("shift", "stages", "knowledge", "abilities", "repeats")


@dataclass(frozen=True)
class _MatrixFile:
    """Keys and types of matrix.json."""

    scenario: Scenario
    stream: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    tasks: Count
    task_types: tuple[str, ...]
    scores: tuple[str, ...]
    sizes: tuple[Count, ...]
    values: tuple[tuple[Value, ...], ...]
    repeats: tuple[str, ...] = ()
    shift: Shift | None = None
    stages: tuple[Stage | None, ...] = ()
    knowledge: tuple[Knowledge | None, ...] = ()
    abilities: tuple[Ability | None, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.columns)
        lists = {key: len(getattr(self, key)) for key in ("task_types", "scores", "sizes")}
        optional = {key: len(getattr(self, key)) for key in _OPTIONAL[1:]}
        lists |= {key: count for key, count in optional.items() if count}
        errors = [f"{key!r} has {k} entries for {n} columns" for key, k in lists.items() if k != n]
        if self.tasks > n:
            errors.append(f"tasks is {self.tasks} of {n} columns")
        unknown = [name for name in self.repeats if name and name not in self.columns]
        if unknown:
            errors.append(f"'repeats' names {unknown[0]!r}, which is no column")
        if len(self.values) != len(self.rows):
            errors.append(f"'values' has {len(self.values)} rows, 'rows' names {len(self.rows)}")
        lengths = zip(self.rows, map(len, self.values), strict=False)
        errors += [f"row {name!r} has {k} values for {n} columns" for name, k in lengths if k != n]
        if errors:
            raise ValueError("; ".join(errors))
        self.matrix()

    def matrix(self) -> AccuracyMatrix:
        unstated = (None,) * len(self.columns)
        described = zip(
            self.columns,
            self.task_types,
            self.scores,
            self.sizes,
            self.repeats or ("",) * len(self.columns),
            self.stages or unstated,
            self.knowledge or unstated,
            self.abilities or unstated,
            strict=True,
        )
        columns = [Column(*each) for each in described]
        tasks, eval_only = columns[: self.tasks], columns[self.tasks :]
        matrix = AccuracyMatrix(self.stream, self.scenario, tasks, eval_only, self.rows, self.shift)
        for row, values in enumerate(self.values):
            for column, value in enumerate(values):
                matrix.set(row, column, value)
        return matrix


def _inline(value: object) -> str:
    return strict_json.to_bytes(value, indent=None).decode("utf-8").rstrip("\n")
