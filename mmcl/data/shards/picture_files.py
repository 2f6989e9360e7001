"""Pictures whose names come from a file that nobody vouches for: nothing outside of a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from mmcl.data.faults import BadSample

MAX_PICTURE_BYTES = 64 << 20
"""Larger picture files are bad samples."""

_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class PictureFolder:
    """A folder below which pictures lie; picklable.

    Args:
        path: of the folder, links resolved; see `picture_folder`.
    """

    path: str

    def find(self, stated: str) -> str:
        """Return where a picture would lie.

        Args:
            stated: its path from the folder, or an absolute one into it.

        Raises:
            BadSample: if it is no path or leads outside, through ``..`` or a link as well.
        """
        try:
            found = os.path.realpath(os.path.join(self.path, stated))
        except ValueError:  # a byte 0, or half of a character
            raise BadSample(f"its picture {stated[:200]!r} is missing") from None
        if not found.startswith(os.path.join(self.path, "")):
            raise BadSample(
                f"its picture {stated[:200]!r} leads outside of the image folder {self.path}"
            )
        return found

    def read(self, stated: str) -> tuple[str, bytes]:
        """Return the extension of a picture's format, whatever its name, and its bytes.

        Raises:
            BadSample: as `find`; or if it is missing, no file, empty, too large, or not JPEG, PNG
                or WebP.
        """
        data = read_file(self.find(stated), stated)
        return extension_of(data, stated), data


def picture_folder(path: Path) -> PictureFolder:
    """Open a folder of pictures.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures {path}: correct --images")
    return PictureFolder(os.path.realpath(path))


def read_file(path: str | Path, stated: str) -> bytes:
    """Read a picture file whole.

    Args:
        path: of the file.
        stated: its name for messages.

    Raises:
        BadSample: if it is missing, no regular file, empty, or too large.
    """
    try:
        status = os.stat(path)
        # A pipe or device would be waited for without end, so look before it is opened.
        if not S_ISREG(status.st_mode):
            raise BadSample(f"its picture {stated[:200]!r} is not a file")
        if not 0 < status.st_size <= MAX_PICTURE_BYTES:
            raise BadSample(
                f"its picture {stated[:200]!r} has {status.st_size} bytes, expected 1 to "
                f"{MAX_PICTURE_BYTES}"
            )
        with open(path, "rb") as file:
            return file.read(MAX_PICTURE_BYTES)
    except FileNotFoundError:
        raise BadSample(f"its picture {stated[:200]!r} is missing") from None
    except OSError as error:
        raise BadSample(f"its picture {stated[:200]!r} cannot be read ({error.strerror})") from None


def extension_of(data: bytes, stated: str = "") -> str:
    """Return jpg, png or webp by the first bytes of a picture.

    Raises:
        BadSample: if it is of another format.
    """
    for start, extension in _STARTS:
        if data.startswith(start) and (extension != "webp" or data[8:12] == b"WEBP"):
            return extension
    named = f" {stated[:200]!r}" if stated else ""
    raise BadSample(f"its picture{named} is not JPEG, PNG or WebP (it starts with {data[:8]!r})")
