"""Checkpoints in shards from strangers: pickles in them are found before torch runs them."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from mmcl.lightning.checkpoints.checkpoint_checks import LostCheckpoint, check_whole, reject_pickles
from mmcl.lightning.checkpoints.checkpoint_io import check_resumable
from tests.toys.network_guard import Trap


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in shards with tensors of several sorts and single values."""
    values = {"lr": 0.1, "betas": (0.9, 0.99), "step": 3, "name": "x", "none": None}
    tensors = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1)}
    path = tmp_path / "last_0000003.ckpt"
    dcp.save({"state_dict": tensors, "group": values}, checkpoint_id=path, no_dist=True)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:.*no_dist.*", "ignore:torch.distributed.*")


def test_what_torch_writes_is_plain(folder):
    reject_pickles(folder)


class Reached:
    """Pickles as ``getattr(owner, name)``, as Python 3.11.2 does with members of an enum."""

    def __init__(self, owner, name):
        self.reduced = getattr, (owner, name)

    def __reduce__(self):
        return self.reduced


def test_a_member_of_an_enum_may_be_written_as_an_attribute_and_nothing_else(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, is_plain in (("TORCH_CONTIGUOUS_FORMAT", True), ("__class__", False)):
        metadata.planner_data["y"] = Reached(_MEM_FORMAT_ENCODING, name)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        if is_plain:
            reject_pickles(folder)
        else:
            with pytest.raises(ValueError, match="cannot be read"):
                reject_pickles(folder)


def test_a_pickle_for_the_metadata_is_named_and_not_run(tmp_path, folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))
    with pytest.raises(ValueError, match=r"it names (posix|nt|os)\.mkdir.*which are never run"):
        check_resumable(trainer, folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_inside_of_good_metadata_is_named_and_not_run(tmp_path, folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["x"] = Trap(tmp_path / "sprung")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it names (posix|nt|os)\.mkdir"):
        reject_pickles(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_for_a_single_value_is_not_run(tmp_path, folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "group.lr")
    torch.save(Trap(tmp_path / "sprung"), folder / "__1_0.distcp")
    place = metadata.storage_data[index]
    place.relative_path, place.offset = "__1_0.distcp", 0
    place.length = (folder / "__1_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="holds pickled objects, which are never run"):
        reject_pickles(folder)
    assert not (tmp_path / "sprung").exists()
    # Torch itself would run it.
    dcp.load({"group": {"lr": 0.0}}, checkpoint_id=folder, no_dist=True)
    assert (tmp_path / "sprung").exists()


def test_a_value_outside_of_the_folder_is_refused(tmp_path, folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"a value is stored in '\.\./elsewhere'"):
        reject_pickles(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"garbage", b"\x80\x04}.", b"\x80\x04K\x01."]
)
def test_broken_metadata_is_one_sentence(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"last_0000003\.ckpt cannot be read"):
        reject_pickles(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"last_0000003\.ckpt cannot be read \(FileNotFoundError"):
        reject_pickles(Path(folder))


@pytest.fixture
def file(tmp_path):
    """A checkpoint in one file, with a padded record between two others."""
    tensors = {"a": torch.arange(300.0), "b": torch.ones(5), "c": [1, "x", None]}
    torch.save(tensors, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def equal(one, other):
    return all(one[k].equal(v) if hasattr(v, "equal") else one[k] == v for k, v in other.items())


def test_a_bit_that_flips_anywhere_in_a_file_is_noticed_or_changes_nothing(file):
    check_whole(file)
    content, expected = file.read_bytes(), torch.load(file, weights_only=True)
    unnoticed = 0
    for place in range(0, len(content), 31):
        raw = bytearray(content)
        raw[place] ^= 1 << place % 8
        file.write_bytes(raw)
        try:
            check_whole(file)
        except LostCheckpoint:
            continue
        unnoticed += 1
        assert equal(torch.load(file, weights_only=True), expected), place
    assert unnoticed < len(content) / 31 / 2


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_half_a_file_is_noticed(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(LostCheckpoint, match=r"is damaged \("):
        check_whole(file)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(LostCheckpoint, match=r"task_00\.ckpt is missing"):
        check_whole(tmp_path / "task_00.ckpt")


def test_every_file_of_a_checkpoint_in_shards_is_needed(folder):
    check_whole(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(LostCheckpoint, match="is missing"):
            check_whole(folder)
        path.write_bytes(content)
    check_whole(folder)


def test_a_value_that_flips_in_a_checkpoint_in_shards_is_noticed(folder):
    ones = torch.ones(3).numpy().tobytes()
    [path] = [path for path in folder.glob("*.distcp") if ones in path.read_bytes()]
    raw = bytearray(path.read_bytes())
    raw[raw.index(ones) + 2] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(LostCheckpoint, match=f"is damaged \\({path.name}: the checksum of "):
        check_whole(folder)
