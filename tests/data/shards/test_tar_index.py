import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import mmcl.data.shards.tar_index
import mmcl.data.shards.tar_scan
import mmcl.data.shards.tar_shard
from mmcl.data import open_stream
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.tar_index import read_index
from mmcl.data.shards.tar_scan import MAX_EXTENSIONS
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import hash_bytes
from tests.data.small_stream import labelled, write_stream, write_tar


def shard_of(path, cache="beside"):
    return TarShard(LocalFile(path), path.name, path.parent if cache == "beside" else cache)


def contents(index):
    """Everything that an index says."""
    arrays = (index.first, index.block, index.length, index.kind, index.large)
    return index.size, index.head_tail_hash, index.extensions, [array.tolist() for array in arrays]


def never(*given):
    raise AssertionError("the shard was scanned again")


def test_the_index_is_written_once_and_read_afterwards(tmp_path, monkeypatch):
    stream = write_stream(tmp_path)
    first = open_stream(stream)
    assert (tmp_path / "a-train.tar.index").is_file()
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    again = open_stream(stream)
    for number in range(10):
        assert again.reader(0, "train").read(number) == first.reader(0, "train").read(number)


def test_the_index_says_what_tarfile_finds(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(5))
    index = shard_of(path).index
    found = [member for place in range(5) for member in index.members(place)]
    with tarfile.open(path) as tar:
        theirs = [
            (info.name.split(".", 1)[1], info.offset_data, info.size) for info in tar.getmembers()
        ]
    assert found == theirs
    assert index.lengths("DE.TXT").tolist() == [6] * 5
    assert index.lengths("json").tolist() == [0] * 5
    with pytest.raises(IndexError, match="sample 5 is outside 0 to 4"):
        list(index.members(5))


def test_lengths_are_zero_where_a_sample_lacks_the_member(tmp_path):
    members = [("a.txt", b"four"), ("b.png", b"1"), ("c.png", b"1"), ("c.txt", b"x")]
    shard = shard_of(write_tar(tmp_path / "x.tar", members))
    assert shard.text_bytes("txt").tolist() == [4, 0, 1]


def test_a_sample_of_image_and_text_takes_22_bytes(tmp_path):
    members = [(f"{n:010d}.{kind}", b"x") for n in range(500) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "x.tar", members)
    for _ in ("scanned", "read from its file"):
        shard = shard_of(path)
        assert shard.nbytes == 0
        assert len(shard.key_hashes()) == 500
        assert shard.nbytes == 500 * 22 + 4


def test_key_hashes_are_those_of_the_keys_and_come_from_the_file(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", labelled(7))
    expected = [hash_bytes(f"s{n:03d}".encode()) for n in range(7)]
    assert shard_of(path).key_hashes().tolist() == expected
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    assert shard_of(path).key_hashes().tolist() == expected


def test_key_hashes_whose_file_is_gone_are_rebuilt(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    shard = shard_of(path)
    assert len(shard.index) == 3
    (tmp_path / "x.tar.index").unlink()
    assert shard.key_hashes().tolist() == [hash_bytes(f"s{n:03d}".encode()) for n in range(3)]
    assert (tmp_path / "x.tar.index").is_file()


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_stale_index_is_rebuilt(tmp_path, keep_time):
    stream = write_stream(tmp_path)
    open_stream(stream)
    path = tmp_path / "a-train.tar"
    before = path.stat()
    write_tar(path, labelled(10, name="other-"))
    assert path.stat().st_size == before.st_size
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_stream(stream).reader(0, "train").read(0).key == "other-000"


@pytest.mark.parametrize("shift", [-(10**18), -1, 1])
def test_a_clock_that_jumps_does_not_save_a_stale_index(tmp_path, monkeypatch, shift):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    shard_of(path).key_hashes()
    time = path.stat().st_mtime_ns + shift
    os.utime(path, ns=(time, time))
    with path.open("rb") as file:
        assert read_index([tmp_path / "x.tar.index"], file) is None
    assert len(shard_of(path)) == 3
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    assert len(shard_of(path)) == 3


def test_an_index_cut_anywhere_is_rebuilt(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(2))
    good, place = contents(shard_of(path).index), tmp_path / "x.tar.index"
    whole = place.read_bytes()
    for kept in [*range(0, len(whole), 13), len(whole) - 1]:
        place.write_bytes(whole[:kept])
        assert contents(shard_of(path).index) == good
        assert place.read_bytes() == whole, kept
    place.write_bytes(whole + b"\0")
    assert contents(shard_of(path).index) == good
    assert place.read_bytes() == whole


def test_an_index_with_any_byte_flipped_is_rebuilt(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(2))
    shard, place = shard_of(path), tmp_path / "x.tar.index"
    good, hashes = contents(shard.index), shard.key_hashes().tolist()
    whole = place.read_bytes()
    for number in range(0, len(whole), 5):
        data = bytearray(whole)
        data[number] ^= 1 << number % 8
        place.write_bytes(data)
        again = shard_of(path)
        assert contents(again.index) == good
        assert again.key_hashes().tolist() == hashes
        assert place.read_bytes() == whole, number


@pytest.mark.parametrize("garbage", [b"", b"garbage" * 9, b"mmclidx2", bytes(4096), "folder"])
def test_an_index_replaced_by_garbage_is_rebuilt(tmp_path, garbage):
    stream = write_stream(tmp_path, sizes=(4,))
    index = tmp_path / "a-train.tar.index"
    if garbage == "folder":
        index.mkdir()
    else:
        index.write_bytes(garbage)
    prepared = open_stream(stream, cache_dir=tmp_path / "cache")
    assert prepared.reader(0, "train").read(3).key == "atrain003"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("block", lambda a: a + (1 << 20)),
        ("block", lambda a: a * 0),
        ("block", lambda a: a[::-1]),
        ("length", lambda a: a + (1 << 31)),
        ("length", lambda a: a | 0xFFFFFFFF),
        ("first", lambda a: a[::-1]),
        ("first", lambda a: a + 1),
        ("first", lambda a: a * 0),
        ("first", lambda a: a * 9),
        ("kind", lambda a: a + 99),
        ("large", lambda a: np.array([[0, 1 << 40]])),
        ("large", lambda a: np.array([[999, -1]])),
        ("extensions", lambda a: ("pkl", *a[1:])),
        ("extensions", lambda a: ("png",) * 4),
        ("extensions", lambda a: (1, 2, 3, 4)),
        ("extensions", lambda a: a[:1]),
        ("extensions", lambda a: {"png": 1}),
    ],
)
def test_an_inconsistent_index_is_rebuilt_even_with_true_checksums(tmp_path, name, change):
    path, place = write_tar(tmp_path / "x.tar", labelled(4)), tmp_path / "x.tar.index"
    good = contents(shard_of(path).index)
    whole = place.read_bytes()
    _write_absurd(place, shard_of(path).index, name, change, path.stat().st_mtime_ns)
    assert place.read_bytes() != whole
    assert contents(shard_of(path).index) == good
    assert place.read_bytes() == whole


