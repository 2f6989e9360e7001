"""Untrusted images: decoded or a bad sample, in bounded memory and time."""

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmcl.data import BadSample, decode_image
from mmcl.data.decode import MAX_SCANS
from tests.data.small_stream import picture
from tests.data.test_image_formats import needs_avif, tiff


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width=8, height=8, *chunks, rows=None, depth=8, colour=2, interlaced=0):
    """A PNG of chosen header and chunks; black, if no rows are given."""
    per_pixel = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth // 8 or 1
    rows = bytes(height * (1 + width * per_pixel)) if rows is None else rows
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def saved(kind, size=(64, 48), **options):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(1, size=size))).save(file, kind, **options)
    return file.getvalue()


def sized(jpeg, width, height):
    """A JPEG whose frame header says another size."""
    place = jpeg.index(b"\xff\xc0")
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


BOMB = zlib.compress(bytes(100_000_000), 9)


def test_a_jpeg_that_says_sixty_thousand_squared_is_refused_unseen():
    with pytest.raises(BadSample, match="is 60000 x 60000, more than 64000000 pixels: shrink it"):
        decode_image(sized(picture(1, "JPEG"), 60_000, 60_000))


def test_a_jpeg_that_says_more_than_it_holds_is_broken():
    with pytest.raises(BadSample, match="its JPEG is broken"):
        decode_image(sized(picture(1, "JPEG"), 600, 600))
    with pytest.raises(BadSample, match="its image cannot be decoded"):
        decode_image(sized(picture(1, "JPEG"), 8, 0))


@pytest.mark.parametrize(("width", "height"), [(100_000, 1), (1, 100_000), (16_001, 2)])
def test_an_image_a_hundred_thousand_pixels_wide_is_refused(width, height):
    # A model that pads it to a square would ask for 30 GB.
    with pytest.raises(BadSample, match=f"{width} x {height}, a side of more than 16000 pixels"):
        decode_image(png(width, height))
    assert decode_image(png(16_000, 2)).shape == (3, 2, 16_000)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(width, height):
    with pytest.raises(BadSample, match=r"cannot be decoded \(its header is broken\)"):
        decode_image(png(width, height))


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")]
)
def test_a_bomb_in_the_header_of_a_png_is_refused(kind, head):
    with pytest.raises(BadSample, match="(?i)decompressed data too large"):
        decode_image(png(8, 8, chunk(kind, head + BOMB)))


def test_many_small_bombs_in_one_png_are_refused_together():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))
    with pytest.raises(BadSample, match="Too much memory used in text chunks"):
        decode_image(png(8, 8, *[text] * 70))


@pytest.mark.parametrize("interlaced", [0, 1])
def test_rows_beyond_the_image_are_not_unpacked(interlaced):
    data = png(8, 8, interlaced=interlaced).partition(b"IDAT")[0][:-4]
    data += chunk(b"IDAT", BOMB) + chunk(b"IEND", b"")
    assert decode_image(data).shape == (3, 8, 8)


def test_an_interlaced_canvas_without_rows_is_a_bad_sample():
    with pytest.raises(BadSample, match="truncated|cannot be decoded"):
        decode_image(png(7000, 7000, rows=b"", interlaced=1))


def test_a_second_header_does_not_enlarge_a_png():
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    with pytest.raises(BadSample, match="its header says 50000 x 50000|cannot be decoded"):
        decode_image(png(8, 8, huge))


def test_an_animation_is_its_first_frame_whatever_it_is_called():
    first, second = (Image.open(io.BytesIO(picture(n, size=(16, 16)))) for n in (1, 2))
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        file = io.BytesIO()
        first.save(file, kind, save_all=True, append_images=[second] * 20, **options)
        expected = torch.from_numpy(np.array(first)).permute(2, 0, 1)
        assert decode_image(file.getvalue()).equal(expected)


@pytest.mark.parametrize("kind", ["ICO", "PDF", "JPEG2000", "SGI", "TGA", "PCX", "DDS"])
def test_a_format_that_is_not_in_the_table_is_never_decoded_whatever_it_is_called(kind):
    with pytest.raises(BadSample, match="its image is .*not JPEG, PNG, WebP, GIF, BMP, TIFF, PPM"):
        decode_image(saved(kind, size=(16, 16)))


