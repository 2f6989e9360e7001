"""Images, conversations, labels and texts changed at random: an example, or a bad sample."""

import contextlib
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcl.core import Conversation
from mmcl.data.batches.collate import make_example
from mmcl.data.decode import decode_image, size_of
from mmcl.data.shards.llava_json import apply_template, read_dialogue
from mmcl.data.stored_sample import BadSample, Sample
from tests.data.small_stream import dialogue, picture
from tests.fuzz.mutation import CHANGES, expect_shown, mutated
from tests.fuzz.test_fuzz_reader import TASKS, stand_in


def saved(kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(1, size=(24, 16)))).convert(mode).save(file, kind, **options)
    return file.getvalue()


PICTURES = [
    saved("JPEG"), saved("JPEG", progressive=True), saved("JPEG", "CMYK"), saved("JPEG", "L"),
    saved("JPEG", exif=Image.Exif(), subsampling=2, quality=40), saved("JPEG", dpi=(72, 72)),
    saved("PNG"), saved("PNG", "P"), saved("PNG", "RGBA"), saved("PNG", "1"), saved("PNG", "I;16"),
    saved("PNG", "LA", optimize=True), saved("WEBP"), saved("WEBP", lossless=True),
    saved("WEBP", "RGBA", save_all=True, append_images=[Image.new("RGBA", (24, 16))]),
    saved("GIF"), saved("GIF", "RGBA"), saved("BMP"), saved("BMP", "P"), saved("PPM"),
    saved("PPM", "1"), saved("TIFF"), saved("TIFF", "RGBA", compression="tiff_lzw"),
    saved("TIFF", "I;16"), saved("TIFF", "F"), saved("TIFF", "LAB"),
    saved("TIFF", "CMYK", compression="tiff_adobe_deflate"),
]  # fmt: skip


STARTS = [
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0", b"P5 8 8 255 ", b"P3 8 8 ", b"\0\0\0\x18ftypavif", b"",
]  # fmt: skip


def shown(data):
    """Decode an image of at most 40,000 pixels."""
    try:
        pixels = decode_image(data, max_pixels=40_000)
    except BadSample as error:
        expect_shown(error, "its ")
        return None
    height, width = size_of(data)
    assert (pixels.dtype, pixels.ndim, pixels.shape[0]) == (torch.uint8, 3, 3)
    assert 1 <= pixels[0].numel() <= 40_000
    assert pixels.shape[1:] == (height, width)
    return pixels


def test_the_images_that_the_others_are_made_of_are_valid():
    assert all(shown(data) is not None for data in PICTURES)


@pytest.mark.slow
@settings(max_examples=1500)
@given(data=st.sampled_from(PICTURES), changes=CHANGES)
def test_a_changed_image_is_pixels_or_a_bad_sample(data, changes):
    shown(mutated(data, changes))


@settings(max_examples=500)
@given(
    start=st.sampled_from(STARTS),
    rest=st.binary(max_size=200),
)
def test_any_bytes_behind_a_true_beginning_are_pixels_or_a_bad_sample(start, rest):
    shown(start + rest)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
        st.sampled_from(["human", "gpt", "user", "<image>", "\ud800", "\0", " ", "\u200b"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["conversations", "from", "value", "answers", "id"]), inner, max_size=4
        ),
    ),
    max_leaves=15,
)  # fmt: skip
TURN = st.one_of(
    st.builds(
        lambda who, text: {"from": who, "value": text},
        st.sampled_from(["human", "gpt", "user", "assistant"]) | JSON,
        st.sampled_from(["what?", "<image>\nwhat?", "this", "\ud800", "\x00", ""]) | JSON,
    ),
    JSON,
)
RAW = st.one_of(
    JSON,
    st.builds(
        lambda turns, answers: {"conversations": turns, "answers": answers},
        st.lists(TURN, max_size=5),
        JSON,
    ),
)


def expect_dialogue(data):
    """Read a conversation; a valid one can be formatted, prompted and scored."""
    try:
        found = read_dialogue(data)
    except BadSample as error:
        expect_shown(error, "its ")
        return
    assert isinstance(found, Conversation)
    speakers = [turn.role for turn in found.turns]
    assert speakers == ["user", "assistant"] * (len(speakers) // 2)
    for text in (*(turn.text for turn in found.turns), *found.reference.answers):
        assert text.encode().strip()
    assert apply_template(found, "Q: {}").turns[0].text.encode()


@pytest.mark.slow
@settings(max_examples=500)
@given(raw=RAW)
def test_any_json_is_a_dialogue_or_a_bad_sample(raw):
    expect_dialogue(json.dumps(raw).encode())


@settings(max_examples=500)
@given(changes=CHANGES)
def test_a_changed_dialogue_is_one_or_a_bad_sample(changes):
    whole = dialogue('<image>\nschön \\ "so"?', "this", answers=["this", "that"], id=7)
    expect_dialogue(mutated(whole, changes))


@settings(max_examples=500)
@given(
    members=st.dictionaries(
        st.sampled_from(["cls", "txt", "json", "png", "jpg", "webp"]),
        st.one_of(
            st.binary(max_size=30), st.text(max_size=10).map(lambda t: t.encode()),
            st.integers(-3, 10**20).map(lambda n: str(n).encode()),
            st.just(PICTURES[0]), st.just(dialogue("what?", "this")), st.just(b"1"),
        ),
        max_size=4,
    ),
    task=st.sampled_from(TASKS),
)  # fmt: skip
def test_any_members_make_an_example_or_a_bad_sample(members, task):
    sample = Sample("key", "x.tar", members)
    try:
        made = make_example(sample, 0, task, stand_in, seed=0, max_pixels=10_000)
    except BadSample as error:
        expect_shown(error)
        return
    assert (
        made.label in (0, 1)
        if task.task_type == "classification"
        else made.processed.input_ids is not None
    )


@settings(max_examples=300)
@given(text=st.text(max_size=12), member=st.sampled_from(["txt", "cls"]))
def test_any_text_is_one_that_says_something_or_a_bad_sample(text, member):
    task = TASKS[0 if member == "cls" else 1]
    data = text.encode("utf-8", "surrogatepass")
    sample = Sample("key", "x.tar", {member: data, "png": PICTURES[6]})
    with contextlib.suppress(BadSample):
        made = make_example(sample, 0, task, stand_in, seed=0, max_pixels=10_000)
        assert any(mark.isalnum() or not mark.isspace() for mark in text)
        assert made.processed.image.shape == (3, 16, 24)
