"""Input from parquet tables, read one row group at a time by pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmcl.data.convert.record import Chunk, InputData, InvalidRecord, Record
from mmcl.data.convert.table_input import Columns, TableRows, find_columns, record_of, row_name
from mmcl.data.shards.image_folder import open_image_folder
from mmcl.data.stored_sample import BadSample, one_line

_SPLIT = re.compile(r"(train|test)([-_.].*)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ParquetChunk(TableRows):
    """One row group of one file, behind ``rows_before`` other rows of it.

    ``classes`` and ``tasks`` name the numbers in the columns of labels and of tasks, () = as is.
    """

    group: int
    rows_before: int
    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    split: str

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the rows.

        Raises:
            RuntimeError: if the file changed or cannot be read any more.
        """
        parquet, wanted = _library(), self.wanted()
        first = 0
        names = self.columns.names
        try:
            with parquet.ParquetFile(self.path) as file:
                batches = file.iter_batches(
                    batch_size=64,
                    row_groups=[self.group],
                    columns=list(dict.fromkeys(names.values())),
                    use_threads=False,
                )
                for batch in batches:
                    for index in [n for n in range(batch.num_rows) if first + n in wanted]:
                        yield self._record(
                            {use: batch.column(name)[index].as_py() for use, name in names.items()},
                            self.rows_before + first + index + 1,
                        )
                    first += batch.num_rows
        # pyarrow's errors are ValueError, OSError, KeyError and others.
        except Exception as error:
            raise RuntimeError(f"{self.path} cannot be read any more ({one_line(error)})") from None
        if first != self.count:
            raise RuntimeError(f"{self.path} changed while it was read: start again")

    def _record(self, row: dict[str, Any], number: int) -> Record | InvalidRecord:
        for use, names in (("label", self.classes), ("task", self.tasks)):
            value = row.get(use)
            if isinstance(value, int) and not isinstance(value, bool) and names:
                row[use] = names[value] if 0 <= value < len(names) else None
        if self.split and not row.get("split"):
            row["split"] = self.split
        try:
            place = f"row {number} of {self.path.name}"
            return record_of(row, self.columns, self.images, place)
        except BadSample as error:
            return InvalidRecord(row_name(row), str(error))


def open_parquet(
    path: Path,
    task_type: str | None = None,
    images: Path | None = None,
    task_column: str | None = None,
) -> InputData:
    """Open a parquet file, or all ``.parquet`` files of a folder.

    Files named ``train...`` and ``test...`` are these splits. Class names are taken from the
    metadata that the hub's library writes, if they are there.

    Args:
        path: of the file or folder.
        task_type: see `find_columns`.
        images: folder from which image paths start; None = that of the file.
        task_column: see `find_columns`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if pyarrow is not installed.
        ValueError: if columns are missing, or a file is not parquet.
    """
    files = parquet_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    chunks: list[Chunk] = []
    columns: Columns | None = None
    classes: tuple[str, ...] = ()
    for file in files:
        own, classes, tasks, counts = _read_schema(file, task_type, task_column)
        if columns is not None and own != columns:
            raise ValueError(f"{file} has other columns than {files[0]}: convert them one by one")
        columns = own
        named = _SPLIT.fullmatch(file.stem)
        split = named[1].lower() if named and len(files) > 1 else ""
        folder = open_image_folder(images or file.parent)
        before = accumulate(counts, initial=0)
        chunks += [
            ParquetChunk(
                path=file, count=count, columns=columns, images=folder, group=group,
                rows_before=rows_before, classes=classes, tasks=tasks, split=split,
            )
            for group, (count, rows_before) in enumerate(zip(counts, before, strict=False))
            if count
        ]  # fmt: skip
    if columns is None or not chunks:
        raise ValueError(f"{path} has no rows")
    return InputData(columns.task_type, str(path), chunks, classes, task_column=task_column or "")


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder, or of its ``data`` folder as on the hub."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _read_schema(
    path: Path, task_type: str | None, task_column: str | None
) -> tuple[Columns, tuple[str, ...], tuple[str, ...], list[int]]:
    """Return the columns, names of classes and tasks, and the number of rows of every row group."""
    parquet = _library()
    try:
        with parquet.ParquetFile(path) as file:
            schema, about = file.schema_arrow, file.metadata
            counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            names, notes = list(schema.names), dict(schema.metadata or {})
    except Exception as error:
        raise ValueError(f"{path} is no parquet file ({one_line(error)})") from None
    columns = find_columns(names, task_type, str(path), task_column)
    classes = _class_names(notes, columns.names.get("label", ""))
    return columns, classes, _class_names(notes, columns.names.get("task", "")), counts


def _class_names(notes: Mapping[bytes, bytes], column: str) -> tuple[str, ...]:
    """Return the class names that the hub's library stored for a column of numbers, or ()."""
    try:
        noted = json.loads(notes[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    is_good = isinstance(noted, list) and all(isinstance(name, str) and name for name in noted)
    return tuple(noted) if is_good and len(set(noted)) == len(noted) else ()


def _library() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "parquet files are read by pyarrow, which is not installed: pip install mmcl[parquet]"
        ) from None
    return pyarrow.parquet
