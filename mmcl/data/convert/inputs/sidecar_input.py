"""Image folders with texts: a text file beside each image, or Hugging Face's ``metadata`` table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmcl.data.convert.inputs.columns import ColumnOptions
from mmcl.data.convert.inputs.image_folder_input import FolderChunk, ImageTree, folder_chunks
from mmcl.data.convert.inputs.llava_input import open_json
from mmcl.data.convert.inputs.parquet_input import open_parquet
from mmcl.data.convert.inputs.table_input import open_table
from mmcl.data.convert.record import (
    Chunk,
    InputData,
    expect_no_near_splits,
    split_of,
    without_validation,
)
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample

_TEXTS = (".txt", ".caption")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NEARLY_ALL = 0.9
"""Share of images with a text beside them from which they are taken for captions."""
_LOOKED_AT = 20


@dataclass(frozen=True)
class SidecarChunk(FolderChunk):
    """Some images of a folder that have a text file of the same name, ``1.jpg`` and ``1.txt``."""

    def texts(self, name: str) -> dict[str, bytes]:
        """Return the text beside an image as its caption."""
        return {"txt": _read_text(Path(self.folder, name)).encode()}


def _read_text(image: Path) -> str:
    """Return the text beside an image.

    Raises:
        BadSample: if there is none, or it is empty, too long or not UTF-8.
    """
    for ending in _TEXTS:
        path = image.with_suffix(ending)
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise BadSample(f"its text {path.name!r} has {size} bytes, more than {MAX_TEXT_BYTES}")
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise BadSample(f"its text {path.name!r} is not UTF-8: save it as UTF-8") from None
        if not text:
            raise BadSample(f"its text {path.name!r} is empty")
        return text
    raise BadSample(f"its text is missing: there is no {image.with_suffix(_TEXTS[0]).name!r}")


def find_metadata(path: Path) -> list[Path]:
    """Return the ``metadata`` tables of a folder, of itself or of the folders of its splits."""
    homes = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
    found = [home / name for home in homes for name in _METADATA if (home / name).is_file()]
    return [file for file in found if file.parent == path] or found


def open_metadata(path: Path, files: Sequence[Path], options: ColumnOptions) -> InputData:
    """Open an image folder whose images are listed in ``metadata`` tables.

    Args:
        path: of the folder.
        files: the tables, see `find_metadata`; image paths start from the folder of each.
        options: see `find_columns`.

    Raises:
        ValueError: if a table's columns do not say what they are, or two tables differ.
    """
    inputs = []
    for file in files:
        split = "" if file.parent == path else split_of(file.parent.name)
        if split is None:
            raise ValueError(
                f"{file} is of no known split: name its folder train, val or test, or give "
                f"{file.parent} as SOURCE"
            )
        if file.suffix == ".csv":
            inputs.append(open_table(file, options, None, split))
        elif file.suffix == ".jsonl":
            inputs.append(open_json(file, options, None, split=split))
        else:
            inputs.append(open_parquet(file, options, None, split))
    first = inputs[0]
    for file, other in zip(files, inputs, strict=True):
        if (other.task_type, other.text_field) != (first.task_type, first.text_field):
            raise ValueError(f"{file} has other columns than {files[0]}: convert them one by one")
    chunks, notes = without_validation([chunk for each in inputs for chunk in each.chunks])
    notes += dict.fromkeys(note for each in inputs for note in each.notes)
    listed = sum(len(chunk) for each in inputs for chunk in each.chunks)
    images = sum(ImageTree(file.parent).count_below(file.parent) for file in files)
    if images > listed:
        notes.append(f"not used: {images - listed:,} images that no {files[0].name} lists")
    return replace(first, where=str(path), chunks=chunks, notes=notes)


def has_captions(path: Path, options: ColumnOptions) -> bool:
    """Return whether a folder's images have texts beside them, as img2dataset writes ``files``.

    Raises:
        ValueError: if only some images have a text, or the texts hold no words, and ``task_type``
            is not given.
    """
    if options.task_type is not None:
        return options.task_type in ("captioning", "retrieval")
    images, texts = 0, list[Path]()
    for folder, names in _walk(ImageTree(path, options.ignore_columns)):
        own = set(os.listdir(folder))
        images += len(names)
        for name in names:
            stem = os.path.splitext(name)[0]
            texts += [folder / (stem + ending) for ending in _TEXTS if stem + ending in own][:1]
    if not texts:
        return False
    if len(texts) < _NEARLY_ALL * images:
        raise ValueError(
            f"{len(texts):,} of {images:,} images of {path} have a text beside them, such as "
            f"{texts[0].name}: choose --task_type captioning, which needs a text of each, or "
            "--task_type classification"
        )
    looked_at = [text.read_bytes()[:1000].decode("utf-8", "replace") for text in texts[:_LOOKED_AT]]
    if not any(sign.isalpha() for text in looked_at for sign in text):
        raise ValueError(
            f"the texts beside the images of {path} hold no words (such as {texts[0].name}: "
            f"{looked_at[0][:40]!r}): choose --task_type captioning or classification"
        )
    return True


def open_captions(path: Path, options: ColumnOptions, task_level: int | None = None) -> InputData:
    """Open a folder of images with a text file beside each; images without one are bad samples.

    Folders may be nested, as those of shards. A folder of the first two levels that is named as a
    split is this split.

    Args:
        path: of the folder.
        options: ``task_type`` captioning or retrieval, ``ignore_columns``.
        task_level: level below the splits whose folders are the tasks, None = one task.

    Raises:
        ValueError: if there are no images or texts, or folders of splits stand beside others.
    """
    tree = ImageTree(path, options.ignore_columns)
    chunks = _caption_chunks(tree, task_level)
    used = {
        os.path.splitext(tree.name(Path(chunk.folder, os.fsdecode(raw))))[0]
        for chunk in chunks
        for raw in chunk.joined.split(b"\0")
    }
    others = [
        name
        for name in tree.others
        if not (name.endswith(_TEXTS) and os.path.splitext(name)[0] in used)
    ]
    if len(others) == len(tree.others):
        raise ValueError(
            f"--task_type is {options.task_type}, and {path} is a folder whose images have no text "
            "beside them: put 1.txt beside 1.jpg, or list images with their texts in a csv"
        )
    tree.others = others
    chunks, notes = without_validation(chunks)
    return InputData(
        options.task_type or "captioning",
        str(path),
        list[Chunk](chunks),
        task_column="folder" if task_level else "",
        notes=[*notes, *tree.notes()],
        interleaved=True,
    )


def _caption_chunks(tree: ImageTree, task_level: int | None) -> list[SidecarChunk]:
    """Return the images of all folders, with their splits and tasks."""
    chunks: list[SidecarChunk] = []
    unknown = ""
    for folder, names in _walk(tree):
        parts = list(folder.relative_to(tree.top).parts)
        split = next((part for part in parts[:2] if split_of(part)), "")
        unknown = unknown if split else str(folder)
        if split:
            parts.remove(split)
        if task_level is not None and len(parts) < task_level:
            raise ValueError(f"{folder} has images above the folders of --task_level {task_level}")
        task = parts[task_level - 1] if task_level is not None else ""
        chunks += folder_chunks(SidecarChunk, folder, names, "", task, split_of(split) or "")
    if not any(chunk.split for chunk in chunks):
        homes = (Path(chunk.folder).relative_to(tree.top) for chunk in chunks)
        expect_no_near_splits({part for home in homes for part in home.parts[:2]}, str(tree.top))
    elif unknown:
        raise ValueError(
            f"{unknown} is of no known split and stands beside folders of splits: move it below "
            "train, val or test"
        )
    if not chunks:
        raise ValueError(f"{tree.top} has no images: correct SOURCE")
    return chunks


def _walk(tree: ImageTree, path: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder that has images, and their names."""
    home = path or tree.top
    if names := tree.images(home):
        yield home, names
    for _, folder in tree.folders(home):
        yield from _walk(tree, folder)
