"""The folder of fetched shards: its limit, and many who want it at once."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mmcl.data.remote.file_lock
from mmcl.data.remote.cache import parse_size
from mmcl.data.remote.fetch import RetryPolicy
from mmcl.data.remote.file_lock import file_lock, remove_left_over, write_once
from mmcl.data.remote.location import resolve_url
from tests.toys.http_server import cut, serving, stall, status, whole, without_length

SIZE = 50_000
HOUSE = Path(__file__).parents[2]


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as site:
        for number in range(5):
            site.put(f"/{number}.tar", bytes([number]) * SIZE)
        yield site


@pytest.fixture
def origin(site, tmp_path):
    """Return an origin of shard 0 to 4 in a cache of some limit, counted in shards."""

    def make(number, shards=None, **settings):
        limit = None if shards is None else int(shards * SIZE)
        patience = RetryPolicy(attempts=2, stall_seconds=5.0, first_wait_seconds=0.001)
        url = site.url(f"/{number}.tar")
        return resolve_url(url, tmp_path, limit_bytes=limit, patience=patience, **settings)

    return make


def here(folder):
    """Numbers of the whole shards, and how many files stand there besides."""
    names = [p.name for p in (folder / "shards").iterdir() if p.name != ".lock"]
    shards = [name for name in names if name.endswith(".tar")]
    return {int(name[17:-4]) for name in shards}, len(names) - len(shards)


def taken(folder):
    """Bytes of shards and parts, of two listings in a row that agree: one takes time."""
    last, now = None, sizes_of(folder)
    while now != last:
        last, now = now, sizes_of(folder)
    return sum(now.values())


def sizes_of(folder):
    """Bytes of each file in the cache, by its inode."""
    sizes = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder / "shards"):
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.inode()] = entry.stat().st_size
    return sizes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (5, 5), ("5", 5), ("50GB", 50 * 10**9), ("50 gb", 50 * 10**9), ("512MiB", 2**29),
        ("1.5TB", 1_500_000_000_000), ("2KiB", 2048), ("7B", 7), ("0.5kB", 500),
    ],
)  # fmt: skip
def test_a_size_is_read_as_people_write_it(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "50G", "-5GB", "5,5GB", "5 GB 2", "all", True, "5e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="50GB"):
        parse_size(text)


@pytest.mark.parametrize("text", [0, "0GB", "0.1B"])
def test_a_size_of_nothing_is_refused(text):
    with pytest.raises(ValueError, match="leave it out for no limit"):
        parse_size(text)


def test_the_shard_used_longest_ago_goes_first(tmp_path, origin):
    for number in (0, 1, 0, 2):
        origin(number, 2).path()
    assert here(tmp_path) == ({0, 2}, 0)
    assert origin(1, 2).path().read_bytes() == bytes([1]) * SIZE
    assert here(tmp_path) == ({1, 2}, 0)


def test_using_a_shard_leaves_its_time_of_modification(origin):
    path = origin(0).path()
    os.utime(path, ns=(1, 2))
    origin(0).path()
    assert path.stat().st_mtime_ns == 2
    assert path.stat().st_atime_ns > 1


def test_a_cache_that_cannot_be_marked_is_still_read(origin, monkeypatch):
    path = origin(0).path()

    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert origin(0).path() == path


def test_a_clock_that_jumps_back_costs_nothing_but_fetches(tmp_path, origin, site, monkeypatch):
    origin(0, 2).path()
    monkeypatch.setattr(time, "time_ns", lambda: 1000)
    for number in (1, 2, 3, 0, 4):
        assert origin(number, 2).path().read_bytes() == bytes([number]) * SIZE
    assert len(here(tmp_path)[0]) == 2


def test_a_shard_above_the_limit_is_refused_and_evicts_nothing(tmp_path, origin, site):
    origin(0, 1).path()
    site.put("/1.tar", bytes(SIZE + 1))
    with pytest.raises(ValueError, match="has 50,001 bytes or more and the cache limit is 50,000"):
        origin(1, 1).path()
    assert here(tmp_path) == ({0}, 0)


def test_shards_without_a_stated_length_share_a_small_cache(tmp_path, origin, site):
    for number in range(5):
        site.script[f"/{number}.tar"] = [without_length]
    for number in range(5):
        assert origin(number, 2.5).path().read_bytes() == bytes([number]) * SIZE
    assert taken(tmp_path) <= 2.5 * SIZE


def test_an_evicted_shard_that_is_open_stays_readable(tmp_path, origin):
    with origin(0, 1).path().open("rb") as file:
        origin(1, 1).path()
        assert here(tmp_path) == ({1}, 0)
        assert file.read() == bytes(SIZE)


def test_another_hash_on_the_card_is_another_file(origin, site):
    old = origin(0, sha256="").path()
    new = b"new"
    site.put("/0.tar", new)
    stated = "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
    assert origin(0, sha256=stated).path().read_bytes() == new
    assert origin(0).path() == old


def test_many_who_want_one_shard_fetch_it_once(tmp_path, origin, site):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: origin(0, 2).path(), range(32)))
    assert len(set(paths)) == 1
    assert site.count("/0.tar") == 1
    assert here(tmp_path) == ({0}, 0)


def test_different_shards_are_fetched_side_by_side(origin, site):
    both = threading.Barrier(2, timeout=20)

    def together(request):
        both.wait()
        whole(request)

    site.script["/0.tar"], site.script["/1.tar"] = [together], [together]
    with ThreadPoolExecutor(2) as pool:
        assert len({p.name for p in pool.map(lambda n: origin(n, 2).path(), (0, 1))}) == 2


def test_shards_that_do_not_fit_together_are_fetched_one_after_the_other(tmp_path, origin, site):
    def sample_from(request):
        whole(request)
        sizes.append(taken(tmp_path))

    sizes = []
    for number in range(5):
        site.script[f"/{number}.tar"] = [sample_from]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda n: origin(n, 1.5).path(), range(5)))
    assert len(sizes) == 5
    assert max(sizes) <= 1.5 * SIZE
    assert len(here(tmp_path)[0]) == 1


def test_what_a_killed_process_left_goes_when_room_is_made(tmp_path, origin):
    origin(0, 2).path()
    left = tmp_path / "shards" / ".0123456789abcdef-9.tar.part"
    left.write_bytes(bytes(SIZE))
    held = left.with_name(".0123456789abcdef-8.tar.part")
    with write_once(left.with_name("whole"), held) as file:
        file.write(bytes(SIZE // 2))
        origin(1, 2).path()
        assert not left.exists()
        assert here(tmp_path) == ({1}, 1)


def test_without_a_limit_left_overs_go_as_well(tmp_path, origin):
    left = tmp_path / "shards" / ".0123456789abcdef-9.tar.part"
    left.parent.mkdir()
    left.write_bytes(bytes(SIZE))
    origin(0).path()
    assert here(tmp_path) == ({0}, 0)


def test_a_failed_fetch_leaves_nothing_and_the_next_one_works(tmp_path, origin, site):
    site.script["/0.tar"] = [cut(9), status(500)]
    with pytest.raises(ValueError, match="after 2 attempts"):
        origin(0, 1).path()
    assert here(tmp_path) == (set(), 0)
    assert origin(0, 1).path().stat().st_size == SIZE


@pytest.mark.parametrize("kind", ["no flock", "refused"])
def test_where_nothing_can_be_locked_work_is_only_done_twice(tmp_path, origin, monkeypatch, kind):
    if kind == "no flock":
        monkeypatch.setattr(mmcl.data.remote.file_lock, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(mmcl.data.remote.file_lock.fcntl, "flock", refuse)
    with ThreadPoolExecutor(4) as pool:
        # Room for what each of them may be fetching at once: nothing has to go meanwhile.
        contents = list(pool.map(lambda n: origin(n, 9).path().read_bytes(), [0, 1] * 8))
    assert contents == [bytes(SIZE), b"\1" * SIZE] * 8
    assert here(tmp_path)[0] == {0, 1}


def test_a_lock_is_not_kept_by_a_forked_child(tmp_path, monkeypatch):
    kept, real = [], os.open

    def opened(*given):
        handle = real(*given)
        kept.append(os.dup(handle))  # as a child forked now would have it
        return handle

    (tmp_path / "lock").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        with file_lock(tmp_path / "lock"):
            pass
        with write_once(tmp_path / "x", tmp_path / ".x") as file:
            file.write(b"1")
    assert len(kept) == 2
    assert remove_left_over(tmp_path / "lock")
    assert remove_left_over(tmp_path / "x")
    for handle in kept:
        os.close(handle)


def test_a_shard_is_fetched_ahead_two_at_a_time(tmp_path, origin, site):
    lock, now, most = threading.Lock(), [0], [0]
    is_begun = threading.Semaphore(0)

    def gauged(request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        is_begun.release()
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        whole(request)

    for number in range(5):
        site.script[f"/{number}.tar"] = [gauged]
        origin(number).prefetch()
    for _ in range(5):
        assert is_begun.acquire(timeout=20)
    for number in range(5):
        origin(number).path()
        assert site.count(f"/{number}.tar") == 1
    assert most[0] <= 2


def test_a_failure_ahead_of_time_is_told_when_the_shard_is_needed(origin, site):
    done = threading.Event()

    def refuse(request):
        status(404)(request)
        done.set()

    site.script["/0.tar"] = [refuse, status(404)]
    origin(0).prefetch()
    assert done.wait(20)
    with pytest.raises(ValueError, match="status 404"):
        origin(0).path()


READING = """
import sys, random
from pathlib import Path
from mmcl.data.remote.fetch import RetryPolicy
from mmcl.data.remote.location import resolve_url
from mmcl.data.shards.tar_shard import open_at_once
url, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
order = random.Random(seed)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    number = order.randrange(5)
    patience = RetryPolicy(first_wait_seconds=0.001)
    origin = resolve_url(url % number, folder, limit_bytes=2 * {size}, patience=patience)
    with open_at_once(origin) as file:
        assert file.read() == bytes([number]) * {size}
