"""Input from parquet tables and saved data sets of Hugging Face, read in parts by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmcl.data.convert.inputs.columns import ColumnOptions, Columns, find_columns
from mmcl.data.convert.inputs.image_search import ImageSearch, open_images
from mmcl.data.convert.inputs.table_rows import TableRows, table_input
from mmcl.data.convert.record import (
    Chunk,
    InputData,
    InvalidRecord,
    Record,
    file_split,
    file_splits,
    without_validation,
)
from mmcl.data.stored_sample import one_line

_MAX_VALUES = 100
Classes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ParquetChunk(TableRows):
    """One row group of one file, behind ``rows_before`` other rows of it.

    ``classes`` and ``tasks`` name the numbers in the columns of labels and of tasks, () = as is;
    ``splits`` those in the column of splits.
    """

    group: int
    rows_before: int
    classes: Classes
    tasks: Classes
    splits: Classes

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the rows.

        Raises:
            RuntimeError: if the file changed or cannot be read any more.
        """
        wanted = self.wanted()
        first = 0
        names = self.columns.names
        try:
            with _open(self.path) as file:
                for batch in file.batches(self.group, list(dict.fromkeys(names.values()))):
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
        for use, names in (("label", self.classes), ("task", self.tasks), ("split", self.splits)):
            value = row.get(use)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(value, int) and not isinstance(value, bool) and names:
                if not 0 <= value < len(names):
                    reason = f"its {use} is {value}, and the table names {len(names)}"
                    return InvalidRecord("", f"{reason} (row {number} of {self.path.name})")
                row[use] = names[value]
        return self.record(row, f"row {number} of {self.path.name}")


class _Table:
    """An open parquet file, or an arrow file as `datasets` saves it."""

    def __init__(self, file: Any, is_parquet: bool) -> None:
        self.file, self.is_parquet = file, is_parquet
        self.schema = file.schema_arrow if is_parquet else file.schema

    def counts(self) -> list[int]:
        """Return the number of rows of every part."""
        if not self.is_parquet:
            return [batch.num_rows for batch in self.file]
        about = self.file.metadata
        return [about.row_group(group).num_rows for group in range(about.num_row_groups)]

    def batches(self, group: int, names: list[str]) -> Iterator[Any]:
        """Yield the rows of a part, some at a time."""
        if self.is_parquet:
            yield from self.file.iter_batches(
                batch_size=64, row_groups=[group], columns=names, use_threads=False
            )
            return
        # A stream has no table of contents; its parts are mapped into memory, not copied.
        for number, batch in enumerate(self.file):
            if number == group:
                yield batch.select(names)
                return

    def values(self, column: str) -> set[str]:
        """Return the distinct values of a column, at most some hundred."""
        found: set[str] = set()
        rows = self.file.iter_batches(columns=[column]) if self.is_parquet else self.file
        for batch in rows:
            found |= {str(value).strip() for value in batch.column(column).unique().to_pylist()}
            if len(found) > _MAX_VALUES:
                break
        return found


@contextmanager
def _open(path: Path) -> Iterator[_Table]:
    arrow, parquet = _library()
    if path.suffix == ".arrow":
        with arrow.memory_map(str(path)) as source:
            yield _Table(arrow.ipc.open_stream(source), is_parquet=False)
        return
    with parquet.ParquetFile(path) as file:
        yield _Table(file, is_parquet=True)


def open_parquet(
    path: Path,
    options: ColumnOptions,
    images: Path | Sequence[Path] | None = None,
    split: str = "",
) -> InputData:
    """Open a parquet file, a folder of them, or a data set that `datasets` saved to disk.

    Files and folders named train, val, test and so on are these splits. Class names are taken from
    the metadata that the hub's library writes, if they are there.

    Args:
        path: of the file or folder.
        options: see `find_columns`.
        images: folders from which image paths start; None = that of the file.
        split: of a file, "" if it states none.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if pyarrow is not installed.
        ValueError: if columns are missing, a file is not parquet, or of a split of unknown name.
    """
    files = table_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    splits = file_splits(path, files) if path.is_dir() else [split]
    chunks: list[Chunk] = []
    first: tuple[Columns, list[Classes]] | None = None
    for file, own_split in zip(files, splits, strict=True):
        columns, named, counts = _read_schema(file, options)
        if first is not None and (columns, named) != first:
            raise ValueError(f"{file} has other columns than {files[0]}: convert them one by one")
        first = columns, named
        folder = open_images(images, file.parent, follow_links=options.follow_links)
        chunks += _chunks(file, columns, named, counts, folder, own_split)
    if first is None or not chunks:
        raise ValueError(f"{path} has no rows")
    chunks, notes = without_validation(chunks)
    columns, (classes, _, _) = first
    labels = _unique(classes)
    names = {own: name for own, name in zip(labels, classes, strict=True) if own != name}
    return table_input(
        path, chunks, columns, options, classes=labels, class_names=names, notes=notes
    )


