"""Members of any name: found or named on the card, and what is not used is listed or refused."""

import json

import numpy as np
import pytest
import torch
import yaml

from mmcl.core import ReplayPlan, TaskStream
from mmcl.data import ReplayCopyReader, eval_loader, open_stream, save_replay_copies, train_loader
from mmcl.data.shards.sample_fields import json_value
from mmcl.data.stored_sample import BadSample
from mmcl.data.validate.validate import check_stream
from tests.data.small_stream import CutAndNoise, dialogue, picture, same, write_tar

CAPTIONS = {"task_type": "captioning"}
CLASSES = {"task_type": "classification", "classes": ["cat", "dog"]}
COUNT = 4


def content(kind, number):
    """What a member of this name holds."""
    last = kind.rpartition(".")[2].lower()
    if last in ("png", "jpg", "jpeg", "webp", "img", "image", "input"):
        return picture(number)
    if last in ("cls", "label", "index", "class") or kind == "cls.txt":
        return str(number % 2).encode()
    if last == "json":
        held = {"url": "u", "caption": f"text {number}", "info": {"label": number % 2}, "n": [1]}
        return json.dumps(held).encode()
    return f"text {number}".encode()


def write(folder, kinds, card, order=None, key="{split}{number:03d}", **changes):
    """Write a stream of one task whose samples have members of these names; return its card."""
    for split in ("train", "test"):
        members = [
            (
                f"{key.format(split=split, number=n)}.{kind}",
                content(kind, n + 50 * (split == "test")),
            )
            for n in range(COUNT)
            for kind in kinds
        ]
        members = [(name, changes.get(name, data)) for name, data in members]
        write_tar(folder / f"{split}.tar", members if order is None else sorted(members, key=order))
    task = {"name": "one", "train": "train.tar", "test": "test.tar"}
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "scenario": "domain", "tasks": [task], **card}))
    return path


def batch_of(path):
    """The test samples of a stream as one batch, in order, bad samples as errors."""
    prepared = open_stream(TaskStream.read(path), cache_dir=path.parent / "cache")
    (batch,) = eval_loader(prepared, 0, CutAndNoise(), batch=2 * COUNT)
    return batch


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        (("jpg", "txt"), {}),
        (("JPG", "TXT"), {}),
        (("input.jpg", "outputs.txt"), {"image_field": "input.jpg", "text_field": "outputs.txt"}),
        (("input.jpg", "outputs.txt"), {}),
        (("image.png", "txt"), {"image_field": ".image.png"}),
        (("img", "cap"), {"image_field": "img", "text_field": "cap"}),
        (("img", "cap"), {}),
        (("image", "caption"), {}),
        (("image", "text"), {}),
        (("input", "prompt"), {"text_field": "prompt"}),
        (("input.jpg", "output.jpg", "txt"), {"image_field": "input.jpg"}),
        (("input.jpg", "output.jpg", "txt"), {"ignore_members": ["output.jpg"]}),
        (("png", "seg.png", "txt"), {"image_field": "png;jpg"}),
        (("jpg", "txt", "caption"), {"ignore_members": ["caption"]}),
        (("jpg", "txt", "caption"), {"text_field": "caption"}),
        (("jpg", "de.txt", "txt"), {}),
        (("jpg", "de.txt", "fr.txt"), {"text_field": "de.txt"}),
        (("jpg", "txt", "json"), {}),
        (("jpg", ["title", "text"][0]), {"text_field": "caption;title"}),
        (("jpg", "beschreibung.größe"), {"text_field": "Beschreibung.Größe"}),
    ],
)
def test_the_image_and_the_text_are_found_whatever_their_names(tmp_path, kinds, fields):
    path = write(tmp_path, kinds, {**CAPTIONS, **fields})
    batch = batch_of(path)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert batch.errors == ()
    assert same(batch, batch_of(write(plain, ("png", "txt"), CAPTIONS)))
    assert check_stream(path).errors == ()


