"""Shards that are cut off, or say that they go on: refused with a reason, named by their card."""

import tarfile

import pytest

from mmcl.data import open_stream
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadShard
from tests.data.small_stream import labelled, picture, write_stream, write_tar


def opened(path):
    shard = TarShard(LocalFile(path), path.name, cache=None)
    return len(shard), shard


def test_a_shard_cut_anywhere_is_reported_unless_only_its_end_mark_is_cut(tmp_path):
    whole = write_tar(tmp_path / "x.tar", labelled(2)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    # The end mark is one block of zeros or more, behind the last content filled up to a block.
    end = -(-end // 512) * 512 + 512
    for kept in range(0, len(whole), 173):
        path = tmp_path / f"{kept}.tar"
        path.write_bytes(whole[:kept])
        if kept >= end:
            assert opened(path)[0] == 2
            continue
        with pytest.raises(BadShard, match=r"is (empty|truncated).*: fetch or build it again"):
            opened(path)


def test_a_truncated_shard_is_named_with_its_task(tmp_path):
    stream = write_stream(tmp_path)
    for name, kept in (("b-train.tar", 3000), ("c-test.tar", 512)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="2 errors") as caught:
        open_stream(stream)
    assert "task 'task-b': shard b-train.tar is truncated" in str(caught.value)
    assert "task 'task-c': shard c-test.tar is truncated" in str(caught.value)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_member_of_ten_gigabytes_in_the_header_is_reported_with_both_sizes(tmp_path, place):
    stream = write_stream(tmp_path, sizes=(4,))
    header = tarfile.TarInfo("big.png")
    header.size = 10_000_000_000
    path = tmp_path / "a-train.tar"
    rest = path.read_bytes()
    content = len(rest.rstrip(b"\0")) // 512 * 512 + 512
    header = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(header + rest if place == "first" else rest[:content] + header + bytes(1024))
    message = r"shard a-train\.tar is truncated: the member at byte \d+ needs 10000000000 bytes"
    with pytest.raises(ValueError, match=message):
        open_stream(stream)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_shard_without_its_blocks_of_one_member_is_refused_or_lacks_that_member(tmp_path, number):
    members = [("a.png", picture()), ("a.cls", b"1"), ("b.png", picture()), ("b.cls", b"0")]
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        info = tar.getmembers()[number]
    behind = info.offset_data + -(-info.size // 512) * 512
    path = tmp_path / "y.tar"
    path.write_bytes(whole[: info.offset] + whole[behind:])
    count, shard = opened(path)
    found = [f"{shard.read(n).key}.{kind}" for n in range(count) for kind in shard.read(n).members]
    assert found == [name for place, (name, _) in enumerate(members) if place != number]
    path = tmp_path / "z.tar"
    path.write_bytes(whole[: info.offset] + whole[info.offset_data :])
    with pytest.raises(BadShard, match="is damaged: there is no tar header at byte"):
        opened(path)


def test_zeros_in_place_of_a_header_do_not_end_a_shard_without_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar.getmembers()]
    whole = path.read_bytes()
    for start in starts[1:]:
        path = tmp_path / f"{start}.tar"
        path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        with pytest.raises(BadShard, match=f"continues after its end mark at byte {start}"):
            opened(path)
