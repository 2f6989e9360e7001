"""Samples drawn to be looked at."""

import io

import torch
from PIL import Image

from mmcl.core import IGNORE_INDEX
from mmcl.data.validate.preview import draw_samples, make_thumbnail
from tests.data.small_stream import coloured, labelled, write_answer_stream, write_stream


def drawn(stream, task=0, part="train", count=6, **options):
    return draw_samples(
        stream, stream.evaluated_task(task), part, count, cache_dir=stream.folder, **options
    )


def test_the_same_seed_draws_the_same_samples_and_another_one_others(tmp_path):
    stream = write_stream(tmp_path, sizes=(40,))
    first = drawn(stream)
    assert len({sample.key for sample in first}) == 6
    assert drawn(stream) == first
    assert drawn(stream, seed=1) != first
    assert {sample.column for sample in first} <= {0, 1}


def test_what_cannot_be_read_is_passed_over(tmp_path):
    members = [
        (name, b"" if name.endswith("png") and name[6:9] != "007" else content)
        for name, content in labelled(12, name="atrain")
    ]
    stream = write_stream(tmp_path, a_train=members)
    assert {sample.key for sample in drawn(stream)} == {"atrain007"}
    (tmp_path / "b-train.tar").unlink()
    assert drawn(stream, 1) == []


def test_turns_come_without_the_mark_of_the_picture(tmp_path):
    stream = write_answer_stream(tmp_path, a_train=coloured(4, 0, name="atrain"))
    (sample,) = drawn(stream, count=1)
    assert sample.turns[0] == ("user", "What colour is it?")
    assert sample.turns[1][0] == "assistant"
    assert (sample.size, sample.column) == ((16, 16), IGNORE_INDEX)


def test_small_pictures_are_kept_exactly_and_large_ones_made_smaller():
    small = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    kept = Image.open(io.BytesIO(make_thumbnail(small)))
    assert kept.format == "PNG"
    assert list(kept.tobytes()) == small.permute(1, 2, 0).flatten().tolist()
    large = Image.open(io.BytesIO(make_thumbnail(torch.zeros(3, 400, 1000, dtype=torch.uint8))))
    assert (large.format, large.size) == ("JPEG", (320, 128))
    thin = Image.open(io.BytesIO(make_thumbnail(torch.zeros(3, 1, 5000, dtype=torch.uint8))))
    assert thin.size[0] == 320
