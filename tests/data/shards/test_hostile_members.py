"""Untrusted labels, texts and conversations: an example, or a bad sample that says why."""

import json

import pytest
import torch

from mmcl.core import ProcessedSample, Task
from mmcl.data import eval_loader, open_stream
from mmcl.data.batches.collate import make_example
from mmcl.data.shards.llava_json import read_dialogue
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, Sample
from tests.data.small_stream import (
    CutAndNoise,
    dialogue,
    labelled,
    picture,
    write_answer_stream,
    write_stream,
)  # fmt: skip

CLASSES = Task(0, "classes", task_type="classification", classes=("a", "b"), label_to_class=(0, 1))
CAPTIONS = Task(0, "captions", task_type="captioning")


def stand_in(pixels, text, seed):
    tokens = None if text is None else torch.tensor(list(text.encode()))
    return ProcessedSample(pixels, tokens)


def row(task, **members):
    sample = Sample("key", "x.tar", {"png": picture(), **members})
    return make_example(sample, 0, task, stand_in, seed=0, max_pixels=10_000)


@pytest.mark.parametrize("label", [b"1", b" 1", b"1\n", b"\t001\r\n", b"000000000000000001"])
def test_a_label_is_a_whole_number_with_spaces_around_it(label):
    assert row(CLASSES, cls=label).label == 1


@pytest.mark.parametrize(
    "label",
    [
        b"", b" ", b"\0", b"1\0", b"-1", b"+1", b"1.0", b"1e0", b"0x1", b"1 0", b"1_0", b"one",
        "１".encode(), "¹".encode(), "①".encode(), "٣".encode(), b"\xef\xbb\xbf1", b"1" * 19,
        b"1" * 5000, b"\xff\xfe1\0", b"[1]", b"null", b"\x80\x04K\x01.", "\u200b1".encode(),
    ],
)  # fmt: skip
def test_a_label_of_anything_else_is_shown_shortened(label):
    with pytest.raises(BadSample, match="its label is b.*, expected a whole number") as caught:
        row(CLASSES, cls=label)
    assert len(str(caught.value)) < 130


@pytest.mark.parametrize("label", [b"2", b"99", b"9" * 18])
def test_a_label_beyond_the_classes_is_reported(label):
    with pytest.raises(BadSample, match=f"its label is {int(label)}, the card has classes 0 to 1"):
        row(CLASSES, cls=label)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n\r\t\v\f", "\0", "\0\0\0", "\x1b\x07", "\x7f", "\x85\xa0", "\u2028\u2029",
        "\u200b\u200d\ufeff", "\u3000", "\u202e", " \0 \0 ",
    ],
)  # fmt: skip
def test_a_text_that_shows_nothing_is_empty(text):
    with pytest.raises(BadSample, match=r"its caption \(\.txt\) is empty"):
        row(CAPTIONS, txt=text.encode())
    with pytest.raises(BadSample, match="turn 0 of its conversation is not a text from human"):
        read_dialogue(dialogue(text, "this"))
    with pytest.raises(BadSample, match="turn 1 of its conversation is not a text from gpt"):
        read_dialogue(dialogue("what?", text))


@pytest.mark.parametrize(
    "text", ["a\0b", "👩\u200d🚀", "שלום\u200f", "\ue000", "。", "\x1b[2Jx", "5"]
)
def test_a_text_that_shows_something_is_one(text):
    assert row(CAPTIONS, txt=text.encode()).processed.input_ids.tolist() == list(
        text.strip().encode()
    )
    assert read_dialogue(dialogue(text, text)).turns[1].text == text


@pytest.mark.parametrize("text", [b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"a\x00\xd8", b"\xc0\x80"])
def test_a_text_that_is_not_utf8_is_reported(text):
    with pytest.raises(BadSample, match=r"its caption \(\.txt\) is not UTF-8"):
        row(CAPTIONS, txt=text)
    with pytest.raises(BadSample, match=r"its conversation \(\.json\) is not JSON"):
        read_dialogue(b'{"conversations": "' + text + b'"}')