def test_of_a_file_of_several_images_the_first_is_taken():
    first, second = (Image.open(io.BytesIO(picture(n, size=(16, 16)))) for n in (1, 2))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second])
    alone = io.BytesIO()
    first.save(alone, "JPEG")
    assert decode_image(file.getvalue()).equal(decode_image(alone.getvalue()))


@pytest.mark.parametrize(("colour", "depth"), [(2, 16), (6, 16), (4, 16), (0, 1), (0, 2), (4, 8)])
def test_every_depth_of_a_png_becomes_three_bytes(colour, depth):
    pixels = decode_image(png(8, 8, colour=colour, depth=depth))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 8, 8))


def test_a_palette_that_is_missing_is_no_crash():
    with contextlib.suppress(BadSample):
        assert decode_image(png(8, 8, colour=3)).shape == (3, 8, 8)


def with_scans(jpeg, count):
    """A progressive JPEG whose last scan is repeated."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    # 2000 scans of 150 KB would keep a decoder busy for half a minute at 16 million pixels.
    whole = saved("JPEG", progressive=True)
    with pytest.raises(BadSample, match=f"drawn in more than {MAX_SCANS} scans"):
        decode_image(with_scans(whole, 2000))
    assert decode_image(with_scans(whole, 50)).shape == (3, 48, 64)


def test_what_looks_like_scans_inside_or_behind_a_jpeg_is_not_counted():
    whole = picture(1, "JPEG")
    comment = b"\xff\xda" * 500
    inside = whole[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + whole[2:]
    for data in (inside, whole + comment):
        assert decode_image(data).equal(decode_image(whole))


@pytest.mark.parametrize("marker", [0xC2, 0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCF])
def test_another_coding_in_the_frame_header_is_decoded_or_a_bad_sample(marker):
    data = picture(1, "JPEG")
    place = data.index(b"\xff\xc0")
    try:
        pixels = decode_image(data[: place + 1] + bytes([marker]) + data[place + 2 :])
    except BadSample:
        return
    assert pixels.shape == (3, 6, 8)


def test_a_jpeg_of_twelve_bits_is_a_bad_sample():
    data = picture(1, "JPEG")
    place = data.index(b"\xff\xc0")
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(data[: place + 4] + b"\x0c" + data[place + 5 :])


def test_a_reason_is_the_same_in_every_run():
    messages = set()
    for _ in range(3):
        with pytest.raises(BadSample) as caught:
            decode_image(png(0, 0))
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


NEW = ["GIF", "BMP", "TIFF", "PPM", pytest.param("AVIF", marks=needs_avif)]
GREY = {258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 273: (4, [8]), 279: (4, [64])}
HUGE = "is 60000 x 60000, more than 64000000 pixels: shrink it"


def bmp(width, height):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def gif(canvas, frame, before=b""):
    """A GIF of one frame; ``before`` are the extensions before it."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<4HB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"
    return head + before + image


@pytest.mark.parametrize(
    "data",
    [
        bmp(60_000, 60_000), bmp(60_000, -60_000), gif((60_000, 60_000), (1, 1)),
        gif((1, 1), (60_000, 60_000)), b"P6\n60000 60000\n255\n" + bytes(99),
        b"P1 60000 60000 0", b"P5 60000 60000 65535 " + bytes(99), tiff(60_000, 60_000, GREY, b""),
        tiff(60_000, 60_000, {**GREY, 259: (3, [5])}, bytes(9), ">"),
    ],
)  # fmt: skip
def test_a_size_in_the_header_of_any_format_is_refused_before_a_canvas_is_made(data):
    with pytest.raises(BadSample, match=HUGE):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [
        bmp(0, 5), bmp(5, 0), gif((0, 0), (0, 0)), gif((0, 9), (0, 9)), b"P6 0 0 255\n",
        b"P5 4 0 255\n", b"P4 0 3\n", tiff(0, 0, GREY, bytes(64)), tiff(8, 0, GREY, bytes(64)),
    ],
)  # fmt: skip
def test_an_image_of_any_format_without_pixels_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(data)


