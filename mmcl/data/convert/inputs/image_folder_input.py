"""Image folders with one folder for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mmcl.data.convert.inputs.column_names import is_image_name
from mmcl.data.convert.inputs.columns import absent_names
from mmcl.data.convert.record import (
    InputData,
    InvalidRecord,
    Record,
    expect_no_near_splits,
    file_split,
    split_of,
    without_validation,
)
from mmcl.data.shards.image_folder import extension_of, read_file
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.stored_sample import BadSample, IntArray

_CHUNK_RECORDS = 1000
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")
_LISTS = (".txt", ".token", ".lst", ".list")
_LOOKED_AT = 4096
_NAMED = 3


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
                members = {extension_of(data, relative): data, **self.texts(name)}
                yield Record(Path(name).stem, members, self.task, self.label, self.split)
            except BadSample as error:
                yield InvalidRecord(relative, str(error))

    def texts(self, name: str) -> dict[str, bytes]:
        """Return the other members of an image, none for a class folder."""
        return {}


Chunked = TypeVar("Chunked", bound=FolderChunk)


def natural(name: str) -> tuple[object, ...]:
    """Return a natural sort key, which sorts 2 before 10."""
    pieces = re.split(r"([0-9]{1,18})", name)
    return tuple((int(text), text) if index % 2 else text for index, text in enumerate(pieces))


@dataclass
class ImageTree:
    """Folders and images below a folder; what is passed over is kept for a note.

    Hidden files and folders are skipped.

    Args:
        top: the folder.
        ignored: names, or paths from ``top``, of files and folders that are harmless.
    """

    top: Path
    ignored: Sequence[str] = ()
    others: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    met: set[str] = field(default_factory=set)

    def folders(self, path: Path) -> list[tuple[str, Path]]:
        """Return name and path of the folders in a folder."""
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and self._is_seen(entry)]
        return [(name, path / name) for name in sorted(names, key=natural)]

    def images(self, path: Path) -> list[str]:
        """Return the names of the images in a folder, and keep those of its other files."""
        found, others = list[str](), list[str]()
        with os.scandir(path) as entries:
            for entry in entries:
                if self._is_seen(entry) and not entry.is_dir():
                    (found if is_image_name(entry.name) else others).append(entry.name)
        self.others += [self.name(path / other) for other in sorted(others)]
        return sorted(found, key=natural)

    def name(self, path: Path) -> str:
        """Return the path from the top, in UTF-8."""
        return readable_name(str(path.relative_to(self.top)))

    def count_below(self, path: Path) -> int:
        """Return the number of images in a folder and all folders below it."""
        below = sum(self.count_below(folder) for _, folder in self.folders(path))
        with os.scandir(path) as entries:
            return below + sum(self._is_seen(entry) and is_image_name(entry.name) and
                               not entry.is_dir() for entry in entries)  # fmt: skip

    def notes(self) -> list[str]:
        """Return what was passed over: a sentence on files, and one on folders."""
        others = list(dict.fromkeys(self.others))
        notes = []
        if others:
            more = ", ..." if len(others) > _NAMED else ""
            what = (
                "1 file is no image" if len(others) == 1 else f"{len(others):,} files are no images"
            )
            notes.append(f"not used: {what} ({', '.join(others[:_NAMED])}{more})")
        if self.unused:
            notes.append(f"not used: folders without images ({', '.join(self.unused[:20])})")
        return notes + absent_names(self.top, [n for n in self.ignored if n not in self.met])

    def _is_seen(self, entry: os.DirEntry[str]) -> bool:
        if entry.name[0] == "." or not self.ignored:
            return entry.name[0] != "."
        own = {entry.name, self.name(Path(entry.path))}.intersection(self.ignored)
        self.met |= own
        return not own


def open_folder(
    path: Path, task_level: int | None = None, ignored: Sequence[str] = ()
) -> InputData:
    """Open an image folder: ``<class>/*``, or ``train/<class>/*`` and ``test/<class>/*``.

    Hidden files and folders are skipped; other files without an image extension are named once.
    The folders of splits may also be below one folder (``images/train``), or below the folders of
    tasks or classes. Where there is a test split, validation images are left out.

    Args:
        path: of the folder.
        task_level: 1 = ``<task>/<class>/*``, 2 = ``<class>/<task>/*``, None = one task.
        ignored: names of files and folders that are harmless.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has another layout, saying what was found.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: correct the path")
    tree = ImageTree(path, ignored)
    chunks: list[FolderChunk] = []
    for split, task, label, folder in _image_folders(tree, task_level):
        chunks += _chunks(tree, folder, label, task, split)
    chunks, notes = without_validation(chunks)
    _expect_same_classes(path, chunks)
    classes = {chunk.label for chunk in chunks}
    tasks = dict.fromkeys(chunk.task for chunk in chunks)
    return InputData(
        "classification",
        str(path),
        chunks,
        sorted(classes, key=natural),
        tuple(filter(None, tasks)),
        task_column="folder" if task_level else "",
        notes=[*notes, *tree.notes()],
        interleaved=True,
    )


def _image_folders(tree: ImageTree, task_level: int | None) -> Iterator[tuple[str, str, str, Path]]:
    """Yield split, task, class and path of each folder of images; "" where none is stated."""
    wanted = {None: "<class>", 1: "<task>/<class>", 2: "<class>/<task>"}[task_level]
    for split, root in _split_folders(tree, tree.top, may_descend=True):
        if task_level == 2:
            for label, home in _named_folders(tree, root, wanted):
                for task, inner in _named_folders(tree, home, wanted):
                    for own, folder in _inner_splits(tree, inner, split):
                        yield own, task, label, folder
            continue
        for task, home in _named_folders(tree, root, wanted) if task_level else [("", root)]:
            for own, inner in [(split, home)] if split else _split_folders(tree, home):
                for label, folder in _named_folders(tree, inner, wanted):
                    for last, images in _inner_splits(tree, folder, own):
                        yield last, task, label, images


def _split_folders(
    tree: ImageTree, path: Path, may_descend: bool = False
) -> list[tuple[str, Path]]:
    """Return the folders of the splits, or the folder itself if there are none.

    A folder ``train`` that holds images and no folders is a class (of vehicles), not a split.
    """
    inner = tree.folders(path)
    splits: list[tuple[str, Path]] = [
        (split_of(name) or "", folder)
        for name, folder in inner
        if split_of(name) and tree.folders(folder)
    ]
    if splits:
        chosen = {folder for _, folder in splits}
        for _, folder in inner:
            if folder not in chosen and tree.count_below(folder):
                raise ValueError(
                    f"{folder} is of no known split and stands beside {splits[0][1]}: name it "
                    f"train, val or test, or give --ignore_columns {tree.name(folder)}"
                )
        tree.unused += [tree.name(folder) for _, folder in inner if folder not in chosen]
        _expect_no_images(tree, path)
        return splits
    is_all = all(file_split(name) for name, _ in inner)
    expect_no_near_splits(
        (name for name, folder in inner if not split_of(name) and (is_all or tree.folders(folder))),
        str(path),
    )
    if inner and all(split_of(name) for name, _ in inner):
        raise ValueError(
            f"{path} has only folders of splits ({', '.join(name for name, _ in inner)}) and no "
            "folders of classes in them: put a text beside each image, or list images with texts "
            "or labels in a csv"
        )
    if may_descend:
        homes = [folder for _, folder in inner if _holds_splits(tree, folder)]
        rest = [folder for _, folder in inner if folder not in homes]
        if len(homes) == 1 and not any(map(tree.count_below, rest)):
            tree.unused += map(tree.name, rest)
            _expect_no_images(tree, path)
            return _split_folders(tree, homes[0])
    return [("", path)]


def _holds_splits(tree: ImageTree, path: Path) -> bool:
    inner = tree.folders(path)
    return any(split_of(name) == "train" and tree.folders(folder) for name, folder in inner)


def _inner_splits(tree: ImageTree, path: Path, split: str) -> list[tuple[str, Path]]:
    """Return the folders of a class's images: its own, those of its splits, or ``images``."""
    inner = tree.folders(path)
    if not inner or tree.count_below(path) == 0:
        return [(split, path)]
    filled = [(name, folder) for name, folder in inner if tree.count_below(folder)]
    has_images = any(is_image_name(name) for name in os.listdir(path))
    if not filled:
        tree.unused += [tree.name(folder) for _, folder in inner]
    elif has_images:
        raise ValueError(
            f"{path} has images, and a folder of images {filled[0][0]!r}: put all images of a "
            f"class into one folder, or give --ignore_columns {tree.name(filled[0][1])}"
        )
    elif not split and all(split_of(name) for name, _ in filled):
        return [(split_of(name) or "", folder) for name, folder in filled]
    elif len(filled) == 1 and filled[0][0].lower() in ("images", "imgs", "img"):
        return [(split, filled[0][1])]
    return [(split, path)]


def _named_folders(tree: ImageTree, path: Path, wanted: str) -> list[tuple[str, Path]]:
    """Return name and path of the folders of classes or tasks; ``wanted`` is the layout."""
    found = tree.folders(path)
    if not found:
        direct = len(tree.images(path))
        raise ValueError(
            f"{path} has no class folders and {direct} images: expected {tree.top}/{wanted}/"
            "image.jpg; put a text beside each image (1.jpg and 1.txt), or list images with texts "
            "or labels in a csv with the columns path and text, or path and label"
        )
    _expect_no_images(tree, path)
    return [(readable_name(name), folder) for name, folder in found]


def _expect_no_images(tree: ImageTree, path: Path) -> None:
    """Refuse images, and at the top tables, beside folders."""
    images = tree.images(path)
    if images:
        raise ValueError(
            f"{path} has {len(images)} images beside its folders, such as "
            f"{readable_name(images[0])!r}: move them into a folder of a class, or give "
            "--ignore_columns with their names"
        )
    tables = [name for name in tree.others if "/" not in name and _is_table(path / name)]
    if tables and path == tree.top:
        raise ValueError(
            f"{path} has the table {tables[0]!r} beside its folders, which may hold texts, labels "
            f"or splits: give {path / tables[0]} as SOURCE, or --ignore_columns {tables[0]}"
        )


def _is_table(path: Path) -> bool:
    """Return whether a file is a table by its name, or a list with names of images."""
    if path.suffix.lower() in _TABLES:
        return True
    if path.suffix.lower() not in _LISTS or not path.is_file():
        return False
    with path.open("rb") as file:
        words = re.split(r"[\s,;|#]+", file.read(_LOOKED_AT).decode("utf-8", "replace"))
    return any(map(is_image_name, words))


def _expect_same_classes(path: Path, chunks: Sequence[FolderChunk]) -> None:
    """Refuse a split whose classes are all others, which are no classes then."""
    of_split: dict[str, set[str]] = {}
    for chunk in chunks:
        of_split.setdefault(chunk.split, set()).add(chunk.label)
    known = of_split.get("train", set())
    for split, labels in of_split.items():
        if known and not labels & known:
            raise ValueError(
                f"the {split} split of {path} has none of the classes of the training split, but "
                f"{', '.join(map(repr, sorted(labels)[:_NAMED]))}: sort its images into folders of "
                "classes, or list them in a csv for --test"
            )


def readable_name(name: str) -> str:
    """Return a folder's name as a class name; bytes that are not UTF-8 are written in hex."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").strip()


def _chunks(tree: ImageTree, folder: Path, label: str, task: str, split: str) -> list[FolderChunk]:
    names = tree.images(folder)
    if not names:
        raise ValueError(
            f"{folder} has no images (.{', .'.join(IMAGES)}): remove this folder, or, if it "
            "holds the folders of classes or tasks, give --tasks_are_folders or --task_level 2"
        )
    return folder_chunks(FolderChunk, folder, names, label, task, split)


def folder_chunks(
    kind: type[Chunked], folder: Path, names: Sequence[str], label: str, task: str, split: str
) -> list[Chunked]:
    """Return chunks of about a thousand images of a folder."""
    parts = [
        names[first : first + _CHUNK_RECORDS] for first in range(0, len(names), _CHUNK_RECORDS)
    ]
    return [
        kind(str(folder), b"\0".join(map(os.fsencode, part)), len(part), label, task, split)
        for part in parts
    ]
