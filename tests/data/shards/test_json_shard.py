"""A JSON and its images used in place: the same samples as shards, and nothing else is read."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from mmcl.core import Batch, ProcessedSample, Task
from mmcl.data.batches.collate import collate, make_example
from mmcl.data.convert.convert import convert
from mmcl.data.convert.inputs.llava_input import open_instructions
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from mmcl.data.remote.location import LocalFile, sha256_of
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.reader import Reader
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadSample, BadShard
from tests.data.convert.llava_files import asked, jpeg, put, train_set
from tests.data.shards.shard_files import read_samples

OPTIONS = ConvertOptions("vqa", test_fraction=0.2)


def placed(folder, records=None, count=10, **more):
    """Put a train set in place; return the shard of its training split."""
    source, images = train_set(folder, count)
    if records is not None:
        put(source, records)
    out = folder / "loose"
    convert(
        open_instructions(source, images),
        None,
        out,
        OPTIONS,
        in_place=InPlace(images, images),
        **more,
    )
    return JsonShard(out / "vqa-train.loose.json", "vqa-train.loose.json", folder / "cache")


def pointing(folder, records, images=None):
    """Point at records by hand, without a look at them."""
    source, own = train_set(folder, 3)
    source.write_text(json.dumps(records))
    stated = {
        "format": "mmcl-loose/1", "records": "train.json", "images": str(images or own.name),
        "samples": len(records), "bytes": 0, "sha256": sha256_of(source),
    }  # fmt: skip
    path = put(folder / "x.loose.json", stated)
    return JsonShard(path, path.name, folder / "cache")


def picture_and_tokens(pixels, dialogue, seed):
    """Transform like that of a model: pixels, and the bytes of the turns."""
    text = " ".join(turn.text for turn in dialogue.turns)
    tokens = torch.tensor(list(text.encode()))
    return ProcessedSample(pixels, input_ids=tokens, labels=tokens.clone())


def batch_of(samples):
    task = Task(0, "vqa", task_type="instruction", scorer="exact")
    rows = [
        make_example(sample, number, task, picture_and_tokens, seed=number, max_pixels=10_000)
        for number, sample in enumerate(samples)
    ]
    return collate(rows)


def test_loose_samples_are_those_of_the_shards_made_of_the_same_data(tmp_path):
    loose = placed(tmp_path)
    source, images = tmp_path / "train.json", tmp_path / "pictures"
    convert(open_instructions(source, images), None, tmp_path / "tars", OPTIONS)
    tars = read_samples([tmp_path / "tars" / "vqa-train-00000.tar"])
    own = [loose.read(place) for place in range(len(loose))]
    assert {sample.key: dict(sample.members) for sample in own} == tars
    assert [loose.key(place) for place in range(len(loose))] == list(tars)
    assert loose.text_bytes("json").tolist() == [len(one["json"]) for one in tars.values()]
    assert loose.text_bytes("txt").tolist() == [0] * len(tars)


def test_a_batch_of_loose_files_is_bitwise_that_of_shards(tmp_path):
    loose = placed(tmp_path)
    source, images = tmp_path / "train.json", tmp_path / "pictures"
    convert(open_instructions(source, images), None, tmp_path / "tars", OPTIONS)
    tar = TarShard(LocalFile(tmp_path / "tars" / "vqa-train-00000.tar"), "x.tar", None)
    batches = []
    for shard in (loose, tar):
        reader = Reader([shard])
        batches.append(batch_of([reader.read(number) for number in range(len(reader))]))
    for name in Batch.__dataclass_fields__:
        first, second = (getattr(batch, name) for batch in batches)
        same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        assert same, name


def test_train_and_test_share_no_record_and_no_image(tmp_path):
    train = placed(tmp_path)
    test = JsonShard(tmp_path / "loose" / "vqa-test.loose.json", "test", tmp_path)
    shown = [{one.read(n).members["jpg"] for n in range(len(one))} for one in (train, test)]
    assert (len(train), len(test)) == (8, 2)
    assert not shown[0] & shown[1]
    assert not set(train.key_hashes().tolist()) & set(test.key_hashes().tolist())
    assert len(set(train.key_hashes().tolist())) == 8


def test_what_another_process_gets_is_small_and_reads_the_same(tmp_path):
    shard = placed(tmp_path)
    before = shard.read(3)
    packed = pickle.dumps(shard)
    assert len(packed) < 2000
    assert pickle.loads(packed).read(3) == before


def index_file(folder):
    return folder / "train.json.index.npz"


@pytest.mark.parametrize("harm", ["half", "flipped", "stale", "lying"])
def test_an_index_that_is_not_whole_is_rebuilt(tmp_path, harm):
    shard = placed(tmp_path)
    keys = [shard.key(place) for place in range(len(shard))]
    path = index_file(tmp_path)
    data = bytearray(path.read_bytes())
    if harm == "half":
        data = data[: len(data) // 2]
    elif harm == "flipped":
        data[len(data) // 3] ^= 255
    elif harm == "lying":
        with np.load(path) as stored:
            arrays = {**stored, "offset": stored["offset"] + 10**9}
        np.savez(path, **arrays)
        data = path.read_bytes()
    else:
        os.utime(tmp_path / "train.json", ns=(1, 1))
    path.write_bytes(data)
    again = JsonShard(shard.origin, shard.name, shard.cache)
    assert [again.key(place) for place in range(len(again))] == keys
    assert again.read(0).key == keys[0]


def test_the_index_of_a_read_only_folder_is_in_the_cache(tmp_path):
    shard = placed(tmp_path)
    index_file(tmp_path).unlink()
    index_file(tmp_path).mkdir()  # root may write everywhere, but not over a folder
    assert len(JsonShard(shard.origin, shard.name, shard.cache)) == 8
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1


def test_a_json_that_changed_during_a_run_ends_it_with_a_sentence(tmp_path):
    shard = placed(tmp_path)
    assert shard.read(0).key
    put(tmp_path / "train.json", [asked(0)])
    with pytest.raises(RuntimeError, match="changed since it was indexed: leave it alone"):
        shard.read(0)
    with pytest.raises(BadShard, match="was made for other samples: .*train.json changed since"):
        len(JsonShard(shard.origin, shard.name, shard.cache))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("sub/9.jpg", "'sub/9.jpg' is missing"),
        ("../secret.jpg", "'../secret.jpg' leads outside of the image folder"),
        ("sub/../../secret.jpg", "leads outside"),
        ("/etc/passwd", "'/etc/passwd' leads outside"),
        ("link.jpg", "'link.jpg' leads outside"),
        ("linked/secret.jpg", "leads outside"),
        ("sub", "'sub' is not a file"),
        ("a\0.jpg", "is missing"),
        ("\ud83d.jpg", "is missing"),
        ("x" * 5000, "cannot be read"),
        ("pipe.jpg", "is not a file"),
        ("empty.jpg", "has 0 bytes"),
        ("text.jpg", "not JPEG, PNG, WebP, GIF"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_and_nothing_outside_is_read(
    tmp_path, picture, message
):
    shard = pointing(tmp_path, [asked(0, picture), asked(1, "sub/1.jpg")])
    images = tmp_path / "pictures"
    put(tmp_path / "secret.jpg", jpeg(7))
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "linked").symlink_to(tmp_path)
    put(images / "empty.jpg", b"")
    put(images / "text.jpg", "root:x:0:0")
    os.mkfifo(images / "pipe.jpg")
    with pytest.raises(BadSample, match=message):
        shard.read(0)
    assert shard.read(1).members["jpg"] == jpeg(1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (asked(0, ["a.jpg", "b.jpg"]), "it has 2 images"),
        ({**asked(0), "video": "a.mp4"}, "it has a video"),
        ({"id": 1}, "neither 'conversations' nor"),
        (3, "it is not a mapping"),
    ],
)
def test_what_shards_cannot_hold_is_a_bad_sample_here_too(tmp_path, record, message):
    shard = pointing(tmp_path, [record, asked(1)])
    assert shard.text_bytes("json")[0] == 0
    with pytest.raises(BadSample, match=message):
        shard.read(0)
    assert shard.key(0).startswith("sample-0000000")


def changed(**values):
    def change(stated):
        stated.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(format="mmcl-loose/9"), "does not say format 'mmcl-loose/1'"),
        (changed(records=3), "no usable 'records'"),
        (changed(samples=True), "no usable 'samples'"),
        (lambda stated: stated.pop("images"), "no usable 'images'"),
        (changed(records="none.json"), "names a file that is missing .*none.json"),
        (changed(images="none"), "names a file that is missing .*none"),
        (changed(records="pictures/sub/0.jpg"), "names a file that cannot be used"),
        (changed(samples=7), "says 7 samples and has 8"),
        (changed(sha256="0" * 64), "was made for other samples"),
        (changed(indices="train.json"), "names train.json, which cannot be read"),
        (changed(indices="far.npy"), "far.npy, which is not an increasing list"),
        (changed(indices="float.npy"), "float.npy, which is not an increasing list"),
        (changed(indices="pickle.npy"), "pickle.npy, which cannot be read"),
    ],
)
def test_a_pointer_that_is_none_says_why(tmp_path, change, message):
    shard = placed(tmp_path)
    stated = json.loads(shard.origin.read_text())
    np.save(tmp_path / "loose" / "far.npy", np.array([0, 10]))
    np.save(tmp_path / "loose" / "float.npy", np.array([0.0]))
    np.save(tmp_path / "loose" / "pickle.npy", np.array([{}]), allow_pickle=True)
    stated.update(records=str(tmp_path / "train.json"), images=str(tmp_path / "pictures"))
    shutil.copy(tmp_path / "train.json", tmp_path / "loose" / "train.json")
    change(stated)
    if not os.path.isabs(str(stated.get("records"))) and isinstance(stated["records"], str):
        stated["records"] = str(tmp_path / stated["records"])
    put(shard.origin, stated)
    with pytest.raises(BadShard, match=message):
        len(shard if shard._opened is None else JsonShard(shard.origin, "x", tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b" " * (2 << 20), b"3"])
def test_a_pointer_of_nonsense_is_reported(tmp_path, content):
    path = put(tmp_path / "x.loose.json", content)
    with pytest.raises(BadShard, match="is not JSON|is larger|does not say format"):
        len(JsonShard(path, "x", tmp_path))
    with pytest.raises(BadShard, match="cannot be read"):
        len(JsonShard(tmp_path / "none.loose.json", "x", tmp_path))
