"""Content of shards: the same wherever it lies, another if the samples are."""

import shutil

import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.data import open_stream
from mmcl.data.shards.shard_content import content_change, path_digest, task_content
from mmcl.data.shards.stream_writer import write_shard
from tests.data.small_stream import labelled, picture, write_stream, write_tar
from tests.toys.http_server import serving

BIG = 400
"""Samples of a shard of which the hash of both ends sees a small part."""


def content_of(card, **options):
    """What is known of the first task's training shards."""
    stream = TaskStream.read(card)
    return task_content(open_stream(stream, **options), stream[0])["train"]


def big_members(size=2000):
    return [(f"s{n:04d}.{kind}", b) for n in range(BIG) for kind, b in sample(n, size)]


def sample(number, size):
    return ("cls", b"%d" % (number % 2)), ("png", bytes([number % 251]) * size)


@pytest.fixture
def card(tmp_path):
    (tmp_path / "stream").mkdir()
    write_stream(tmp_path / "stream", (6,))
    return tmp_path / "stream" / "small.yaml"


def test_a_moved_and_renamed_shard_is_the_same(card, tmp_path):
    before = content_of(card)
    assert before[0].keys() == {"name", "samples", "index", "blocks"}
    moved = tmp_path / "moved"
    shutil.copytree(card.parent, moved)
    (moved / "a-train.tar").rename(moved / "other.tar")
    (moved / "small.yaml").write_text(card.read_text().replace("a-train.tar", "other.tar"))
    assert content_change(before, content_of(moved / "small.yaml")) == ""


def test_a_shard_that_a_pattern_finds_later_is_a_change(card):
    write_tar(card.parent / "more-2.tar", labelled(3, name="more"))
    card.write_text(card.read_text().replace("a-train.tar", "'more-*.tar'"))
    before = content_of(card)
    assert [shard["name"] for shard in before] == ["more-2.tar"]
    write_tar(card.parent / "more-10.tar", labelled(2, name="last"))
    now = content_of(card)
    assert [shard["name"] for shard in now] == ["more-2.tar", "more-10.tar"]
    assert content_change(before, now) == "it has 2 shards, and had 1"


def test_a_shard_on_a_server_is_the_one_in_a_folder(card, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    before = content_of(card)
    with serving() as site:
        url = site.put("/x.tar", (card.parent / "a-train.tar").read_bytes())
        card.write_text(card.read_text().replace("a-train.tar", url))
        remote = content_of(card, cache_dir=tmp_path / "cache")
    assert remote[0].keys() == {"name", "samples", "index"}
    assert content_change(before, remote) == content_change(remote, before) == ""


def test_a_shard_that_is_not_opened_is_recognized_by_the_hash_on_the_card(card, tmp_path):
    raw = yaml.safe_load(card.read_text())
    raw["counts"] = {"http://127.0.0.1:1/a.tar": 6}
    raw["tasks"][0]["train"] = "http://127.0.0.1:1/a.tar"
    card.write_text(yaml.safe_dump(raw))
    plain = content_of(card, cache_dir=tmp_path)
    assert plain == [{"name": "http://127.0.0.1:1/a.tar", "samples": 6}]
    raw["hashes"] = {"http://127.0.0.1:1/a.tar": "ab" * 32}
    card.write_text(yaml.safe_dump(raw))
    hashed = content_of(card, cache_dir=tmp_path)
    renamed = [{**hashed[0], "name": "b.tar"}]
    assert content_change(hashed, renamed) == ""
    assert content_change(plain, hashed) == ""
    assert "cannot be recognized as http" in content_change(plain, renamed)
    assert "has other content than http" in content_change(
        hashed, [{**renamed[0], "sha256": "cd" * 32}]
    )


def changed(members, kind):
    """The same members with another label, image or key in the middle half, of equal length."""
    middle = range(BIG // 4 * 2, BIG // 4 * 6)  # two members for each sample
    found = list(members)
    for place in middle:
        name, content = found[place]
        if kind == "key":
            found[place] = (name.replace("s", "t", 1), content)
        elif name.endswith(kind):
            found[place] = (name, bytes([content[0] ^ 1]) * len(content))
    return found


@pytest.mark.parametrize("kind", ["cls", "png", "key"])
def test_a_change_within_a_shard_that_keeps_its_ends_and_lengths_is_noticed(card, kind):
    shard, members = card.parent / "a-train.tar", big_members()
    write_tar(shard, members)
    before = content_of(card)
    edge = 1 << 16
    first = shard.read_bytes()
    write_tar(shard, changed(members, kind))
    second = shard.read_bytes()
    assert (first[:edge], first[-edge:]) == (second[:edge], second[-edge:])
    assert first != second
    assert len(first) == len(second)
    assert "a-train.tar has other content than before" in content_change(before, content_of(card))


def test_more_shards_or_another_order_is_a_change(card):
    [content] = content_of(card)
    assert content_change([content], [content, content]) == "it has 2 shards, and had 1"
    write_tar(card.parent / "b.tar", labelled(6, name="b"))
    card.write_text(card.read_text().replace("a-train.tar", "[a-train.tar, b.tar]"))
    both = content_of(card)
    assert content_change(both, both) == ""
    assert "b.tar has other content than a-train.tar had" in content_change(both, both[::-1])


def test_the_digest_of_a_path_is_of_what_is_there(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "w.bin").write_bytes(bytes(100_000))
        (tmp_path / name / "c.json").write_text("{}")
    digest = path_digest(tmp_path / "one")
    assert len(digest) == 64
    assert digest == path_digest(tmp_path / "two")
    assert path_digest(tmp_path / "one" / "c.json") == path_digest(tmp_path / "two" / "c.json")
    (tmp_path / "two" / "c.json").rename(tmp_path / "two" / "d.json")
    assert path_digest(tmp_path / "two") != digest
    assert path_digest(tmp_path / "absent") == ""
    assert path_digest(tmp_path / ("x" * 5000)) == ""
    for number in range(1001):
        (tmp_path / "one" / f"{number}").touch()
    assert path_digest(tmp_path / "one") == ""


def test_written_shards_of_the_same_samples_have_the_same_content(card):
    samples = [{"__key__": f"k{n}", "cls": str(n % 2), "png": picture(n)} for n in range(6)]
    found = []
    for _ in range(2):
        write_shard(card.parent / "a-train.tar", samples)
        found.append(content_of(card))
    assert found[0] == found[1]
