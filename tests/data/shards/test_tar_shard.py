import io
import os
import pickle
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

import mmcl.data.shards.tar_shard
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.tar_shard import TarShard, open_at_once
from mmcl.data.stored_sample import BadSample, BadShard
from tests.data.small_stream import labelled, picture, write_tar


@dataclass
class Far:
    """An origin whose cached copy can be given up; counts how often it is fetched."""

    source: Path
    cached: Path
    fetched: int = 0
    lost: int = 0
    url: str = "https://example.org/a/x.tar?token=secret"
    is_remote: bool = True

    def path(self):
        if not self.cached.exists():
            self.cached.write_bytes(self.source.read_bytes())
            self.fetched += 1
        if self.lost:
            self.lost -= 1
            self.cached.unlink()
        return self.cached


def never(*given):
    raise AssertionError("it was called again")


@pytest.fixture
def path(tmp_path):
    return write_tar(tmp_path / "x.tar", labelled(5))


@pytest.fixture
def far(path, tmp_path):
    return Far(path, tmp_path / "cached.tar")


def local(path, **options):
    return TarShard(LocalFile(path), "x.tar", path.parent / "cache", **options)


def distant(far, **options):
    return TarShard(far, "x.tar", far.cached.parent / "cache", **options)


def test_samples_keys_and_names_are_those_of_the_tar(path):
    shard = local(path)
    assert (len(shard), shard.name, shard.is_remote) == (5, "x.tar", False)
    members = labelled(5)
    for place in range(5):
        sample = shard.read(place)
        own = dict(members[4 * place : 4 * place + 4])
        assert {f"{sample.key}.{kind}": data for kind, data in sample.members.items()} == own
        assert (sample.key, sample.shard) == (shard.key(place), "x.tar")
    with pytest.raises(IndexError):
        shard.read(5)
    with pytest.raises(IndexError):
        shard.key(-1)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_keys_are_read_from_headers_of_every_format_and_behind_what_is_not_read(tmp_path, format):
    folder = tarfile.TarInfo("folder/")
    folder.type = tarfile.DIRTYPE
    keys = ["plain", "d/" * 60 + "long", "schön", "a\nb", "folder/inside", "last"]
    members = [(folder, b""), ("notes", b"x" * 700)]
    for key in keys:
        members += [(f"{key}.pkl", b"x" * 600), (f"{key}.txt", key.encode()), (f"{key}.bin", b"")]
    shard = local(write_tar(tmp_path / "x.tar", members, format))
    assert [shard.key(place) for place in range(6)] == keys
    assert [shard.read(place).members["txt"].decode() for place in range(6)] == keys


def test_a_shard_without_samples_is_empty_also_from_its_index(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.pkl", b"x")])
    for _ in range(2):
        shard = local(path)
        assert (len(shard), len(shard.key_hashes()), len(shard.text_bytes("txt"))) == (0, 0, 0)


def test_a_stated_count_needs_no_shard_until_it_is_read(far, monkeypatch):
    shard = distant(far, count=5)
    assert (len(shard), far.fetched) == (5, 0)
    assert shard.read(4).key == "s004"
    assert (len(shard), far.fetched) == (5, 1)


def test_a_wrong_count_names_both_numbers(path):
    shard = local(path, count=7)
    assert len(shard) == 7
    with pytest.raises(BadShard, match="holds 5 samples and the card says 7: correct the card"):
        shard.index  # noqa: B018
    with pytest.raises(RuntimeError, match=r"shard x\.tar holds 5 samples and the card says 7"):
        shard.read(0)


def test_a_remote_shard_that_is_indexed_is_not_fetched_to_be_indexed(far):
    distant(far).key_hashes()
    far.cached.unlink()
    again = distant(far)
    assert (len(again), far.fetched) == (5, 1)
    assert again.text_bytes("de.txt").tolist() == [6] * 5
    assert len(again.key_hashes()) == 5
    assert far.fetched == 1
    assert again.read(2).key == "s002"
    assert far.fetched == 2


def test_the_index_of_a_remote_shard_is_named_by_its_address_without_its_secrets(far, tmp_path):
    assert len(distant(far)) == 5
    (index,) = (tmp_path / "cache" / "indexes").iterdir()
    assert index.name.endswith("-x.tar.index")
    assert "secret" not in index.name
    far.url = "https://example.org/b/x.tar"
    assert len(distant(far)) == 5
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 2


@pytest.mark.parametrize("members", [labelled(5, name="other-"), labelled(6)])
def test_a_remote_shard_that_changed_since_it_was_indexed_is_an_error_once(far, members):
    assert len(distant(far)) == 5
    far.cached.unlink()
    write_tar(far.source, members)
    with pytest.raises(RuntimeError, match=r"shard x\.tar changed or vanished since it was ind"):
        distant(far).read(0)
    assert distant(far).read(0).key == members[0][0].split(".")[0]


def test_a_remote_shard_is_compared_once_per_fetch(far, monkeypatch):
    compared = []
    head_tail_hash = mmcl.data.shards.tar_shard.head_tail_hash
    monkeypatch.setattr(
        mmcl.data.shards.tar_shard,
        "head_tail_hash",
        lambda *given: compared.append(1) or head_tail_hash(*given),
    )
    assert len(distant(far)) == 5
    shard = distant(far)
    for place in [0, 1, 2, 0]:
        shard.read(place)
    assert len(compared) == 1
    mmcl.data.shards.tar_shard._remote_maps.clear()
    shard.read(3)
    assert len(compared) == 1
    mmcl.data.shards.tar_shard._remote_maps.clear()
    os.utime(far.cached, ns=(5, 5))
    shard.read(3)
    assert len(compared) == 2


def test_a_copy_that_the_cache_gave_up_stays_readable_while_mapped_and_is_fetched_after(far):
    shard = distant(far)
    shard.read(0)
    far.cached.unlink()
    assert shard.read(1).key == "s001"
    assert far.fetched == 1
    mmcl.data.shards.tar_shard._remote_maps.clear()
    assert shard.read(1).key == "s001"
    assert far.fetched == 2


def test_a_copy_that_vanishes_before_it_is_open_is_fetched_up_to_three_times(far):
    far.lost = 2
    with open_at_once(far) as file:
        assert len(file.read(512)) == 512
    far.cached.unlink()
    far.lost = 3
    with pytest.raises(BadShard, match="vanished 3 times before it could be opened"):
        open_at_once(far)


def test_a_fetch_that_fails_during_a_run_names_the_shard(far, monkeypatch):
    shard = distant(far)
    assert len(shard) == 5

    def fail():
        raise BadShard("could not be fetched (HTTP 500)")

    monkeypatch.setattr(far, "path", fail)
    with pytest.raises(RuntimeError, match=r"shard x\.tar could not be fetched \(HTTP 500\)"):
        shard.read(0)
    with pytest.raises(RuntimeError, match=r"shard x\.tar could not be fetched"):
        TarShard(far, "x.tar", None).key(0)


def test_a_pickled_shard_is_small_and_reads_the_same(path, monkeypatch):
    shard = local(path)
    before = shard.read(3)
    data = pickle.dumps(shard)
    assert len(data) < 1000
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "scan", never)
    again = pickle.loads(data)
    assert again.nbytes == 0
    assert again.read(3) == before