@needs_avif
def test_the_size_in_an_avif_is_refused_before_it_is_decoded():
    data = saved("AVIF")
    place = data.index(b"ispe") + 8
    bomb = data[:place] + struct.pack(">II", 16_000, 16_000) + data[place + 8 :]
    with pytest.raises(BadSample, match="16000 x 16000, more than 64000000|AVIF header is broken"):
        decode_image(bomb)


def test_a_tile_that_is_larger_than_its_image_is_refused():
    tags = {**GREY, 322: (4, [60_000]), 323: (4, [60_000]), 324: (4, [8]), 325: (4, [64])}
    with pytest.raises(BadSample, match="is 8 x 8 in tiles of 60000 x 60000: save it again"):
        decode_image(tiff(8, 8, tags, bytes(64)))


def test_a_strip_of_a_billion_rows_is_cut_at_the_image():
    data = tiff(8, 8, {**GREY, 278: (4, [1 << 30]), 273: (4, [300])}, bytes(600))
    assert decode_image(data).shape == (3, 8, 8)


def test_tags_that_share_the_bytes_of_a_tiff_are_not_multiplied():
    data = bytearray(tiff(8, 8, {**GREY, 65_000: (1, [0] * 5000)}, bytes(5000)))
    count = struct.unpack_from("<H", data, 8)[0]
    for entry in range(10, 10 + 12 * (count - 1), 12):  # each of them claims the whole file
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (258, 259, 262, 277):
            struct.pack_into("<HII", data, entry + 2, 1, len(data) - 8, 8)
    with pytest.raises(BadSample, match="its TIFF states .* bytes of tags and has"):
        decode_image(bytes(data))


def test_a_directory_of_sixty_thousand_tags_is_refused():
    data = b"II*\0" + struct.pack("<IH", 8, 60_000) + bytes(12 * 60_000 + 4)
    with pytest.raises(BadSample, match="its TIFF has 60000 tags, more than 4096"):
        decode_image(data)


def test_the_other_pages_of_a_tiff_are_not_looked_at():
    page = saved("TIFF", size=(8, 8))
    (first,) = struct.unpack_from("<I", page, 4)
    (count,) = struct.unpack_from("<H", page, first)
    directory = page[first : first + 2 + 12 * count]
    end = first + 2 + 12 * count
    pages = bytearray(page.ljust(end + 4, b"\0"))
    for _ in range(20_000):  # each is followed by the next, the last by itself
        struct.pack_into("<I", pages, end, len(pages))
        end = len(pages) + len(directory)
        pages += directory + bytes(4)
    start = time.process_time()
    assert decode_image(bytes(pages)).equal(decode_image(page))
    assert time.process_time() - start < 1


def test_a_directory_that_follows_itself_does_not_hang():
    data = bytearray(saved("TIFF", size=(8, 8)))
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    assert decode_image(bytes(data)).shape == (3, 8, 8)


def test_comments_before_the_first_image_of_a_gif_are_bounded():
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0"
    with pytest.raises(BadSample, match="its GIF has no image in its first 1048576 bytes"):
        decode_image(gif((8, 8), (8, 8), comment))


def test_a_comment_in_a_ppm_is_bounded():
    start = time.process_time()
    for filler in (b"\n#" + b"x" * 10_000_000, b" " + b"#\n" * 5_000_000, b" " * 9_000_000):
        with pytest.raises(BadSample, match="its PPM header is broken or cut off"):
            decode_image(b"P6" + filler)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", NEW)
def test_a_file_cut_anywhere_is_decoded_or_a_bad_sample(kind):
    whole = saved(kind, size=(24, 16))
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        with contextlib.suppress(BadSample):
            assert decode_image(whole[:length]).shape == (3, 16, 24)


@pytest.mark.parametrize("kind", NEW)
def test_any_changed_byte_of_a_header_is_decoded_or_a_bad_sample(kind):
    whole = saved(kind, size=(24, 16))
    for place in range(min(len(whole), 200)):
        for value in (0, 0x7F, 0xFF):
            with contextlib.suppress(BadSample):
                changed = whole[:place] + bytes([value]) + whole[place + 1 :]
                assert decode_image(changed, max_pixels=40_000).numel() <= 3 * 40_000


def test_exif_whose_tags_lead_outside_turns_nothing():
    body = b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(30)
    exif = b"Exif\0\0" + body
    jpeg = picture(1, "JPEG")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]
    assert decode_image(data).equal(decode_image(jpeg))
