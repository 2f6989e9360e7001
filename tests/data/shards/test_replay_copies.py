import hashlib
import pickle

import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmcl.core import ReplayPlan
from mmcl.data import (
    ReplayCopyReader,
    open_stream,
    prune_replay_copies,
    save_replay_copies,
    train_loader,
)
from tests.data.small_stream import CutAndNoise, labelled, same, write_stream

SAMPLES = [3, 10, 0, 7, 3]


def replay_of(samples, task=0, keep="copy"):
    numbers = torch.tensor(samples)
    return ReplayPlan(torch.full_like(numbers, task), numbers, 0.4, keep)


def old_members():
    """Ten good samples and a bad one, number 10."""
    return [*labelled(10, name="o"), ("o-bad.png", b""), ("o-bad.cls", b"0")]


@pytest.fixture
def stream(tmp_path):
    return write_stream(tmp_path, a_train=old_members())


def test_training_from_copies_is_training_from_references_after_the_old_shards_are_gone(
    tmp_path, stream
):
    prepared = open_stream(stream)
    options = {"global_batch_size": 5, "seed": 2, "position": lambda: (1, 0)}
    from_references = list(
        train_loader(
            prepared, 1, CutAndNoise(), replay_plan=replay_of(SAMPLES, keep="reference"), **options
        )
    )
    save_replay_copies(prepared, replay_of(SAMPLES), tmp_path / "memory", 0)
    (tmp_path / "a-train.tar").unlink()
    (tmp_path / "a-train.tar.index").unlink()
    prepared = open_stream(stream, finished=[0])
    readers = {0: ReplayCopyReader(tmp_path / "memory", 0)}
    loader = train_loader(
        prepared,
        1,
        CutAndNoise(),
        replay_plan=replay_of(SAMPLES),
        replay_readers=readers,
        **options,
    )
    found = list(loader)
    for copied, referred in zip(found, from_references, strict=True):
        renamed = [error.replace("task_000", "a-train") for error in copied.errors]
        assert renamed == list(referred.errors)
        assert same(copied, type(copied)(**{**vars(referred), "errors": copied.errors}))
    assert any("o-bad in task_000.tar" in error for batch in found for error in batch.errors)


def test_copies_are_an_ordinary_shard_that_webdataset_reads(tmp_path, stream):
    save_replay_copies(open_stream(stream), replay_of([7, 3]), tmp_path / "memory", 0)
    with (tmp_path / "memory" / "task_000.tar").open("rb") as file:
        three, seven = group_by_keys(tar_file_expander([{"url": "x", "stream": file}]))
    original = open_stream(stream).reader(0, "train").read(3)
    assert (three["__key__"], seven["__key__"]) == ("000000003", "000000007")
    assert original.members.items() <= three.items()
    reader = ReplayCopyReader(tmp_path / "memory", 0)
    assert reader.numbers.tolist() == [3, 7]
    assert reader.read(3).members == original.members
    assert reader.read(3).key == original.key == "o003"
    assert pickle.loads(pickle.dumps(reader)).describe(7) == "o007 in task_000.tar"
    with pytest.raises(IndexError, match="sample 4 was not copied"):
        reader.read(4)


def test_copies_depend_on_the_samples_alone_to_the_byte(tmp_path, stream):
    prepared = open_stream(stream)
    hashes = []
    for folder, samples in (("one", SAMPLES), ("two", sorted(set(SAMPLES)))):
        save_replay_copies(prepared, replay_of(samples), tmp_path / folder, 0)
        data = (tmp_path / folder / "task_000.tar").read_bytes()
        hashes.append(hashlib.sha256(data).hexdigest())
        assert hashes[-1] in (tmp_path / folder / "task_000.json").read_text()
    assert hashes[0] == hashes[1]


def test_a_memory_that_shrinks_keeps_its_copies_until_they_are_pruned(tmp_path, stream):
    prepared, folder = open_stream(stream), tmp_path / "memory"
    save_replay_copies(prepared, replay_of([1, 2, 3]), folder, 0)
    kept = ReplayCopyReader(folder, 0).read(2)
    save_replay_copies(prepared, replay_of([2]), folder, 0)
    assert ReplayCopyReader(folder, 0).numbers.tolist() == [1, 2, 3]
    prune_replay_copies(replay_of([2]), folder, 0)
    reader = ReplayCopyReader(folder, 0)
    assert reader.numbers.tolist() == [2]
    assert reader.read(2) == kept


def test_copies_that_hold_every_requested_sample_need_no_shard(tmp_path, stream):
    folder = tmp_path / "memory"
    save_replay_copies(open_stream(stream), replay_of([1, 2]), folder, 0)
    (tmp_path / "a-train.tar").unlink()
    prepared = open_stream(stream, finished=[0])
    save_replay_copies(prepared, replay_of([1, 2]), folder, 0)
    with pytest.raises(RuntimeError, match="is not open to this run"):
        save_replay_copies(prepared, replay_of([1, 4]), folder, 0)


def test_a_kill_between_the_shard_and_its_note_is_repaired_by_the_next_call(tmp_path, stream):
    prepared, folder = open_stream(stream), tmp_path / "memory"
    save_replay_copies(prepared, replay_of([1]), folder, 0)
    old_note = (folder / "task_000.json").read_text()
    save_replay_copies(prepared, replay_of([1, 2]), folder, 0)
    (folder / "task_000.json").write_text(old_note)
    with pytest.raises(ValueError, match="damaged or half replaced"):
        ReplayCopyReader(folder, 0)
    save_replay_copies(prepared, replay_of([1, 2]), folder, 0)
    assert ReplayCopyReader(folder, 0).numbers.tolist() == [1, 2]


@pytest.mark.parametrize("note", ["", "[]", "{}", "not json"])
def test_copies_without_a_true_note_are_refused(tmp_path, stream, note):
    save_replay_copies(open_stream(stream), replay_of([1]), tmp_path, 0)
    (tmp_path / "task_000.json").write_text(note)
    with pytest.raises(ValueError, match="damaged or half replaced"):
        ReplayCopyReader(tmp_path, 0)


def test_missing_copies_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no kept copies of task 4"):
        ReplayCopyReader(tmp_path, 4)


def test_recall_of_a_sample_that_was_not_copied_is_refused(tmp_path, stream):
    prepared = open_stream(stream)
    save_replay_copies(prepared, replay_of([1]), tmp_path, 0)
    with pytest.raises(ValueError, match="2 samples of task 0 that are not there, sample 2 first"):
        train_loader(
            prepared, 1, CutAndNoise(), replay_plan=replay_of([1, 2, 3]),
        global_batch_size=5, seed=0,
            replay_readers={0: ReplayCopyReader(tmp_path, 0)},
        )  # fmt: skip
