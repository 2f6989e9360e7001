"""Input from the caption files of COCO and Flickr30k, whose images have several captions each.

Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json``, COCO's own ``captions_*.json``,
``results_20130124.token`` of Flickr30k and ``results.csv`` as it is on Kaggle. A record is an image
with the list of its captions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmcl.data.convert.inputs.columns import ColumnOptions, absent_names
from mmcl.data.convert.inputs.image_search import ImageSearch, open_images
from mmcl.data.convert.record import (
    Chunk,
    InputData,
    InvalidRecord,
    Record,
    captions_member,
    split_of,
)
from mmcl.data.stored_sample import BadSample, IntArray, one_line

Layout = Literal["karpathy", "coco", "token", "results"]

_CHUNK_RECORDS = 1000
_HEAD = 1 << 16
_MAX_BYTES = 2 << 30
_TOKEN = re.compile(r"(?P<image>[^\t]+\.\w+)#\d+(?:\s*\t)(?P<caption>.*)")
_RESULTS_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
# One line of the file on Kaggle lacks its second bar.
_RESULTS = re.compile(r"(?P<image>[^|]+)\|\s*\d+(?:\s*\||\s+)(?P<caption>.*)")
_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images")
"""Folders in which the images of Flickr30k are usually unpacked, next to the file."""
_USED = {"filename", "filepath", "file_name", "split", "sentences", "image_id", "caption", "id"}
_HARMLESS = {
    "cocoid", "imgid", "sentids", "license", "coco_url", "flickr_url", "url", "height", "width",
    "date_captured",
}  # fmt: skip
"""Keys that are known to be about an image and of no use here."""


@dataclass
class _Image:
    """One image: the paths at which it may be, its captions, and its split ("" = none stated)."""

    paths: tuple[str, ...]
    captions: list[Any] = field(default_factory=list)
    split: str = ""
    problem: str = ""
    unused: tuple[str, ...] = ()

    def record(self, images: ImageSearch) -> Record | InvalidRecord:
        """Read the image and return the record."""
        remarks: list[str] = []
        try:
            if self.problem:
                raise BadSample(self.problem)
            if not all(isinstance(caption, str) for caption in self.captions):
                raise BadSample("one of its captions is no text")
            found = [p for p in self.paths for f in images.folders if _exists(f, p)]
            extension, data = images.read(found[0] if found else self.paths[0], remarks)
            texts = [caption.strip() for caption in self.captions]
            members = {extension: data, "json": captions_member(texts)}
        except BadSample as error:
            return InvalidRecord(self.paths[0], str(error))
        return Record(
            self.paths[0], members, split=self.split, remarks=tuple(remarks), unused=self.unused
        )


@dataclass(frozen=True)
class CaptionChunk:
    """About a thousand images with their captions."""

    images: Sequence[_Image]
    folder: ImageSearch

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def subset(self, indices: IntArray) -> CaptionChunk:
        """Return a chunk with only the images at these indices."""
        return replace(self, images=[self.images[index] for index in indices.tolist()])

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the records."""
        return (image.record(self.folder) for image in self.images)


