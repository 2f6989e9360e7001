"""Samples with several captions: drawn in training, all of them pairs at evaluation."""

import binascii
import json

import pytest
import torch

from mmcl.core import Task, TaskStream
from mmcl.data import eval_loader, open_stream, train_loader
from mmcl.data.batches import collate as collate_module
from mmcl.data.batches.caption_member import read_captions, text_member
from mmcl.data.batches.collate import collate, hash_image, make_example, make_pairs
from mmcl.data.stored_sample import BadSample, Sample
from tests.data.small_stream import CutAndNoise, picture, same, write_tar

CAPTIONS = [["one a", "one b", "one c"], ["two a"], ["three a", "three b"], ["four a", "one b"]]


def members(start=0, captions=CAPTIONS):
    found = []
    for number, texts in enumerate(captions, start):
        about = {"about": {"captions": texts}, "width": 8}
        found += [
            (f"s{number:03d}.png", picture(number)),
            (f"s{number:03d}.json", json.dumps(about).encode()),
        ]
    return found


@pytest.fixture
def stream(tmp_path):
    return written(tmp_path)


def written(folder, test=None, field="json.about.captions"):
    write_tar(folder / "train.tar", members())
    write_tar(folder / "test.tar", test or members(start=4))
    card = f"""
name: several
scenario: domain
task_type: captioning
text_field: {field}
tasks:
  - {{name: one, train: train.tar, test: test.tar}}
"""
    (folder / "several.yaml").write_text(card)
    return TaskStream.read(folder / "several.yaml")


def texts_of(batch):
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [bytes(ids[mask].tolist()).decode() for ids, mask in rows]


def epoch_of(stream, epoch, **options):
    loader = train_loader(
        open_stream(stream), 0, CutAndNoise(), replay_plan=None, global_batch_size=2, seed=3,
        position=lambda: (epoch, 0), **options,
    )  # fmt: skip
    return list(loader)


def test_training_draws_one_caption_of_a_sample_in_every_epoch(stream):
    drawn = [set() for _ in CAPTIONS]
    for epoch in range(12):
        batches = epoch_of(stream, epoch)
        assert all(map(same, batches, epoch_of(stream, epoch)))
        assert sorted(n for b in batches for n in b.sample_ids.tolist()) == [0, 1, 2, 3]
        for batch in batches:
            for number, text in zip(batch.sample_ids.tolist(), texts_of(batch), strict=True):
                drawn[number].add(text)
    assert drawn == [set(texts) for texts in CAPTIONS]


