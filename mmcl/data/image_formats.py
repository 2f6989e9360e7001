"""Image formats: what the bytes of an untrusted file say of its format, its size and its rotation.

``FORMATS`` is the one table of what is read. Nothing here allocates a canvas, and only as much of a
file is looked at as a header needs.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image, features

from mmcl.data.stored_sample import BadSample


class ImageFormat(NamedTuple):
    """An image format that is read.

    Attributes:
        name: for messages.
        pillow: Pillow's name of it.
        extensions: of files and members, without a dot; the first is given to those written.
    """

    name: str
    pillow: str
    extensions: tuple[str, ...]


class ImageHeader(NamedTuple):
    """Facts that the header of an image states.

    Attributes:
        height: rows as stored, before the rotation.
        width: columns as stored.
        orientation: 1 to 8 of Exif; 5 to 8 swap height and width. Of a PNG always 1, as the whole
            file has to be walked over, see `png_orientation`.
        bits: of a value.
        layout: of its values, for messages; "" = all layouts of the format are decoded.
    """

    height: int
    width: int
    orientation: int = 1
    bits: int = 8
    layout: str = ""


JPEG = ImageFormat("JPEG", "JPEG", ("jpg", "jpeg", "jfif", "jpe"))
PNG = ImageFormat("PNG", "PNG", ("png", "apng"))
WEBP = ImageFormat("WebP", "WEBP", ("webp",))
GIF = ImageFormat("GIF", "GIF", ("gif",))
BMP = ImageFormat("BMP", "BMP", ("bmp",))
TIFF = ImageFormat("TIFF", "TIFF", ("tif", "tiff"))
PPM = ImageFormat("PPM", "PPM", ("ppm", "pnm"))
PGM = ImageFormat("PGM", "PPM", ("pgm",))
PBM = ImageFormat("PBM", "PPM", ("pbm",))
AVIF = ImageFormat("AVIF", "AVIF", ("avif",))
FORMATS = (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, PGM, PBM, AVIF)

IMAGE_EXTENSIONS = tuple(
    dict.fromkeys(
        ("jpg", "jpeg", "png", "webp", *(each for known in FORMATS for each in known.extensions))
    )
)
"""Extensions of members and files that are images, in the order in which a sample's is sought."""
MAX_IMAGES = 64
"""Samples with more images are bad."""
_NUMBERED = re.compile(rf"([0-9]{{1,4}})\.(?:{'|'.join(IMAGE_EXTENSIONS)})")
OTHER_IMAGE_EXTENSIONS = (
    "heic", "heif", "jp2", "j2k", "jpx", "jxl", "svg", "psd", "ico", "eps", "exr", "hdr", "dng",
    "tga",
)  # fmt: skip
"""Extensions of images that are refused by name, so that no folder loses them silently."""
READABLE = ", ".join(known.name for known in FORMATS[:-1]) + f" or {FORMATS[-1].name}"

