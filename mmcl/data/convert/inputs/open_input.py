"""Opening of the input of a conversion, by its path: image folders, tables, JSON files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmcl.data.convert.inputs.caption_input import caption_layout, open_caption_file
from mmcl.data.convert.inputs.columns import ColumnOptions
from mmcl.data.convert.inputs.image_folder_input import open_folder
from mmcl.data.convert.inputs.llava_input import open_json
from mmcl.data.convert.inputs.parquet_input import open_parquet, table_files
from mmcl.data.convert.inputs.sidecar_input import (
    find_metadata,
    has_captions,
    open_captions,
    open_metadata,
)
from mmcl.data.convert.inputs.table_input import TABLES, open_table, open_tables, table_paths
from mmcl.data.convert.record import InputData

_TABLES = (*TABLES, ".txt")
_PACKED = {
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst"), "compressed: unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet: save it as .csv in UTF-8"),
    ".tar": "a shard, which needs no conversion: list it on a card, see docs/data.md",
    ".arrow": "part of a saved data set: give its folder",
}
"""Extension -> why a file is refused, and what to do."""
_INSTRUCTIONS = (".json", ".jsonl")


def is_instructions(path: Path) -> bool:
    """Return whether a path is taken for LLaVA-style JSON."""
    return path.suffix.lower() in _INSTRUCTIONS


def open_input(
    path: Path,
    task_type: str | None = None,
    images: Path | Sequence[Path] | None = None,
    *,
    task_column: str | None = None,
    task_level: int | None = None,
    answer_field: str = "answer",
    references: Path | None = None,
    options: ColumnOptions | None = None,
    in_place: bool = False,
) -> InputData:
    """Open the input of a conversion: an image folder, a table or a JSON file.

    Args:
        path: a folder, or a file whose extension says what it is.
        task_type: of the tasks; None = what the input allows.
        images: folders from which image paths start; None = that of the input.
        task_column: of a table: column that states the task; of JSON: key of each record.
        task_level: of an image folder: level whose folders are the tasks, see `open_folder`.
        answer_field: of JSON: key of the right answer in records with ``text``.
        references: of JSON: file with all reference answers.
        options: other options about columns; the two above are put into them.
        in_place: whether image paths are taken as they are stated, as a run in place does.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if it is of no known type, has another layout, or an option does not fit it.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(f"SOURCE is {str(path)!r}, which is remote: download it first")
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}: correct SOURCE")
    columns = replace(options or ColumnOptions(), task_type=task_type, task_column=task_column)
    if references is not None and not is_instructions(path):
        raise ValueError(
            f"--references is for LLaVA-style JSON, and {path} is none: put the answers into a "
            "column answer"
        )
    if path.is_dir() and not table_files(path) and not table_paths(path):
        return _open_folder(path, columns, images, task_level)
    return _open_file(path, columns, images, task_level, answer_field, references, in_place)


def _open_file(
    path: Path,
    columns: ColumnOptions,
    images: Path | Sequence[Path] | None,
    task_level: int | None,
    answer_field: str,
    references: Path | None,
    in_place: bool,
) -> InputData:
    """Open a table, a folder of tables, a JSON file or a caption file."""
    if task_level is not None:
        raise ValueError(
            f"--tasks_are_folders and --task_level are for image folders, and {path} is none: give "
            "tables a column task, or say with --task_column which column or key it is"
        )
    layout = caption_layout(path) if path.is_file() and not columns.columns else None
    if layout is not None:
        of_answers = (
            ("references", references is not None), ("in_place", in_place),
            ("answer_field", answer_field != "answer"),
        )  # fmt: skip
        for option, is_given in of_answers:
            if is_given:
                raise ValueError(f"--{option} is for answers, {path} has captions: leave it out")
        return open_caption_file(path, layout, columns, images)
    if columns.columns and path.suffix.lower() not in _TABLES:
        raise ValueError(f"--columns is for .csv, .tsv and .txt, and {path} is none: leave it out")
    if path.is_dir():
        return _open_tables(path, columns, images)
    if path.suffix.lower() == ".parquet":
        return open_parquet(path, columns, images)
    if path.suffix.lower() in _TABLES:
        return open_table(path, columns, images)
    if is_instructions(path):
        return open_json(
            path, columns, images,
            answer_field=answer_field, references=references, in_place=in_place,
        )  # fmt: skip
    raise ValueError(_unknown_type(path))


def _open_tables(
    path: Path, columns: ColumnOptions, images: Path | Sequence[Path] | None
) -> InputData:
    """Open a folder of parquet files, or of csv and tsv files."""
    if table_files(path):
        return open_parquet(path, columns, images)
    return open_tables(path, table_paths(path), columns, images)


def _unknown_type(path: Path) -> str:
    if path.suffix.lower() in _PACKED:
        return f"{path} is {_PACKED[path.suffix.lower()]}"
    return (
        f"{path} is no folder and ends in {path.suffix or 'nothing'!r}: expected .csv, .tsv, "
        ".parquet, .json, .jsonl or, with --columns, .txt"
    )


def _open_folder(
    path: Path,
    columns: ColumnOptions,
    images: Path | Sequence[Path] | None,
    task_level: int | None,
) -> InputData:
    """Open a folder of images: with ``metadata`` tables, with texts beside them, or of classes."""
    if images is not None:
        raise ValueError(f"--images is for tables and JSON, and {path} is a folder: leave it out")
    if metadata := find_metadata(path):
        return open_metadata(path, metadata, columns)
    columns.expect_none(str(path), "ignore_columns")
    if columns.task_type == "instruction":
        raise ValueError(
            f"--task_type is instruction, and {path} is a folder of images: leave --task_type out, "
            "or list images with their questions and answers in a csv"
        )
    if not any(path.iterdir()) or not any(path.glob("*.tar")):
        if has_captions(path, columns):
            return open_captions(path, columns, task_level)
        return open_folder(path, task_level, columns.ignore_columns)
    raise ValueError(
        f"{path} holds shards (.tar), which need no conversion: list them on a card, see "
        "docs/data.md"
    )
