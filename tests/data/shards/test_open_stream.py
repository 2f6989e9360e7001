import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from mmcl.core.seeding import hash_priorities
from mmcl.data import open_stream
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.open_stream import add_repeated_keys
from mmcl.data.shards.reader import Reader
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import ErrorList
from tests.data.small_stream import labelled, picture, write_stream, write_tar


def refused(stream, **options):
    with pytest.raises(ValueError, match=r"stream 'small' has \d+ errors?:") as caught:
        open_stream(stream, **options)
    return str(caught.value).splitlines()[1:]


def test_sizes_are_filled_in_and_samples_stand_in_recorded_order(tmp_path):
    prepared = open_stream(write_stream(tmp_path))
    assert [task.size for task in prepared.stream] == [10, 7, 5]
    assert [task.test_size for task in prepared.stream] == [5, 5, 5]
    reader = prepared.reader(1, "train")
    assert len(reader) == 7
    for number in range(7):
        sample = reader.read(number)
        assert (sample.key, sample.shard) == (f"btrain{number:03d}", "b-train.tar")
        assert sample.members["cls"] == str(2 + number % 2).encode()
        assert set(sample.members) == {"png", "cls"}


def test_shards_of_a_task_follow_each_other_as_on_the_card(tmp_path):
    stream = write_stream(tmp_path)
    write_tar(tmp_path / "more.tar", labelled(3, name="more"))
    first = replace(stream.tasks[0], train=("a-train.tar", "more.tar", "a-test.tar"))
    stream.tasks = (first, *stream.tasks[1:])
    reader = open_stream(stream).reader(0, "train")
    keys = [reader.read(number).key for number in range(len(reader))]
    assert keys[9:14] == ["atrain009", "more000", "more001", "more002", "atest000"]
    assert reader.describe(10) == "more000 in more.tar"
    with pytest.raises(IndexError, match="sample 18 is outside 0 to 17"):
        reader.read(18)


def test_webdataset_reads_the_same_samples(tmp_path):
    with TarWriter(str(tmp_path / "x.tar")) as tar:
        for number in range(6):
            tar.write({"__key__": f"dir.x/n{number}", "PNG": picture(number), "a.TXT": b"t"})
    reader = Reader([TarShard(LocalFile(tmp_path / "x.tar"), "x.tar", None)])
    with (tmp_path / "x.tar").open("rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": "x", "stream": file}])))
    assert [reader.read(number).key for number in range(6)] == [one["__key__"] for one in theirs]
    assert all(dict(reader.read(n).members).items() <= theirs[n].items() for n in range(6))
    assert set(reader.read(0).members) == {"png", "a.txt"}


def test_a_reader_is_picklable_and_opens_its_maps_again(tmp_path):
    reader = open_stream(write_stream(tmp_path)).reader(0, "train")
    reader.read(3)
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(3) == reader.read(3)


def test_all_errors_of_a_stream_are_told_at_once(tmp_path):
    stream = write_stream(tmp_path, b_test=[], c_train=labelled(3) + labelled(1))
    (tmp_path / "a-train.tar").unlink()
    whole = (tmp_path / "a-test.tar").read_bytes()
    (tmp_path / "a-test.tar").write_bytes(whole[:3000])
    stream.tasks = (*stream.tasks[:1], replace(stream.tasks[1], size=284), *stream.tasks[2:])
    lines = refused(stream)
    assert len(lines) == 5
    for part in (
        "task 'task-a': shard a-train.tar is missing, there is no file",
        "task 'task-a': shard a-test.tar is truncated: it ends at byte 3000",
        "task 'task-b' has size 284 on the card and its train shards hold 7 samples",
        "task 'task-b': shard b-test.tar holds no samples",
        "task 'task-c' (train): key 's000' comes twice, in c-train.tar and in c-train.tar",
    ):
        assert sum(part in line for line in lines) == 1, part


@pytest.mark.parametrize("kept", [1, 511, 512, 600, 1024, 5000])
def test_a_tar_cut_anywhere_is_named_with_the_byte(tmp_path, kept):
    stream = write_stream(tmp_path, sizes=(9,))
    whole = (tmp_path / "a-train.tar").read_bytes()
    (tmp_path / "a-train.tar").write_bytes(whole[:kept])
    (line,) = refused(stream)
    assert "shard a-train.tar is truncated" in line
    assert f"byte {kept}" in line


def test_a_tar_that_only_lacks_its_padding_is_whole(tmp_path):
    stream = write_stream(tmp_path, sizes=(9,))
    whole = (tmp_path / "a-train.tar").read_bytes().rstrip(b"\0")
    ends = -(-len(whole) // 512) * 512 + 512
    (tmp_path / "a-train.tar").write_bytes(whole.ljust(ends, b"\0"))
    assert open_stream(stream).stream[0].size == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tar: b"", r"is empty \(0 bytes\)"),
        (lambda tar: b"\x1f\x8b" + tar, "is compressed with gzip: unpack it"),
        (lambda tar: tar[:512] + b"junk" * 128 + tar[1024:], None),
        (lambda tar: b"junk" * 300, "is damaged: there is no tar header at byte 0"),
        (lambda tar: tar + tar, "continues after its end mark"),
        (lambda tar: tar[:2048] + b"!" * 512 + tar[2560:], "no tar header at byte 2048"),
    ],
)
def test_a_damaged_tar_is_never_taken_for_a_shorter_one(tmp_path, change, words):
    members = [(f"k{n}.txt", b"x" * 512) for n in range(6)]
    stream = write_stream(tmp_path, sizes=(9,), a_train=members)
    whole = (tmp_path / "a-train.tar").read_bytes()
    (tmp_path / "a-train.tar").write_bytes(change(whole))
    if words is None:
        shard = TarShard(LocalFile(tmp_path / "a-train.tar"), "a-train.tar", None)
        assert len(shard.index) == 6
        return
    with pytest.raises(ValueError, match=words):
        open_stream(stream)


