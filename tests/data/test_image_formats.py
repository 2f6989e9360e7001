"""Image formats: pixels, sizes and rotations equal those of independent references."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from mmcl.core import ProcessedSample
from mmcl.data import BadSample, ImageLabelCollate, decode_image
from mmcl.data.decode import rgb_array, size_of
from mmcl.data.image_formats import FORMATS, IMAGE_EXTENSIONS, READABLE
from mmcl.data.shards.image_folder import extension_of
from mmcl.data.shards.tar_index import IMAGES

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
LOSSLESS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
has_avif = "avif" in features.modules and features.check("avif")
needs_avif = pytest.mark.skipif(not has_avif, reason="this Pillow has no AVIF")
TURNED = ["PNG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif)]
KINDS = [*LOSSLESS, "JPEG", pytest.param("AVIF", marks=needs_avif)]


def saved(image, kind, **options):
    if kind == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data):
    """(H, W, 3) array of our pixels."""
    return decode_image(data).permute(1, 2, 0).numpy()


def opened(data):
    return Image.open(io.BytesIO(data))


def on_white(image):
    """An image pasted on white, as numpy: the mean of color and white, weighted by alpha."""
    values = np.asarray(image.convert("RGBA")).astype(float)
    alpha = values[:, :, 3:] / 255
    return values[:, :, :3] * alpha + 255 * (1 - alpha)


COLOUR = Image.fromarray(NOISE[:, :, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_each_format_are_those_of_pillow(kind):
    data = saved(COLOUR, kind)
    np.testing.assert_array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))
    assert size_of(data) == (12, 20)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_lossless_format_gives_the_pixels_that_were_saved(kind):
    np.testing.assert_array_equal(decoded(saved(COLOUR, kind)), NOISE[:, :, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_extension_follows_the_first_bytes(kind):
    expected = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    assert extension_of(saved(COLOUR, kind)) == expected
    assert expected in IMAGES


@pytest.mark.parametrize(("mode", "expected"), [("1", "pbm"), ("L", "pgm"), ("RGB", "ppm")])
def test_the_three_forms_of_pnm_have_extensions_of_their_own(mode, expected):
    assert extension_of(saved(COLOUR.convert(mode), "PPM")) == expected


def test_one_table_says_what_is_read():
    assert IMAGES == IMAGE_EXTENSIONS
    assert IMAGES[:4] == ("jpg", "jpeg", "png", "webp")
    assert set(IMAGES) == {each for known in FORMATS for each in known.extensions}
    assert all(known.name in READABLE for known in FORMATS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [*TURNED, "JPEG"])
def test_the_rotation_of_exif_is_applied_as_by_pillow(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(COLOUR, kind, exif=exif)
    expected = ImageOps.exif_transpose(opened(data))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected.convert("RGB")))
    if orientation > 1 and kind in LOSSLESS:
        assert not np.array_equal(decoded(data), NOISE[:, :, :3])
    assert size_of(data) == decoded(data).shape[:2]
    assert size_of(data) == ((20, 12) if orientation > 4 else (12, 20))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 3, 6, 9])
def test_exif_of_either_byte_order_is_read_and_nonsense_ignored(order, orientation):
    body = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    body += struct.pack(f"{order}HHHIHxxI", 1, 0x0112, 3, 1, orientation, 0)
    segment = b"Exif\0\0" + body
    jpeg = saved(COLOUR, "JPEG")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + jpeg[2:]
    expected = ImageOps.exif_transpose(opened(data))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0" + b"\xff" * 4, b"Exif\0\0XX"])
def test_a_broken_exif_block_turns_nothing(exif):
    jpeg = saved(COLOUR, "JPEG")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]
    np.testing.assert_array_equal(decoded(data), decoded(jpeg))


def test_the_rotation_of_xmp_counts_where_exif_states_none():
    packet = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    jpeg = saved(COLOUR, "JPEG")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(packet)) + packet + jpeg[2:]
    np.testing.assert_array_equal(decoded(data), np.asarray(ImageOps.exif_transpose(opened(data))))
    assert decoded(data).shape == (20, 12, 3)


def test_a_turned_jpeg_of_four_colours_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(COLOUR.convert("CMYK"), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(opened(data)).convert("RGB")
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))


@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_put_on_white(kind, mode):
    if (kind, mode) in (("WEBP", "LA"), ("AVIF", "LA")):
        pytest.skip("the format has no greys with alpha")
    data = saved(Image.fromarray(NOISE).convert(mode), kind)
    expected = on_white(opened(data))
    assert np.abs(decoded(data) - expected).max() <= 1
    white = Image.new("RGB", (20, 12), "white")
    image = opened(data).convert("RGBA")
    white.paste(image, mask=image.getchannel("A"))
    np.testing.assert_array_equal(decoded(data), np.asarray(white))


def test_opaque_alpha_changes_no_pixel():
    image = Image.fromarray(NOISE)
    image.putalpha(255)
    np.testing.assert_array_equal(decoded(saved(image, "PNG")), NOISE[:, :, :3])


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.fromarray((np.arange(240) % 4).astype(np.uint8).reshape(12, 20), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    for kind, options in (
        ("PNG", {"transparency": 2}),
        ("GIF", {"transparency": 2}),
        ("PNG", {"transparency": bytes([255, 255, 0, 255])}),
    ):
        pixels = decoded(saved(image, kind, **options))
        assert pixels[0, :4].tolist() == [[10, 20, 30], [40, 50, 60], [255] * 3, [1, 2, 3]], kind


def test_a_transparent_grey_or_colour_of_a_png_is_white():
    grey = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8))
    assert decoded(saved(grey, "PNG", transparency=7))[0, :, 0].tolist() == [0, 255, 255]
    deep = Image.fromarray(np.array([[0, 0x0700, 0xFF00]], dtype=np.uint16))
    assert decoded(saved(deep, "PNG", transparency=0x0700))[0, :, 0].tolist() == [0, 255, 255]
    color = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    pixels = decoded(saved(color, "PNG", transparency=(4, 5, 6)))
    assert pixels[0].tolist() == [[1, 2, 3], [255] * 3]


def test_an_animated_gif_is_its_first_frame():
    first, second = (Image.fromarray(NOISE[:, :, n]) for n in (0, 1))
    data = saved(first, "GIF", save_all=True, append_images=[second] * 5)
    np.testing.assert_array_equal(decoded(data)[:, :, 0], NOISE[:, :, 0])


def test_a_tiff_of_several_pages_is_its_first():
    first, second = (Image.fromarray(NOISE[:, :, n]) for n in (0, 1))
    data = saved(first, "TIFF", save_all=True, append_images=[second] * 5)
    np.testing.assert_array_equal(decoded(data)[:, :, 0], NOISE[:, :, 0])


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"]
)
def test_each_compression_of_tiff_is_read(compression):
    image = COLOUR.convert("1") if compression == "group4" else COLOUR
    data = saved(image, "TIFF", compression=None if compression == "raw" else compression)
    np.testing.assert_array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


def tiff(width, height, tags, content, order="<"):
    """A TIFF of one directory; ``tags`` is tag -> (type, values)."""
    sizes = {1: "B", 3: "H", 4: "I"}
    entries, outside = b"", b""
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    every = {**tags, 256: (4, [width]), 257: (4, [height])}
    for tag, (kind, values) in sorted(every.items()):
        packed = struct.pack(f"{order}{len(values)}{sizes[kind]}", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + len(outside))
            outside += packed
            packed = place
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(every)) + entries + bytes(4) + outside + content


def tiled(width, height, side, grey, order="<"):
    """A grey TIFF in square tiles, written here by hand."""
    tiles = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = np.zeros((side, side), np.uint8)
            part = grey[top : top + side, left : left + side]
            tile[: part.shape[0], : part.shape[1]] = part
            tiles.append(tile.tobytes())
    tags = {258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 322: (3, [side]),
            323: (3, [side]), 325: (4, [side * side] * len(tiles))}  # fmt: skip
    empty = tiff(width, height, {**tags, 324: (4, [0] * len(tiles))}, b"", order)
    offsets = [len(empty) + side * side * n for n in range(len(tiles))]
    return tiff(width, height, {**tags, 324: (4, offsets)}, b"".join(tiles), order)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_in_tiles_is_put_together(order):
    grey = np.random.default_rng(1).integers(0, 256, (37, 50), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(tiled(50, 37, 16, grey, order))[:, :, 1], grey)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_greys_of_sixteen_bits_keep_their_high_bits(kind):
    grey = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    data = saved(Image.fromarray(grey), kind)
    assert decoded(data)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_greys_of_sixteen_bits_in_the_other_byte_order_are_the_same():
    grey = np.array([[0, 0x8000, 0xFFFF]], dtype=">u2")
    tags = {258: (3, [16]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 279: (4, [6])}
    start = len(tiff(3, 1, {**tags, 273: (4, [0])}, b"", ">"))
    data = tiff(3, 1, {**tags, 273: (4, [start])}, grey.tobytes(), ">")
    assert decoded(data)[0, :, 2].tolist() == [0, 128, 255]


def strip(tags, pixels, order="<"):
    """A TIFF of one uncompressed strip of (H, W) or (H, W, C) pixels."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    color = 2 if channels == 3 else 1
    every = {258: (3, [8 * pixels.itemsize] * channels), 259: (3, [1]), 262: (3, [color]),
             277: (3, [channels]), 279: (4, [pixels.nbytes]), 273: (4, [0]), **tags}  # fmt: skip
    start = len(tiff(width, height, every, b"", order))
    return tiff(width, height, {**every, 273: (4, [start])}, pixels.tobytes(), order)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_sixteen_bits_a_channel_keeps_the_high_bits(order):
    pixels = np.random.default_rng(2).integers(0, 1 << 16, (4, 5, 3)).astype(f"{order}u2")
    np.testing.assert_array_equal(decoded(strip({}, pixels, order)), pixels >> 8)


