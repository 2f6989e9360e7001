"""Shards, indexes and samples changed at random: our own errors, or samples."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.core import ProcessedSample, Task
from mmcl.data.batches.collate import collate, make_example
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.reader import Reader
from mmcl.data.shards.tar_scan import split
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadSample, BadShard
from tests.data.small_stream import dialogue, picture, write_tar
from tests.fuzz.mutation import CHANGES, PLACES, expect_shown, mutated

TASKS = (
    Task(0, "classes", task_type="classification", classes=("a", "b"), label_to_class=(0, 1)),
    Task(1, "captions", task_type="captioning"),
    Task(2, "questions", task_type="instruction", scorer="exact"),
)
MEMBERS = [
    ("d/a.png", picture(1)), ("d/a.cls", b"1"), ("d/a.txt", b"a b"),
    ("b.jpg", picture(2, "JPEG")), ("b.json", dialogue("<image>\nwhat?", "this")),
    ("x" * 120 + "/c.webp", picture(3, "WEBP")), ("x" * 120 + "/c.txt", "schön".encode()),
]  # fmt: skip


def stand_in(pixels, text, seed):
    """A transform that takes what there is as it is."""
    ids = [] if text is None else list(text.encode()) if isinstance(text, str) else [1]
    tokens = torch.tensor(ids, dtype=torch.int64)
    return ProcessedSample(pixels, tokens, tokens.clone() if text is not None else None)


def read_all(path, cache=None):
    """Open, count, name and read every sample; return how many examples were made."""
    shard = TarShard(LocalFile(path), path.name, cache)
    try:
        reader = Reader([shard])
        shard.key_hashes()
    except BadShard as error:
        expect_shown(error)
        return 0
    made = 0
    for number in range(len(reader)):
        for task in TASKS:
            try:
                sample = reader.read(number)
                row = make_example(sample, number, task, stand_in, seed=0, max_pixels=10_000)
            except BadSample as error:
                expect_shown(error)
                continue
            assert collate([row]).keys == (sample.key,)
            made += 1
        reader.describe(number).encode()
    return made


def with_true_sums(data):
    """Let every block that could be a header have the checksum that belongs to it."""
    data = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        block = data[start : start + 512]
        if block[257:262] == b"ustar" or block[148:154].strip(b" 01234567") == b"":
            block[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(data)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The same samples in every format of tars."""
    path = tmp_path_factory.mktemp("whole") / "x.tar"
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return [write_tar(path, MEMBERS, format).read_bytes()[: 22 * 512] for format in formats]


def test_the_shards_that_the_others_are_made_of_are_good_ones(tmp_path, wholes):
    for number, data in enumerate(wholes):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        assert read_all(path) == 4


@pytest.mark.slow
@settings(max_examples=1200)
@given(format=st.integers(0, 2), changes=CHANGES, sums=st.booleans())
def test_a_changed_shard_is_read_or_refused(tmp_path_factory, wholes, format, changes, sums):
    data = mutated(wholes[format], changes)
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    path.unlink(missing_ok=True)
    path.write_bytes(with_true_sums(data) if sums else data)
    read_all(path)


FIELDS = {"name": (0, 100), "size": (124, 136), "kind": (156, 157), "link": (157, 257),
          "magic": (257, 265), "prefix": (345, 500)}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=1200)
@given(
    format=st.integers(0, 2),
    header=PLACES,
    field=st.sampled_from(sorted(FIELDS)),
    value=st.one_of(
        st.binary(min_size=1, max_size=12),
        st.integers(-(1 << 62), 1 << 62).map(lambda n: (n & ((1 << 95) - 1)).to_bytes(12, "big")),
        st.integers(0, (1 << 33) - 1).map(lambda n: b"%011o\0" % n),
        st.sampled_from([b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5", b"7", b"\0", b"\x80"]),
    ),
)
def test_headers_that_add_up_are_believed_no_further(
    tmp_path_factory, wholes, format, header, field, value
):
    data = bytearray(wholes[format])
    start = header % (len(data) // 512) * 512 + FIELDS[field][0]
    value = value[: FIELDS[field][1] - FIELDS[field][0]]
    data[start : start + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "header.tar"
    path.unlink(missing_ok=True)
    path.write_bytes(with_true_sums(data))
    read_all(path)


@pytest.mark.slow
@settings(max_examples=200)
@given(changes=CHANGES)
def test_a_changed_index_says_what_a_scan_says_or_is_rebuilt(tmp_path_factory, wholes, changes):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "indexed.tar"
    if not path.exists():
        path.write_bytes(wholes[0])
    place = folder / "indexed.tar.index"
    place.unlink(missing_ok=True)
    expected = contents(TarShard(LocalFile(path), "x.tar", folder))
    whole = place.read_bytes()
    place.write_bytes(mutated(whole, changes))
    assert contents(TarShard(LocalFile(path), "x.tar", folder)) == expected
    assert place.read_bytes() == whole


def contents(shard):
    index = shard.index
    own = [list(index.members(place)) for place in range(len(index))]
    return own, shard.key_hashes().tolist(), [shard.key(place) for place in range(len(index))]


@settings(max_examples=600)
@given(name=st.one_of(st.binary(max_size=60), st.text(max_size=30).map(lambda t: t.encode())))
def test_any_name_has_a_key_and_an_extension_or_none(name):
    key, extension = split(name)
    assert bool(key) == bool(extension) or not extension
    assert name.lower().startswith(key.lower())
    key.decode("utf-8", "backslashreplace").encode()
    assert "." in extension or "/" not in extension


LIMITED = """
import resource, sys
from pathlib import Path
from mmcl.data.stored_sample import BadShard
from tests.fuzz.test_fuzz_reader import read_all
import torch
read_all(Path(sys.argv[1]) / "good.tar")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
for path in sorted(Path(sys.argv[1]).glob("*.tar")):
    read_all(path)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its memory")
def test_no_header_asks_for_memory_that_the_file_does_not_hold(tmp_path, wholes):
    (tmp_path / "good.tar").write_bytes(wholes[0])
    sizes = (b"77777777777\0", b"\x80" + (1 << 62).to_bytes(11, "big"), b"17777777777\0")
    for number in range(len(wholes[0]) // 512):
        for kind in (b"0", b"L", b"x"):
            data = bytearray(wholes[0])
            data[number * 512 + 124 : number * 512 + 136] = sizes[number % 3]
            data[number * 512 + 156 : number * 512 + 157] = kind
            name = f"{number:02d}{kind.decode()}.tar"
            (tmp_path / name).write_bytes(with_true_sums(data))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