@pytest.mark.parametrize(
    ("kinds", "fields"),
    [
        (("jpg", "cls"), {}),
        (("jpg", "cls.txt"), {}),
        (("jpg", "label"), {}),
        (("jpg", "index"), {}),
        (("jpg", "label", "cls"), {"label_field": "label"}),
        (("jpg", "fine.cls", "json"), {}),
        (("jpg", "json"), {"label_field": "json.info.label"}),
        (("jpg", "txt", "cls"), {}),
    ],
)
def test_the_label_is_found_whatever_its_name(tmp_path, kinds, fields):
    path = write(tmp_path, kinds, {**CLASSES, **fields})
    assert batch_of(path).labels.tolist() == [0, 1] * (COUNT // 2)
    assert check_stream(path).errors == ()


def test_a_label_may_be_the_name_of_its_class(tmp_path):
    names = {f"test{n:03d}.label": (b"dog\n", b" cat")[n % 2] for n in range(COUNT)}
    names["test002.label"] = b"bird"
    batch = batch_of(write(tmp_path, ("jpg", "label"), CLASSES, **names))
    assert batch.labels.tolist() == [1, 0, 0]
    assert batch.errors == (
        "test002 in test.tar: its label is b'bird', expected a whole number or one of the card's "
        "classes",
    )


@pytest.mark.parametrize(
    ("kinds", "card", "words"),
    [
        (("input.jpg", "output.jpg", "txt"), CAPTIONS,
         ["2 image members, .input.jpg, .output.jpg", "image_field", "ignore_members"]),
        (("jpg", "png", "txt"), CAPTIONS, ["2 image members, .jpg, .png", "image_field"]),
        (("img", "image", "txt"), CAPTIONS, ["2 image members, .img, .image", "image_field"]),
        (("jpg", "txt", "caption"), CAPTIONS,
         ["2 members that may be the caption, .txt, .caption", "text_field", "ignore_members"]),
        (("jpg", "de.txt", "fr.txt"), CAPTIONS, [".de.txt, .fr.txt", "text_field"]),
        (("jpg", "cls", "label"), CLASSES, [".cls, .label", "label_field"]),
        (("jpg", "json"), CAPTIONS, ["no caption member", ".jpg, .json", "such as json.caption"]),
        (("jpg", "json"), CLASSES, ["no label member (.cls)", "label_field"]),
        (("jpg", "prompt"), CAPTIONS, ["no caption member", ".jpg, .prompt", "text_field"]),
        (("txt", "score"), CAPTIONS, ["no image member", ".txt, .score", "image_field"]),
        (("pyd", "txt"), CAPTIONS, ["no image member", "never read: .pyd"]),
        (("jpg", "txt"), {**CAPTIONS, "image_field": "png"},
         ["no image member (.png)", ".jpg, .txt", "image_field"]),
        (("jpg", "txt"), {**CAPTIONS, "text_field": "cap"}, ["(.cap)", ".jpg, .txt", "text_field"]),
        (("jpg", "pyd"), {**CAPTIONS, "text_field": "pyd"}, [".pyd", "pickles", "never read"]),
        (("jpg", "txt.gz"), {**CAPTIONS, "text_field": "txt.gz"}, [".txt.gz", "compressed"]),
        (("jpg", "json"), {**CAPTIONS, "text_field": "json"}, ["json.<key>", "json.caption"]),
        (("jpg", "txt"), {**CAPTIONS, "ignore_members": ["txt"], "text_field": "txt"},
         [".txt under ignore_members", "correct the card"]),
    ],
)  # fmt: skip
def test_what_may_be_meant_otherwise_is_refused_by_its_names(tmp_path, kinds, card, words):
    path = write(tmp_path, kinds, card)
    with pytest.raises(ValueError, match="stream 's' has") as caught:
        open_stream(TaskStream.read(path))
    validated = "\n".join(check_stream(path).errors)
    for text in (str(caught.value), validated):
        assert "task 'one'" in text
        assert all(word in text for word in words), text


def test_members_that_are_not_used_are_listed_once(tmp_path):
    kinds = ("jpg", "txt", "npy", "cls", "json", "score", "pyd", "mp4", "de.txt")
    path = write(tmp_path, kinds, {**CAPTIONS, "ignore_members": ["mp4"]})
    listed = (
        "of 8 samples these members are not used: .cls (8), .de.txt (8), .json (8), .npy (8), "
        ".pyd (8), .score (8)",
    )
    found = check_stream(path)
    assert (found.errors, found.notes) == ((), listed)
    assert found.plain()["notes"] == list(listed)
    assert open_stream(TaskStream.read(path)).notes == listed
    idle = write(tmp_path, ("jpg", "txt"), {**CAPTIONS, "ignore_members": ["mp4"]})
    listed = ("ignore_members has .mp4, which no sample has",)
    assert check_stream(idle).notes == open_stream(TaskStream.read(idle)).notes == listed
    plain = write(tmp_path, ("jpg", "txt"), CAPTIONS)
    assert check_stream(plain).notes == open_stream(TaskStream.read(plain)).notes == ()


def test_a_member_that_another_task_uses_is_used(tmp_path):
    path = write(tmp_path, ("jpg", "txt", "cls"), CAPTIONS)
    card = yaml.safe_load(path.read_text())
    other = {"name": "two", "task_type": "classification", "classes": ["cat", "dog"]}
    card["tasks"].append({**other, "train": "train.tar", "test": "test.tar"})
    path.write_text(yaml.safe_dump(card))
    assert open_stream(TaskStream.read(path)).notes == ()
    assert check_stream(path).notes == ()


def test_only_members_in_use_are_read_and_a_huge_one_beside_them_is_harmless(tmp_path):
    huge = {f"test{n:03d}.mp4": bytes(3 << 20) for n in range(COUNT)}
    path = write(tmp_path, ("jpg", "mp4", "txt"), CAPTIONS, **huge)
    reader = open_stream(TaskStream.read(path)).reader(0, "test")
    assert [set(reader.read(n).members) for n in range(COUNT)] == [{"jpg", "txt"}] * COUNT
    assert reader.text_bytes("txt").tolist() == [7] * COUNT
    assert batch_of(path).num_bytes.tolist() == [len(picture(n + 50)) + 7 for n in range(COUNT)]


def test_lengths_of_texts_are_those_of_the_member_in_use(tmp_path):
    path = write(tmp_path, ("img", "cap"), CAPTIONS)
    assert (
        open_stream(TaskStream.read(path)).reader(0, "train").text_bytes("txt").tolist()
        == [6] * COUNT
    )


def test_a_sample_that_lacks_a_field_says_which_members_it_has(tmp_path):
    path = write(tmp_path, ("img", "cap", "npy"), CAPTIONS)
    members = [(f"k{n}.{kind}", content(kind, n)) for n in range(2) for kind in ("img", "cap")]
    write_tar(tmp_path / "test.tar", [*members, ("x.cap", b"a"), ("y.img", picture(9))])
    assert batch_of(path).errors == (
        "x in test.tar: it has no image (.img): its members are .cap",
        "y in test.tar: it has no caption (.cap): its members are .img",
    )


def test_conversations_beside_an_image_of_another_name(tmp_path):
    talks = {f"{s}{n:03d}.json": dialogue("<image>\nWhat?", "this") for s in ("train", "test")
             for n in range(COUNT)}  # fmt: skip
    card = {"task_type": "instruction", "image_field": "input.jpg"}
    path = write(tmp_path, ("input.jpg", "output.jpg", "json"), card, **talks)
    assert check_stream(path).errors == ()
    assert open_stream(TaskStream.read(path)).reader(0, "test").read(0).members.keys() == {
        "jpg", "json"
    }  # fmt: skip


def test_members_of_a_sample_that_lie_apart_are_brought_together(tmp_path):
    kinds = ("jpg", "txt", "npy")
    sorted_path = write(tmp_path, kinds, CAPTIONS)
    expected = batch_of(sorted_path)
    apart = tmp_path / "apart"
    apart.mkdir()
    path = write(apart, kinds, CAPTIONS, order=lambda member: member[0][::-1])
    assert same(batch_of(path), expected)
    found = check_stream(path)
    assert found.errors == ()
    (told,) = [line for line in found.warnings if "apart" in line]
    assert "in 2 shards, such as train.tar: " in told
    assert "tar --sort=name" in told
    # The index file says the same as the scan, and a copy in another process the same again.
    again = open_stream(TaskStream.read(path)).reader(0, "test")
    assert [again.key(n) for n in range(COUNT)] == list(expected.keys)
    loader = train_loader(
        open_stream(TaskStream.read(path)), 0, CutAndNoise(), replay_plan=None,
        global_batch_size=2, seed=0, workers=1,
    )  # fmt: skip
    assert sorted(key for batch in loader for key in batch.keys) == [
        f"train{n:03d}" for n in range(COUNT)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_members_gives_the_same_samples(tmp_path, seed):
    kinds = ("jpg", "txt", "cls", "de.txt")
    draw = np.random.default_rng(seed)
    path = write(tmp_path, kinds, CAPTIONS, order=lambda member: draw.random())
    shard = open_stream(TaskStream.read(path)).reader(0, "test").shards[0]
    found = {shard.read(n).key: dict(shard.read(n).members) for n in range(len(shard))}
    assert found == {
        f"test{n:03d}": {kind: content(kind, n + 50) for kind in kinds} for n in range(COUNT)
    }


def test_a_repeated_key_is_one_however_its_members_lie(tmp_path):
    for order in (None, lambda member: member[0][::-1]):
        path = write(tmp_path, ("jpg", "txt"), CAPTIONS, order=order)
        members = [
            (f"k{n % 3}.{kind}", content(kind, n)) for n in range(4) for kind in ("jpg", "txt")
        ]
        write_tar(tmp_path / "train.tar", members if order is None else sorted(members, key=order))
        (error,) = check_stream(path).errors
        assert "key 'k0' comes twice, in train.tar and in train.tar" in error


@pytest.mark.parametrize("key", ["img.v2.{split}{number:04d}", "{split} photo 3.{number}mm"])
def test_keys_with_dots_are_refused_by_name_and_read_as_the_card_says(tmp_path, key):
    path = write(tmp_path, ("jpg", "txt"), CAPTIONS, key=key)
    for error in check_stream(path).errors:
        assert "set key_until: last_dot if keys hold dots" in error
    assert len(check_stream(path).errors) == 2
    path = write(tmp_path, ("jpg", "txt"), {**CAPTIONS, "key_until": "last_dot"}, key=key)
    assert check_stream(path).errors == ()
    assert batch_of(path).keys == tuple(key.format(split="test", number=n) for n in range(COUNT))
    # The other rule is not taken from the index file of this one.
    assert len(check_stream(write(tmp_path, ("jpg", "txt"), CAPTIONS, key=key)).errors) == 2


@pytest.mark.parametrize(
    "key", ["./{split}{number}", "./d.v1/x.y/{split}{number}", "{split}é{number}"]
)
def test_folders_with_dots_and_files_of_a_mac_are_no_trouble(tmp_path, key):
    path = write(tmp_path, ("JPG", "Txt"), CAPTIONS, key=key)
    members = [
        *((f"{key.format(split='s', number=n)}.{kind}", content(kind, n + 9))
          for n in range(2) for kind in ("JPG", "Txt")),
        ("__MACOSX/d/a.jpg", b"x"), ("d/._s0.jpg", b"x"), (".DS_Store", b"x"), ("README.md", b"x"),
    ]  # fmt: skip
    write_tar(tmp_path / "test.tar", members)
    found = check_stream(path)
    assert found.errors == ()
    assert found.tasks[0].test.samples == 2


def test_copies_for_replay_keep_the_fields(tmp_path):
    path = write(tmp_path, ("img", "cap", "npy"), CAPTIONS)
    prepared = open_stream(TaskStream.read(path))
    ones = torch.tensor([1, 3])
    save_replay_copies(prepared, ReplayPlan(ones * 0, ones, 0.4, "copies"), tmp_path, 0)
    copies, reader = ReplayCopyReader(tmp_path, 0), prepared.reader(0, "train")
    for number in (1, 3):
        assert copies.read(number).members == reader.read(number).members
        assert copies.read(number).members == {
            "png": picture(number), "txt": f"text {number}".encode()
        }  # fmt: skip


def test_a_value_inside_of_json():
    data = json.dumps({"a": {"b": [1, {"c": "x"}]}, "A": 2}).encode()
    assert json_value(data, "json.a.b.1.c") == "x"
    assert json_value(data, "json.A") == 2
    with pytest.raises(BadSample, match=r"has no 'x' \(json\.a\.x\): it has 'b'"):
        json_value(data, "json.a.x")
    with pytest.raises(BadSample, match="not JSON"):
        json_value(b"{", "json.a")
