"""Tables in parquet, as data sets on the hub have them; read one group of rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcl.data.faults import BadSample
from mmcl.data.making.columns import Columns, find_columns, record_of, shown
from mmcl.data.making.record import Piece, Record, Source, Unusable
from mmcl.data.shard import Numbers
from mmcl.data.shards.picture_files import PictureFolder, picture_folder

_PART = re.compile(r"(train|test)([-_.].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class ParquetPiece:
    """One group of rows of one file."""

    path: Path
    group: int
    count: int
    columns: Columns
    classes: tuple[str, ...]
    part: str
    pictures: PictureFolder
    chosen: Numbers | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count if self.chosen is None else len(self.chosen)

    def some(self, places: Numbers) -> ParquetPiece:
        """Return a piece with the rows at these places alone."""
        return replace(self, chosen=places if self.chosen is None else self.chosen[places])

    def read(self) -> Iterator[Record | Unusable]:
        """Give the rows.

        Raises:
            RuntimeError: if the file changed or cannot be read any more.
        """
        parquet = _library()
        wanted = range(self.count) if self.chosen is None else set(self.chosen.tolist())
        first = 0
        names = {name: use for use, name in self.columns.names.items()}
        try:
            with parquet.ParquetFile(self.path) as file:
                batches = file.iter_batches(
                    batch_size=64, row_groups=[self.group], columns=list(names), use_threads=False
                )
                for batch in batches:
                    own = [n for n in range(batch.num_rows) if first + n in wanted]
                    for place in own:
                        cells = {name: batch.column(name)[place].as_py() for name in names}
                        yield self._record({names[name]: cell for name, cell in cells.items()})
                    first += batch.num_rows
        # pyarrow's errors are ValueError, OSError, KeyError and others.
        except Exception as error:
            raise RuntimeError(
                f"{self.path} cannot be read any more ({' '.join(str(error).split())[:200]})"
            ) from None
        if first != self.count:
            raise RuntimeError(f"{self.path} changed while it was read: start again")

    def _record(self, row: dict[str, Any]) -> Record | Unusable:
        label = row.get("label")
        if isinstance(label, int) and not isinstance(label, bool) and self.classes:
            row["label"] = self.classes[label] if 0 <= label < len(self.classes) else None
        if self.part and not row.get("split"):
            row["split"] = self.part
        try:
            return record_of(row, self.columns.kind, self.pictures)
        except BadSample as fault:
            return Unusable(shown(row), str(fault))


def open_parquet(path: Path, kind: str | None = None, images: Path | None = None) -> Source:
    """Find the groups of rows of a file, or of all ``.parquet`` files of a folder.

    Files called ``train...`` and ``test...`` are these parts. Names of classes are taken from
    what the hub's library wrote into the file, where it did.

    Args:
        path: of the file or folder.
        kind: see `find_columns`.
        images: folder from which picture paths start; None = that of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if pyarrow is not installed.
        ValueError: if columns are missing, or a file is no parquet.
    """
    files = parquet_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    pieces: list[Piece] = []
    columns: Columns | None = None
    classes: tuple[str, ...] = ()
    for file in files:
        own, classes, counts = _look(file, kind)
        if columns is not None and own != columns:
            raise ValueError(f"{file} has other columns than {files[0]}: make them one by one")
        columns = own
        named = _PART.fullmatch(file.stem)
        part = named[1].lower() if named and len(files) > 1 else ""
        pictures = picture_folder(images or file.parent)
        pieces += [
            ParquetPiece(file, group, count, columns, classes, part, pictures)
            for group, count in enumerate(counts)
            if count
        ]
    if columns is None or not pieces:
        raise ValueError(f"{path} has no rows")
    return Source(columns.kind, str(path), pieces, classes)


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder, or of its ``data`` folder as on the hub."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _look(path: Path, kind: str | None) -> tuple[Columns, tuple[str, ...], list[int]]:
    """Return the columns, the names of classes and the rows of every group of a file."""
    parquet = _library()
    try:
        with parquet.ParquetFile(path) as file:
            schema, about = file.schema_arrow, file.metadata
            counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            names, notes = list(schema.names), dict(schema.metadata or {})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no parquet file ({reason})") from None
    columns = find_columns(names, kind, str(path))
    return columns, _class_names(notes, columns.names.get("label", "")), counts


def _class_names(notes: Mapping[bytes, bytes], column: str) -> tuple[str, ...]:
    """Return the classes that the hub's library noted for a column of numbers; () without."""
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