def test_zero_test_samples_are_a_error(tmp_path):
    stream = write_stream(tmp_path, sizes=(4,))
    stream.tasks = (replace(stream.tasks[0], test=()),)
    assert "task 'task-a' has no test samples" in refused(stream)[0]


def test_a_wrong_test_size_names_both_numbers(tmp_path):
    stream = write_stream(tmp_path, sizes=(4,))
    stream.tasks = (replace(stream.tasks[0], test_size=75),)
    assert "has test_size 75 on the card and its test shards hold 5 samples" in refused(stream)[0]


def test_many_repeated_keys_are_counted_not_listed(tmp_path):
    stream = write_stream(tmp_path, sizes=(9,), a_train=labelled(9) + labelled(9))
    lines = refused(stream)
    assert len(lines) == 6
    assert "and 4 more repeated keys in task 'task-a' (train)" in lines[-1]


def test_a_kind_or_text_member_that_is_not_read_is_a_error(tmp_path):
    stream = write_stream(tmp_path, sizes=(4, 4), task_type="captioning")
    stream.tasks = (
        replace(stream[0], text_field="pkl"),
        replace(stream[1], task_type="preference"),
    )
    lines = refused(stream)
    assert "takes its text from .pkl" in lines[0]
    assert "has task_type 'preference', expected classification, captioning, retrieval" in lines[1]


def test_hashes_are_checked_when_asked(tmp_path):
    stream = write_stream(tmp_path, sizes=(4,))
    own = hashlib.sha256((tmp_path / "a-train.tar").read_bytes()).hexdigest()
    stream.hashes = {"a-train.tar": own.upper(), "a-test.tar": "0" * 64}
    open_stream(stream)
    (line,) = refused(stream, verify_hashes=True)
    assert "shard a-test.tar has the sha256" in line
    assert "the card says 0000" in line


@pytest.mark.parametrize(("limit", "sizes"), [(6, [6, 6, 5]), (0.3, [3, 2, 2]), (9.0, [9, 7, 5])])
def test_a_limit_takes_a_seeded_choice_in_recorded_order(tmp_path, limit, sizes):
    stream = write_stream(tmp_path)
    whole, prepared = open_stream(stream), open_stream(stream, max_samples=limit, seed=4)
    assert [task.size for task in prepared.stream] == sizes
    reader, all_of_it = prepared.reader(0, "train"), whole.reader(0, "train")
    keys = [reader.read(number).key for number in range(len(reader))]
    assert keys == sorted(keys)
    assert set(keys) <= {all_of_it.read(number).key for number in range(10)}
    again = open_stream(stream, max_samples=limit, seed=4).reader(0, "train")
    assert [again.read(number).key for number in range(len(again))] == keys


def test_the_limit_keeps_the_smallest_hashes(tmp_path):
    import zlib

    reader = open_stream(write_stream(tmp_path), max_samples=4, seed=9).reader(0, "train")
    ranks = hash_priorities(9, zlib.crc32(b"train/task-a"), torch.arange(10)).tolist()
    expected = sorted(sorted(range(10), key=ranks.__getitem__)[:4])
    assert [int(reader.read(number).key[-3:]) for number in range(4)] == expected


@pytest.mark.parametrize("limit", [0, -3, 0.0, 1.5, True, -0.1])
def test_a_limit_that_means_nothing_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match=r"max_samples is .*, expected a whole number of samples"):
        open_stream(write_stream(tmp_path), max_samples=limit)


def test_progress_counts_parts(tmp_path):
    told = []
    open_stream(write_stream(tmp_path), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_the_training_part_of_a_finished_task_may_be_gone(tmp_path):
    stream = write_stream(tmp_path)
    (tmp_path / "a-train.tar").unlink()
    prepared = open_stream(stream, finished=[0])
    assert len(prepared.reader(0, "test")) == 5
    with pytest.raises(RuntimeError, match="train split of 'task-a' is not open"):
        prepared.reader(0, "train")


def test_two_keys_of_one_hash_are_no_repeated_key():
    errors = ErrorList()
    keys = ["a", "b", "c", "b"]
    hashes = np.array([7, 8, 7, 8], dtype=np.uint64)
    add_repeated_keys(errors, "task 'x'", hashes, lambda index: (keys[index], f"{index}.tar"))
    (line,) = errors.lines
    assert line.startswith("task 'x': key 'b' comes twice, in 1.tar and in 3.tar")
