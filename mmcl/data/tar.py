"""Tar headers, read one after the other without trusting any of them.

``tarfile`` itself takes a damaged header in the middle of an archive for its end, reads extended
headers of any size into memory and follows chains of them by recursion. So only its parser of a
single 512-byte header is used here. Format: POSIX.1-2001 ustar and pax, and GNU long names.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmcl.data.faults import BadShard

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20
"""Longest extended header (pax records, a GNU long name) that is read."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar.

    Attributes:
        name: as it stands in the header; never used as a path.
        offset: byte of the shard where its content starts.
        length: bytes of content.
    """

    name: bytes
    offset: int
    length: int


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Walk over the regular files of a tar; links, devices and folders are passed over.

    Args:
        file: an uncompressed tar, open for reading.
        size: bytes of the file.

    Raises:
        BadShard: if the file is empty, compressed, truncated or damaged, with the offset.
    """
    _expect_tar(file, size)
    offset = 0
    name: bytes | None = None
    length: int | None = None
    while (header := _header(file, offset, size)) is not None:
        start = offset + BLOCK
        content = header.size if length is None else length
        if content < 0 or header.type == tarfile.GNUTYPE_SPARSE:
            raise BadShard(f"holds a sparse or negative member at byte {offset}: write it anew")
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _extended(file, start, header.size, size).split(b"\0", 1)[0]
            name = text if header.type == tarfile.GNUTYPE_LONGNAME else name
            has_content, content = True, header.size
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _pax_records(_extended(file, start, header.size, size), offset)
            if header.type != tarfile.XGLTYPE:
                name, length = _path_and_size(records, offset, name, length)
            has_content, content = True, header.size
        else:
            if has_content and start + content > size:
                raise BadShard(
                    f"is truncated: the member at byte {offset} needs {content} bytes and the "
                    f"file ends at byte {size}: fetch or build it again"
                )
            if header.isreg():
                own = header.name.encode("utf-8", "surrogateescape") if name is None else name
                yield Member(own, start, content)
            name = length = None
        offset = start + (-(-content // BLOCK) * BLOCK if has_content else 0)
    _expect_nothing_more(file, offset, size)


def _expect_tar(file: BinaryIO, size: int) -> None:
    if size == 0:
        raise BadShard("is empty (0 bytes): fetch or build it again")
    file.seek(0)
    start = file.read(6)
    for mark, method in _COMPRESSED.items():
        if start.startswith(mark):
            raise BadShard(f"is compressed with {method}: unpack it to a plain .tar first")


def _header(file: BinaryIO, offset: int, size: int) -> tarfile.TarInfo | None:
    """Return the header at an offset, None at the end mark."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadShard(
            f"is truncated: it ends at byte {size} without the end mark of a tar: "
            "fetch or build it again"
        )
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadShard(
            f"is damaged: there is no tar header at byte {offset} ({error}): "
            "fetch or build it again"
        ) from None


def _extended(file: BinaryIO, start: int, length: int, size: int) -> bytes:
    if not 0 <= length <= MAX_EXTENDED_BYTES:
        raise BadShard(
            f"has an extended header of {length} bytes at byte {start}, expected at most "
            f"{MAX_EXTENDED_BYTES}: write it anew"
        )
    file.seek(start)
    data = file.read(length)
    if len(data) < length:
        raise BadShard(f"is truncated in a header at byte {start}, it ends at byte {size}")
    return data


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Read the records of a pax header: length, space, keyword, ``=``, value, end of line."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 20)
        digits = data[place:space] if space > 0 else b""
        end = place + int(digits) if digits.isdigit() else 0
        if not space < end <= len(data):
            raise BadShard(f"has a damaged extended header at byte {offset}: write it anew")
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        records[keyword] = value
        place = end
    return records


def _path_and_size(
    records: dict[bytes, bytes], offset: int, name: bytes | None, length: int | None
) -> tuple[bytes | None, int | None]:
    if any(keyword.startswith(b"GNU.sparse") for keyword in records):
        raise BadShard(f"holds a sparse member at byte {offset}: write it anew, not sparse")
    stated = records.get(b"size")
    if stated is not None:
        if not stated.isdigit() or len(stated) > 18:
            raise BadShard(f"has a damaged extended header at byte {offset}: write it anew")
        length = int(stated)
    return records.get(b"path", name), length


def _expect_nothing_more(file: BinaryIO, offset: int, size: int) -> None:
    # Readers stop at the end mark, so the second of two joined tars would be lost in silence.
    file.seek(offset)
    while piece := file.read(1 << 20):
        if piece.count(0) < len(piece):
            raise BadShard(
                f"goes on after its end mark at byte {offset} of {size}: "
                "joined tars must be listed one by one or packed anew"
            )