print("done", flush=True)
"""


def started(site, folder, *arguments, code=READING):
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("{size}", str(SIZE)), site.url("/%d.tar"), str(folder)]
        + [str(argument) for argument in arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HOUSE,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_share_a_cache_of_two_shards(tmp_path, site):
    with started(site, tmp_path, 1) as first, started(site, tmp_path, 2) as second:
        for process in (first, second):
            assert process.stdout.readline() == "ready\n"
        for process in (first, second):
            process.stdin.write("\n")
            process.stdin.flush()
        most = 0
        while first.poll() is None or second.poll() is None:
            most = max(most, taken(tmp_path))
            time.sleep(0.0005)
        assert [p.stdout.read() for p in (first, second)] == ["done\n", "done\n"]
    # What is looked at while a file moves may be counted at both of its names.
    assert most <= 3 * SIZE
    shards, others = here(tmp_path)
    assert len(shards) <= 2
    assert others == 0
    # 120 uses; whoever finds a shard there does not fetch it.
    assert 5 <= len(site.asked) < 120


@pytest.mark.slow
def test_a_process_killed_while_it_fetches_blocks_nobody(tmp_path, site, origin):
    for number in range(5):
        site.script[f"/{number}.tar"] = [stall(1000)]
    with started(site, tmp_path, 1) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        while not site.asked:
            time.sleep(0.01)
        stalled = int(site.asked[0][0][1:-4])
        while not any(p.stat().st_size for p in (tmp_path / "shards").glob("*.part")):
            time.sleep(0.01)
        assert taken(tmp_path) == SIZE
        process.kill()
    for number in range(5):
        site.script[f"/{number}.tar"] = []
        assert origin(number, 2).path().read_bytes() == bytes([number]) * SIZE
    assert site.count(f"/{stalled}.tar") == 2
    assert here(tmp_path)[1] == 0