def test_another_process_that_meets_another_shard_says_so(path):
    shard = local(path)
    assert len(shard) == 5
    data = pickle.dumps(shard)
    write_tar(path, labelled(5, name="other-"))
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        pickle.loads(data).read(0)


def test_a_shard_replaced_after_it_was_indexed_is_an_error(path):
    shard = local(path)
    assert len(shard) == 5
    write_tar(path, labelled(5, name="other-"))
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        shard.read(0)
    path.unlink()
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        shard.read(0)


def test_a_shard_changed_in_its_middle_is_noticed_by_its_headers(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"k{n}.png", b"x" * 200_000) for n in range(5)])
    shard = local(path)
    assert shard.read(2).key == "k2"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(list(shard.index.members(2))[0][1] - 512)
        file.write(b"k9")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RuntimeError, match="changed or vanished since it was indexed"):
        shard.read(2)
    assert shard.read(3).key == "k3"


def test_a_touched_shard_is_compared_and_read_on(path):
    shard = local(path)
    assert len(shard) == 5
    os.utime(path, ns=(1, 1))
    assert shard.read(1).key == "s001"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files")
@pytest.mark.parametrize(("is_far", "limit"), [(False, 128), (True, 8)])
def test_many_shards_hold_few_files_open(tmp_path, is_far, limit):
    path = write_tar(tmp_path / "x.tar", labelled(1))
    shards = []
    for number in range(limit + 30):
        own = tmp_path / f"{number}.tar"
        os.link(path, own)
        far = Far(path, own, url=f"https://example.org/{number}.tar")
        shards.append(TarShard(far if is_far else LocalFile(own), "x.tar", None))
    mmcl.data.shards.tar_shard._maps.clear()
    mmcl.data.shards.tar_shard._remote_maps.clear()
    before = len(os.listdir("/proc/self/fd"))
    assert all(len(shard) == 1 for shard in shards)
    assert len(os.listdir("/proc/self/fd")) == before
    for shard in [*shards, *shards[:9]]:
        assert shard.read(0).key == "s000"
    assert len(os.listdir("/proc/self/fd")) == before + limit


def test_threads_read_one_shard_at_a_time_or_together(path, monkeypatch):
    monkeypatch.setattr(mmcl.data.shards.tar_shard, "_MAPS", 1)
    shards = [local(path), local(path)]
    expected = [shards[0].read(place) for place in range(5)]
    wrong = []

    def work(own):
        for round in range(60):
            if own[round % 2].read(round % 5) != expected[round % 5]:
                wrong.append(round)

    threads = [threading.Thread(target=work, args=(shards[:: 1 - 2 * n],)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_members_of_four_gibibytes_and_more_are_exact_and_bad_samples(tmp_path):
    path, sizes = tmp_path / "x.tar", [10_000_000_000, (1 << 32) - 1, 3]
    with path.open("wb") as file:
        for number, size in enumerate(sizes):
            for name, length in ((f"k{number}.png", size), (f"k{number}.txt", 2)):
                info = tarfile.TarInfo(name)
                info.size = length
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.seek(-(-length // 512) * 512, io.SEEK_CUR)
        file.write(bytes(1024))
    for _ in ("scanned", "read from its file"):
        shard = local(path)
        assert shard.text_bytes("png").tolist() == sizes
        assert shard.text_bytes("txt").tolist() == [2, 2, 2]
        assert [shard.key(place) for place in range(3)] == ["k0", "k1", "k2"]
        with pytest.raises(BadSample, match="its .png has 10000000000 bytes, more than 268435456"):
            shard.read(0)
        with pytest.raises(BadSample, match="its .png has 4294967295 bytes"):
            shard.read(1)
        assert shard.read(2).members == {"png": b"\0\0\0", "txt": b"\0\0"}


def test_without_a_cache_nothing_is_written(path):
    before = sorted(path.parent.rglob("*"))
    shard = TarShard(LocalFile(path), "x.tar", None)
    assert shard.read(0).members["png"] == picture(_seed("s"))
    assert len(shard.key_hashes()) == 5
    assert sorted(path.parent.rglob("*")) == before


def _seed(name):
    import zlib

    return zlib.crc32(name.encode()) % 1000
