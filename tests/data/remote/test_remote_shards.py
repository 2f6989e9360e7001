"""Remote shards from a server on this machine, good and bad."""

import errno
import hashlib
import pickle
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

import mmcl.data.remote.cache
import mmcl.data.remote.download
from mmcl.data.remote.download import FILE_SYSTEMS
from mmcl.data.remote.fetch import RetryPolicy
from mmcl.data.remote.location import LocalFile, default_cache, resolve_url
from tests.toys.http_server import cut, lie, replaced, serving, stall, status, without_length

CONTENT = bytes(range(256)) * 4000
HALF = 600_000
OTHERS = [("oci", "ocifs"), ("abfs", "adlfs"), ("sftp", "paramiko")]


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as site:
        yield site


@pytest.fixture
def waits():
    return []


@pytest.fixture
def patience(waits):
    return RetryPolicy(stall_seconds=0.2, jitter=0.0, sleep=waits.append)


def fetched(url, folder, patience, **settings):
    return resolve_url(url, folder, patience=patience, **settings).path().read_bytes()


def left(folder):
    """Names in the cache, without the lock of the folder."""
    return sorted(p.name for p in (folder / "shards").iterdir() if p.name != ".lock")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_remote_shard_is_fetched_once(tmp_path, site, patience):
    url = site.put("/a/train%20000.tar", CONTENT) + "?part=1"
    origin = resolve_url(url, tmp_path, patience=patience)
    assert origin.is_remote
    assert site.asked == []
    assert origin.path().read_bytes() == CONTENT
    assert origin.path() == origin.path()
    assert [path for path, _ in site.asked] == ["/a/train%20000.tar?part=1"]
    assert origin.path().name.endswith("-train_000.tar")
    assert left(tmp_path) == [origin.path().name]


def test_two_urls_of_one_file_name_do_not_meet(tmp_path, site, patience):
    first = site.put("/a/x.tar", b"first")
    second = site.put("/b/x.tar", b"second")
    for query in ("?key=1", "?key=2", "?part=2"):
        assert fetched(first + query, tmp_path, patience) == b"first"
    assert fetched(second, tmp_path, patience) == b"second"
    assert len(left(tmp_path)) == 4


def test_a_server_that_fails_twice_is_asked_a_third_time(tmp_path, site, patience, waits):
    url = site.put("/x.tar", CONTENT, status(500), status(503))
    assert fetched(url, tmp_path, patience) == CONTENT
    assert waits == [1.0, 2.0]


def test_a_server_that_always_fails_is_told_with_every_attempt(tmp_path, site, patience, waits):
    url = site.put("/x.tar", CONTENT, status(500), status(500), stall(HALF), cut(HALF), status(502))
    with pytest.raises(ValueError, match="could not be fetched after 5 attempts") as caught:
        fetched(url, tmp_path, patience)
    assert (
        "(status 500, 2 times; it stalled for 0.2 s at byte 600,000 of 1,024,000; it was cut off "
        "at byte 600,000 of 1,024,000; status 502): check the address and the network" in
        str(caught.value)
    )  # fmt: skip
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert left(tmp_path) == []


def test_waits_are_bounded_and_drawn_apart(waits):
    patience = RetryPolicy(sleep=waits.append)
    for attempts in (1, 5, 6, 60):
        patience.wait(attempts)
    for seconds, least in zip(waits, (1, 16, 30, 30), strict=True):
        assert least <= seconds <= 1.25 * least


def test_a_server_may_ask_for_patience_within_bounds(tmp_path, site, patience, waits):
    answers = (
        status(429, Retry_After="7"),
        status(503, Retry_After="86400"),
        status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        status(503, Retry_After="soon"),
    )
    url = site.put("/x.tar", CONTENT, *answers)
    assert fetched(url, tmp_path, patience) == CONTENT
    assert waits == [7.0, 120.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (404, "is not at its address"),
        (401, "is refused by its server"),
        (403, "is refused by its server"),
        (418, "answers with status 418"),
    ],
)
def test_an_answer_that_stays_is_told_at_once(tmp_path, site, patience, waits, code, reason):
    url = site.put("/x.tar", CONTENT, status(code, b"who asks?"))
    with pytest.raises(ValueError, match=reason) as caught:
        fetched(url, tmp_path, patience)
    assert str(code) in str(caught.value)
    assert waits == []
    assert left(tmp_path) == []


def test_a_server_that_is_not_there_is_told(tmp_path, site, patience):
    url = site.put("/x.tar", b"").replace(str(site.port), "1")
    with pytest.raises(ValueError, match=r"after 5 attempts \(connection refused, 5 times\)"):
        fetched(url, tmp_path, patience)


