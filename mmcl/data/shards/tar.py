"""Tar reader that walks over untrusted headers and yields the regular files.

``tarfile`` itself takes a damaged header in the middle of an archive for its end, reads extended
headers of any size into memory and follows chains of them by recursion. So only its parser of a
single 512-byte header is used here, and only for headers that are not plain. Format: POSIX.1-2001
ustar and pax, and GNU long names.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmcl.data.stored_sample import BadShard

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20
"""Longest extended header (pax records, a GNU long name) that is read."""

Piece = Callable[[int, int], bytes]
"""Function (offset, length) -> the bytes of this range, fewer at the end of the file."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_UNPACK = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
_OTHER_FILES = {
    b"PK\x03\x04": "is a zip archive: there is no tar header at byte 0; unpack it and write a tar",
    b"PAR1": "is a parquet file: there is no tar header at byte 0; give it to mmcl data convert",
    b"version https://git-lfs": "is a pointer of Git LFS, not the shard: run git lfs pull",
}
_EMPTY = bytes(BLOCK)
_BLANK = b" " * 8
_REGULAR = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_WITHOUT_CONTENT = frozenset(tarfile.SUPPORTED_TYPES) - _REGULAR
_LONG = frozenset({tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK})
_PAX = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE})


class Member(NamedTuple):
    """A regular file inside a tar.

    Attributes:
        name: name in the header; never used as a path.
        offset: byte of the shard where its content starts.
        length: bytes of content.
    """

    name: bytes
    offset: int
    length: int


class Header(NamedTuple):
    """Fields of a 512-byte header: name, type byte, and number of content bytes."""

    name: bytes
    kind: bytes
    size: int


def members(piece: Piece, size: int, start: int = 0) -> Iterator[Member]:
    """Yield the regular files of a tar; links, devices and folders are skipped.

    Args:
        piece: reads a byte range of the tar.
        size: bytes of the tar.
        start: offset after the padded content of a member, to begin there.

    Raises:
        BadShard: if the file is empty, compressed, truncated or damaged, with the offset.
    """
    if start == 0:
        _expect_tar(piece, size)
    offset = start
    name: bytes | None = None
    length: int | None = None
    while (header := _header(piece, offset, size)) is not None:
        inside, kind = offset + BLOCK, header.kind
        content = header.size if length is None else length
        if content < 0 or kind == tarfile.GNUTYPE_SPARSE:
            raise BadShard(f"holds a sparse or negative member at byte {offset}: write it again")
        if kind in _LONG:
            text = _extended(piece, inside, header.size, size).split(b"\0", 1)[0]
            name = text if kind == tarfile.GNUTYPE_LONGNAME else name
            content = header.size
        elif kind in _PAX:
            records = _pax_records(_extended(piece, inside, header.size, size), offset)
            if kind != tarfile.XGLTYPE:
                name, length = _path_and_size(records, offset, name, length)
            content = header.size
        elif kind in _WITHOUT_CONTENT:
            content, name, length = 0, None, None
        else:
            if inside + content > size:
                raise BadShard(
                    f"is truncated: the member at byte {offset} needs {content} bytes and the "
                    f"file ends at byte {size}: fetch or build it again"
                )
            if kind in _REGULAR:
                yield Member(header.name if name is None else name, inside, content)
            name = length = None
        offset = inside + padded(content)
    _expect_only_zeros(piece, offset, size)


