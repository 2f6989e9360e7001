"""Image decoding: the bytes of an untrusted image file become pixels.

JPEG goes through simplejpeg with exact flags (bit-equal to Pillow, 1.4 times its rate), everything
else through Pillow. The size is read from the header first, before a decoder allocates a canvas.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from mmcl.data.image_formats import (
    JPEG,
    PNG,
    TIFF,
    ImageFormat,
    ImageHeader,
    image_format,
    orientation_of,
    png_orientation,
    read_header,
)
from mmcl.data.stored_sample import BadSample, one_line

MAX_PIXELS = 64_000_000
"""Images of more pixels are bad samples, unless a caller says otherwise."""

MAX_SCANS = 100
"""Scans (passes over the canvas) that a progressive JPEG may have; usual files have about ten."""

_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image of one of ``image_formats.FORMATS``, whatever its file was called.

    The rotation that Exif states is applied, transparency is put on white, and of an animation or
    of several pages the first is taken; see `rgb_array` for other modes.

    Args:
        data: the whole file.
        max_pixels: largest height x width that is decoded; no side may be longer than twice the
            side of a square of this area, because some models resize the image to such a square.

    Returns:
        (3, H, W) uint8 RGB, channels last in memory.

    Raises:
        BadSample: if the image is broken, truncated, too large or of another format.
    """
    header = expect_limits(data, max_pixels)
    known = image_format(data)
    pixels = _decode_jpeg(data) if known is JPEG else None
    if pixels is None:
        pixels = _decode_with_pillow(data, known, header, max_pixels)
    elif header.orientation > 1:
        pixels = _upright(pixels, header.orientation)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def expect_limits(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Check an image by its header alone, and return the header.

    Raises:
        BadSample: if it is empty, too large, of another format, or a JPEG of too many scans.
    """
    if not data:
        raise BadSample("its image is empty (0 bytes)")
    header = read_header(data)
    height, width = header.height, header.width
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
    if image_format(data) is JPEG and data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise BadSample(f"its JPEG is drawn in more than {MAX_SCANS} scans: save it again")
    return header


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width of an image by its header, after the rotation that Exif states.

    Raises:
        BadSample: if it is of another format, or its header is broken or cut off.
    """
    header = read_header(data)
    is_png = image_format(data) is PNG
    is_turned = (png_orientation(data) if is_png else header.orientation) > 4
    return (header.width, header.height) if is_turned else (header.height, header.width)


def rgb_array(image: Any) -> np.ndarray:
    """Convert an image of Pillow to RGB: upright, transparency on white, high values scaled.

    Greys of 16 bits keep their 8 high bits. Greys of 32 bits state no range: integers from 0 to 255
    are taken for levels, those up to 65535 for 16 bits; floats from 0 to 1 are scaled, those up to
    255 are levels.

    Args:
        image: ``PIL.Image.Image`` of any mode.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadSample: if 32-bit values are outside of these ranges.
    """
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_levels(image)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    elif image.has_transparency_data:
        opaque = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(opaque, mask=opaque.getchannel("A"))
        pixels = np.array(canvas)
    elif image.mode == "LAB":
        pixels = np.array(ImageCms.applyTransform(image, _lab_to_rgb()))
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    orientation = orientation_of(image)
    return pixels if orientation == 1 else _upright(pixels, orientation)


@cache
def _lab_to_rgb() -> Any:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")


def _grey_levels(image: Any) -> np.ndarray:
    """Return (H, W) uint8 levels of greys of 16 or 32 bits."""
    values = np.asarray(image)
    clear = image.info.get("transparency")
    is_16_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if is_16_bit:
        levels = (values.astype(np.int64) >> 8).clip(0, 255)
    else:
        low, high = float(values.min()), float(values.max())
        limit = 255.0 if image.mode == "F" else 65535.0
        if not 0 <= low <= high <= limit:  # also for NaN
            # Pillow reads unsigned integers as signed ones, so their numbers say nothing.
            is_float = image.mode == "F"
            found = f"floats from {low:g} to {high:g}" if is_float else "integers of another range"
            expected = "0 to 1 or 0 to 255" if is_float else "0 to 255 or 0 to 65535"
            raise BadSample(
                f"its image has greys of 32 bits, {found}, expected {expected}: save it with 8 or "
                "16 bits"
            )
        if image.mode == "F":
            levels = np.round(values * (255.0 if high <= 1 else 1.0))
        else:
            levels = values >> (0 if high <= 255 else 8)
    if isinstance(clear, int):
        levels = np.where(values == clear, 255, levels)
    return levels.astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, 3) pixels by an Exif orientation, which says where row 0 and column 0 are."""
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


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


def _decode_with_pillow(
    data: bytes, known: ImageFormat, header: ImageHeader, max_pixels: int
) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # max_pixels bounds decompression bombs; palettes with transparency warn in convert().
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=(known.pillow,)) as image:
                if not 0 < image.width * image.height <= max_pixels:
                    raise ValueError(f"its header says {image.width} x {image.height}")
                return rgb_array(image)
    except BadSample:
        raise
    except UnidentifiedImageError:
        reason = "its header is broken"
        if known is TIFF:
            layout = f"its TIFF has {header.layout}"
            reason = f"{layout}, which Pillow does not read: save it as RGB of 8 bits"
        raise BadSample(f"its image cannot be decoded ({reason})") from None
    # Pillow's plugins raise anything from struct.error to SyntaxError on hostile bytes.
    except Exception as error:
        raise BadSample(f"its image cannot be decoded ({one_line(error)})") from None
