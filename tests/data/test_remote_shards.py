"""Remote shards, without a network: what opens a url is replaced."""

import io

import pytest

import mmcl.data.source
from mmcl.data.source import default_cache, local_shard

URL = "https://example.org/a/../train%20000.tar?key=1"


class Stream(io.BytesIO):
    """Like webdataset's: it learns only at its end that the command failed."""

    fault = None

    def __exit__(self, *what):
        if self.fault is not None:
            raise OSError(self.fault)


def remote(monkeypatch, content=b"content", fault=None):
    """Serve one content for every url and count how often it is asked for."""
    asked = []

    def gopen(url, mode):
        asked.append(url)
        stream = Stream(content)
        stream.fault = fault
        return stream

    monkeypatch.setattr(mmcl.data.source, "gopen", gopen)
    return asked


def test_a_remote_shard_is_fetched_once(tmp_path, monkeypatch):
    asked = remote(monkeypatch)
    first = local_shard(URL, tmp_path)
    assert local_shard(URL, tmp_path) == first
    assert asked == [URL]
    assert first.read_bytes() == b"content"
    assert first.parent == tmp_path / "shards"


def test_two_urls_of_one_file_name_do_not_meet(tmp_path, monkeypatch):
    remote(monkeypatch)
    assert local_shard(URL, tmp_path) != local_shard("https://other.org/train%20000.tar", tmp_path)


def test_a_fetch_that_fails_half_way_leaves_nothing_and_tells_no_secret(tmp_path, monkeypatch):
    remote(monkeypatch, fault="['curl', '-H', 'Authorization:Bearer hf_secret']: exit 22 (read)")
    with pytest.raises(ValueError, match="ended with status 22") as caught:
        local_shard(URL, tmp_path)
    assert "secret" not in str(caught.value)
    assert not list((tmp_path / "shards").glob("*.tar*tmp"))
    remote(monkeypatch)
    assert local_shard(URL, tmp_path).read_bytes() == b"content"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    remote(monkeypatch)
    (tmp_path / "shards").write_text("a file stands here")
    with pytest.raises(ValueError, match="give cache=<a folder|could not be fetched"):
        local_shard(URL, tmp_path)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MMCL_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.delenv("MMCL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "mmcl"
