"""Folders of pictures, one folder for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmcl.data.faults import BadSample
from mmcl.data.making.record import Piece, Record, Source, Unusable
from mmcl.data.shard import Numbers
from mmcl.data.shards.picture_files import extension_of, read_file

_PIECE = 1000
_PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "test", "valid": "test", "validation": "test"}  # fmt: skip
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class FolderPiece:
    """Some pictures of one class folder; their names are joined, as a list takes ten times more."""

    folder: str
    joined: bytes
    count: int
    label: str
    task: str
    part: str

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.count

    def some(self, places: Numbers) -> FolderPiece:
        """Return a piece with the pictures at these places alone."""
        names = self.joined.split(b"\0")
        chosen = b"\0".join(names[place] for place in places.tolist())
        return replace(self, joined=chosen, count=len(places))

    def read(self) -> Iterator[Record | Unusable]:
        """Give the pictures."""
        for raw in self.joined.split(b"\0"):
            name = os.fsdecode(raw)
            shown = os.path.join(os.path.basename(self.folder), name)
            try:
                data = read_file(os.path.join(self.folder, name), shown)
                members = {extension_of(data, shown): data}
                yield Record(Path(name).stem, members, self.task, self.label, self.part)
            except BadSample as fault:
                yield Unusable(shown, str(fault))


def natural(name: str) -> tuple[object, ...]:
    """Return a key that sorts 2 before 10."""
    split = re.split(r"([0-9]{1,18})", name)
    return tuple((int(text), text) if place % 2 else text for place, text in enumerate(split))


def open_folder(path: Path, tasks_are_folders: bool = False) -> Source:
    """List the pictures of ``<class>/*``, below ``train/`` and ``test/`` where these are there.

    Hidden files and folders are passed over; so are files that do not look like pictures by name.

    Args:
        path: of the folder.
        tasks_are_folders: there is a folder for each task, and the class folders are in these.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is laid out in another way; what was found is said.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: correct the path")
    pieces: list[Piece] = []
    classes: set[str] = set()
    tasks: dict[str, None] = {}
    for part, root in _parts(path):
        for task, home in _tasks(root) if tasks_are_folders else [("", root)]:
            for own, inner in [(part, home)] if part else _parts(home):
                for label, folder in _class_folders(inner, path, tasks_are_folders):
                    classes.add(label)
                    tasks[task] = None
                    pieces += _pieces(folder, label, task, own)
    return Source(
        "classify",
        str(path),
        pieces,
        sorted(classes, key=natural),
        tuple(filter(None, tasks)),
        is_spread=True,
    )


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Return the folders of train and test, or the folder itself where there are none."""
    inner = _folders(path)
    known = {name: _PARTS.get(name.lower(), "") for name, _ in inner}
    if inner and all(known.values()) and "train" in known.values():
        # Beside a test folder, what is there for validation belongs to neither part.
        has_test = any(name.lower().startswith("test") for name in known)
        return [
            (known[name], folder)
            for name, folder in inner
            if not (has_test and name.lower().startswith("val"))
        ]
    return [("", path)]


def _tasks(path: Path) -> list[tuple[str, Path]]:
    return _folders(path)


def _folders(path: Path) -> list[tuple[str, Path]]:
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return [(name, path / name) for name in sorted(names, key=natural)]


def _class_folders(path: Path, top: Path, tasks_are_folders: bool) -> list[tuple[str, Path]]:
    found = _folders(path)
    if not found:
        wanted = "<task>/<class>" if tasks_are_folders else "<class>"
        direct = sum(1 for name in os.listdir(path) if name.lower().endswith(_PICTURES))
        raise ValueError(
            f"{path} has no class folders and {direct} pictures: expected {top}/{wanted}/"
            "picture.jpg; pictures with texts or labels of their own go into a csv with the "
            "columns path and text, or path and label"
        )
    return [(_readable(name), folder) for name, folder in found]


def _readable(name: str) -> str:
    """Return a folder's name as a class name; bytes that are no text are written in hex."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").strip()


def _pieces(folder: Path, label: str, task: str, part: str) -> list[Piece]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _is_picture(entry)]
    names.sort(key=natural)
    if not names:
        raise ValueError(
            f"{folder} has no pictures (.jpg, .jpeg, .png, .webp): remove this folder, or, if it "
            "holds class folders of a task, give --tasks_are_folders"
        )
    return [
        FolderPiece(
            str(folder),
            b"\0".join(os.fsencode(name) for name in names[first : first + _PIECE]),
            len(names[first : first + _PIECE]),
            label,
            _readable(task),
            part,
        )
        for first in range(0, len(names), _PIECE)
    ]


def _is_picture(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    return name[0] != "." and name.lower().endswith(_PICTURES) and not entry.is_dir()