def _chunks(
    file: Path,
    columns: Columns,
    named: Sequence[Classes],
    counts: Sequence[int],
    folder: ImageSearch,
    split: str,
) -> list[Chunk]:
    classes, tasks, splits = named
    before = accumulate(counts, initial=0)
    return [
        ParquetChunk(
            path=file, count=count, columns=columns, images=folder, group=group,
            rows_before=rows_before, classes=_unique(classes), tasks=tasks, splits=splits,
            split=split,
        )
        for group, (count, rows_before) in enumerate(zip(counts, before, strict=False))
        if count
    ]  # fmt: skip


def _unique(classes: Classes) -> Classes:
    """Return names that are all different: instead of two equal ones their numbers."""
    return tuple(
        str(number) if classes.count(name) > 1 else name for number, name in enumerate(classes)
    )


def table_files(folder: Path) -> list[Path]:
    """Return the parquet or arrow files of a folder of tables, () if it is none.

    They may be in ``data``, in the folder of one configuration as on the hub, or in folders of
    splits. A parquet file beside a folder of its name describes the images in it.

    Raises:
        ValueError: if there are several configurations.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return sorted(folder.glob("*.arrow")) or sorted(folder.glob("*/*.arrow"))
    found = sorted(
        path
        for depth in ("*", "*/*", "*/*/*")
        for path in folder.glob(f"{depth}.parquet")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    found = [path for path in found if path.stem != "metadata"]
    if all(path.with_suffix("").is_dir() for path in found):
        return []
    homes: dict[Path, None] = {}
    for path in found:
        parts = [part for part in path.relative_to(folder).parts[:-1] if not file_split(part)]
        homes[folder.joinpath(*parts)] = None
    # A folder beside those of splits is no configuration, but a split of unknown name.
    if len([home for home in homes if not homes.keys() & set(home.parents)]) > 1:
        listed = ", ".join(map(str, homes))
        raise ValueError(f"{folder} has tables in several folders: give one of {listed}")
    return found


def _read_schema(path: Path, options: ColumnOptions) -> tuple[Columns, list[Classes], list[int]]:
    """Return the columns, names of classes, tasks and splits, and the rows of every part."""
    arrow, _ = _library()
    try:
        with _open(path) as file:
            counts, schema = file.counts(), file.schema
    except Exception as error:
        kind = "arrow" if path.suffix == ".arrow" else "parquet"
        raise ValueError(f"{path} is no {kind} file ({one_line(error)})") from None

    def peek(column: str) -> set[str]:
        with _open(path) as file:
            names = _class_names(schema.metadata or {}, column)
            values = file.values(column)
            return {
                names[int(value)] if value.isdigit() and int(value) < len(names) else value
                for value in values
            }

    of_type = {name: schema.field(name).type for name in set(schema.names)}
    images = {name for name, kind in of_type.items() if _holds_images(arrow.types, kind)}
    lists = {name for name, kind in of_type.items() if _holds_lists(arrow.types, kind)}
    turns = {name for name, kind in of_type.items() if _holds_turns(arrow.types, kind)}
    columns = find_columns(
        schema.names, options, str(path), images=images, lists=lists, turns=turns, peek=peek
    )
    notes = dict(schema.metadata or {})
    named = [_class_names(notes, columns.names.get(use, "")) for use in ("label", "task", "split")]
    return columns, named, counts


def _holds_images(types: Any, kind: Any) -> bool:
    """Return whether a type is bytes, a mapping with ``bytes``, or a list of such: images."""
    kind = kind.value_type if _holds_lists(types, kind) else kind
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    return bool(types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _holds_turns(types: Any, kind: Any) -> bool:
    """Return whether a type is a list of turns: mappings of a speaker and a text."""
    if not _holds_lists(types, kind) or not types.is_struct(kind.value_type):
        return False
    pairs = (("from", "value"), ("role", "content"), ("user", "assistant"))
    return any(all(kind.value_type.get_field_index(name) >= 0 for name in pair) for pair in pairs)


def _holds_lists(types: Any, kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _class_names(notes: Mapping[bytes, bytes], column: str) -> Classes:
    """Return the class names that the hub's library stored for a column of numbers, or ()."""
    try:
        noted = json.loads(notes[b"huggingface"])["info"]["features"][column]
        noted = noted[0] if isinstance(noted, list) else noted.get("feature", noted)
        names = noted["names"]
    except (KeyError, TypeError, ValueError, RecursionError, IndexError, AttributeError):
        return ()
    is_good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return tuple(names) if is_good else ()


def _library() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "parquet files are read by pyarrow, which is not installed: pip install mmcl[parquet]"
        ) from None
    return pyarrow, pyarrow.parquet