_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_STARTS = (
    (_JPEG_START, JPEG), (_PNG_START, PNG), (b"GIF87a", GIF), (b"GIF89a", GIF), (b"BM", BMP),
    (b"II*\0", TIFF), (b"MM\0*", TIFF), (b"II+\0", TIFF), (b"MM\0+", TIFF),
)  # fmt: skip
_PNM = {b"1": PBM, b"2": PGM, b"3": PPM, b"4": PBM, b"5": PGM, b"6": PPM}
_OTHERS = (
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"8BPS", "Photoshop"), (b"\0\0\1\0", "ICO"),
    (b"%!PS", "PostScript"), (b"%PDF", "PDF"), (b"v/1\x01", "OpenEXR"), (b"#?RADIANCE", "Radiance"),
    (b"<svg", "SVG"), (b"<?xml", "XML or SVG"), (b"<!DOCTYPE", "an HTML page"),
    (b"<!doctype", "an HTML page"), (b"<html", "an HTML page"),
    (b"version https://git-lfs", "a pointer of Git LFS"), (b"\x93NUMPY", "a numpy array"),
    (b"\x1f\x8b", "a gzip archive"), (b"PK\x03\x04", "a ZIP archive"),
)  # fmt: skip
_HEIC = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
)  # fmt: skip
_AVIF = frozenset({b"avif", b"avis"})
_CONVERT = "convert it to one of these, for example with ImageMagick (magick IN OUT.png)"

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
_XMP_START = b"http://ns.adobe.com/xap/1.0/\0"
_PNM_HEADER = re.compile(
    rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+([0-9]{1,10})(?:\s|#[^\r\n]*[\r\n])+([0-9]{1,10})"
    rb"(?:\s|#[^\r\n]*[\r\n])+([0-9]{0,10})"
)
_MAX_HEADER = 1 << 20
"""Bytes before the first image of a GIF, and of a PNM header (in 64 KiB of them)."""
_MAX_TAGS = 4096
"""Tags in a directory of a TIFF; usual files have about twenty."""
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SUB_DIRECTORIES = (0x8769, 0x8825, 0xA005)


def is_numbered(member: str) -> bool:
    """Return whether a member is one of the images of a sample with several: ``0.jpg``."""
    return _NUMBERED.fullmatch(member) is not None


def image_members(members: Iterable[str]) -> list[str]:
    """Return the members of a sample that are its images: ``jpg``; or ``0.jpg``, ``1.png`` ...

    They are in the order of their numbers. Of a sample with one image the first extension of
    ``IMAGE_EXTENSIONS`` counts.
    """
    listed = list(members)
    plain = [name for name in IMAGE_EXTENSIONS if name in listed][:1]
    numbered = [(int(found[1]), name) for name in listed if (found := _NUMBERED.fullmatch(name))]
    return plain or [name for _, name in sorted(numbered)]


def as_members(images: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """Return the members that hold images, (extension, content) each, in their order."""
    if len(images) == 1:
        return dict(images)
    return {f"{number}.{extension}": data for number, (extension, data) in enumerate(images)}


def image_format(data: bytes, stated: str = "") -> ImageFormat:
    """Return the format of an image by its first bytes, whatever the file was called.

    Args:
        data: the file, or its first 512 bytes.
        stated: its name for messages.

    Raises:
        BadSample: if it is of another format; one that is known is named.
    """
    for start, known in _STARTS:
        if data.startswith(start):
            return known
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WEBP
    if data[:1] == b"P" and data[1:2] in _PNM and data[2:3] in (b" ", b"\t", b"\n", b"\r", b"#"):
        return _PNM[data[1:2]]
    brands = _brands(data)
    # Of a feature that it does not know, an older Pillow warns.
    if brands & _AVIF and "avif" in features.modules and features.check("avif"):
        return AVIF
    named = f" {stated[:200]!r}" if stated else ""
    if brands & _AVIF:
        raise BadSample(
            f"its image{named} is AVIF, which this version of Pillow does not read: "
            "pip install 'pillow>=11.3', or convert it to PNG"
        )
    other = "HEIC" if brands & _HEIC else ""
    head = data[:64].lstrip()
    other = other or next((name for start, name in _OTHERS if head.startswith(start)), "")
    what = f"is {other}, not" if other else "is not"
    first = "" if other else f" (it starts with {bytes(data[:8])!r})"
    fix = "fetch the image itself" if other.startswith(("a ", "an ")) else _CONVERT
    raise BadSample(f"its image{named} {what} {READABLE}{first}: {fix}")


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an image.

    Raises:
        BadSample: if it is of no known format, or its header is broken, cut off, or states more
            than a file of its length can hold.
    """
    known = image_format(data)
    if known is JPEG:
        return _jpeg_header(data)
    try:
        return _HEADERS[known](data)
    # Short files; Pillow's plugins raise anything from struct.error to SyntaxError.
    except Exception as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"its {known.name} header is broken or cut off") from None


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, that an Exif block states (CIPA DC-008); 0 = it states none.

    Args:
        exif: a TIFF structure, with or without its marker ("Exif" and two zeros) before it.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 0
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == 0x0112 and kind in _TIFF_INTEGERS:
                (value,) = struct.unpack_from(f"{order}{_TIFF_INTEGERS[kind]}", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 0


def _xmp_orientation(xmp: bytes) -> int:
    """Return the orientation, 1 to 8, that an XMP packet states; 0 = it states none."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 0


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of a file in ISO's base media format, none of another."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), len(data), 512)
    return {bytes(data[8:12]), *(bytes(data[at : at + 4]) for at in range(16, end, 4))}


def _jpeg_header(data: bytes) -> ImageHeader:
    """Walk over the segments of a JPEG file to its frame header (ITU T.81, B.2.2)."""
    offset, exif, xmp = 2, 0, 0
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in _FRAMES:
            height = int.from_bytes(data[offset + 5 : offset + 7], "big")
            width = int.from_bytes(data[offset + 7 : offset + 9], "big")
            return ImageHeader(height, width, exif or xmp or 1)
        is_bare = marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01
        length = 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if marker == 0xE1:  # APP1; Exif stands before the frame header
            segment = data[offset + 4 : offset + length]
            if segment.startswith(b"Exif\0\0"):
                exif = exif or exif_orientation(segment)
            elif segment.startswith(_XMP_START):
                xmp = _xmp_orientation(segment)
        offset += (1 if marker == 0xFF else 2) if is_bare else length
    raise BadSample("its JPEG header is broken or cut off: it states no image size")


def _png_header(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR" or len(data) < 25:
        raise BadSample("its PNG header is broken or cut off")
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return ImageHeader(height, width, bits=bits)


def png_orientation(data: bytes) -> int:
    """Return the orientation, 1 to 8, of a PNG by its eXIf chunk, which may be at its end."""
    offset = 8
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"eXIf":
            return exif_orientation(data[offset + 8 : offset + 8 + length]) or 1
        offset += 12 + length
    return 1


def _webp_header(data: bytes) -> ImageHeader:
    """Read the canvas of a WebP file (lossy, lossless or extended), see its container format."""
    if len(data) < 30:
        raise BadSample("its WebP header is broken or cut off")
    if data[12:16] == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return ImageHeader(height, width, _webp_orientation(data) if data[20] & 8 else 1)
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ImageHeader((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    height, width = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (28, 26))
    return ImageHeader(height, width)


def _webp_orientation(data: bytes) -> int:
    offset = 12
    while offset + 8 <= len(data):
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if data[offset : offset + 4] == b"EXIF":
            return exif_orientation(data[offset + 8 : offset + 8 + length]) or 1
        offset += 8 + length + length % 2
    return 1


def _gif_header(data: bytes) -> ImageHeader:
    """Walk over the extensions of a GIF to its first image, which may enlarge the canvas."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    offset = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    while offset < min(len(data), _MAX_HEADER):
        if data[offset] == 0x2C:
            left, top, columns, rows = struct.unpack_from("<4H", data, offset + 1)
            return ImageHeader(max(height, top + rows), max(width, left + columns))
        is_extension = data[offset] == 0x21
        offset += 2 if is_extension else 1
        while is_extension and offset < len(data) and data[offset]:
            offset += 1 + data[offset]
    raise BadSample(f"its GIF has no image in its first {_MAX_HEADER} bytes")


def _bmp_header(data: bytes) -> ImageHeader:
    if int.from_bytes(data[14:18], "little") == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<Ii", data, 18)
    return ImageHeader(abs(height), width)


def _pnm_header(data: bytes) -> ImageHeader:
    found = _PNM_HEADER.match(data[: _MAX_HEADER >> 4])
    if found is None:
        raise BadSample("its PPM header is broken or cut off")
    is_bitmap = data[1:2] in (b"1", b"4")
    bits = 1 if is_bitmap else int(found[3] or 0).bit_length()
    return ImageHeader(int(found[2]), int(found[1]), bits=bits)


def _tiff_header(data: bytes) -> ImageHeader:
    """Read the first directory of a TIFF (TIFF 6.0, BigTIFF), and that its values fit the file."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    (first,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, 8 if is_big else 4)
    tags = _tiff_tags(data, first, order, is_big)
    total = tags.pop(0, 0)
    for tag in _SUB_DIRECTORIES:  # those of Exif and GPS, which Pillow reads as well
        if tags.get(tag):
            total += _tiff_tags(data, tags[tag], order, is_big).get(0, 0)
    if total > len(data):
        raise BadSample(f"its TIFF states {total} bytes of tags and has {len(data)}: save it again")
    if 50706 in tags:
        raise BadSample(f"its image is DNG (raw), not {READABLE}: {_CONVERT}")
    width, height = tags[256], tags[257]
    tile = tags.get(322, 0), tags.get(323, 0)
    # A decoder makes room for a whole tile, and the last ones may reach beyond the image.
    if tile[0] * tile[1] > 4 * max(width * height, 1 << 20):
        raise BadSample(
            f"its TIFF is {width} x {height} in tiles of {tile[0]} x {tile[1]}: save it again"
        )
    kind = {1: "integers", 2: "signed integers", 3: "floats"}.get(tags.get(339, 1), "values")
    bits, channels = tags.get(258, 1), tags.get(277, 1)
    orientation = tags.get(274, 1)
    return ImageHeader(
        height, width, orientation if 1 <= orientation <= 8 else 1, bits,
        f"{channels} {'channel' if channels == 1 else 'channels'} of {bits}-bit {kind}",
    )  # fmt: skip


def _tiff_tags(data: bytes, offset: int, order: str, is_big: bool) -> dict[int, int]:
    """Return tag -> its first value, of those that are integers; 0 -> bytes of all values."""
    (count,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", data, offset)
    if count > _MAX_TAGS:
        raise BadSample(f"its TIFF has {count} tags, more than {_MAX_TAGS}: save it again")
    start, size, width = offset + (8 if is_big else 2), 20 if is_big else 12, 8 if is_big else 4
    tags, total = {}, 0
    for entry in range(start, start + size * count, size):
        tag, kind, number = struct.unpack_from(f"{order}HH{'Q' if is_big else 'I'}", data, entry)
        length, place = number * _TIFF_BYTES.get(kind, 0), entry + size - width
        if length > width:
            total += length
            (place,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, place)
        if number and kind in _TIFF_INTEGERS and tag not in tags and place < len(data):
            (tags[tag],) = struct.unpack_from(f"{order}{_TIFF_INTEGERS[kind]}", data, place)
    return {**tags, 0: total}


def _avif_header(data: bytes) -> ImageHeader:
    """Let Pillow parse the boxes of an AVIF; it decodes nothing until it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=("AVIF",)) as image:
            return ImageHeader(image.height, image.width, orientation_of(image))


def orientation_of(image: Any) -> int:
    """Return the orientation, 1 to 8, in which a loaded image of Pillow is still to be turned."""
    if image.format == "TIFF":
        return 1  # Pillow turns it when it is loaded
    exif = image.info.get("exif")
    if exif is None and (profile := image.info.get("Raw profile type exif")):
        try:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            exif = None
    orientation = exif_orientation(exif) if isinstance(exif, bytes) else 0
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    return orientation or _xmp_orientation(xmp) or 1


_HEADERS: dict[ImageFormat, Callable[[bytes], ImageHeader]] = {
    PNG: _png_header, WEBP: _webp_header, GIF: _gif_header, BMP: _bmp_header, TIFF: _tiff_header,
    PPM: _pnm_header, PGM: _pnm_header, PBM: _pnm_header, AVIF: _avif_header,
}  # fmt: skip
