"""A pickle in every file that a run reads: it is refused or ignored, and never run."""

import hashlib
import json
import pickle
import pickletools

import numpy as np
import pytest
import torch
import yaml

from mmcl.core import ReplayPlan
from mmcl.data import ReplayCopyReader, open_stream, save_replay_copies
from mmcl.data.remote.location import LocalFile, sha256_of
from mmcl.data.shards.json_index import open_json_index
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadShard
from mmcl.evaluation.cost import Ledger
from mmcl.lightning.run_dir import RunDirectory
from mmcl.memory import MmapStore
from tests.data.small_stream import dialogue, labelled, picture, write_stream, write_tar
from tests.toys.network_guard import Trap


@pytest.fixture
def sprung(tmp_path):
    """What is there once a trap was sprung; every test ends with a look at it."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


@pytest.fixture(params=["pickle", "old pickle", "torch", "old torch", "npy", "npz"])
def planted(request, tmp_path, sprung):
    """The bytes of a trap in each of the formats that may hold one."""
    trap, path = Trap(sprung), tmp_path / "planted"
    if request.param == "pickle":
        path.write_bytes(pickletools.optimize(pickle.dumps(trap)))
    elif request.param == "old pickle":
        path.write_bytes(pickle.dumps(trap, protocol=0))
    elif request.param.endswith("torch"):
        torch.save(trap, path, _use_new_zipfile_serialization=request.param == "torch")
    else:
        held = np.empty(1, dtype=object)
        held[0] = trap
        with path.open("wb") as file:
            save = np.save if request.param == "npy" else np.savez
            save(file, held, allow_pickle=True)
    return path.read_bytes()


def test_the_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "another")))
    assert (tmp_path / "another").exists()


def test_in_place_of_a_shard(tmp_path, planted):
    (tmp_path / "x.tar").write_bytes(planted)
    with pytest.raises(BadShard, match="there is no tar header at byte 0|is truncated"):
        len(TarShard(LocalFile(tmp_path / "x.tar"), "x.tar", None))


def test_in_place_of_any_member_that_is_read(tmp_path, planted):
    members = [(f"a.{kind}", planted) for kind in ("png", "cls", "txt", "json", "de.txt", "npy")]
    stream = write_stream(tmp_path, sizes=(4,), a_train=[*labelled(3), *members])
    sample = open_stream(stream).reader(0, "train").read(3)
    assert set(sample.members) == {"png", "cls"}
    sample = TarShard(LocalFile(tmp_path / "a-train.tar"), "x.tar", None).read(3)
    assert set(sample.members) == {"png", "cls", "txt", "json", "de.txt"}


def test_in_place_of_the_index_of_a_shard(tmp_path, planted):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    expected = TarShard(LocalFile(path), "x.tar", tmp_path).key_hashes().tolist()
    whole = (tmp_path / "x.tar.index").read_bytes()
    (tmp_path / "x.tar.index").write_bytes(planted)
    again = TarShard(LocalFile(path), "x.tar", tmp_path)
    assert again.key_hashes().tolist() == expected
    assert (tmp_path / "x.tar.index").read_bytes() == whole


def loose(folder, **more):
    """A JSON of two records, its images, and a pointer at them."""
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(picture(1))
    records = [{"image": "a.png", **json.loads(dialogue("what?", f"this {n}"))} for n in range(2)]
    (folder / "r.json").write_text(json.dumps(records))
    stated = {
        "format": "mmcl-loose/1", "records": "r.json", "images": "pictures", "samples": 2,
        "bytes": 0, "sha256": sha256_of(folder / "r.json"), **more,
    }  # fmt: skip
    (folder / "x.loose.json").write_text(json.dumps(stated))
    return folder / "x.loose.json"


def test_in_place_of_the_index_of_loose_files(tmp_path, planted):
    shard = JsonShard(loose(tmp_path), "x", None)
    assert len(shard) == 2
    place = tmp_path / "r.json.index.npz"
    place.write_bytes(planted)
    assert len(open_json_index(tmp_path / "r.json", "answer", None).records) == 2
    assert place.read_bytes() != planted


def test_inside_of_the_index_of_loose_files(tmp_path, sprung):
    expected = open_json_index(loose(tmp_path).with_name("r.json"), "answer", None)
    place = tmp_path / "r.json.index.npz"
    with np.load(place) as stored:
        arrays = dict(stored)
    held = np.empty(2, dtype=object)
    held[:] = [Trap(sprung)] * 2
    for name in arrays:
        np.savez(place, **{**arrays, name: held})
        again = open_json_index(tmp_path / "r.json", "answer", None)
        assert again.text_bytes.tolist() == expected.text_bytes.tolist()


def test_in_place_of_the_indices_of_loose_files(tmp_path, planted):
    path = loose(tmp_path, indices="indices.npy")
    (tmp_path / "indices.npy").write_bytes(planted)
    with pytest.raises(
        BadShard, match=r"names indices\.npy, which (cannot be read|is not an increasing)"
    ):
        len(JsonShard(path, "x", None))


def test_in_place_of_loose_files_themselves(tmp_path, planted):
    path = loose(tmp_path)
    (tmp_path / "pictures" / "a.png").write_bytes(planted)
    with pytest.raises(ValueError, match="its image 'a.png' is .*not JPEG, PNG, WebP, GIF"):
        JsonShard(path, "x", None).read(0)
    (tmp_path / "r.json").write_bytes(planted)
    with pytest.raises(BadShard, match="cannot be used|made for other samples"):
        len(JsonShard(path, "x", None))
    path.write_bytes(planted)
    with pytest.raises(BadShard, match="is not JSON"):
        len(JsonShard(path, "x", None))


def copies(folder):
    """The kept copies of two samples."""
    stream = write_stream(folder, sizes=(4,))
    ones = torch.tensor([1, 2])
    save_replay_copies(open_stream(stream), ReplayPlan(ones * 0, ones, 0.4, "copies"), folder, 0)
    assert ReplayCopyReader(folder, 0).numbers.tolist() == [1, 2]


def test_in_place_of_kept_copies(tmp_path, planted):
    copies(tmp_path)
    path = tmp_path / "task_000.tar"
    path.write_bytes(planted)
    with pytest.raises(ValueError, match="damaged or half replaced"):
        ReplayCopyReader(tmp_path, 0)
    note = {"sha256": hashlib.sha256(planted).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="no tar header|is truncated"):
        ReplayCopyReader(tmp_path, 0)


@pytest.mark.parametrize("note", [b"", b"[" * 100_000, b"\xff", b"3"])
def test_in_place_of_the_note_of_kept_copies(tmp_path, sprung, note):
    copies(tmp_path)
    for content in (note, pickle.dumps(Trap(sprung))):
        (tmp_path / "task_000.json").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or half replaced"):
            ReplayCopyReader(tmp_path, 0)


def test_in_place_of_rows_in_a_file(tmp_path, planted):
    made = MmapStore()
    made.directory = tmp_path
    with made.spool() as own:
        numbers = own.add(torch.zeros(4, 10, dtype=torch.uint8))
        made.commit(own, 0, numbers, torch.device("cpu"))
    (path,) = tmp_path.glob("rows_*.bin")
    path.write_bytes(planted)
    made._mapped = {}
    with pytest.raises(ValueError, match="stored rows were changed"):
        made.get(torch.tensor([0]), torch.tensor([0]))
    # Under a true name it is nothing but bytes.
    name = f"rows_000_{hashlib.sha256(planted).hexdigest()}.bin"
    (tmp_path / name).write_bytes(planted)
    state = {"files": [[0, name, 1]], "unused": [], "row_bytes": len(planted)}
    made.set_extra_state(state)
    assert bytes(made.get(torch.tensor([0]), torch.tensor([0]))[0].tolist()) == planted


def test_in_place_of_what_a_run_says_of_itself(tmp_path, planted):
    folder = RunDirectory(tmp_path)
    (tmp_path / "run.json").write_bytes(planted)
    with pytest.raises(ValueError, match=r"run\.json is not a run state"):
        folder.state()
    (tmp_path / "config.yaml").write_bytes(planted)
    with pytest.raises(ValueError, match=r"config\.yaml is not a run configuration|another"):
        folder.check_config({"seed": 1})
    (tmp_path / "ledger.json").write_bytes(planted)
    with pytest.raises(ValueError, match=r"ledger\.json"):
        Ledger.read(tmp_path / "ledger.json")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000, b"[]", b"3", b'{"done": 1}', b"\xff", b'{"done": NaN}',
        b'{"done": "1", "task": 0, "tasks": [], "seed": 0}',
        b'{"done": -1, "task": 0, "tasks": [], "seed": 0}',
        b'{"done": 2, "task": 2, "tasks": ["a"], "seed": 0}',
        b'{"done": 0, "task": 0, "tasks": [3], "seed": 0}',
        b'{"done": 0, "task": 0, "tasks": [], "seed": 0, "last": [1]}',
        b'{"done": 0, "task": 0, "tasks": [], "seed": 0, "last": "../../other/last.ckpt"}',
        b'{"done": 0, "task": 0, "tasks": [], "seed": 0, "last": "/tmp/last.ckpt"}',
    ],
)  # fmt: skip
def test_a_state_of_nonsense_is_one_sentence(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is not a run state .*: move it away"):
        RunDirectory(tmp_path).state()


def test_tags_in_the_configuration_of_a_run_make_no_objects(tmp_path, sprung):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.dump({"seed": Trap(sprung)}))
    assert "python/object/apply" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"config\.yaml is not a run configuration"):
        RunDirectory(tmp_path).check_config({"seed": 1})
