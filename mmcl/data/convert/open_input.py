"""Input of a conversion, opened by what its path is.

A file of its own: it imports every input format, and none of them imports it.
"""

from __future__ import annotations

from pathlib import Path

from mmcl.data.convert.csv_input import open_table
from mmcl.data.convert.image_folder_input import open_folder
from mmcl.data.convert.llava_input import open_instructions
from mmcl.data.convert.parquet_input import open_parquet, parquet_files
from mmcl.data.convert.record import InputData

_TABLES = (".csv", ".tsv")
_INSTRUCTIONS = (".json", ".jsonl")


def is_instructions(path: Path) -> bool:
    """Return whether a path is taken for LLaVA-style JSON."""
    return path.suffix.lower() in _INSTRUCTIONS


def open_source(
    path: Path,
    task_type: str | None = None,
    images: Path | None = None,
    *,
    tasks_are_folders: bool = False,
    answer_field: str = "answer",
    references: Path | None = None,
) -> InputData:
    """Open the input of a conversion: an image folder, a table or an instruction file.

    Args:
        path: a folder, or a file whose extension says what it is.
        task_type: of the tasks; None = what the input allows.
        images: folder from which image paths start; None = that of the input.
        tasks_are_folders: of an image folder: there is a folder for each task.
        answer_field: of JSON: key of the right answer in records with ``text``.
        references: of JSON: file with all reference answers.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if it is of no known type, has another layout, or an option does not fit it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}: correct SOURCE")
    if tasks_are_folders and (not path.is_dir() or parquet_files(path)):
        raise ValueError(
            f"--tasks_are_folders is for image folders, and {path} is none: give tables a column "
            "task"
        )
    if references is not None and not is_instructions(path):
        raise ValueError(
            f"--references is for LLaVA-style JSON, and {path} is none: put the answers into a "
            "column answer"
        )
    if path.suffix.lower() in _TABLES and path.is_file():
        return open_table(path, task_type, images)
    if path.suffix.lower() == ".parquet" or (path.is_dir() and parquet_files(path)):
        return open_parquet(path, task_type, images)
    if path.is_dir():
        _expect_task_type(path, task_type, "classification", "a folder of classes")
        return open_folder(path, tasks_are_folders)
    if is_instructions(path):
        _expect_task_type(path, task_type, "instruction", "an instruction file")
        return open_instructions(path, images, answer_field, references)
    raise ValueError(
        f"{path} is no folder and ends in {path.suffix or 'nothing'!r}: expected .csv, .tsv, "
        ".parquet, .json or .jsonl"
    )


def _expect_task_type(path: Path, task_type: str | None, own: str, what: str) -> None:
    if task_type not in (None, own):
        raise ValueError(
            f"--task_type is {task_type}, and {path} is {what}, which is {own}: "
            "leave --task_type out, or list images with their texts in a csv"
        )
