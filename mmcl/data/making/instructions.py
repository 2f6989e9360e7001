"""LLaVA-style JSON as a source of `mmcl data make`: records are parsed one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmcl.data.builders.llava_json import read_sample
from mmcl.data.faults import BadSample
from mmcl.data.making.record import Piece, Record, Source, Unusable
from mmcl.data.shard import Numbers
from mmcl.data.shards.json_records import JsonRecords, find_records
from mmcl.data.shards.picture_files import PictureFolder, picture_folder

_PIECE = 1000


@dataclass(frozen=True)
class InstructionPiece:
    """About a thousand records."""

    records: JsonRecords
    pictures: PictureFolder

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def some(self, places: Numbers) -> InstructionPiece:
        """Return a piece with the records at these places alone."""
        return replace(self, records=self.records.part(places))

    def read(self) -> Iterator[Record | Unusable]:
        """Give the records.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        for place in range(len(self.records)):
            name = ""
            try:
                raw = self.records.read(place)
                if isinstance(raw, dict):
                    stated = raw.get("id", raw.get("question_id"))
                    name = "" if stated is None else str(stated)
                sample = read_sample(raw)
                members = {"json": sample.data}
                if sample.picture is not None:
                    extension, data = self.pictures.read(sample.picture)
                    members[extension] = data
                yield Record(name, members)
            except BadSample as fault:
                yield Unusable(name, str(fault))


def open_instructions(path: Path, images: Path | None) -> Source:
    """Find the records of a JSON list or JSON lines.

    Args:
        path: of the file.
        images: folder from which picture paths start; None = that of the file.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if it is no JSON list, or holds no records.
    """
    records = find_records(path)
    pictures = picture_folder(images or path.parent)
    pieces: list[Piece] = [
        InstructionPiece(records.part(slice(first, first + _PIECE)), pictures)
        for first in range(0, len(records), _PIECE)
    ]
    return Source("answer", str(path), pieces)
