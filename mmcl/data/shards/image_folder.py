"""Image folder: reads image files by untrusted names, none of them outside of the folder."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from mmcl.data.image_formats import image_format
from mmcl.data.stored_sample import BadSample

MAX_IMAGE_FILE_BYTES = 64 << 20
"""Larger image files are bad samples."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_HEAD_CHARACTERS = 684
"""Characters of base64 by which an image is recognized: 512 bytes and one more."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images; picklable.

    Args:
        path: path of the folder, links resolved; see `open_image_folder`.
        follow_links: whether links below the folder may lead outside.
    """

    path: str
    follow_links: bool = False

    def find(self, stated: str) -> str:
        """Return the path of an image, stated relative to the folder or absolute; may not exist.

        Raises:
            BadSample: if it is no path or leads outside, also through ``..`` or a link.
        """
        try:
            found = inner_path(self.path, stated, self.follow_links)
        except ValueError:  # a byte 0, or half of a character
            raise BadSample(f"its image {stated[:200]!r} is missing") from None
        if not found.startswith(os.path.join(self.path, "")):
            raise BadSample(
                f"its image {stated[:200]!r} leads outside of the image folder {self.path}"
            )
        return found

    def read(self, stated: str, limit: int | None = None) -> tuple[str, bytes]:
        """Return the extension of an image's format, whatever its name, and its bytes.

        Args:
            stated: as of ``find``.
            limit: largest number of bytes, of its beginning; None = all.

        Raises:
            BadSample: as `find`; or if it is missing, no file, empty, too large, or of a format
                that is not read.
        """
        data = read_file(self.find(stated), stated, limit)
        return extension_of(data, stated), data


def inner_path(folder: str, stated: str, follow_links: bool) -> str:
    """Return the path of a stated one, with its links resolved unless they are followed.

    Raises:
        ValueError: if it holds a byte 0, or half of a character.
    """
    joined = os.path.join(folder, stated)
    resolved = os.path.realpath(joined)
    return os.path.normpath(joined) if follow_links else resolved


def load_image(stated: Any, read: Callable[[str], tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return the extension of the format, and the bytes, of an image as a record states it.

    Args:
        stated: a path; bytes; a mapping with ``bytes`` and ``path``, as in data sets on the hub; a
            ``data:`` address; or the base64 text of the file, as in the tables of VLMEvalKit.
        read: returns the image at a path.

    Raises:
        BadSample: if it is none of these, or the image cannot be used.
    """
    inside = stated
    if isinstance(stated, Mapping):
        inside = stated.get("bytes") or stated.get("path")
    if isinstance(inside, str):
        inside = _decoded(inside) or inside
    if isinstance(inside, bytes | bytearray | memoryview):
        if not 0 < len(inside) <= MAX_IMAGE_FILE_BYTES:
            raise BadSample(
                f"its image has {len(inside)} bytes, expected 1 to {MAX_IMAGE_FILE_BYTES}"
            )
        return extension_of(bytes(inside)), bytes(inside)
    if not isinstance(inside, str) or not inside.strip():
        raise BadSample(f"its image is {str(inside)[:40]!r}, expected a path")
    return read(inside.strip())


def is_base64_image(text: str) -> bool:
    """Return whether a text is an image file in base64, by its first characters."""
    start = text[:_HEAD_CHARACTERS].strip()
    if len(start) < 32 or not _BASE64.fullmatch(start):
        return False
    plain = re.sub(r"[\s=]", "", start)
    try:
        extension_of(base64.b64decode(plain[: len(plain) // 4 * 4]))
    except (BadSample, binascii.Error):
        return False
    return True


def _decoded(text: str) -> bytes:
    """Return the bytes of an image in a ``data:`` address or in base64, b"" of other texts."""
    found = _DATA_URL.match(text)
    if text.startswith("data:") and not found:
        raise BadSample(
            f"its image is the address {text[:40]!r}, expected data:image/...;base64,..."
        )
    if not found and not is_base64_image(text):
        return b""
    body = re.sub(r"\s+", "", text[found.end() :] if found else text)
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except binascii.Error as error:
        raise BadSample(f"its image is no base64 ({error})") from None


def open_image_folder(path: Path, *, follow_links: bool = False) -> ImageFolder:
    """Open a folder of images.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder of images {path}: correct --images")
    return ImageFolder(os.path.realpath(path), follow_links)


def read_file(path: str | Path, stated: str, limit: int | None = None) -> bytes:
    """Read an image file, or its first ``limit`` bytes; ``stated`` is its name for messages.

    Raises:
        BadSample: if it is missing, no regular file, empty, or too large.
    """
    try:
        status = os.stat(path)
        # Opening a pipe or device could block forever, so check before it is opened.
        if not S_ISREG(status.st_mode):
            raise BadSample(f"its image {stated[:200]!r} is not a file")
        if not 0 < status.st_size <= MAX_IMAGE_FILE_BYTES:
            raise BadSample(
                f"its image {stated[:200]!r} has {status.st_size} bytes, expected 1 to "
                f"{MAX_IMAGE_FILE_BYTES}"
            )
        with open(path, "rb") as file:
            return file.read(MAX_IMAGE_FILE_BYTES if limit is None else limit)
    except FileNotFoundError:
        raise BadSample(f"its image {stated[:200]!r} is missing") from None
    except OSError as error:
        raise BadSample(f"its image {stated[:200]!r} cannot be read ({error.strerror})") from None


def extension_of(data: bytes, stated: str = "") -> str:
    """Return the extension of an image's format, such as jpg, by its first bytes.

    Args:
        data: the file, or its first 512 bytes.
        stated: its name for messages.

    Raises:
        BadSample: if it is of a format that is not read.
    """
    return image_format(data, stated).extensions[0]
