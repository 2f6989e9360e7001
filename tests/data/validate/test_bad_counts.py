"""Each kind of bad sample is found by validation, counted once, and left out by a run once."""

import json
import struct

import pytest
import torch
import yaml

from mmcl.core import ProcessedSample, TaskStream
from mmcl.data import check_stream, eval_loader, open_stream, train_loader
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.stored_sample import MAX_TEXT_BYTES
from tests.data.convert.llava_files import put
from tests.data.small_stream import dialogue, picture, write_tar
from tests.data.test_hostile_images import bmp, gif, png
from tests.data.test_image_formats import tiff

LONG = MAX_TEXT_BYTES + 1
IMAGES = {
    "empty": b"",
    "no image": b"these are words",
    "another format": b"8BPS\0\1",
    "half a png": picture(1)[:60],
    "half a jpeg": picture(1, "JPEG")[:-10],
    "a png of too many pixels": png(9000, 9000),
    "a png with a long side": png(2, 16_001),
    "a bmp of too many pixels": bmp(60_000, 60_000),
    "a gif of too many pixels": gif((60_000, 60_000), (1, 1)),
    "half a tiff": picture(1, "TIFF")[:100],
    "a tiff of many channels": tiff(
        1, 1, {258: (3, [16] * 9), 259: (3, [1]), 262: (3, [1]), 277: (3, [9]), 273: (4, [8])}, b""
    ),
    "floats of no range": tiff(
        1, 1, {258: (3, [32]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 339: (3, [3]),
               273: (4, [8 + 2 + 9 * 12 + 4]), 279: (4, [4])}, struct.pack("<f", -7.0),
    ),
}  # fmt: skip
CLASSIFICATION = {
    **{name: {"png": data} for name, data in IMAGES.items()},
    "no image member": {"png": None},
    "no class": {"cls": None},
    "a class in words": {"cls": b"one"},
    "a class below zero": {"cls": b"-1"},
    "a class beyond the card": {"cls": b"9"},
    "a class of another task": {"cls": b"2"},
    "bad for two reasons": {"png": b"", "cls": b"nine"},
    "a class of a megabyte": {"cls": b"1" * LONG},
}
CAPTIONING = {
    "no image": {"png": b""},
    "no caption": {"txt": None},
    "a blank caption": {"txt": b" \n"},
    "an invisible caption": {"txt": "\u200b\u200d".encode()},
    "a caption that is not UTF-8": {"txt": b"\xff\xfe"},
    "a caption of a megabyte": {"txt": b"x" * LONG},
    "two reasons": {"png": b"", "txt": b""},
}
INSTRUCTION = {
    "no image": {"png": b""},
    "no conversation": {"json": None},
    "no JSON": {"json": b"{"},
    "nested": {"json": b"[" * 99_999},
    "one turn": {"json": json.dumps({"conversations": [{"from": "human", "value": "x"}]}).encode()},
    "a turn of nobody": {
        "json": json.dumps(
            {"conversations": [{"from": "human", "value": "x"}, {"from": "cat", "value": "y"}]}
        ).encode()
    },
    "two images shown": {"json": dialogue("<image> <image> what?", "a")},
    "an image shown that is not there": {"png": None, "json": dialogue("<image> what?", "a")},
    "answers of numbers": {"json": dialogue("what?", "a", answers=[1])},
    "half a character": {
        "json": b'{"conversations": [{"from": "human", "value": "\\ud800"}, '
        b'{"from": "gpt", "value": "a"}]}'
    },  # fmt: skip
    "a megabyte": {"json": dialogue("what?" * LONG, "a")},
}
KINDS = {"classification": CLASSIFICATION, "captioning": CAPTIONING, "instruction": INSTRUCTION}
CASES = [(kind, name) for kind, cases in KINDS.items() for name in cases]


def members_of(kind, number, key, changes=None):
    """Members of a good sample, with ``changes``: extension -> content, None = leave it out."""
    good = {"png": picture(number)}
    if kind == "classification":
        good["cls"] = str(number % 2).encode()
    elif kind == "captioning":
        good["txt"] = f"a thing, number {number}".encode()
    else:
        good["json"] = dialogue("what?", f"thing {number}")
    members = {**good, **(changes or {})}
    return [(f"{key}.{name}", data) for name, data in members.items() if data is not None]


def write(folder, kind, changes):
    """Write a stream of one task whose training and test shards have one bad sample each."""
    for split, start in (("train", 0), ("test", 100)):
        members = []
        for number in range(6):
            wrong = changes if number == 3 else None
            members += members_of(kind, start + number, f"{split}{number}", wrong)
        write_tar(folder / f"{split}.tar", members)
    task = {"name": "a", "train": "train.tar", "test": "test.tar"}
    card = {"name": "s", "scenario": "domain", "task_type": kind, "tasks": [task]}
    if kind == "classification":
        other = {"name": "b", "train": "other.tar", "test": "rest.tar", "classes": ["z"]}
        for name in ("other", "rest"):
            data = picture(500 if name == "other" else 501)
            write_tar(folder / f"{name}.tar", [(f"{name}.png", data), (f"{name}.cls", b"2")])
        card |= {"classes": ["x", "y", "z"], "tasks": [{**task, "classes": ["x", "y"]}, other]}
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


def transform(pixels, text, seed):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    is_text = isinstance(text, str)
    return ProcessedSample(
        None if pixels is None else image, torch.tensor([1, 2]) if is_text else None,
        None if is_text or text is None else torch.tensor([1, 2]),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_bad_sample_is_found_counted_once_and_left_out_once(tmp_path, kind, name):
    path = write(tmp_path, kind, KINDS[kind][name])
    found = check_stream(path, num_workers=0)
    lines = {
        split: [line for line in found.errors if line.startswith(f"task 'a' ({split}): {split}3 ")]
        for split in ("train", "test")
    }
    assert [len(one) for one in lines.values()] == [1, 1], found.errors
    assert (len(found.errors), found.num_errors) == (2, 2)
    assert [part.bad for part in found.tasks[0].splits] == [1, 1]
    opened = open_stream(TaskStream.read(path))
    place = [0, 0]
    loader = train_loader(
        opened, 0, transform, replay_plan=None, global_batch_size=3, seed=0,
        position=lambda: tuple(place),
    )  # fmt: skip
    met = []
    for epoch in range(2):
        place[0] = epoch
        met += [error for batch in loader for error in batch.errors]
    assert {f"task 'a' (train): {error}" for error in met} == set(lines["train"])
    tested = [
        error for batch in eval_loader(opened, 0, transform, batch=3) for error in batch.errors
    ]
    assert [f"task 'a' (test): {error}" for error in tested] == lines["test"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_without_a_bad_sample_has_none(tmp_path, kind):
    found = check_stream(write(tmp_path, kind, {}), num_workers=0)
    assert (found.errors, found.num_errors) == ((), 0)


@pytest.mark.parametrize(
    ("scorer", "good", "bad"),
    [
        ("box/2", "[0.1, 0.2, 0.3, 0.4]", "top left"),
        ("box", "<|box_start|>(12,34),(56,78)<|box_end|>", "<|box_start|>(12,34)<|box_end|>"),
        ("box", "<loc0205><loc0102><loc0922><loc0512> cup", "<loc0205> cup"),
        ("option", "B", "both"),
        ("option", "(B) gold", "A lot"),
    ],
)
def test_an_answer_that_the_scorer_cannot_use_is_a_bad_test_sample(tmp_path, scorer, good, bad):
    for split, start in (("train", 0), ("test", 100)):
        members = []
        for number in range(4):
            answer = dialogue("where?", bad if number == 2 else good)
            changes = {"json": answer}
            members += members_of("instruction", start + number, f"{split}{number}", changes)
        write_tar(tmp_path / f"{split}.tar", members)
    task = {"name": "a", "train": "train.tar", "test": "test.tar", "scorer": scorer}
    card = {"name": "s", "scenario": "domain", "task_type": "instruction", "tasks": [task]}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(card))
    found = check_stream(path, num_workers=0)
    reason = f"test2 in test.tar: its right answer is {bad!r}, which the scorer"
    assert [line.startswith(f"task 'a' (test): {reason}") for line in found.errors] == [True]
    assert (found.num_errors, found.tasks[0].test.bad, found.tasks[0].train.bad) == (1, 1, 0)
    opened = open_stream(TaskStream.read(path))
    batches = list(eval_loader(opened, 0, transform, batch=4))
    assert [f"task 'a' (test): {error}" for error in batches[0].errors] == list(found.errors)
    assert batches[0].keys == ("test0", "test1", "test3")
    passed = list(eval_loader(opened, 0, transform, batch=4, split="train"))
    assert (passed[0].errors, len(passed[0])) == ((), 4)


def test_a_shard_that_two_tasks_list_has_its_bad_samples_once(tmp_path):
    path = write(tmp_path, "captioning", {"txt": b""})
    card = yaml.safe_load(path.read_text())
    card["tasks"].append({**card["tasks"][0], "name": "b"})
    path.write_text(yaml.safe_dump(card))
    found = check_stream(path, num_workers=0)
    assert [line.partition(": ")[2] for line in found.errors] == [
        "train3 in train.tar: its caption (.txt) is empty",
        "test3 in test.tar: its caption (.txt) is empty",
    ]
    assert found.num_errors == 2
    assert [part.bad for task in found.tasks for part in task.splits] == [1, 1, 1, 1]


def test_errors_that_are_only_counted_count(tmp_path):
    write_tar(tmp_path / "train.tar", [
        pair for n in range(12) for pair in members_of("captioning", n, f"k{n:02d}", {"png": b""})
    ])  # fmt: skip
    write_tar(tmp_path / "test.tar", members_of("captioning", 50, "t"))
    task = {"name": "a", "train": "train.tar", "test": "test.tar"}
    path = tmp_path / "s.yaml"
    card = {"name": "s", "scenario": "domain", "task_type": "captioning", "tasks": [task]}
    path.write_text(yaml.safe_dump(card))
    found = check_stream(path, num_workers=0)
    assert len(found.errors) == 6
    assert found.errors[-1] == "and 7 more in task 'a' (train) of this sort: its image is empty"
    assert found.num_errors == found.plain()["num_errors"] == found.tasks[0].train.bad == 12


@pytest.mark.parametrize("name", IMAGES)
def test_a_conversion_refuses_the_images_that_a_run_would_leave_out(tmp_path, name):
    for number in range(4):
        put(tmp_path / "set" / "c" / f"{number}.png", picture(number))
    put(tmp_path / "set" / "c" / "wrong.png", IMAGES[name])
    source = open_input(tmp_path / "set")
    with pytest.raises(ValueError, match="1 of 5 samples in .* cannot be used"):
        convert(source, None, tmp_path / "out", ConvertOptions("s"))
    path, made = convert(source, None, tmp_path / "out", ConvertOptions("s", max_bad_fraction=0.5))
    assert (made.num_bad, len(made.left_out)) == (1, 1)
    assert check_stream(path, num_workers=0).errors == ()


@pytest.mark.parametrize("text", ["\u200b", "\u00a0 "])
def test_a_conversion_refuses_the_captions_that_a_run_would_leave_out(tmp_path, text):
    for number in range(5):
        put(tmp_path / f"{number}.png", picture(number))
    rows = "".join(f"{number}.png,thing {number}\n" for number in range(4))
    put(tmp_path / "t.csv", f"path,text\n{rows}4.png,{text}\n")
    source = open_input(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="1 of 5 samples in .* cannot be used"):
        convert(source, None, tmp_path / "out", ConvertOptions("s"))


def test_a_conversion_has_the_limits_of_pixels_that_a_run_has(tmp_path):
    assert MAX_PIXELS == 64_000_000
    put(tmp_path / "set" / "c" / "a.png", png(16_001, 3))
    put(tmp_path / "set" / "c" / "b.png", picture(1))
    with pytest.raises(ValueError, match="16001 x 3, a side of more than 16000 pixels"):
        convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("s"))