def test_no_answer_at_all_is_a_stall(tmp_path, site, patience):
    url = site.put("/x.tar", CONTENT, lambda request: site.over.wait(20))
    with pytest.raises(ValueError, match=r"after 1 attempt \(no answer within 0.2 s\)"):
        fetched(url, tmp_path, replace(patience, attempts=1))


@pytest.mark.parametrize("error", [cut, stall])
def test_a_broken_transfer_goes_on_where_it_broke(tmp_path, site, patience, error):
    url = site.put("/x.tar", CONTENT, error(HALF), cut(HALF + 9), tag='"1"')
    assert fetched(url, tmp_path, patience, sha256=sha256(CONTENT)) == CONTENT
    ranges = [headers.get("Range") for _, headers in site.asked]
    assert ranges == [None, f"bytes={HALF}-", f"bytes={HALF + 9}-"]


@pytest.mark.parametrize("tag", ["", 'W/"1"'])
def test_without_a_strong_tag_a_broken_transfer_begins_again(tmp_path, site, patience, tag):
    url = site.put("/x.tar", CONTENT, cut(HALF), cut(HALF), tag=tag)
    assert fetched(url, tmp_path, patience, sha256=sha256(CONTENT)) == CONTENT
    assert [headers.get("Range") for _, headers in site.asked] == [None] * 3


@pytest.mark.parametrize("length", [10, len(CONTENT) + 10])
def test_two_contents_are_never_glued(tmp_path, site, patience, length):
    new = b"n" * length
    url = site.put("/x.tar", CONTENT, cut(HALF), replaced(new, '"2"'), tag='"1"')
    assert fetched(url, tmp_path, patience) == new
    assert site.asked[1][1]["If-Range"] == '"1"'


def test_a_part_that_was_not_asked_for_begins_again(tmp_path, site, patience):
    def shifted(request):
        request.begin(206, 10, Content_Range=f"bytes 5-14/{len(CONTENT)}")
        request.wfile.write(CONTENT[5:15])

    too_far = status(416, Content_Range=f"bytes */{len(CONTENT)}")
    url = site.put("/x.tar", CONTENT, cut(HALF), shifted, cut(HALF), too_far, tag='"1"')
    assert fetched(url, tmp_path, patience, sha256=sha256(CONTENT)) == CONTENT
    assert site.count("/x.tar") == 5
    assert "Range" not in site.asked[2][1]


def test_a_shard_shorter_than_stated_is_never_taken(tmp_path, site, patience):
    url = site.put("/x.tar", b"short", *[lie(9)] * 5)
    with pytest.raises(ValueError, match=r"\(it was cut off at byte 5 of 9, 5 times\)"):
        fetched(url, tmp_path, patience)
    assert left(tmp_path) == []


def test_a_shard_without_a_stated_length_is_fetched(tmp_path, site, patience):
    url = site.put("/x.tar", CONTENT, without_length)
    assert fetched(url, tmp_path, patience) == CONTENT
    url = site.put("/y.tar", CONTENT, without_length, without_length)
    assert fetched(url, tmp_path, patience, limit_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(ValueError, match="the cache limit is 1,023,999"):
        fetched(url + "?2", tmp_path, patience, limit_bytes=len(CONTENT) - 1)


def test_a_shard_that_is_not_the_cards_is_fetched_a_second_time(tmp_path, site, patience):
    stated = sha256(CONTENT)
    url = site.put("/x.tar", CONTENT, lie(len(CONTENT) - 1))
    assert fetched(url, tmp_path, patience, sha256=stated.upper()) == CONTENT
    url = site.put("/y.tar", b"other")
    with pytest.raises(ValueError, match="also when it is fetched again") as caught:
        fetched(url, tmp_path, patience, sha256=stated)
    assert sha256(b"other") in str(caught.value)
    assert stated in str(caught.value)
    assert site.count("/y.tar") == 2
    assert len(left(tmp_path)) == 1


def test_a_redirect_is_followed_and_a_password_stays_with_its_host(tmp_path, site, patience):
    there = site.put("/there.tar", CONTENT, cut(HALF), tag='"1"')
    other = there.replace("127.0.0.1", "localhost")
    moved = [status(code, Location=other) for code in (302, 308)]
    url = site.put("/here.tar", b"", *moved).replace("//", "//me:hush@")
    assert fetched(url, tmp_path, patience) == CONTENT
    secrets = [(path, headers.get("Authorization")) for path, headers in site.asked]
    assert secrets == [("/here.tar", "Basic bWU6aHVzaA=="), ("/there.tar", None)] * 2
    assert site.asked[-1][1]["Range"] == f"bytes={HALF}-"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_out_of_the_web_is_refused(tmp_path, site, patience, target):
    url = site.put("/x.tar", b"", status(302, Location=target))
    with pytest.raises(ValueError, match="redirects from http to ftp|with status 302"):
        fetched(url, tmp_path, patience)


def test_a_redirect_in_a_circle_ends(tmp_path, site, patience):
    url = site.put("/x.tar", b"", *[status(302, Location="/x.tar")] * 50)
    with pytest.raises(ValueError, match="answers with status 302"):
        fetched(url, tmp_path, patience)


def test_no_secret_of_an_address_is_shown_or_becomes_a_name(tmp_path, site, patience):
    url = site.put("/x.tar", b"", *[status(403)] * 9)
    url = url.replace("//", "//me:hushhush@") + "?token=hushhush&X-Amz-Signature=hushhush&part=2"
    origin = resolve_url(url, tmp_path, patience=patience)
    with pytest.raises(ValueError, match="status 403") as caught:
        origin.path()
    site.script["/x.tar"] = []
    assert site.asked[0][0].endswith("?token=hushhush&X-Amz-Signature=hushhush&part=2")
    for text in (str(caught.value), origin.url, repr(origin), str(origin.path())):
        assert "hushhush" not in text
    assert origin.url.endswith("part=2")
    signed_anew = resolve_url(url.replace("Signature=hush", "Signature=new"), tmp_path)
    assert signed_anew.path() == origin.path()


def test_a_packed_answer_is_refused(tmp_path, site, patience):
    url = site.put("/x.tar", b"", status(200, b"\x1f\x8b", Content_Encoding="gzip"))
    with pytest.raises(ValueError, match="sends it compressed"):
        fetched(url, tmp_path, patience)


@pytest.mark.parametrize("url", ["http://", "http://[x/y.tar", "https:///x.tar"])
def test_an_address_that_makes_no_sense_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match="address"):
        resolve_url(url, tmp_path)