def test_a_png_of_sixteen_bits_a_channel_keeps_the_high_bits():
    pixels = np.random.default_rng(3).integers(0, 1 << 16, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = b""
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):  # fmt: skip
        check = zlib.crc32(kind + body)
        parts += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    np.testing.assert_array_equal(decoded(b"\x89PNG\r\n\x1a\n" + parts), pixels >> 8)


def test_a_tiff_whose_white_is_zero_is_no_negative():
    grey = NOISE[:, :, 0]
    np.testing.assert_array_equal(decoded(strip({262: (3, [0])}, grey))[:, :, 2], 255 - grey)


@pytest.mark.parametrize(
    ("pixels", "layout"),
    [
        (np.zeros((4, 5), np.float16), "1 channel of 16-bit floats"),
        (np.zeros((4, 5), np.float64), "1 channel of 64-bit floats"),
        (np.zeros((4, 5, 3), np.float32), "3 channels of 32-bit floats"),
    ],
)
def test_a_tiff_of_a_layout_that_is_not_read_is_named_with_the_way(pixels, layout):
    kind = [3] * (pixels.shape[2] if pixels.ndim == 3 else 1)
    with pytest.raises(BadSample, match=f"its TIFF has {layout}, .*: save it as RGB of 8 bits"):
        decode_image(strip({339: (3, kind)}, pixels))