def padded(length: int) -> int:
    """Return the bytes that content of this length occupies in a tar, whole blocks."""
    return -(-length // BLOCK) * BLOCK


def _expect_tar(piece: Piece, size: int) -> None:
    if size == 0:
        raise BadShard("is empty (0 bytes): fetch or build it again")
    start = piece(0, 32)
    for mark, method in _COMPRESSED.items():
        if start.startswith(mark):
            raise BadShard(
                f"is compressed with {method}: unpack it to a plain .tar first ({_UNPACK[method]})"
            )
    for mark, reason in _OTHER_FILES.items():
        if start.startswith(mark):
            raise BadShard(reason)


def _header(piece: Piece, offset: int, size: int) -> Header | None:
    """Return the header at an offset, None at the end mark."""
    block = piece(offset, BLOCK)
    if len(block) < BLOCK:
        raise BadShard(
            f"is truncated: it ends at byte {size} without the end mark of a tar: "
            "fetch or build it again"
        )
    if block == _EMPTY:
        return None
    plain = plain_header(block)
    if plain is not None:
        return plain
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        hint = "" if offset else f", it starts with {block[:16]!r} and may be another file"
        raise BadShard(
            f"is damaged: there is no tar header at byte {offset} ({error}){hint}: "
            "fetch or build it again"
        ) from None
    return Header(header.name.encode("utf-8", "surrogateescape"), header.type, header.size)


def plain_header(block: bytes) -> Header | None:
    """Parse a plain header (octal numbers, valid checksum, name in one field); None = not plain.

    Several times as fast as ``tarfile``, which parses every field and sums the bytes twice.
    """
    size, checksum, kind = block[124:136], block[148:156], block[156:157]
    digits, stated = size.rstrip(b" \0"), checksum.strip(b" \0")
    if block[345] or kind == tarfile.AREGTYPE or not (digits.isdigit() and stated.isdigit()):
        return None
    # The checksum is the sum of all bytes, with eight spaces in place of its own field.
    counted = _sum_of(block[:148] + _BLANK + block[156:256]) + _sum_of(block[256:])
    try:
        is_valid, length = int(stated, 8) == counted, int(digits, 8)
    except ValueError:
        return None
    return Header(block[:100].split(b"\0", 1)[0], kind, length) if is_valid else None


def _sum_of(half: bytes) -> int:
    """Return the sum of up to 256 bytes.

    Adler-32 (RFC 1950) counts it, plus 1 and modulo 65521, in its low 16 bits, ten times as fast as
    a loop over the bytes.
    """
    return (zlib.adler32(half) & 0xFFFF) - 1


def _extended(piece: Piece, start: int, length: int, size: int) -> bytes:
    if not 0 <= length <= MAX_EXTENDED_BYTES:
        raise BadShard(
            f"has an extended header of {length} bytes at byte {start}, expected at most "
            f"{MAX_EXTENDED_BYTES}: write it again"
        )
    data = piece(start, length)
    if len(data) < length:
        raise BadShard(f"is truncated in a header at byte {start}, it ends at byte {size}")
    return data


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Parse the records of a pax header: length, space, keyword, ``=``, value, end of line."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data) and data[start]:
        space = data.find(b" ", start, start + 20)
        digits = data[start:space] if space > 0 else b""
        end = start + int(digits) if digits.isdigit() else 0
        if not 0 < space < end <= len(data):
            raise BadShard(f"has a damaged extended header at byte {offset}: write it again")
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        records[keyword] = value
        start = end
    return records


def _path_and_size(
    records: dict[bytes, bytes], offset: int, name: bytes | None, length: int | None
) -> tuple[bytes | None, int | None]:
    if any(keyword.startswith(b"GNU.sparse") for keyword in records):
        raise BadShard(f"holds a sparse member at byte {offset}: write it again, not sparse")
    stated = records.get(b"size")
    if stated is not None:
        if not stated.isdigit() or len(stated) > 18:
            raise BadShard(f"has a damaged extended header at byte {offset}: write it again")
        length = int(stated)
    return records.get(b"path", name), length


def _expect_only_zeros(piece: Piece, offset: int, size: int) -> None:
    # Readers stop at the end mark, so the second of two joined tars would be lost without an error.
    start = offset
    while start < size and (data := piece(start, 1 << 20)):
        if data.count(0) < len(data):
            raise BadShard(
                f"continues after its end mark at byte {offset} of {size}: "
                "joined tars must be listed one by one or packed again"
            )
        start += len(data)
