import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmcl.data import BadSample, decode_image
from tests.data.small_stream import picture


def by_pillow(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def png_with_header(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillow(kind, mode):
    data = picture(3, kind, (31, 17), mode)
    pixels = decode_image(data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 17, 31)
    assert pixels.equal(by_pillow(data))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "1")])
def test_other_colour_modes_become_rgb(kind, mode):
    data = picture(3, kind, (9, 5), mode)
    assert decode_image(data).equal(by_pillow(data))


def test_a_palette_with_transparency_decodes_without_a_warning():
    file = io.BytesIO()
    Image.new("P", (4, 4), 1).save(file, "PNG", transparency=bytes([0, 128]))
    assert decode_image(file.getvalue()).shape == (3, 4, 4)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(file, "PNG")
    assert decode_image(file.getvalue())[0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_truncated_files_are_bad_samples(kind, kept):
    data = picture(1, kind, (64, 64))
    with pytest.raises(BadSample):
        decode_image(data[: int(kept * len(data))])


def test_a_jpeg_that_is_damaged_in_the_middle_is_a_bad_sample():
    data = picture(1, "JPEG", (64, 64))
    lost = len(data) // 2
    with pytest.raises(BadSample, match="its JPEG is broken"):
        decode_image(data[:lost] + data[-2:])


def test_stray_bytes_before_the_end_mark_of_a_jpeg_harm_nothing():
    data = picture(1, "JPEG", (16, 16))
    assert decode_image(data[:-2] + b"junk" + data[-2:]).equal(decode_image(data))


def test_the_format_is_found_by_content_not_by_name():
    assert decode_image(picture(1, "WEBP")).shape == (3, 6, 8)


@pytest.mark.parametrize("data", [b"PIXAR" + bytes(50), b"%!PS-Adobe-3.0 EPSF", b"\x80\x04K\x01."])
def test_other_formats_are_never_given_to_a_decoder(data):
    with pytest.raises(BadSample, match="not JPEG, PNG, WebP, GIF, BMP, TIFF"):
        decode_image(data)


def test_an_empty_file_is_a_bad_sample():
    with pytest.raises(BadSample, match="empty"):
        decode_image(b"")


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(BadSample, match=r"100000 x 100000, more than 64000000 pixels"):
        decode_image(png_with_header(100_000, 100_000))


def test_a_webp_canvas_of_any_sort_is_measured_before_decoding():
    canvas = (16383 - 1).to_bytes(3, "little")
    extended = b"RIFF" + bytes(4) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    lossless = b"RIFF" + bytes(4) + b"WEBPVP8L" + bytes(4) + b"\x2f" + b"\xff" * 4 + bytes(8)
    for data in (extended, lossless):
        with pytest.raises(BadSample, match=r"more than 64000000 pixels"):
            decode_image(data)
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "WEBP", lossless=True)
    with pytest.raises(BadSample, match=r"30 x 20, more than 500 pixels"):
        decode_image(file.getvalue(), max_pixels=500)


def test_the_largest_allowed_image_is_set_by_the_caller():
    assert decode_image(picture(size=(10, 10)), max_pixels=100).shape == (3, 10, 10)
    with pytest.raises(BadSample, match="10 x 10, more than 99 pixels"):
        decode_image(picture(size=(10, 10)), max_pixels=99)