def test_local_shards_are_paths(tmp_path):
    (tmp_path / "a b.tar").write_bytes(b"here")
    for url in (str(tmp_path / "a b.tar"), f"file://{tmp_path}/a%20b.tar"):
        origin = resolve_url(url, tmp_path)
        assert origin == LocalFile(str(tmp_path / "a b.tar"))
        assert not origin.is_remote
        assert origin.path().read_bytes() == b"here"
    with pytest.raises(ValueError, match=r"is missing, there is no file .*no\.tar: build"):
        resolve_url(str(tmp_path / "no.tar"), tmp_path).path()


def test_many_origins_share_one_cache_and_travel(tmp_path):
    origins = [resolve_url(f"https://example.org/{n}.tar", tmp_path) for n in range(1000)]
    assert len({id(origin.cache) for origin in origins}) == 1
    stored = pickle.dumps(origins)
    assert len(stored) < 100 * len(origins)
    assert pickle.loads(stored) == origins


class Store(MemoryFileSystem):
    """A cloud in memory."""

    protocol = "s3"
    store, pseudo_dirs, errors = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("s3://").strip("/")

    def _open(self, path, mode="rb", **settings):
        if self.errors and mode == "rb":
            raise self.errors.pop(0)
        return super()._open(path, mode, **settings)


@pytest.fixture
def cloud(monkeypatch):
    monkeypatch.setitem(_registry, "s3", Store)
    Store.store.clear()
    Store.errors.clear()
    store = fsspec.filesystem("s3")
    store.pipe("/bucket/x.tar", CONTENT)
    return store


def test_a_shard_in_a_cloud_is_fetched_by_its_file_system(tmp_path, cloud, patience, waits):
    cloud.errors += [OSError("slow down s3://bucket/x.tar?token=hush"), TimeoutError()]
    assert fetched("s3://bucket/x.tar", tmp_path, patience, sha256=sha256(CONTENT)) == CONTENT
    assert waits == [1.0, 2.0]
    assert cloud.errors == []


def test_a_cloud_that_always_fails_is_told(tmp_path, cloud, patience):
    cloud.errors += [OSError("slow down https://me:hush@h/x.tar?token=hush now")] * 5
    with pytest.raises(ValueError, match=r"slow down https://h/x.tar\?... now, 5 times") as caught:
        fetched("s3://bucket/x.tar", tmp_path, patience)
    assert "hush" not in str(caught.value)


def test_what_is_not_in_a_cloud_or_not_ours_is_told_at_once(tmp_path, cloud, patience, waits):
    with pytest.raises(ValueError, match="is not at its address"):
        fetched("s3://bucket/no.tar", tmp_path, patience)
    cloud.errors.append(PermissionError("Access Denied"))
    with pytest.raises(ValueError, match="log in with the server's own tool"):
        fetched("s3://bucket/x.tar", tmp_path, patience)
    with pytest.raises(ValueError, match="name one shard on one server"):
        fetched("s3://bucket/x.tar::file:///etc/passwd", tmp_path, patience)
    assert waits == []