@pytest.mark.parametrize(("top", "expected"), [(1023, [0, 127, 255]), (4095, [0, 127, 255])])
def test_a_pgm_of_ten_or_twelve_bits_is_scaled_by_its_stated_maximum(top, expected):
    values = np.array([0, top // 2, top], dtype=">u2")
    assert decoded(b"P5\n3 1\n%d\n" % top + values.tobytes())[0, :, 0].tolist() == expected


def test_integers_of_32_bits_are_levels_or_sixteen_bits_or_refused():
    def data(values):
        return saved(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")

    assert decoded(data([0, 7, 255]))[0, :, 0].tolist() == [0, 7, 255]
    assert decoded(data([0, 0x8000, 0xFFFF]))[0, :, 0].tolist() == [0, 128, 255]
    for wrong in ([0, 70_000], [-1, 3]):
        with pytest.raises(
            BadSample, match="greys of 32 bits, integers of another .*save it with 8 or 16"
        ):
            decode_image(data(wrong))


def test_floats_are_fractions_or_levels_or_refused():
    def data(values):
        return saved(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")

    assert decoded(data([0, 0.5, 1]))[0, :, 0].tolist() == [0, 128, 255]
    assert decoded(data([0, 100.4, 255]))[0, :, 0].tolist() == [0, 100, 255]
    for wrong in ([-0.1, 1], [0, 300], [0, np.nan]):
        with pytest.raises(BadSample, match="expected 0 to 1 or 0 to 255: save it with 8 or 16"):
            decode_image(data(wrong))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_four_colours_of_print_become_three(kind):
    plain = np.tile(np.array([[[255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0], [0, 128, 0, 64]]],
                             dtype=np.uint8).repeat(16, 1), (16, 1, 1))  # fmt: skip
    data = saved(Image.fromarray(plain, "CMYK"), kind)
    ink = plain.astype(float)
    expected = (255 - ink[:, :, :3]) * (255 - ink[:, :, 3:]) / 255
    tolerance = 8 if kind == "JPEG" else 1  # of a lossy file
    assert np.abs(decoded(data) - expected).max() <= tolerance


def test_a_jpeg_of_adobe_whose_inks_are_inverted_is_no_negative():
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")  # Pillow writes Adobe's form
    assert b"Adobe" in data
    assert decoded(data)[8, 8].tolist() == [0, 255, 255]


def test_luminance_and_two_colours_become_three():
    data = saved(COLOUR.convert("YCbCr"), "TIFF")
    y, cb, cr = (np.asarray(COLOUR.convert("YCbCr"))[:, :, n].astype(float) for n in range(3))
    expected = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
         y + 1.772 * (cb - 128)], axis=2,
    ).clip(0, 255)  # fmt: skip
    assert np.abs(decoded(data) - expected).max() <= 1.5


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no LittleCMS")
def test_lab_becomes_three_colours():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    smooth = Image.new("RGB", (4, 4), (200, 60, 90))
    there = ImageCms.applyTransform(smooth, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert np.abs(decoded(saved(there, "TIFF")).astype(int) - [200, 60, 90]).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_one_bit_and_palettes_are_widened(kind, mode):
    image = COLOUR.convert(mode)
    np.testing.assert_array_equal(decoded(saved(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("header", [b"P6 20 12 255\n", b"P6\n# made by hand\n20 12\n#x\n255\n"])
def test_a_header_of_ppm_may_have_comments(header):
    np.testing.assert_array_equal(decoded(header + NOISE[:, :, :3].tobytes()), NOISE[:, :, :3])


def test_a_ppm_in_decimal_digits_is_read():
    digits = b" ".join(b"%d" % value for value in NOISE[:, :, :3].reshape(-1).tolist())
    np.testing.assert_array_equal(decoded(b"P3\n20 12\n255\n" + digits + b"\n"), NOISE[:, :, :3])


def test_a_bmp_from_top_to_bottom_is_not_upside_down():
    rows = NOISE[:, :, 2::-1].tobytes()  # 60 bytes each, a multiple of four; blue first
    head = struct.pack("<IiiHHIIiiII", 40, 20, -12, 1, 24, 0, len(rows), 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + head + rows
    np.testing.assert_array_equal(decoded(data), NOISE[:, :, :3])
    assert size_of(data) == (12, 20)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51\0", "JPEG 2000"),
        (b"\xff\x0a\0", "JPEG XL"), (b"8BPS\0\1", "Photoshop"), (b"%PDF-1.4", "PDF"),
        (b"\n <!DOCTYPE html><html>", "an HTML page"), (b"<svg xmlns=''>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
    ],
)  # fmt: skip
def test_a_format_that_is_not_read_is_named_with_what_is_read(data, name):
    for read in (decode_image, size_of, extension_of):
        with pytest.raises(BadSample) as caught:
            read(data)
        assert f"its image is {name}, not {READABLE}" in str(caught.value)
        assert "convert it" in str(caught.value) or "fetch the image" in str(caught.value)


def test_avif_is_refused_by_name_where_pillow_does_not_read_it(monkeypatch):
    monkeypatch.setattr("mmcl.data.image_formats.features.check", lambda name: False)
    with pytest.raises(BadSample, match="is AVIF, which this version of Pillow does not read"):
        decode_image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf")


def test_a_tiff_of_many_channels_is_refused_with_its_layout():
    tags = {258: (3, [16] * 13), 259: (3, [1]), 262: (3, [1]), 277: (3, [13]), 279: (4, [26]),
            273: (4, [8])}  # fmt: skip
    with pytest.raises(BadSample, match="its TIFF has 13 channels of 16-bit integers"):
        decode_image(tiff(1, 1, tags, bytes(26)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "I", "F", "CMYK", "1", "I;16"])
def test_images_of_a_users_dataset_follow_the_same_rules(mode):
    grey = NOISE[:, :, 0]
    image = {
        "I": Image.fromarray(grey.astype(np.int32)),
        "F": Image.fromarray(grey.astype(np.float32) / 255),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "PA": Image.fromarray(NOISE[:, :, :2], "LA").convert("PA"),
    }.get(mode) or Image.fromarray(NOISE).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()

    def keep(pixels, text, seed):
        return ProcessedSample(pixels)

    batch = ImageLabelCollate(keep)([(image, 0)])
    if mode in ("I", "F", "I;16"):
        expected = np.repeat(grey[:, :, None], 3, axis=2).astype(float)
    else:
        expected = on_white(image) if image.has_transparency_data else image.convert("RGB")
    expected = np.rot90(np.asarray(expected).astype(float), -1)
    found = batch.images[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    np.testing.assert_array_equal(found, rgb_array(image))


def test_the_text_of_a_png_may_hold_its_exif():
    exif = Image.Exif()
    exif[0x0112] = 8
    hexadecimal = exif.tobytes().hex()
    text = b"Raw profile type exif\0\0" + zlib.compress(
        f"\nexif\n{len(hexadecimal) // 2:8}\n{hexadecimal}\n".encode()
    )
    body = b"zTXt" + text
    part = struct.pack(">I", len(text)) + body + struct.pack(">I", zlib.crc32(body))
    data = saved(COLOUR, "PNG")
    data = data[:33] + part + data[33:]
    expected = ImageOps.exif_transpose(opened(data))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))
    assert torch.equal(decode_image(data), decode_image(saved(expected, "PNG")))
