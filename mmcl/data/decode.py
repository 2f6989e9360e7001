"""Image decoding: the bytes of an untrusted image file become pixels.

JPEG goes through simplejpeg with exact flags (bit-equal to Pillow, 1.4 times its rate), everything
else through Pillow. The size is read from the header first, before a decoder allocates a canvas.
"""

from __future__ import annotations

import io
import math
import re
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmcl.data.stored_sample import BadSample, one_line

MAX_PIXELS = 64_000_000
"""Images of more pixels are bad samples, unless a caller says otherwise."""

MAX_SCANS = 100
"""Scans (passes over the canvas) that a progressive JPEG may have; usual files have about ten."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a JPEG, PNG or WebP image, whatever its file was called.

    EXIF rotation is ignored and an alpha channel is dropped, as all common loaders do. Of an
    animation the first frame is taken.

    Args:
        data: the whole file.
        max_pixels: largest height x width that is decoded; no side may be longer than twice the
            side of a square of this area, because some models resize the image to such a square.

    Returns:
        (3, H, W) uint8 RGB, channels last in memory.

    Raises:
        BadSample: if the image is broken, truncated, too large or of another format.
    """
    if not data:
        raise BadSample("its image is empty (0 bytes)")
    height, width = size_of(data)
    if height * width > max_pixels:
        raise BadSample(
            f"its image is {width} x {height}, more than {max_pixels} pixels: shrink it or "
            "raise max_pixels"
        )
    longest = 2 * math.isqrt(max_pixels)
    if max(height, width) > longest:
        raise BadSample(
            f"its image is {width} x {height}, a side of more than {longest} pixels: shrink it "
            "or raise max_pixels"
        )
    pixels = _decode_jpeg(data) if data.startswith(_JPEG) else None
    if pixels is None:
        pixels = _decode_with_pillow(data, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width as the header of an image states them.

    Raises:
        BadSample: if it is not a JPEG, PNG or WebP image, or its header is cut off.
    """
    if data.startswith(_JPEG):
        return _jpeg_size(data)
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    raise BadSample(f"its image is not JPEG, PNG or WebP (it starts with {data[:8]!r})")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk over the segments of a JPEG file to its frame header (ITU T.81, B.2.2)."""
    offset = 2
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in _FRAMES:
            height = int.from_bytes(data[offset + 5 : offset + 7], "big")
            return height, int.from_bytes(data[offset + 7 : offset + 9], "big")
        is_bare = marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01
        length = 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        offset += (1 if marker == 0xFF else 2) if is_bare else length
    raise BadSample("its JPEG header is broken or cut off: it states no image size")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read the canvas of a WebP file (lossy, lossless or extended), see its container format."""
    if data[12:16] == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return int.from_bytes(data[27:30], "little") + 1, width
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width = int.from_bytes(data[26:28], "little") & 0x3FFF
    return int.from_bytes(data[28:30], "little") & 0x3FFF, width


def _scans(data: bytes) -> int:
    """Count the scans of a JPEG, up to one more than allowed: each may take as long as a file."""
    offset, count = 2, 0
    while count <= MAX_SCANS and (found := _MARKER.search(data, offset)):
        offset, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:
            break
        count += marker == _SCAN[1]
        if marker not in (0x01, 0xD8):
            offset += int.from_bytes(data[offset : offset + 2], "big")
    return count


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG with exact flags; None = leave it to Pillow (CMYK, unusual but whole files)."""
    if data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise BadSample(f"its JPEG is drawn in more than {MAX_SCANS} scans: save it again")
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, strict=True
        )
    # simplejpeg raises KeyError for a color space or subsampling that it has no name for.
    except (ValueError, KeyError) as error:
        # Stray bytes before a marker are common on the web and harm no pixel; data that ends early
        # or is no Huffman code does, and Pillow would fill in grey without an error.
        if any(reason in str(error) for reason in ("remature end", "bad Huffman")):
            raise BadSample(f"its JPEG is broken ({error})") from None
        return None
    return pixels


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # max_pixels bounds decompression bombs; palettes with transparency warn in convert().
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(f"its header says {image.width} x {image.height}")
                if image.mode.startswith("I"):
                    # Pillow would clip 16-bit greys to 255 instead of scaling them.
                    grey = (np.array(image).astype(np.int64) >> 8).clip(0, 255)
                    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
                return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise BadSample("its image cannot be decoded (its header is broken)") from None
    # Pillow's plugins raise anything from struct.error to SyntaxError on hostile bytes.
    except Exception as error:
        raise BadSample(f"its image cannot be decoded ({one_line(error)})") from None
