"""Samples are grouped by text and images together; the sizes of images come from headers."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mmcl.core import ProcessedSample, ReplayPlan
from mmcl.data import ReplayCopyReader, open_stream, save_replay_copies, train_loader
from mmcl.data.batches import sample_lengths
from mmcl.data.batches.sample_lengths import EntryLengths, image_sizes
from mmcl.data.remote.location import sha256_of
from mmcl.data.shards import image_folder
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.reader import Reader
from tests.data.small_stream import dialogue, picture, write_answer_stream

SHAPES = ((8, 8), (24, 16), (40, 40), (64, 24))
PLAN = ReplayPlan(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 5, 6, 11]), 0.25)


@dataclass
class Tiles:
    """A transform of a model with a token for every 4 x 4 pixels, or a fixed number an image."""

    tokens_per_image: int | None = None

    def __call__(self, pixels, text, seed):
        tokens = torch.ones(3, dtype=torch.int64)
        return ProcessedSample(None, tokens, tokens)

    def image_tokens(self, sizes):
        return sum(height * width // 16 for height, width in sizes)


class TextAlone:
    """A transform of a model whose images are no tokens of its text."""

    def __call__(self, pixels, text, seed):
        return Tiles()(pixels, text, seed)


def varied(count, name):
    """Samples with no image, one of some size, or two; with texts of some lengths."""
    members, sizes = [], []
    for number in range(count):
        key, images = f"{name}{number:03d}", number % 3
        shapes = [SHAPES[(number + k) % 4] for k in range(images)]
        marks = "<image>" * images
        text = dialogue(f"{marks}what is it" + "?" * (number * 7 % 50), "a square")
        for k, (height, width) in enumerate(shapes):
            member = "png" if images == 1 else f"{k}.png"
            members.append((f"{key}.{member}", picture(number + k, size=(width, height))))
        members.append((f"{key}.json", text))
        sizes.append((len(text), shapes))
    return members, sizes


@pytest.fixture
def stream(tmp_path):
    """A stream of two tasks, and (bytes of text, shapes of images) of each sample by its key."""
    known = {}
    changes = {}
    for name, count in (("a", 12), ("b", 48)):
        members, sizes = varied(count, name)
        changes[f"{name}_train"] = members
        known |= {f"{name}{number:03d}": own for number, own in enumerate(sizes)}
    return write_answer_stream(tmp_path, sizes=(12, 48), **changes), known


def load(prepared, transform=None, **how):
    options = {"replay_plan": PLAN, "global_batch_size": 8, "seed": 1, "group": 4, **how}
    return list(train_loader(prepared, 1, transform or Tiles(), **options))


def length_of(known, key, per_image=None):
    text, shapes = known[key]
    tokens = sum(h * w // 16 if per_image is None else per_image for h, w in shapes)
    return text + 4 * tokens


def padding(known, batches, **how):
    """Padding of the new samples, all batches together."""
    total = 0
    for batch in batches:
        own = [length_of(known, key, **how) for key in batch.keys if key.startswith("b")]
        total += max(own) * len(own) - sum(own)
    return total


@pytest.mark.parametrize("per_image", [None, 64])
def test_batches_hold_samples_of_similar_length_with_their_images(stream, per_image):
    prepared, known = open_stream(stream[0]), stream[1]
    how = {"per_image": per_image}
    both = padding(known, load(prepared, Tiles(per_image)), **how)
    text = padding(known, load(prepared, TextAlone()), **how)
    assert both < 0.6 * text
    assert both < 0.6 * padding(known, load(prepared, Tiles(per_image), group=0), **how)


def test_lengths_are_those_of_text_and_images(stream):
    prepared, known = open_stream(stream[0]), stream[1]
    reader = prepared.reader(1, "train")
    text = reader.text_bytes("json")
    lengths = EntryLengths(text, lambda entry: (reader, entry), Tiles())
    asked = np.array([5, 0, 47, 5, 13])
    expected = [length_of(known, reader.key(number)) for number in asked.tolist()]
    assert lengths[asked].tolist() == expected
    for number in range(len(reader)):
        assert image_sizes(reader, number) == known[reader.key(number)][1]


def test_headers_are_read_once_and_only_of_the_window_that_is_cut(stream, monkeypatch):
    prepared, seen = open_stream(stream[0]), []
    plain = sample_lengths.image_sizes

    def counted(reader, number):
        seen.append(reader.key(number))
        return plain(reader, number)

    monkeypatch.setattr(sample_lengths, "image_sizes", counted)
    batches = iter(train_loader(
        prepared, 1, Tiles(), replay_plan=PLAN, global_batch_size=8, seed=1, group=4
    ))  # fmt: skip
    next(batches)
    assert len(seen) <= 4 * 8
    list(batches)
    assert len(seen) == len(set(seen)) == 48 + 4


def test_every_sample_comes_once_replay_has_its_slots_and_epochs_differ(stream):
    prepared = open_stream(stream[0])
    orders = []
    for epoch in range(2):
        batches = load(prepared, position=lambda epoch=epoch: (epoch, 0))
        assert {int(batch.is_replay.sum()) for batch in batches} == {2}
        keys = [key for batch in batches for key in batch.keys if key.startswith("b")]
        assert sorted(keys) == [f"b{number:03d}" for number in range(48)]
        orders.append(keys)
    assert orders[0] != orders[1]


def test_a_resumed_epoch_and_two_ranks_have_the_same_batches(stream):
    prepared = open_stream(stream[0])
    whole = [batch.keys for batch in load(prepared)]
    assert [batch.keys for batch in load(prepared, position=lambda: (0, 3))] == whole[3:]
    ranks = [load(prepared, rank=rank, world=2) for rank in range(2)]
    for keys, *parts in zip(whole, *ranks, strict=True):
        pairs = zip(*(part.keys for part in parts), strict=True)
        assert tuple(key for pair in pairs for key in pair) == keys


def test_copies_in_place_of_old_shards_give_the_same_batches(stream, tmp_path):
    prepared = open_stream(stream[0])
    whole = [batch.keys for batch in load(prepared)]
    copied = ReplayPlan(PLAN.task_ids, PLAN.sample_ids, 0.25, "copy")
    save_replay_copies(prepared, copied, tmp_path / "memory", 0)
    readers = {0: ReplayCopyReader(tmp_path / "memory", 0)}
    found = load(prepared, replay_plan=copied, replay_readers=readers)
    assert [batch.keys for batch in found] == whole


def test_an_image_that_cannot_be_read_counts_nothing(tmp_path):
    broken = [("b000.png", b"no image"), ("b000.json", dialogue("<image>what?", "it"))]
    members, _ = varied(12, "c")
    reader = open_stream(
        write_answer_stream(tmp_path, sizes=(2, 13), b_train=[*broken, *members])
    ).reader(1, "train")
    lengths = EntryLengths(reader.text_bytes("json"), lambda entry: (reader, entry), Tiles())
    assert lengths[np.array([0])].tolist() == [len(broken[1][1])]


def test_a_header_behind_a_long_preview_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_lengths, "_HEAD_BYTES", 20)
    reader = open_stream(
        write_answer_stream(tmp_path, sizes=(2, 12), b_train=varied(12, "b")[0])
    ).reader(1, "train")
    assert image_sizes(reader, 1) == [SHAPES[1]]


def test_images_in_place_are_measured_without_reading_them_whole(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    records = []
    for number in range(4):
        height, width = SHAPES[number]
        (images / f"{number}.bmp").write_bytes(picture(number, "BMP", size=(width * 8, height * 8)))
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "it"}]
        records.append({"id": str(number), "image": f"{number}.bmp", "conversations": turns})
    source = tmp_path / "data.json"
    source.write_text(json.dumps(records))
    stated = {
        "format": "mmcl-loose/1", "records": "data.json", "images": "images", "samples": 4,
        "sha256": sha256_of(source), "bytes": source.stat().st_size,
    }  # fmt: skip
    (tmp_path / "x.loose.json").write_text(json.dumps(stated))
    reader = Reader([JsonShard(tmp_path / "x.loose.json", "x.loose.json", None)])
    read, plain = [], image_folder.read_file

    def counted(path, stated, limit=None):
        data = plain(path, stated, limit)
        read.append(len(data))
        return data

    monkeypatch.setattr(image_folder, "read_file", counted)
    monkeypatch.setattr(sample_lengths, "_HEAD_BYTES", 512)
    assert [image_sizes(reader, n) for n in range(4)] == [[(8 * h, 8 * w)] for h, w in SHAPES]
    assert read == [512] * 4
    assert [len(reader.image_heads(n, 0)) for n in range(4)] == [1] * 4
    assert len(read) == 4
