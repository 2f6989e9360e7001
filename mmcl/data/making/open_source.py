"""Finding out what a path is that somebody wants to make a stream of."""

from __future__ import annotations

from pathlib import Path

from mmcl.data.making.folder import open_folder
from mmcl.data.making.instructions import open_instructions
from mmcl.data.making.parquet import open_parquet, parquet_files
from mmcl.data.making.record import Source
from mmcl.data.making.table import open_table

_TABLES = (".csv", ".tsv")
_INSTRUCTIONS = (".json", ".jsonl")


def is_instructions(path: Path) -> bool:
    """Tell whether a path is taken for LLaVA-style JSON."""
    return path.suffix.lower() in _INSTRUCTIONS


def open_source(
    path: Path, kind: str | None, images: Path | None, tasks_are_folders: bool = False
) -> Source:
    """Open a folder of pictures, a table or an instruction file.

    Args:
        path: of it; its ending says what it is.
        kind: of the tasks; None = what the source allows.
        images: folder from which picture paths start; None = where the source lies.
        tasks_are_folders: of a folder: there is one for each task.

    Raises:
        FileNotFoundError: if something is not there.
        ValueError: if it is of no known sort, or not laid out as such.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}: correct SOURCE")
    if tasks_are_folders and (not path.is_dir() or parquet_files(path)):
        raise ValueError(
            f"--tasks_are_folders is for folders of pictures, and {path} is none: give tables a "
            "column task"
        )
    if path.suffix.lower() in _TABLES and path.is_file():
        return open_table(path, kind, images)
    if path.suffix.lower() == ".parquet" or (path.is_dir() and parquet_files(path)):
        return open_parquet(path, kind, images)
    if path.is_dir():
        _expect_kind(path, kind, "classify", "a folder of classes")
        return open_folder(path, tasks_are_folders)
    if is_instructions(path):
        _expect_kind(path, kind, "answer", "an instruction file")
        return open_instructions(path, images)
    raise ValueError(
        f"{path} is no folder and ends in {path.suffix or 'nothing'!r}: expected .csv, .tsv, "
        ".parquet, .json or .jsonl"
    )


def _expect_kind(path: Path, kind: str | None, own: str, what: str) -> None:
    if kind not in (None, own):
        raise ValueError(
            f"--kind is {kind}, and {path} is {what}, which is {own}: leave --kind out, or list "
            "pictures with their texts in a csv"
        )