def test_the_draw_is_the_same_in_a_worker(stream):
    assert all(map(same, epoch_of(stream, 1), epoch_of(stream, 1, workers=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_caption_is_a_pair_at_evaluation(stream, workers):
    loader = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=3, workers=workers)
    batches = list(loader)
    assert max(map(len, batches)) <= 3
    assert [t for batch in batches for t in texts_of(batch)] == sum(CAPTIONS, [])
    numbers = [n for batch in batches for n in batch.sample_ids.tolist()]
    assert numbers == [0, 0, 0, 1, 2, 2, 3, 3]
    images, ids = (torch.cat([getattr(b, n) for b in batches]) for n in ("images", "image_ids"))
    for left in range(8):
        for right in range(8):
            is_same = numbers[left] == numbers[right]
            assert (ids[left] == ids[right]).item() == is_same
            assert torch.equal(images[left], images[right]) == is_same
    with pytest.raises(TypeError, match="not counted"):
        len(loader)


@pytest.mark.parametrize("world", [2, 3])
def test_the_pairs_of_a_sample_stay_on_one_rank(stream, world):
    found = []
    for rank in range(world):
        batches = eval_loader(
            open_stream(stream), 0, CutAndNoise(), batch=2, rank=rank, world=world
        )
        found += [text for batch in batches for text in texts_of(batch)]
    assert sorted(found) == sorted(sum(CAPTIONS, []))


def test_the_pass_over_training_samples_has_each_once(stream):
    loader = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=3, split="train")
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert [n for batch in batches for n in batch.sample_ids.tolist()] == [0, 1, 2, 3]
    for text, own in zip((t for b in batches for t in texts_of(b)), CAPTIONS, strict=True):
        assert text in own


def test_sizes_and_limits_are_counted_in_samples(stream):
    prepared = open_stream(stream, max_samples=2)
    assert (prepared.stream[0].size, prepared.stream[0].test_size) == (2, 2)
    part = open_stream(stream, validation_share=0.5)
    assert part.stream[0].size == 2
    few = eval_loader(part, 0, CutAndNoise(), batch=8, split="validation")
    assert len({n for batch in few for n in batch.sample_ids.tolist()}) == 2


def test_an_image_is_decoded_once_for_all_its_captions(monkeypatch):
    decoded = []
    decode = collate_module.decode_image
    monkeypatch.setattr(
        collate_module, "decode_image", lambda *given: decoded.append(1) or decode(*given)
    )
    sample, task = stored(["a", "b", "c"]), a_task("json.texts")
    made = make_pairs(sample, 5, task, CutAndNoise(), seed=0, max_pixels=1000)
    assert (len(made), len(decoded)) == (3, 1)
    assert {example.sample_id for example in made} == {5}
    one = make_example(sample, 5, task, CutAndNoise(), seed=0, max_pixels=1000)
    assert torch.equal(one.processed.image, made[0].processed.image)


def a_task(field, task_type="captioning"):
    return Task(0, "t", task_type=task_type, text_field=field)


def stored(texts, number=0, **more):
    content = json.dumps({"texts": texts, **more}).encode()
    return Sample("k", "s.tar", {"png": picture(number), "json": content, "txt": b"a\nb"})


def test_the_identity_of_an_image_is_its_content_in_any_process_and_shard():
    halves = [binascii.crc32(half) for half in (b"an i", b"mage")]
    assert hash_image(b"an image") == (halves[0] * 2**32 + halves[1]) // 2
    assert hash_image(b"") == 0
    made = [
        make_example(stored(["x"], n), n, a_task("txt"), CutAndNoise(), seed=n, max_pixels=1000)
        for n in (0, 1, 0)
    ]
    ids = collate(made).image_ids
    assert ids[0] == ids[2] != ids[1]
    assert ids.min() >= 0
    sample = stored(["x"])
    answered = make_example(sample, 0, a_task("txt", "image"), CutAndNoise(), seed=0, max_pixels=99)
    assert collate([answered]).image_ids is None


def test_a_text_member_of_several_lines_is_one_caption():
    (made,) = make_pairs(stored(["x"]), 0, a_task("txt"), CutAndNoise(), seed=0, max_pixels=1000)
    assert texts_of(collate([made])) == ["a\nb"]


DEEP = {"a": {"b": ["x", "y"]}, "c": "z", "s": [{"raw": "r1"}, {"raw": "r2"}], "A": "upper"}


@pytest.mark.parametrize(
    ("field", "texts"),
    [
        ("json.a.b", ["x", "y"]), ("json.c", ["z"]), ("json.s.raw", ["r1", "r2"]),
        ("json.s.1.raw", ["r2"]), ("json.a.b.0", ["x"]), ("json.A", ["upper"]), ("JSON.c", ["z"]),
        (".json.c", ["z"]),
    ],
)  # fmt: skip
def test_captions_are_found_inside_of_json(field, texts):
    assert text_member(field) == "json"
    assert read_captions({"json": json.dumps(DEEP).encode()}, field) == texts


def test_other_members_are_one_caption():
    assert text_member("de.TXT") == "de.txt"
    assert read_captions({"de.txt": b" Bild \n"}, "de.txt") == ["Bild"]


@pytest.mark.parametrize(
    ("content", "field", "sentence"),
    [
        (DEEP, "json.caption", r"no key 'caption' of text_field json.caption, it has a, c, s, A"),
        (DEEP, "json.a.c", r"no key 'c' of text_field json.a.c, it has b"),
        (DEEP, "json.c.d", "there is a value of type str"),
        (DEEP, "json.a", r"is a mapping with the keys b: name one of them"),
        (DEEP, "json.a.b.7", "has no entry 7"),
        ({"a": []}, "json.a", "an empty list"),
        ({"a": ["x", 3]}, "json.a", r"number 2 is of type int, expected a text"),
        ({"a": None}, "json.a", "is null, expected a text"),
        ({"a": ["x", " \n"]}, "json.a", "number 2 is empty"),
        ({"a": ""}, "json.a", r"caption \(json.a\) is empty"),
        ({"a": "x\ud800"}, "json.a", "half of a character"),
        ({"a": ["x"] * 1001}, "json.a", "1001 captions"),
        ([], "json.a", "an empty list"),
        (7, "json.a", "there is a value of type int"),
    ],
)
def test_captions_that_are_none_are_named(content, field, sentence):
    with pytest.raises(BadSample, match=sentence):
        read_captions({"json": json.dumps(content).encode()}, field)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000])
def test_broken_json_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="JSON|UTF-8"):
        read_captions({"json": data}, "json.a")


def test_a_bad_list_costs_its_sample_alone(tmp_path):
    stream = written(tmp_path, test=members(4, [["a", "b"], [], ["c", 3], ["d"]]))
    batches = list(eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8))
    assert [t for batch in batches for t in texts_of(batch)] == ["a", "b", "d"]
    errors = [error for batch in batches for error in batch.errors]
    assert len(errors) == 2
    assert "empty list" in errors[0]
    assert "number 2 is of type int" in errors[1]


def test_errors_of_a_cut_batch_are_counted_once(tmp_path):
    stream = written(tmp_path, test=members(4, [[], ["a", "b", "c", "d", "e"]]))
    batches = list(eval_loader(open_stream(stream), 0, CutAndNoise(), batch=2))
    assert list(map(len, batches)) == [1, 2, 2]
    assert sum(len(batch.errors) for batch in batches) == 1
