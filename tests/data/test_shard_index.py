import io
import os

import numpy as np
import pytest

import mmcl.data.index
from mmcl.data import prepare
from mmcl.data.index import open_index
from tests.data.small_stream import labelled, write_stream, write_tar


def test_the_index_is_written_once_and_read_afterwards(tmp_path, monkeypatch):
    stream = write_stream(tmp_path)
    first = prepare(stream)
    assert (tmp_path / "a-train.tar.index.npz").is_file()
    monkeypatch.setattr(mmcl.data.index, "scan", None)
    again = prepare(stream)
    for number in range(10):
        assert again.reader(0, "train").read(number) == first.reader(0, "train").read(number)


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_stale_index_is_made_anew(tmp_path, keep_time):
    stream = write_stream(tmp_path)
    prepare(stream)
    path = tmp_path / "a-train.tar"
    before = path.stat()
    write_tar(path, labelled(10, name="other-"))
    assert path.stat().st_size == before.st_size
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(stream).reader(0, "train").read(0).key == "other-000"


@pytest.mark.parametrize(
    "garbage", [b"", b"garbage" * 9, b"PK\x03\x04" + bytes(9), "cut", "pickle"]
)
def test_an_index_replaced_by_garbage_is_made_anew(tmp_path, garbage):
    stream = write_stream(tmp_path, sizes=(4,))
    prepare(stream)
    index = tmp_path / "a-train.tar.index.npz"
    whole = index.read_bytes()
    if garbage == "cut":
        garbage = whole[: len(whole) // 2]
    elif garbage == "pickle":
        file = io.BytesIO()
        np.savez(file, first=np.array([{"a": 1}], dtype=object))
        garbage = file.getvalue()
    index.write_bytes(garbage)
    assert prepare(stream).reader(0, "train").read(3).key == "atrain003"
    assert index.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offset", lambda a: a + (1 << 40)),
        ("offset", lambda a: -a - 1),
        ("length", lambda a: a + (1 << 62)),
        ("first", lambda a: a[::-1].copy()),
        ("first", lambda a: a + 1),
        ("kind", lambda a: a + 99),
        ("key_ends", lambda a: a * 2),
        ("keys", lambda a: a[:3]),
        ("offset", lambda a: a.astype(np.float64)),
        ("key_hash", lambda a: a[:1]),
        ("extensions", lambda a: np.frombuffer(b'["pkl", "png", "cls", "txt"]', np.uint8)),
    ],
)
def test_an_index_that_points_outside_its_shard_is_made_anew(tmp_path, name, change):
    write_tar(tmp_path / "x.tar", labelled(4))
    good = open_index(tmp_path / "x.tar", "x.tar", tmp_path)
    place = tmp_path / "x.tar.index.npz"
    with np.load(place) as stored:
        arrays = dict(stored)
    np.savez(place, **{**arrays, name: change(arrays[name])})
    again = open_index(tmp_path / "x.tar", "x.tar", tmp_path)
    assert again.offset.tolist() == good.offset.tolist()
    assert again.first.tolist() == good.first.tolist()
    assert again.extensions == good.extensions


def test_the_index_of_a_read_only_folder_lies_in_the_cache(tmp_path, monkeypatch):
    stream = write_stream(tmp_path, sizes=(4,))
    write = mmcl.data.index.write_atomic

    def only_cache(path, data):
        if "cache" not in str(path):
            raise PermissionError(13, "read-only")
        write(path, data)

    monkeypatch.setattr(mmcl.data.index, "write_atomic", only_cache)
    prepare(stream, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("*.npz"))
    assert len(list((tmp_path / "cache" / "indexes").glob("*a-train.tar.index.npz"))) == 1
    monkeypatch.setattr(mmcl.data.index, "scan", None)
    assert prepare(stream, cache=tmp_path / "cache").stream[0].size == 4


def test_without_any_place_to_write_the_index_is_kept_in_memory(tmp_path, monkeypatch):
    stream = write_stream(tmp_path, sizes=(4,))

    def full(path, data):
        raise OSError(28, "no space left")

    monkeypatch.setattr(mmcl.data.index, "write_atomic", full)
    assert prepare(stream, cache=tmp_path / "cache").stream[0].size == 4


def test_a_shard_that_shrinks_during_a_run_is_an_error_not_a_crash(tmp_path):
    reader = prepare(write_stream(tmp_path, sizes=(4,))).reader(0, "train")
    path = tmp_path / "a-train.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        reader.read(0)
