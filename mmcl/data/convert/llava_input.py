"""LLaVA-style JSON as an input of ``mmcl data convert``; records are parsed one at a time."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.data.convert.record import Chunk, InputData, InvalidRecord, Record, task_name
from mmcl.data.shards.image_folder import ImageFolder, extension_of, open_image_folder, read_file
from mmcl.data.shards.json_index import JsonRecords, find_records
from mmcl.data.shards.llava_json import ReferenceFile, open_references, read_sample, record_id
from mmcl.data.stored_sample import BadSample, IntArray

_CHUNK_RECORDS = 1000


@dataclass(frozen=True)
class ImageFolders:
    """Image folders of a public set; links in them are followed, as large sets are often linked.

    Args:
        paths: image paths start from one of them; the first that has the file is used.
    """

    paths: tuple[Path, ...]

    def read(self, stated: str) -> tuple[str, bytes]:
        """Return the extension of the format, and the bytes, of an image of an instruction file.

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

    ``task_key`` is the key of the task that a record belongs to, "" if records state none.
    """

    records: JsonRecords
    numbers: IntArray
    images: ImageFolder | ImageFolders
    answer_field: str
    references: ReferenceFile | None
    task_key: str = ""

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
            name = ""
            try:
                raw = self.records.read(index)
                name = record_id(raw)
                answers = self.references.answers(number, raw) if self.references else []
                sample = read_sample(raw, answers, self.answer_field)
                members = {"json": sample.data}
                if sample.image is not None:
                    extension, data = self.images.read(sample.image)
                    members[extension] = data
                yield Record(name, members, self._task(raw, number))
            except BadSample as error:
                yield InvalidRecord(name, str(error))

    def _task(self, raw: Mapping[str, Any], number: int) -> str:
        if not self.task_key:
            return ""
        return task_name(raw.get(self.task_key), self.task_key, f"record {number + 1}")


def open_instructions(
    path: Path,
    images: Path | ImageFolders | None,
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
    folder = (
        images if isinstance(images, ImageFolders) else open_image_folder(images or path.parent)
    )
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