def _write_absurd(place, index, name, change, time):
    changed = {**vars(index), name: change(getattr(index, name))}
    absurd = object.__new__(type(index))
    for field, value in changed.items():
        object.__setattr__(absurd, field, value)
    hashes = np.zeros(len(index), np.uint64)
    mmcl.data.shards.tar_index.write_index([place], absurd, hashes, time)


def test_a_deeply_nested_list_of_extensions_is_no_crash(tmp_path):
    path, place = write_tar(tmp_path / "x.tar", labelled(1)), tmp_path / "x.tar.index"
    good = contents(shard_of(path).index)
    whole = place.read_bytes()
    nested = b"[" * 100_000
    start = whole.index(b'[["png"')
    guarded = bytearray(whole[16:start] + nested)
    struct.pack_into("<I", guarded, 28, len(nested))
    sums = struct.pack("<8sI", whole[:8], zlib.crc32(guarded)) + whole[12:16]
    place.write_bytes(sums + guarded + whole[-8:])
    assert contents(shard_of(path).index) == good
    assert place.read_bytes() == whole


def test_the_index_of_a_read_only_folder_is_in_the_cache(tmp_path, monkeypatch):
    stream = write_stream(tmp_path, sizes=(4,))
    write = mmcl.data.shards.tar_index.write_atomic

    def only_cache(path, data):
        if "cache" not in str(path):
            raise PermissionError(13, "read-only")
        write(path, data)

    monkeypatch.setattr(mmcl.data.shards.tar_index, "write_atomic", only_cache)
    open_stream(stream, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("*.index"))
    assert len(list((tmp_path / "cache" / "indexes").glob("*a-train.tar.index"))) == 1
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    assert open_stream(stream, cache_dir=tmp_path / "cache").stream[0].size == 4


def test_on_a_full_disk_the_index_is_kept_in_memory_with_its_hashes(tmp_path, monkeypatch):
    stream = write_stream(tmp_path, sizes=(4,))

    def full(path, data):
        raise OSError(28, "no space left")

    monkeypatch.setattr(mmcl.data.shards.tar_index, "write_atomic", full)
    assert open_stream(stream, cache_dir=tmp_path / "cache").stream[0].size == 4
    shard = shard_of(tmp_path / "a-train.tar")
    assert len(shard.key_hashes()) == 4
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    assert len(shard.key_hashes()) == 4
    assert shard.read(3).key == "atrain003"
    assert not list(tmp_path.glob("**/*.index"))


def test_an_index_that_cannot_be_read_is_rebuilt(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    good = contents(shard_of(path).index)
    is_file = Path.is_file

    def refused(self):
        if self.suffix == ".index":
            raise PermissionError(13, "not for you")
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert contents(shard_of(path).index) == good


def test_a_shard_that_shrinks_during_a_run_is_an_error_not_a_crash(tmp_path):
    reader = open_stream(write_stream(tmp_path, sizes=(4,))).reader(0, "train")
    path = tmp_path / "a-train.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        reader.read(0)


def test_keys_with_dots_in_them_are_reported_not_taken_for_many_extensions(tmp_path):
    members = [(f"photo.{n}.txt", b"x") for n in range(MAX_EXTENSIONS + 1)]
    with pytest.raises(
        ValueError, match=r"more than 256 extensions of members, \.256\.txt for one"
    ):
        len(shard_of(write_tar(tmp_path / "x.tar", members)))
    assert len(shard_of(write_tar(tmp_path / "x.tar", members[1:]))) == 1


def test_a_shard_beyond_two_tebibytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mmcl.data.shards.tar_scan, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="bytes, more than 1000: write it in several shards"):
        len(shard_of(write_tar(tmp_path / "x.tar", labelled(1))))