def test_a_shard_replaced_in_its_cloud_while_it_is_read_is_read_again(
    tmp_path, cloud, patience, monkeypatch
):
    monkeypatch.setattr(mmcl.data.remote.download, "_BLOCK", 1000)
    real, new = Store._open, b"n" * len(CONTENT)

    def replacing(self, path, mode="rb", **settings):
        file = real(self, path, mode, **settings)
        if mode == "rb" and self.cat_file(path) != new:
            self.pipe(path, new)
        return file

    monkeypatch.setattr(Store, "cat_file", lambda self, path: self.store[path].getvalue())
    monkeypatch.setattr(Store, "_open", replacing)
    assert fetched("s3://bucket/x.tar", tmp_path, patience) == new


def test_a_cloud_that_hangs_is_given_up(tmp_path, cloud, patience, site, monkeypatch):
    monkeypatch.setattr(Store, "info", lambda *_, **__: site.over.wait(20))
    with pytest.raises(ValueError, match=r"\(no answer within 0.2 s\)"):
        fetched("s3://bucket/x.tar", tmp_path, replace(patience, attempts=1))
    site.over.set()


@pytest.mark.parametrize(
    ("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub"), *OTHERS]
)
def test_the_package_that_opens_an_address_is_named(
    tmp_path, patience, waits, scheme, package, monkeypatch
):
    def missing(scheme):
        raise ImportError(f"no file system\nfor {scheme}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=f"pip install {package}, or fetch it yourself") as caught:
        fetched(f"{scheme}://bucket/x.tar", tmp_path, patience)
    assert f"fsspec cannot open {scheme}:// (no file system for {scheme})" in str(caught.value)
    assert waits == []
    assert left(tmp_path) == []


def test_a_pipe_is_run_once_and_its_command_is_no_name(tmp_path, patience, waits):
    (tmp_path / "x.tar").write_bytes(b"content")
    command = f"pipe:TOKEN=hush cat {tmp_path}/x.tar"
    origin = resolve_url(command, tmp_path, allow_pipes=True, patience=patience)
    assert origin.path().read_bytes() == b"content"
    assert "hush" not in f"{origin.path()} {origin.url} {origin}"
    with pytest.raises(ValueError, match="the command ended with status 3: try it in a shell"):
        fetched("pipe:exit 3", tmp_path, patience, allow_pipes=True)
    assert waits == []


@pytest.mark.parametrize("command", ["cat x\0", "cat " + "x" * (1 << 22)])
def test_a_pipe_that_cannot_be_started_is_refused(tmp_path, patience, waits, command):
    with pytest.raises(ValueError, match="its command cannot be started .*: try it in a shell"):
        fetched(f"pipe:{command}", tmp_path, patience, allow_pipes=True)
    assert waits == []


def test_a_pipe_that_is_given_up_is_killed_with_its_children(tmp_path, patience):
    command = f"pipe:(sleep 1; touch {tmp_path}/late) & head -c 100000 /dev/zero; wait"
    with pytest.raises(ValueError, match="the cache limit is 4"):
        fetched(command, tmp_path / "cache", patience, allow_pipes=True, limit_bytes=4)
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("scheme", sorted(FILE_SYSTEMS))
def test_every_scheme_is_known_to_fsspec(scheme):
    assert scheme in known_implementations


@pytest.mark.parametrize("url", ["ais://b/x.tar", "scp://h/x.tar", "ftps://h/x.tar"])
def test_a_scheme_that_fsspec_does_not_know_is_refused_with_those_it_does(tmp_path, url):
    with pytest.raises(ValueError, match=f"has the scheme '{url[:3]}.*expected one of abfs, az"):
        resolve_url(url, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, site, patience):
    url = site.put("/x.tar", CONTENT)
    (tmp_path / "shards").write_text("a file stands here")
    with pytest.raises(ValueError, match=r"cache folder .*shards is not writable .*MMCL_CACHE"):
        fetched(url, tmp_path, patience)


def test_a_full_disk_is_told_before_and_while_a_shard_is_fetched(
    tmp_path, site, patience, monkeypatch
):
    url = site.put("/x.tar", CONTENT)
    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            ValueError, match=r"is full \(1,024,000 more bytes are needed, 1,000 are free\)"
        ):
            fetched(url, tmp_path, patience)

    def filled(address, file, *, reserve, **_):
        reserve(len(CONTENT), len(CONTENT))
        file.write(CONTENT[:HALF])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mmcl.data.remote.cache, "fetch", filled)
    with pytest.raises(ValueError, match=r"is full \(424,000 more bytes .*MMCL_CACHE"):
        fetched(url, tmp_path, patience)
    assert left(tmp_path) == []


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCL_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.delenv("MMCL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "mmcl"
