"""Addresses from strangers: none of them is a command, or an option of one."""

import os
import subprocess
from pathlib import Path

import pytest

import mmcl.data.remote.download
from mmcl.core import TaskStream
from mmcl.data import open_stream
from mmcl.data.remote.fetch import RetryPolicy
from mmcl.data.remote.location import resolve_url
from mmcl.data.stored_sample import BadShard
from tests.data.small_stream import labelled, write_stream, write_tar
from tests.toys.http_server import serving

ONCE = RetryPolicy(attempts=1, stall_seconds=5.0, jitter=0.0, sleep=lambda seconds: None)


@pytest.fixture
def sprung(tmp_path, monkeypatch):
    """What a command would make; every test ends with a look at it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "sprung"
    assert not [path for path in tmp_path.rglob("*") if path.name == "sprung"]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Every way to a process is closed."""

    def never(*given, **more):
        raise AssertionError(f"something was run: {given}")

    for name in ("system", "popen", "posix_spawn", "execv", "fork"):
        monkeypatch.setattr(os, name, never, raising=False)
    monkeypatch.setattr(subprocess, "Popen", never)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:mkdir sprung", "PIPE:mkdir sprung", "Pipe:mkdir sprung", " pipe:mkdir sprung",
        "\tpipe:mkdir sprung", "pipe://mkdir sprung", "pipe:mkdir sprung ://", "pi\npe:mkdir x",
        "file:pipe:mkdir sprung", "file://pipe:mkdir sprung", "file:///pipe:mkdir sprung",
        "pipe%3Amkdir sprung", "https:pipe:mkdir sprung", "|mkdir sprung", "mkdir sprung|",
        "$(mkdir sprung).tar", "`mkdir sprung`.tar", "a.tar; mkdir sprung", "a.tar && mkdir sprung",
        "-x", "--help", "-oProxyCommand=mkdir sprung", "a.tar\nmkdir sprung", "a\0.tar", "",
        "exec:mkdir sprung", "python:os.mkdir('sprung')", "local://mkdir sprung", "a::pipe:x",
        "!mkdir sprung", "~/sprung", "$HOME/none.tar", "%(x)s", "{0.__class__}",
    ],
)  # fmt: skip
def test_no_spelling_of_a_command_is_run(tmp_path, sprung, nothing_runs, url):
    with pytest.raises(BadShard):
        resolve_url(url, tmp_path / "cache", patience=ONCE).path()


@pytest.mark.parametrize("name", ["PIPE:mkdir sprung", "$(mkdir sprung).tar", "-x; mkdir sprung"])
def test_no_shard_of_a_card_is_a_command_and_each_is_named(tmp_path, sprung, name):
    write_stream(tmp_path, sizes=(4,))
    card = tmp_path / "small.yaml"
    card.write_text(card.read_text().replace("a-train.tar", f"'{name}'"))
    with pytest.raises(ValueError, match="task 'task-a': shard ") as caught:
        open_stream(TaskStream.read(card), cache_dir=tmp_path / "cache")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["$(touch sprung).tar", "-rf.tar", "a b;touch sprung|.tar", "#.tar"]
)
def test_a_file_of_a_strange_name_is_read_all_the_same(tmp_path, sprung, name):
    write_stream(tmp_path, sizes=(4,))
    write_tar(tmp_path / name.replace("touch sprung", "touch x"), labelled(4))
    card = tmp_path / "small.yaml"
    name = name.replace("touch sprung", "touch x")
    card.write_text(card.read_text().replace("a-train.tar", f"'{name}'"))
    assert len(open_stream(TaskStream.read(card)).reader(0, "train")) == 4


@pytest.mark.parametrize("tail", ["|mkdir sprung", ";mkdir sprung", "$(mkdir sprung)", " x"])
@pytest.mark.parametrize("start", ["http://127.0.0.1:9/x", "https://127.0.0.1:9/x", "hf://d/x"])
def test_what_follows_an_address_is_part_of_it(
    tmp_path, sprung, nothing_runs, monkeypatch, start, tail
):
    def closed(address, *given):
        raise BadShard(f"was asked for as {address}")
        yield

    monkeypatch.setattr(mmcl.data.remote.download, "_read_file", closed)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(BadShard, match="could not be fetched|was asked for as hf://d/x.* ?x?"):
        resolve_url(start + tail, tmp_path / "cache", patience=ONCE).path()


@pytest.mark.parametrize("mark", ["\n", "\r\n", "\0", "\x1b", "\t", "\u2028", "\ud800", "\x7f"])
@pytest.mark.parametrize("start", ["http://h/x", "https://h/", "s3://b/", "sftp://h/", "hf://d/"])
def test_an_address_of_more_than_one_line_is_refused(tmp_path, nothing_runs, start, mark):
    with pytest.raises(BadShard, match="control characters|makes no sense|has the scheme"):
        resolve_url(f"{start}{mark}Host: elsewhere", tmp_path)


def test_no_address_adds_a_line_to_what_is_asked_of_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as site:
        for tail in ("/a%0d%0aX-Own:%201", "/a b", "/é", '/"><x>', "/..%2f..%2fetc", "/a?b=%0a c"):
            with pytest.raises(BadShard, match="is not at its address|could not be fetched"):
                resolve_url(site.url(tail), tmp_path, patience=ONCE).path()
        assert len(site.asked) == 6
        assert all("X-Own" not in headers for _, headers in site.asked)
        assert all(path.isascii() and " " not in path for path, _ in site.asked)


def test_a_copy_lies_in_the_cache_whatever_its_address_climbs_to(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as site:
        for path in ("/../../../climb.tar", "/%2e%2e%2fclimb.tar", "/..", "/a/..%00.tar"):
            site.put(path, b"content")
            found = resolve_url(site.url(path), tmp_path / "cache", patience=ONCE).path()
            assert found.parent == tmp_path / "cache" / "shards"
    outside = [path for path in tmp_path.rglob("*climb*") if path.parent.name != "shards"]
    assert not outside
    assert not list(Path(tmp_path.parent).glob("climb*"))
