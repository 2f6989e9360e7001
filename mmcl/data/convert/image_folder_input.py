"""Image folders with one folder for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmcl.data.convert.record import Chunk, InputData, InvalidRecord, Record
from mmcl.data.image_formats import OTHER_IMAGE_EXTENSIONS
from mmcl.data.shards.image_folder import extension_of, read_file
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.stored_sample import BadSample, IntArray

_CHUNK_RECORDS = 1000
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
           "val": "test", "valid": "test", "validation": "test"}  # fmt: skip
_EXTENSIONS = tuple(f".{each}" for each in (*IMAGES, *OTHER_IMAGE_EXTENSIONS))


@dataclass(frozen=True)
class FolderChunk:
    """Some images of one class folder; names are joined, as a list takes ten times the memory."""

    folder: str
    joined: bytes
    count: int
    label: str
    task: str
    split: str

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def subset(self, indices: IntArray) -> FolderChunk:
        """Return a chunk with only the images at these indices."""
        names = self.joined.split(b"\0")
        chosen = b"\0".join(names[index] for index in indices.tolist())
        return replace(self, joined=chosen, count=len(indices))

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the images."""
        for raw in self.joined.split(b"\0"):
            name = os.fsdecode(raw)
            relative = os.path.join(os.path.basename(self.folder), name)
            try:
                data = read_file(os.path.join(self.folder, name), relative)
                members = {extension_of(data, relative): data}
                yield Record(Path(name).stem, members, self.task, self.label, self.split)
            except BadSample as error:
                yield InvalidRecord(relative, str(error))


def natural(name: str) -> tuple[object, ...]:
    """Return a natural sort key, which sorts 2 before 10."""
    pieces = re.split(r"([0-9]{1,18})", name)
    return tuple((int(text), text) if index % 2 else text for index, text in enumerate(pieces))


def open_folder(path: Path, task_level: int | None = None) -> InputData:
    """Open an image folder: ``<class>/*``, or ``train/<class>/*`` and ``test/<class>/*``.

    Hidden files and folders are skipped; so are files without an image extension. ``train/`` and
    ``test/`` may also be below the folders of tasks.

    Args:
        path: of the folder.
        task_level: 1 = ``<task>/<class>/*``, 2 = ``<class>/<task>/*``, None = one task.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has another layout, saying what was found.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: correct the path")
    chunks: list[Chunk] = []
    classes: set[str] = set()
    tasks: dict[str, None] = {}
    for split, task, label, folder in _image_folders(path, task_level):
        classes.add(label)
        tasks[task] = None
        chunks += _chunks(folder, label, task, split)
    return InputData(
        "classification",
        str(path),
        chunks,
        sorted(classes, key=natural),
        tuple(filter(None, tasks)),
        task_column="folder" if task_level else "",
        interleaved=True,
    )


def _image_folders(path: Path, task_level: int | None) -> Iterator[tuple[str, str, str, Path]]:
    """Yield split, task, class and path of each folder of images; "" where none is stated."""
    wanted = {None: "<class>", 1: "<task>/<class>", 2: "<class>/<task>"}[task_level]
    for split, root in _split_folders(path):
        if task_level == 2:
            for label, home in _named_folders(root, path, wanted):
                for task, inner in _named_folders(home, path, wanted):
                    for own, folder in [(split, inner)] if split else _split_folders(inner):
                        yield own, task, label, folder
            continue
        for task, home in _named_folders(root, path, wanted) if task_level else [("", root)]:
            for own, inner in [(split, home)] if split else _split_folders(home):
                for label, folder in _named_folders(inner, path, wanted):
                    yield own, task, label, folder


def _split_folders(path: Path) -> list[tuple[str, Path]]:
    """Return the folders of train and test, or the folder itself if there are none."""
    inner = _folders(path)
    known = {name: _SPLITS.get(name.lower(), "") for name, _ in inner}
    if inner and all(known.values()) and "train" in known.values():
        # If there is a test folder, a validation folder belongs to neither split.
        has_test = any(name.lower().startswith("test") for name in known)
        return [
            (known[name], folder)
            for name, folder in inner
            if not (has_test and name.lower().startswith("val"))
        ]
    return [("", path)]


def _folders(path: Path) -> list[tuple[str, Path]]:
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return [(name, path / name) for name in sorted(names, key=natural)]


def _named_folders(path: Path, top: Path, wanted: str) -> list[tuple[str, Path]]:
    """Return name and path of the folders of classes or tasks; ``wanted`` is the layout."""
    found = _folders(path)
    if not found:
        direct = sum(1 for name in os.listdir(path) if name.lower().endswith(_EXTENSIONS))
        raise ValueError(
            f"{path} has no class folders and {direct} images: expected {top}/{wanted}/image.jpg; "
            "list images with texts or labels in a csv with the columns path and text, or path "
            "and label"
        )
    return [(_readable(name), folder) for name, folder in found]


def _readable(name: str) -> str:
    """Return a folder's name as a class name; bytes that are not UTF-8 are written in hex."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").strip()


def _chunks(folder: Path, label: str, task: str, split: str) -> list[Chunk]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _is_image(entry)]
    names.sort(key=natural)
    if not names:
        raise ValueError(
            f"{folder} has no images (.{', .'.join(IMAGES)}): remove this folder, or, if it "
            "holds the folders of classes or tasks, give --tasks_are_folders or --task_level 2"
        )
    return [
        FolderChunk(
            str(folder),
            b"\0".join(os.fsencode(name) for name in names[first : first + _CHUNK_RECORDS]),
            len(names[first : first + _CHUNK_RECORDS]),
            label,
            task,
            split,
        )
        for first in range(0, len(names), _CHUNK_RECORDS)
    ]


def _is_image(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    return name[0] != "." and name.lower().endswith(_EXTENSIONS) and not entry.is_dir()