def caption_layout(path: Path) -> Layout | None:
    """Return the layout of a caption file, None if it is none of the known ones."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_layout(path)
    if suffix not in (".token", ".txt", ".csv", ".tsv"):
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = file.read(_HEAD).lstrip()
    first = head.split("\n", 1)[0]
    if _RESULTS_HEADER.fullmatch(first):
        return "results"
    return "token" if suffix == ".token" or _TOKEN.fullmatch(first) else None


def open_caption_file(
    path: Path,
    layout: Layout,
    options: ColumnOptions,
    images: Path | Sequence[Path] | None = None,
) -> InputData:
    """Open a caption file.

    Karpathy's files state a split for every image, and ``restval`` is trained on; the others state
    none.

    Args:
        path: of the file.
        layout: see `caption_layout`.
        options: only ``task_type`` and ``ignore_columns`` may be given.
        images: folders from which image paths start; None = that of the file.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if an option does not fit, or the file holds no captions.
    """
    if options.task_type not in (None, "captioning", "retrieval"):
        raise ValueError(
            f"--task_type is {options.task_type}, and {path} holds images with captions: give "
            "captioning or retrieval, or leave it out"
        )
    options.expect_none(str(path), "ignore_columns")
    folder = open_images(images, path.parent, follow_links=options.follow_links)
    if layout in ("karpathy", "coco"):
        raw = _parsed(path)
        found = _karpathy(raw) if layout == "karpathy" else _coco(raw, path)
        keys = {key for image in found for key in image.unused}
        notes = absent_names(path, [name for name in options.ignore_columns if name not in keys])
        known = _USED | _HARMLESS | set(options.ignore_columns)
        found = [replace(image, unused=tuple(set(image.unused) - known)) for image in found]
    else:
        found, notes = _lines(path, layout), absent_names(path, options.ignore_columns)
    if not found:
        raise ValueError(f"{path} holds no image with captions: is it the right file?")
    chunks: list[Chunk] = [
        CaptionChunk(found[first : first + _CHUNK_RECORDS], folder)
        for first in range(0, len(found), _CHUNK_RECORDS)
    ]
    return InputData(
        options.task_type or "captioning", str(path), chunks, text_field="json.captions",
        notes=notes, interleaved=True,
    )  # fmt: skip


def _exists(folder: str, path: str) -> bool:
    return "\0" not in path and os.path.isfile(os.path.join(folder, path))


def _json_layout(path: Path) -> Layout | None:
    with path.open("rb") as file:
        first = file.readline(_HEAD).removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"{"):
            return None
        if first.endswith(b"}") and file.read(_HEAD).strip().startswith(b"{"):
            return None  # JSON lines
    try:
        raw = _parsed(path)
    except ValueError:
        return None
    listed = raw.get("images") if isinstance(raw, dict) else None
    if not isinstance(listed, list):
        return None
    if any(isinstance(image, dict) and "sentences" in image for image in listed[:100]):
        return "karpathy"
    return "coco" if isinstance(raw.get("annotations"), list) else None


def _parsed(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {_MAX_BYTES}: cut it into parts")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({one_line(error)}): correct it") from None


def _karpathy(raw: Mapping[str, Any]) -> list[_Image]:
    """Return the images of ``{"images": [{"filename", "split", "sentences": [{"raw"}]}]}``."""
    found = []
    for number, entry in enumerate(raw["images"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            found.append(_Image((f"entry {number}",), problem="it has no filename"))
            continue
        name, stated = entry["filename"], entry.get("split")
        above = entry.get("filepath")
        paths = (f"{above}/{name}", name) if isinstance(above, str) and above else (name,)
        image = _Image((*paths, *(f"{folder}/{name}" for folder in _FOLDERS)))
        image.unused = tuple(entry)
        split = split_of(stated) if isinstance(stated, str) else None
        image.split = split or ""
        if stated is not None and split is None:
            image.problem = f"its split is {str(stated)[:40]!r}, expected train, restval, val, test"
        sentences = entry.get("sentences")
        image.captions = [_sentence(each) for each in sentences or ()]
        found.append(image)
    return found


def _sentence(stated: Any) -> Any:
    """Return the text of ``{"raw": text}`` or of its words."""
    if not isinstance(stated, dict):
        return stated
    words = stated.get("tokens")
    has_words = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return stated.get("raw", " ".join(words) if has_words and words else None)


def _coco(raw: Mapping[str, Any], path: Path) -> list[_Image]:
    """Return the images of ``{"images": [{"id", "file_name"}], "annotations": [...]}``."""
    annotations = [each for each in raw["annotations"] if isinstance(each, dict)]
    if annotations and not any("caption" in each for each in annotations):
        keys = ", ".join(list(annotations[0])[:12])
        raise ValueError(
            f"{path} has annotations without captions, with the keys {keys}: give the file of "
            "captions, such as captions_train2017.json"
        )
    found: dict[Any, _Image] = {}
    for number, entry in enumerate(raw["images"]):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            found["", number] = _Image((f"entry {number}",), problem="it has no file_name")
            continue
        paths = (name, *(f"{folder}/{name}" for folder in _coco_folders(name, path)))
        found[str(entry.get("id"))] = _Image(paths, unused=tuple(entry))
    for each in annotations:
        key = str(each.get("image_id"))
        if key not in found:
            problem = f"an annotation is of image {key[:40]}, which is not among the images"
            found[key] = _Image((f"image {key[:40]}",), problem=problem)
        image = found[key]
        image.captions.append(each.get("caption"))
        image.unused = tuple(dict.fromkeys((*image.unused, *each)))
    return list(found.values())


def _coco_folders(name: str, path: Path) -> Iterator[str]:
    """Yield the folders in which the images are usually unpacked: train2014, val2017."""
    for text in (name, path.stem):
        yield from re.findall(r"(?:train|val|test)\d{4}", text)


def _lines(path: Path, layout: Layout) -> list[_Image]:
    """Return the images of a file with a line for every caption."""
    form = _TOKEN if layout == "token" else _RESULTS
    found: dict[str, _Image] = {}
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or (number == 1 and layout == "results"):
                continue
            matched = form.fullmatch(text)
            if matched is None:
                problem = f"line {number} is no image with a number and a caption"
                found[f"line {number}"] = _Image((f"line {number}",), problem=problem)
                continue
            name = matched["image"].strip()
            paths = (name, *(str(PurePosixPath(folder) / name) for folder in _FOLDERS))
            found.setdefault(name, _Image(paths)).captions.append(matched["caption"])
    return list(found.values())