@pytest.mark.parametrize(
    "data",
    [
        b"[" * MAX_TEXT_BYTES, b'{"a":' * (MAX_TEXT_BYTES // 5), b'[{"":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000, b"9" * 5000, b'{"a": 1' + b"0" * 5000 + b"}", b"",
        b"\0", b"nul", b"{'a': 1}", b'{"conversations": [', b"\x80\x04K\x01.", b"1 2",
    ],
)  # fmt: skip
def test_a_conversation_of_nonsense_is_one_sentence(data):
    with pytest.raises(BadSample, match="its conversation .*(is not JSON|has no turns)") as caught:
        read_dialogue(data)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("data", [b"NaN", b"[Infinity]", b"3", b'"a"', b"null", b"{}", b"[{}]"])
def test_json_that_is_no_conversation_is_reported(data):
    with pytest.raises(BadSample, match="its conversation has no turns, expected 'conversations'"):
        read_dialogue(data)


def nested(depth):
    return b'{"conversations": [{"from": ' + b"[" * depth + b"]" * depth + b"}, {}]}"


@pytest.mark.parametrize("depth", [10, 300, 900, 950, 970, 980, 990, 2000])
def test_a_speaker_of_nested_lists_is_no_crash_at_any_depth(depth):
    with pytest.raises(BadSample, match="turn 0 of its conversation|is not JSON"):
        read_dialogue(nested(depth))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "[]", "{}", "true", "null", "7"])
def test_values_that_are_no_texts_are_reported(value):
    good = dialogue("what?", "this").decode()
    with pytest.raises(BadSample, match="turn 1 of its conversation is not a text"):
        read_dialogue(good.replace('"this"', value).encode())
    with pytest.raises(BadSample, match="its 'answers' are not a list of texts"):
        read_dialogue(good.replace("{", f'{{"answers": [{value}], ', 1).encode())


@pytest.mark.parametrize("half", [r"\ud800", r"\udfff", r"a\ud83d b", r"\ude00\ud83d"])
def test_half_of_a_character_is_a_bad_sample(half):
    message = "half of a character|is not a text"
    for place in ("what?", "this", "that"):
        data = dialogue("what?", "this", answers=["that"]).decode().replace(place, f"x{half}")
        with pytest.raises(BadSample, match=message):
            read_dialogue(data.encode())
    whole = dialogue("what?", "this").decode().replace("this", r"\ud83d\ude00")
    assert read_dialogue(whole.encode()).turns[1].text == "😀"


def test_of_a_key_that_comes_twice_the_last_counts_and_is_checked():
    twice = b'{"conversations": 3, ' + dialogue("what?", "this")[1:]
    assert read_dialogue(twice).turns[1].text == "this"
    with pytest.raises(BadSample, match="has no turns"):
        read_dialogue(dialogue("what?", "this")[:-1] + b', "conversations": 3}')


@pytest.mark.parametrize("count", [0, 1, 3, 201, 202, 50_000])
def test_a_conversation_of_too_many_turns_or_an_odd_number_is_reported(count):
    turns = [{"from": "gpt" if n % 2 else "human", "value": "x"} for n in range(count)]
    with pytest.raises(BadSample, match=f"has {count} turns, expected .* 2 to 200"):
        read_dialogue(json.dumps({"conversations": turns}).encode())


def test_bad_members_are_named_with_sample_and_shard(tmp_path):
    members = [
        *labelled(2),
        ("a.png", picture()), ("a.cls", b"[[["),
        ("b.png", b"\x89PNG"), ("b.cls", b"0"),
    ]  # fmt: skip
    stream = write_stream(tmp_path, sizes=(4,), a_test=members)
    (batch,) = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8)
    assert [error.partition(":")[0] for error in batch.errors] == [
        "a in a-test.tar",
        "b in a-test.tar",
    ]


def test_a_conversation_of_brackets_is_named_with_sample_and_shard(tmp_path):
    members = [("deep.png", picture()), ("deep.json", b"[" * MAX_TEXT_BYTES)]
    stream = write_answer_stream(tmp_path, sizes=(4,), a_test=members)
    with pytest.raises(
        ValueError, match=r"deep in a-test\.tar: its conversation \(\.json\) is not JSON"
    ):
        list(eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8))
