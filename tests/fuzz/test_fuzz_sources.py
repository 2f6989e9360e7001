"""InPlace files and addresses changed at random: our own errors, and nothing is fetched or run."""

import contextlib
import json
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.data.remote.location import resolve_url, sha256_of
from mmcl.data.shards.json_index import find_records, open_json_index
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.stored_sample import BadSample, BadShard, Sample
from tests.data.small_stream import picture
from tests.fuzz.mutation import CHANGES, PLACES, expect_shown, mutated

RECORDS = [
    {
        "id": f'{number}-ü\\"',
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat, [then]?"},
            {"from": "gpt", "value": "this {one}"},
        ],
    }
    for number in range(4)
]
WHOLE = json.dumps(RECORDS, ensure_ascii=False).encode()
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """A folder with images, and a JSON that points at them."""
    folder = tmp_path_factory.mktemp("loose")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(picture(1))
    return folder


def point(folder, name, data, **more):
    """Write records, and a pointer at them that believes them."""
    records = folder / name
    records.unlink(missing_ok=True)
    records.write_bytes(data)
    stated = {
        "format": "mmcl-loose/1", "records": name, "images": "pictures", "samples": 4,
        "bytes": len(data), "sha256": sha256_of(records), **more,
    }  # fmt: skip
    path = folder / "x.loose.json"
    path.write_text(json.dumps(stated))
    return path


def read_all(path, cache):
    """Read every sample; return how many could be."""
    shard, read = JsonShard(path, path.name, cache), 0
    try:
        count = len(shard)
    except BadShard as error:
        expect_shown(error)
        return 0
    assert len(shard.text_bytes("json")) == len(shard.key_hashes()) == count
    for place in range(count):
        shard.key(place).encode()
        try:
            assert isinstance(shard.read(place), Sample)
            read += 1
        except BadSample as error:
            expect_shown(error)
    return read


@pytest.mark.parametrize(("name", "data"), [("r.json", WHOLE), ("r.jsonl", LINES)])
def test_the_records_that_the_others_are_made_of_are_good_ones(loose, name, data):
    assert read_all(point(loose, name, data), None) == 4


@pytest.mark.slow
@settings(max_examples=300)
@given(changes=CHANGES, lines=st.booleans(), count=st.integers(1, 5))
def test_changed_records_are_read_or_refused(loose, changes, lines, count):
    name, data = ("r.jsonl", LINES) if lines else ("r.json", WHOLE)
    read_all(point(loose, name, mutated(data, changes), samples=count), None)


@settings(max_examples=200)
@given(changes=CHANGES, lines=st.booleans())
def test_records_that_are_found_are_those_of_the_parser(loose, changes, lines):
    path = loose / ("found.jsonl" if lines else "found.json")
    path.unlink(missing_ok=True)
    path.write_bytes(mutated(LINES if lines else WHOLE, changes))
    try:
        records = find_records(path)
    except ValueError as error:
        expect_shown(error, path.name)
        return
    own = []
    for place in range(len(records)):
        with contextlib.suppress(BadSample):
            own.append(records.read(place))
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(path.read_bytes().decode())
        assert not isinstance(whole, list) or lines or own == whole


@settings(max_examples=150)
@given(changes=CHANGES)
def test_a_changed_pointer_is_read_or_refused(loose, changes):
    path = point(loose, "r.json", WHOLE)
    path.write_bytes(mutated(path.read_bytes(), changes))
    read_all(path, None)


@settings(max_examples=100)
@given(changes=CHANGES)
def test_a_changed_index_of_records_is_the_same_or_is_rebuilt(loose, changes):
    path = loose / "indexed.json"
    if not path.exists():
        path.write_bytes(WHOLE)
    place = loose / "indexed.json.index.npz"
    place.unlink(missing_ok=True)
    expected = open_json_index(path, "answer", None)
    place.write_bytes(mutated(place.read_bytes(), changes))
    found = open_json_index(path, "answer", None)
    assert found.text_bytes.tolist() == expected.text_bytes.tolist()
    assert found.records.offset.tolist() == expected.records.offset.tolist()
    assert found.sha256 == expected.sha256


@settings(max_examples=150)
@given(changes=CHANGES, start=PLACES)
def test_a_changed_list_of_places_is_read_or_refused(loose, changes, start):
    path = point(loose, "r.json", WHOLE, samples=2, indices="indices.npy")
    np.save(loose / "indices.npy", np.array([1, 3]))
    whole = (loose / "indices.npy").read_bytes()
    (loose / "indices.npy").write_bytes(mutated(whole, changes))
    read_all(path, None)


URLS = st.lists(
    st.sampled_from(
        ["pipe:", "PIPE:", "file:", "file://", "http://", "https://", "hf://", "s3://", "sftp://",
         "ssh://", "ftp://", "local://", "memory://", "github://", "zip://", "::", "://", ":", "//",
         "/", "..", "~", "$(touch x)", "`touch x`", "; touch x", "|touch x", "&&", " ", "\n", "\0",
         "\r\nHost: x", "-o", "--output=x", "@", "?", "#", "[", "]", "[::1]", "a.tar", "x", "%00",
         "%0a", "%2e%2e", "localhost", "é", "\ud800", "user:pass@", ":99999", "loose.json"]
    ),
    min_size=1,
    max_size=6,
).map("".join)  # fmt: skip


@settings(max_examples=1000)
@given(url=st.one_of(URLS, st.text(max_size=20)))
def test_any_address_is_refused_or_an_origin_and_nothing_is_run(tmp_path_factory, url):
    folder = tmp_path_factory.getbasetemp()
    before = set(os.listdir(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("system", "popen"):
            patch.setattr(os, name, _never)
        patch.setattr(subprocess, "Popen", _never)
        try:
            origin = resolve_url(url, folder / "cache")
        except BadShard as error:
            expect_shown(error)
            return
        assert not url.lower().strip().startswith("pipe:")
        origin.url.encode("utf-8", "surrogatepass")
        if not origin.is_remote:
            with pytest.raises(BadShard):
                origin.path()
    assert set(os.listdir(folder)) == before


def _never(*given, **more):
    raise AssertionError(f"something was run: {given}")
