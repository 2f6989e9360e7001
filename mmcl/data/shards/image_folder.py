"""Image folder: reads image files by untrusted names, none of them outside of the folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from mmcl.data.image_formats import image_format
from mmcl.data.stored_sample import BadSample

MAX_IMAGE_FILE_BYTES = 64 << 20
"""Larger image files are bad samples."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images; picklable.

    Args:
        path: path of the folder, links resolved; see `open_image_folder`.
    """

    path: str

    def find(self, stated: str) -> str:
        """Return the path of an image, stated relative to the folder or absolute; may not exist.

        Raises:
            BadSample: if it is no path or leads outside, also through ``..`` or a link.
        """
        try:
            found = os.path.realpath(os.path.join(self.path, stated))
        except ValueError:  # a byte 0, or half of a character
            raise BadSample(f"its image {stated[:200]!r} is missing") from None
        if not found.startswith(os.path.join(self.path, "")):
            raise BadSample(
                f"its image {stated[:200]!r} leads outside of the image folder {self.path}"
            )
        return found

    def read(self, stated: str) -> tuple[str, bytes]:
        """Return the extension of an image's format, whatever its name, and its bytes.

        Raises:
            BadSample: as `find`; or if it is missing, no file, empty, too large, or of a format
                that is not read.
        """
        data = read_file(self.find(stated), stated)
        return extension_of(data, stated), data


def open_image_folder(path: Path) -> ImageFolder:
    """Open a folder of images.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder of images {path}: correct --images")
    return ImageFolder(os.path.realpath(path))


def read_file(path: str | Path, stated: str) -> bytes:
    """Read a whole image file; ``stated`` is its name for messages.

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
            return file.read(MAX_IMAGE_FILE_BYTES)
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
