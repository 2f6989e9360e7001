"""Images of every format are converted unchanged, and read from shards and in place."""

import hashlib
import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mmcl.core import TaskStream
from mmcl.data import check_stream, decode_image, open_stream
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from mmcl.data.image_formats import FORMATS
from tests.data.convert.llava_files import asked, put
from tests.data.test_image_formats import needs_avif

ENDINGS = [
    "jpg", "JPEG", "jfif", "png", "webp", "gif", "bmp", "tif", "TIFF", "ppm", "pgm", "pbm", "pnm",
    pytest.param("avif", marks=needs_avif),
]  # fmt: skip
MODES = {"pgm": "L", "pbm": "1"}
OWN = {"jpeg": "jpg", "jfif": "jpg", "tiff": "tif", "pnm": "ppm"}


def image_of(number, ending, size=(12, 10)):
    """The bytes of noise in the format of an ending."""
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    kind = next(f.pillow for f in FORMATS if ending.lower() in f.extensions)
    file = io.BytesIO()
    Image.fromarray(noise).convert(MODES.get(ending.lower(), "RGB")).save(file, kind)
    return file.getvalue()


def samples(path):
    """(members, pixels) of every sample of a stream."""
    opened = open_stream(TaskStream.read(path))
    for task in opened.stream:
        for split in ("train", "test"):
            reader = opened.reader(task.index, split)
            for number in range(len(reader)):
                members = dict(reader.read(number).members)
                members.pop("cls", None), members.pop("json", None)
                ((extension, data),) = members.items()
                yield extension, data, decode_image(data)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_of_a_format_becomes_a_stream_of_the_same_bytes(tmp_path, ending):
    written = {}
    for label, first in (("forest", 0), ("river", 50)):
        for number in range(4):
            data = image_of(first + number, ending)
            put(tmp_path / "set" / label / f"{number}.{ending}", data)
            written[hashlib.sha256(data).hexdigest()] = data
    path, made = convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
    assert made.notes == []
    found = list(samples(path))
    assert {hashlib.sha256(data).hexdigest() for _, data, _ in found} == set(written)
    assert {extension for extension, _, _ in found} == {OWN.get(ending.lower(), ending.lower())}
    for _, data, pixels in found:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert check_stream(path, num_workers=0).errors == ()


def test_a_name_that_states_another_format_is_corrected(tmp_path):
    for number in range(4):
        put(tmp_path / "set" / "c" / f"{number}.jpg", image_of(number, "tif"))
    path, _ = convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
    assert {extension for extension, _, _ in samples(path)} == {"tif"}


@pytest.mark.parametrize("in_place", [True, False])
def test_records_show_images_of_all_formats(tmp_path, in_place):
    endings = ["jpg", "gif", "bmp", "tif", "ppm", "pgm", "webp", "png"]
    for number, ending in enumerate(endings):
        put(tmp_path / "images" / f"{number}.{ending}", image_of(number, ending))
    records = [asked(n, f"{n}.{ending}") for n, ending in enumerate(endings)]
    source = put(tmp_path / "train.json", records)
    images = tmp_path / "images"
    path, _ = convert(
        open_input(source, None, images), None, tmp_path / "out", ConvertOptions("s"),
        in_place=InPlace(images, images) if in_place else None,
    )  # fmt: skip
    assert sorted(extension for extension, _, _ in samples(path)) == sorted(endings)
    assert check_stream(path, num_workers=0).errors == ()


def test_bytes_in_parquet_may_be_of_any_format(tmp_path):
    data = [image_of(number, ending) for number, ending in enumerate(("tif", "gif", "bmp", "jpg"))]
    table = pyarrow.table({"image": data, "text": [f"thing {number}" for number in range(4)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_input(tmp_path / "t.parquet")
    path, _ = convert(source, None, tmp_path / "out", ConvertOptions("s"))
    opened = open_stream(TaskStream.read(path))
    kinds = [
        set(opened.reader(0, split).read(number).members) - {"txt"}
        for split in ("train", "test") for number in range(len(opened.reader(0, split)))
    ]  # fmt: skip
    assert sorted(next(iter(one)) for one in kinds) == ["bmp", "gif", "jpg", "tif"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_images_of_sixteen_bits_are_told_of(tmp_path, kind):
    for number in range(4):
        deep = np.random.default_rng(number).integers(0, 65536, (8, 8), dtype=np.uint16)
        grey = Image.fromarray(deep if number < 3 else (deep >> 8).astype(np.uint8))
        (tmp_path / "set" / "c").mkdir(parents=True, exist_ok=True)
        grey.save(tmp_path / "set" / "c" / f"{number}.{kind.lower()}", kind)
    _, made = convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
    assert made.notes == [
        "3 images have more than 8 bits a value: they are stored as they are and read with 8, of "
        "16 bits the high ones (docs/data.md, Image formats)"
    ]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "'c/x.heic' is HEIC, not JPEG, PNG"),
        ("x.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "'c/x.jp2' is JPEG 2000, not JPEG, PNG"),
        ("x.jpg", b"<!DOCTYPE html>", "'c/x.jpg' is an HTML page, not .*: fetch the image itself"),
        ("x.svg", b"<svg/>", "'c/x.svg' is SVG, not JPEG"),
        ("x.jxl", b"\xff\x0a\0\0", "'c/x.jxl' is JPEG XL, not JPEG"),
    ],
)
def test_a_format_that_is_not_read_is_named_and_not_passed_over(tmp_path, name, data, said):
    for number in range(3):
        put(tmp_path / "set" / "c" / f"{number}.png", image_of(number, "png"))
    put(tmp_path / "set" / "c" / name, data)
    with pytest.raises(ValueError, match=said):
        convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
    assert not (tmp_path / "out").exists()


def test_a_turned_photo_is_upright_in_a_shard_and_its_bytes_are_unchanged(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        image = Image.open(io.BytesIO(image_of(number, "png", (10, 16))))
        (tmp_path / "set" / "c").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "set" / "c" / f"{number}.jpg", exif=exif)
    before = {file.read_bytes() for file in (tmp_path / "set" / "c").iterdir()}
    path, _ = convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
    found = list(samples(path))
    assert {data for _, data, _ in found} == before
    assert {tuple(pixels.shape) for _, _, pixels in found} == {(3, 16, 10)}
    assert check_stream(path, num_workers=0).tasks[0].train.sizes[0] == (10, 16)
