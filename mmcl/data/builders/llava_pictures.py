"""Finding the pictures that an instruction file names, and nothing outside of the image folder."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from mmcl.data.decode import MAX_PIXELS, decode_image, size_of
from mmcl.data.faults import BadSample

MAX_BYTES = 64 << 20
"""Picture files larger than this are bad samples; a shard's writer holds one of them at a time."""

_EDGE = 1 << 16
_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class Picture:
    """A picture file that was found whole.

    Attributes:
        path: where it lies.
        extension: of its format, whatever the file is called: jpg, png or webp.
        size: its bytes.
    """

    path: str
    extension: str
    size: int


class Pictures:
    """The pictures below one or more image folders, each file looked at once.

    Args:
        folders: image paths start from one of them; the first that has the file is taken.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._known: dict[str, Picture | str] = {}

    def find(self, stated: str) -> Picture:
        """Find a picture and look at its first and last bytes.

        Args:
            stated: its path as the instruction file has it.

        Raises:
            BadSample: if it leads outside of the image folder, is missing or is no whole picture.
        """
        if stated not in self._known:
            try:
                self._known[stated] = self._found(stated)
            except BadSample as fault:
                self._known[stated] = str(fault)
        known = self._known[stated]
        if isinstance(known, str):
            raise BadSample(known)
        return known

    def _found(self, stated: str) -> Picture:
        inside = inner_path(stated)
        for folder in self.folders:
            path = folder / inside
            try:
                status = path.stat()
            except (OSError, ValueError):
                continue
            if not S_ISREG(status.st_mode):
                raise BadSample(f"its picture {stated} is not a file")
            if not 0 < status.st_size <= MAX_BYTES:
                raise BadSample(
                    f"its picture {stated} has {status.st_size} bytes, expected 1 to {MAX_BYTES}"
                )
            try:
                return Picture(str(path), _format_of(path, status.st_size), status.st_size)
            except (BadSample, OSError) as error:
                raise BadSample(f"its picture {stated} is unusable: {error}") from None
        raise BadSample(f"its picture {stated} is missing")


def inner_path(stated: str) -> str:
    """Return a path that starts from the image folder, ``./`` and the like taken out.

    Raises:
        BadSample: if it is absolute or leads outside.
    """
    inside = posixpath.normpath(stated)
    if inside.startswith(("/", "../")) or inside in ("..", ".") or stated[1:3] in (":/", ":\\"):
        raise BadSample(f"its picture {stated} leads outside of the image folder")
    return inside


def _format_of(path: Path, size: int) -> str:
    """Check a picture by its header and its end, and by decoding it where the end is odd."""
    with path.open("rb") as file:
        head = file.read(_EDGE)
        try:
            height, width = size_of(head)
        except BadSample:
            # A large colour profile stands in front of the size.
            head += file.read()
            height, width = size_of(head)
        file.seek(max(0, size - _EDGE))
        tail = file.read()
    if height * width > MAX_PIXELS:
        raise BadSample(f"it is {width} x {height}, more than {MAX_PIXELS} pixels")
    extension = next(name for start, name in _STARTS if head.startswith(start))
    if not ends_well(extension, head, tail, size):
        decode_image(path.read_bytes())
    return extension


def ends_well(extension: str, head: bytes, tail: bytes, size: int) -> bool:
    """Tell whether a picture of ``size`` bytes ends as its format does, by its first and last."""
    if extension == "webp":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return (b"\xff\xd9" if extension == "jpg" else b"IEND") in tail
