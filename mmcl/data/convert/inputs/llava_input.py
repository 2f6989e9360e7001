"""JSON as an input of ``mmcl data convert``: LLaVA-style records, or rows of a table."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.data.convert.inputs.columns import (
    ColumnOptions,
    absent_names,
    find_columns,
    find_split,
    list_names,
    stated_split,
)
from mmcl.data.convert.inputs.image_search import ImageSearch, open_images
from mmcl.data.convert.inputs.table_rows import TableRows, list_captions, table_input
from mmcl.data.convert.record import Chunk, InputData, InvalidRecord, Record, task_name
from mmcl.data.image_formats import as_members
from mmcl.data.question_options import is_absent
from mmcl.data.shards.image_folder import extension_of, load_image, read_file
from mmcl.data.shards.json_index import JsonRecords, find_records
from mmcl.data.shards.llava_json import ReferenceFile, open_references, read_sample, record_id
from mmcl.data.shards.record_layouts import (
    has_turns,
    is_instruction,
    question_keys_of,
    used_keys,
)
from mmcl.data.stored_sample import BadSample, IntArray

_CHUNK_RECORDS = 1000


@dataclass(frozen=True)
class ImageFolders:
    """Image folders of a public set; links in them are followed, as large sets are often linked.

    Args:
        paths: image paths start from one of them; the first that has the file is used.
    """

    paths: tuple[Path, ...]

    def read(self, stated: str, remarks: list[str] | None = None) -> tuple[str, bytes]:
        """Return the extension of the format, and the bytes, of an image of an instruction file.

        The first folder that has the file is by definition the right one, so ``remarks`` get none.

        Raises:
            BadSample: if the path is absolute or leads outside, or as `read_file` says.
        """
        inside = posixpath.normpath(stated)
        if inside.startswith(("/", "../")) or inside in ("..", ".") or stated[1:3] in (":/", ":\\"):
            raise BadSample(f"its image {stated[:200]!r} leads outside of the image folder")
        for folder in self.paths:
            path = folder / inside
            if os.path.exists(path):
                data = read_file(path, stated)
                return extension_of(data, stated), data
        raise BadSample(f"its image {stated[:200]!r} is missing")


@dataclass(frozen=True)
class InstructionChunk:
    """About a thousand records of an instruction file, and their numbers (n,) in it.

    ``task_key`` and ``split_key`` are keys of the task and the split of a record, "" if records
    state none; ``ignored`` are keys that are left out of every record, None = nothing is reported
    as not used.
    """

    records: JsonRecords
    numbers: IntArray
    images: ImageSearch | ImageFolders
    answer_field: str
    references: ReferenceFile | None
    task_key: str = ""
    split_key: str = ""
    ignored: frozenset[str] | None = None

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def subset(self, indices: IntArray) -> InstructionChunk:
        """Return a chunk with only the records at these indices."""
        return replace(self, records=self.records.part(indices), numbers=self.numbers[indices])

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the records.

        Raises:
            RuntimeError: if the file, or that of the references, changed since it was opened.
        """
        for index, number in enumerate(self.numbers.tolist()):
            name, remarks = "", list[str]()
            try:
                raw = self.records.read(index)
                if self.ignored and isinstance(raw, Mapping):
                    raw = {key: value for key, value in raw.items() if key not in self.ignored}
                name = record_id(raw)
                answers = self.references.answers(number, raw) if self.references else []
                sample = read_sample(raw, answers, self.answer_field)
                read = partial(self.images.read, remarks=remarks)
                images = [load_image(image, read) for image in sample.images]
                members = {"json": sample.data, **as_members(images)}
                task, split = self._task(raw, number), self._split(raw, number)
                unused = self._unused(raw)
                if images:  # what else names images is harmless beside them
                    others = [key for key in unused if "image" in key.lower()]
                    remarks += [f"{key!r} is not used, they have images" for key in others]
                    unused = tuple(key for key in unused if key not in others)
                yield Record(name, members, task, "", split, tuple(remarks), unused)
            except BadSample as error:
                yield InvalidRecord(name, str(error))

    def _unused(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        if self.ignored is None:
            return ()
        used = {*used_keys(raw, self.answer_field), self.task_key, self.split_key}
        return tuple(key for key, value in raw.items() if key not in used and not is_absent(value))

    def _task(self, raw: Mapping[str, Any], number: int) -> str:
        if not self.task_key:
            return ""
        return task_name(raw.get(self.task_key), self.task_key, f"record {number + 1}")

    def _split(self, raw: Mapping[str, Any], number: int) -> str:
        if not self.split_key:
            return ""
        stated = str(raw.get(self.split_key, ""))
        split = stated_split(self.split_key, stated)
        if split is None:
            raise BadSample(
                f"its split is {stated[:40]!r}, expected train, val or test (record {number + 1})"
            )
        return split


@dataclass(frozen=True, kw_only=True)
class JsonRows(TableRows):
    """About a thousand records that are rows of a table, and the number of the first.

    ``known`` are keys that are used or named already.
    """

    records: JsonRecords
    first: int
    known: frozenset[str]

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the records.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        for index in sorted(self.wanted()):
            is_question = self.columns.task_type == "instruction"
            try:
                raw = self.records.read(index)
                name = record_id(raw) if is_question else ""
            except BadSample as error:
                yield InvalidRecord("", str(error))
                continue
            if not isinstance(raw, Mapping):
                yield InvalidRecord("", "it is not a mapping of keys and values")
                continue
            row = {use: raw.get(name) for use, name in self.columns.names.items()}
            unused = tuple(raw.keys() - self.known)
            record = self.record(row, f"record {self.first + index + 1}", unused)
            yield replace(record, name=name or record.name)


def open_json(
    path: Path,
    options: ColumnOptions,
    images: Path | Sequence[Path] | None,
    *,
    answer_field: str = "answer",
    references: Path | None = None,
    in_place: bool = False,
    split: str = "",
) -> InputData:
    """Open a JSON list or JSON lines: instruction records, or rows of a table of other tasks.

    Args:
        path: of the file.
        options: see `find_columns`; the keys of the records are the columns.
        images: folders from which image paths start; None = that of the file.
        answer_field: key of the right answer in records with ``text``.
        references: file with all reference answers, see `open_references`.
        in_place: whether paths are taken as they are stated, as a run in place does.
        split: of a table's rows, "" if it states none.

    Raises:
        FileNotFoundError: if a file or the folder is missing.
        ValueError: if it is no JSON list, holds no records, or keys do not say what they are.
    """
    records = find_records(path)
    head = _Head(records, options.ignore_columns)
    folder = open_images(images, path.parent, is_exact=in_place, follow_links=options.follow_links)
    if references is None and head.is_table({"answer", "answers", answer_field}, options):
        if not in_place:
            return _open_rows(path, records, head, options, folder, split)
        _expect_usual_keys(path, head, options)
        options = replace(options, task_type="instruction")
    if options.task_type not in (None, "instruction"):
        raise ValueError(
            f"--task_type is {options.task_type}, and {path} is an instruction file, which is "
            "instruction: leave --task_type out, or list images with their texts in a csv"
        )
    options.expect_none(str(path), "task_column", "split_column", "ignore_columns")
    if in_place:
        _expect_none_ignored(head, answer_field)
    split_key = find_split(head.keys, options, str(path), head.values) or ""
    opened = open_instructions(path, folder, answer_field, references, options.task_column)
    chunks = [
        replace(chunk, split_key=split_key, ignored=head.ignored)
        for chunk in opened.chunks
        if isinstance(chunk, InstructionChunk)
    ]
    absent = [name for name in options.ignore_columns if name not in head.keys]
    return replace(opened, chunks=chunks, notes=absent_names(path, absent))


def _expect_none_ignored(head: _Head, answer_field: str) -> None:
    """Refuse ``ignore_columns`` that names what a run in place would read."""
    needed = sorted(head.ignored & head.used(answer_field))
    if needed:
        raise ValueError(
            f"--ignore_columns names {list_names(needed)}, and --in_place reads records as they "
            "are: leave --in_place out, or these keys out of the file"
        )


def _expect_usual_keys(path: Path, head: _Head, options: ColumnOptions) -> None:
    """Check that questions in place are found without options: by keys that a run knows too.

    Raises:
        ValueError: if a key is none that is read in place, or records have no questions.
    """
    columns = find_columns(head.keys, options, str(path), peek=head.values)
    if columns.task_type != "instruction":
        raise ValueError(
            f"{path} has no conversations, which --in_place needs: leave --in_place out"
        )
    known = question_keys_of(head.keys)
    for use, name in columns.names.items():
        if use not in ("task", "split") and "option#" not in use and known.get(use) != name:
            raise ValueError(
                f"{path} has the {use} under {name!r}, which is not read in place: rename the key, "
                "or leave --in_place out"
            )


class _Head:
    """The first records that are mappings, about a thousand, and their keys."""

    def __init__(self, records: JsonRecords, ignored: Sequence[str] = ()) -> None:
        self.records: list[Mapping[str, Any]] = []
        for index in range(min(len(records), _CHUNK_RECORDS)):
            try:
                raw = records.read(index)
            except BadSample:
                continue
            self.records += [raw] if isinstance(raw, Mapping) else []
        self.keys = list(dict.fromkeys(key for raw in self.records for key in raw))
        self.ignored = frozenset(ignored)

    def is_table(self, answers: set[str], options: ColumnOptions) -> bool:
        """Return whether the records are rows, whose columns are found by their names.

        They are not if a record has turns, or a ``text`` with an answer; nor if they are pairs such
        as query and response, unless an option names columns.
        """
        keys = set(self.keys) - self.ignored
        is_quiz = "text" in keys and bool({"question_id", *answers} & keys)
        if not keys or is_quiz or any(map(has_turns, self.records)):
            return False
        names_columns = (options.image_column, options.text_column, options.label_column)
        if any(names_columns) or options.task_type not in (None, "instruction"):
            return True
        return not any(map(is_instruction, self.records))

    def used(self, answer_field: str) -> set[str]:
        """Return the keys that the records need."""
        return {key for raw in self.records for key in used_keys(raw, answer_field) & raw.keys()}

    def values(self, key: str) -> set[str]:
        """Return the values of a key as texts."""
        return {str(raw.get(key, "")) for raw in self.records}


def _open_rows(
    path: Path,
    records: JsonRecords,
    head: _Head,
    options: ColumnOptions,
    folder: ImageSearch,
    split: str,
) -> InputData:
    columns = find_columns(head.keys, options, str(path), peek=head.values)
    text = columns.names.get("text")
    has_lists = text is not None and any(list_captions(raw.get(text)) for raw in head.records)
    columns = replace(columns, has_lists=has_lists)
    numbers = np.arange(len(records))
    chunks = []
    for first in range(0, len(records), _CHUNK_RECORDS):
        part = records.part(numbers[first : first + _CHUNK_RECORDS])
        chunks.append(
            JsonRows(
                path=path, count=len(part), columns=columns, images=folder, records=part,
                first=first, known=frozenset({*head.keys, *options.ignore_columns}), split=split,
            )
        )  # fmt: skip
    return table_input(path, chunks, columns, options)


def open_instructions(
    path: Path,
    images: Path | ImageFolders | ImageSearch | None,
    answer_field: str = "answer",
    references: Path | None = None,
    task_key: str | None = None,
) -> InputData:
    """Open a JSON list or JSON lines of instruction records.

    Args:
        path: of the file.
        images: folder from which image paths start; None = that of the file.
        answer_field: key of the right answer in records with ``text``.
        references: file with all reference answers, see `open_references`.
        task_key: key of the task that a record belongs to; None = records state none.

    Raises:
        FileNotFoundError: if a file or the folder is missing.
        ValueError: if it is no JSON list, or holds no records, or ``references`` is in no known
            layout.
    """
    records = find_records(path)
    folder = images
    if not isinstance(folder, ImageFolders | ImageSearch):
        folder = open_images(folder, path.parent)
    answers = None if references is None else open_references(references)
    numbers = np.arange(len(records))
    chunks: list[Chunk] = []
    for first in range(0, len(records), _CHUNK_RECORDS):
        own = slice(first, first + _CHUNK_RECORDS)
        chunks.append(
            InstructionChunk(
                records.part(own), numbers[own], folder, answer_field, answers, task_key or ""
            )
        )
    return InputData("instruction", str(path), chunks, task_column=task_key or "")
