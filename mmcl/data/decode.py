"""From the bytes of a picture to pixels, for files that nobody vouches for.

JPEG goes through simplejpeg with exact flags (bit-equal to Pillow, 1.4 times its rate), everything
else through Pillow. The size is read from the header first, before a decoder allocates a canvas.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from mmcl.data.faults import BadSample

MAX_PIXELS = 64_000_000
"""Pictures of more pixels are bad samples, unless a caller says otherwise."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a JPEG, PNG or WebP picture, whatever its file was called.

    EXIF rotation is ignored and an alpha channel is dropped, as all common loaders do. Of an
    animation the first frame is taken.

    Args:
        data: the whole file.
        max_pixels: largest height x width that is decoded.

    Returns:
        (3, H, W) uint8 RGB, channels last in memory.

    Raises:
        BadSample: if the picture is broken, truncated, too large or of another format.
    """
    if not data:
        raise BadSample("its picture is empty (0 bytes)")
    height, width = size_of(data)
    if height * width > max_pixels:
        raise BadSample(
            f"its picture is {width} x {height}, more than {max_pixels} pixels: shrink it or "
            "raise max_pixels"
        )
    pixels = _decode_jpeg(data) if data.startswith(_JPEG) else None
    if pixels is None:
        pixels = _decode_with_pillow(data, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width as the header of a picture states them.

    Raises:
        BadSample: if it is not a JPEG, PNG or WebP picture, or its header is cut off.
    """
    if data.startswith(_JPEG):
        try:
            return tuple(simplejpeg.decode_jpeg_header(data, strict=False)[:2])
        except ValueError as error:
            raise BadSample(f"its JPEG header is broken ({error})") from None
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    raise BadSample(f"its picture is not JPEG, PNG or WebP (it starts with {data[:8]!r})")


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


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG with exact flags; None = Pillow must see it (CMYK, odd but whole files)."""
    try:
        if simplejpeg.decode_jpeg_header(data, strict=False)[2] in ("CMYK", "YCCK"):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, strict=True
        )
    except ValueError as error:
        # Stray bytes between whole segments are common on the web and harm no pixel; data that
        # ends early does, and Pillow would show grey in its place without a word.
        if "premature end" in str(error).lower():
            raise BadSample(f"its JPEG is broken ({error})") from None
        return None
    return pixels


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Bombs are judged by max_pixels; palettes with transparency warn in convert().
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
                if picture.width * picture.height > max_pixels:
                    raise ValueError(f"its header says {picture.width} x {picture.height}")
                if picture.mode.startswith("I"):
                    # Pillow would clip 16-bit greys to 255 instead of scaling them.
                    grey = (np.array(picture).astype(np.int64) >> 8).clip(0, 255)
                    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
                return np.array(picture.convert("RGB"))
    # Pillow's plugins raise anything from struct.error to SyntaxError on hostile bytes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadSample(f"its picture cannot be decoded ({reason})") from None
