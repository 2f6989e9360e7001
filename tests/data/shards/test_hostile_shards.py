"""Each test carries an attack and shows that it does nothing."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import random
import tarfile
from dataclasses import replace

import pytest

import mmcl.data.shards.tar
from mmcl.data import eval_loader, open_stream, train_loader
from mmcl.data.remote.location import LocalFile, resolve_url
from mmcl.data.shards.tar import MAX_EXTENDED_BYTES
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, BadShard
from tests.data.small_stream import CutAndNoise, labelled, picture, write_stream, write_tar


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def opened(path):
    """A shard, indexed."""
    shard = TarShard(LocalFile(path), path.name, cache=None)
    assert len(shard) == len(shard.index)
    return shard


def info(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_a_pickle_in_a_shard_is_never_decoded(tmp_path):
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    members = labelled(4)
    for extension in ("pyd", "pkl", "pth", "pickle", "pt", "npy", "ten", "PYD"):
        members.insert(1, (f"s000.{extension}", trap))
    members += [("lonely.pkl", trap), ("s004.png", trap), ("s004.cls", b"0")]
    stream = write_stream(tmp_path, sizes=(4,), a_train=members, a_test=members)
    prepared = open_stream(stream)
    assert set(prepared.reader(0, "train").read(0).members) == {"png", "cls"}
    assert set(opened(tmp_path / "a-train.tar").read(0).members) == {"png", "cls", "txt", "de.txt"}
    assert prepared.stream[0].size == 5
    list(train_loader(prepared, 0, CutAndNoise(), replay_plan=None, global_batch_size=2, seed=0))
    list(eval_loader(prepared, 0, CutAndNoise(), batch=2))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("url", ["pipe:mkdir {}", "PIPE:mkdir {} ://", " pipe:mkdir {} ://"])
def test_a_pipe_url_is_refused_and_not_run(tmp_path, url):
    stream = write_stream(tmp_path, sizes=(4,))
    command = url.format(tmp_path / "sprung")
    card = (tmp_path / "small.yaml").read_text().replace("a-train.tar", f"'{command}'")
    (tmp_path / "small.yaml").write_text(card)
    stream = type(stream).read(tmp_path / "small.yaml")
    with pytest.raises(ValueError, match=r"task 'task-a': shard .*allow_pipes=True"):
        open_stream(stream, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "sprung").exists()


def test_a_pipe_url_runs_where_its_user_allows_it(tmp_path):
    stream = write_stream(tmp_path, sizes=(4,))
    task = stream.tasks[0]
    object.__setattr__(task, "train", (f"pipe:cat {tmp_path / 'a-train.tar'}",))
    with pytest.raises(ValueError, match="allow_pipes=True if you trust it"):
        open_stream(stream, cache_dir=tmp_path / "cache")
    prepared = open_stream(stream, cache_dir=tmp_path / "cache", allow_pipes=True)
    assert prepared.reader(0, "train").read(3).key == "atrain003"
    object.__setattr__(task, "train", ("pipe:cat /does/not/exist",))
    with pytest.raises(ValueError, match="could not be fetched"):
        open_stream(stream, cache_dir=tmp_path / "cache", allow_pipes=True)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


@pytest.mark.parametrize("url", ["gopher://x/y.tar", "ldap://x", "-oProxyCommand=x://y"])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match="has the scheme"):
        resolve_url(url, tmp_path)


def test_file_urls_are_plain_paths(tmp_path):
    path = write_tar(tmp_path / "a b.tar", labelled(2))
    assert resolve_url(f"file://{str(path).replace(' ', '%20')}", tmp_path).path() == path


def test_absolute_and_climbing_names_and_links_are_harmless(tmp_path):
    before = sorted(tmp_path.parent.iterdir())
    members = [
        ("/abs/s000.png", picture()),
        ("/abs/s000.cls", b"0"),
        ("../../../climb.png", picture()),
        ("../../../climb.cls", b"1"),
        (info("s002.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (info("s002.txt", tarfile.LNKTYPE, "../../../etc/passwd"), b""),
        (info("s003.png", tarfile.CHRTYPE), b""),
        (info("s004.png", tarfile.FIFOTYPE), b""),
        (info("dir.png", tarfile.DIRTYPE), b""),
        ("s005.cls", b"1"),
    ]
    stream = write_stream(tmp_path, sizes=(4,), a_train=members)
    open_stream(stream)
    shard = opened(tmp_path / "a-train.tar")
    found = {shard.read(n).key: set(shard.read(n).members) for n in range(len(shard))}
    assert found == {
        "/abs/s000": {"png", "cls"},
        "../../../climb": {"png", "cls"},
        "s005": {"cls"},
    }
    assert sorted(tmp_path.parent.iterdir()) == before


def test_a_zero_byte_member_is_a_bad_sample(tmp_path):
    members = [*labelled(4), ("e.png", b""), ("e.cls", b"0"), ("f.png", picture()), ("f.cls", b"")]
    stream = write_stream(tmp_path, sizes=(4,), a_test=members)
    (batch,) = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8)
    assert len(batch) == 4
    assert batch.errors == (
        "e in a-test.tar: its image is empty (0 bytes)",
        "f in a-test.tar: its label is b'', expected a whole number or one of the card's classes",
    )


def test_two_members_of_one_name_are_a_repeated_key(tmp_path):
    members = [("a.png", picture(1)), ("a.cls", b"0"), ("a.png", picture(2)), ("a.cls", b"1")]
    stream = write_stream(tmp_path, sizes=(4,), a_train=members)
    with pytest.raises(ValueError, match=r"key 'a' comes twice, in a-train.tar and in a-train.tar"):
        open_stream(stream)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_are_not_utf8_are_read_and_written_in_hex(tmp_path, format):
    name = b"caf\xe9/\xff".decode("utf-8", "surrogateescape")
    path = write_tar(
        tmp_path / "x.tar", [(f"{name}.png", picture()), (f"{name}.cls", b"0")], format
    )
    index = opened(path)
    assert len(index) == 1
    key = index.key(0)
    assert key == "caf\\xe9/\\xff"
    key.encode()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path, format):
    name = "d/" * 200 + "schön" * 30
    path = write_tar(tmp_path / "x.tar", [(f"{name}.png", b"1"), (f"{name}.de.txt", b"22")], format)
    reader = opened(path)
    assert reader.read(0).key == name
    assert reader.read(0).members == {"png": b"1", "de.txt": b"22"}


def test_files_without_a_key_or_inside_meta_folders_are_no_samples(tmp_path):
    names = [".hidden.png", "noextension", "__meta__/a.png", "d.x/noextension", "ok.png"]
    path = write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    index = opened(path)
    assert [index.key(n) for n in range(len(index))] == ["ok"]


def header(name, kind, size):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_huge_extended_header_is_not_read_into_memory(tmp_path):
    path = tmp_path / "x.tar"
    size = MAX_EXTENDED_BYTES + 1
    path.write_bytes(header("x", tarfile.GNUTYPE_LONGNAME, size) + bytes(2 << 20))
    with pytest.raises(ValueError, match=f"extended header of {size} bytes"):
        opened(path)


def test_a_long_chain_of_extended_headers_does_not_recurse(tmp_path):
    chain = (header("x", tarfile.GNUTYPE_LONGNAME, 5) + b"a.png".ljust(512, b"\0")) * 5000
    path = tmp_path / "x.tar"
    path.write_bytes(chain + header("y.png", tarfile.REGTYPE, 0) + bytes(1024))
    assert opened(path).key(0) == "a"


@pytest.mark.parametrize("size", [-512, -1, 513, 10_000_000_000, 1 << 60])
def test_a_member_of_impossible_size_ends_the_scan(tmp_path, size):
    path = tmp_path / "x.tar"
    path.write_bytes(header("x.png", tarfile.REGTYPE, size) + bytes(512))
    with pytest.raises(ValueError, match=r"negative member at byte 0|byte 0 needs \d+ bytes"):
        opened(path)


@pytest.mark.parametrize(
    "records", [b"999 path=a\n", b"x path=a\n", b"0 path=a\n", b"12 size=-1x\n"]
)
def test_damaged_pax_records_end_the_scan(tmp_path, records):
    path = tmp_path / "x.tar"
    start = header("x", tarfile.XHDTYPE, len(records)) + records.ljust(512, b"\0")
    path.write_bytes(start + header("y.png", tarfile.REGTYPE, 0) + bytes(1024))
    with pytest.raises(ValueError, match="damaged extended header at byte 0"):
        opened(path)


def test_an_oversized_text_member_is_a_bad_sample(tmp_path):
    members = [*labelled(2), ("big.png", picture()), ("big.cls", b"0" * (MAX_TEXT_BYTES + 1))]
    stream = write_stream(tmp_path, sizes=(4,), a_test=members)
    (batch,) = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8)
    assert batch.errors == ("big in a-test.tar: its .cls has 1048577 bytes, more than 1048576",)


def test_a_bomb_in_a_shard_is_a_bad_sample(tmp_path):
    file = io.BytesIO(picture())
    data = bytearray(file.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    members = [*labelled(2), ("bomb.png", bytes(data)), ("bomb.cls", b"0")]
    stream = write_stream(tmp_path, sizes=(4,), a_test=members)
    (batch,) = eval_loader(open_stream(stream), 0, CutAndNoise(), batch=8)
    assert "bomb in a-test.tar: its image is 100000 x 100000, more than" in batch.errors[0]


@pytest.mark.parametrize(
    ("pack", "method"),
    [
        (gzip.compress, "gzip"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda data: b"(\xb5/\xfd" + data, "zstd"),
    ],
)
def test_a_compressed_tar_is_told_how_to_be_unpacked(tmp_path, pack, method):
    path = write_tar(tmp_path / "x.tar", labelled(2))
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(BadShard, match=f"is compressed with {method}: unpack it to a plain .tar"):
        opened(path)


@pytest.mark.parametrize("gap", [0, 512, 10_240])
def test_joined_tars_are_refused_not_read_in_half(tmp_path, gap):
    first = write_tar(tmp_path / "a.tar", labelled(2)).read_bytes()
    second = write_tar(tmp_path / "b.tar", labelled(2, start=2)).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(first + bytes(gap) + second)
    with pytest.raises(BadShard, match="continues after its end mark"):
        opened(path)


def test_sparse_members_of_either_kind_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(header("x.png", tarfile.GNUTYPE_SPARSE, 0) + bytes(1024))
    with pytest.raises(BadShard, match="sparse or negative member at byte 0"):
        opened(path)
    for keyword in (b"GNU.sparse.major=1", b"GNU.sparse.map=0,1", b"GNU.sparse.realsize=9"):
        record = b"%d %s\n" % (len(keyword) + 4, keyword)
        start = header("x", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
        path.write_bytes(start + header("x.png", tarfile.REGTYPE, 0) + bytes(1024))
        with pytest.raises(BadShard, match="holds a sparse member at byte 0"):
            opened(path)


def test_a_size_in_a_pax_header_counts_for_one_member_alone(tmp_path):
    record = b"10 size=3\n"
    start = header("x", tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")
    pair = header("a.txt", tarfile.REGTYPE, 0) + b"abc".ljust(512, b"\0")
    last = header("b.txt", tarfile.REGTYPE, 2) + b"de".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(start + pair + last + bytes(1024))
    shard = opened(path)
    assert [shard.read(place).members["txt"] for place in range(2)] == [b"abc", b"de"]


def test_a_name_with_newlines_and_controls_is_one_line_of_a_message(tmp_path):
    name = "two\nlines\x1b[2J"
    members = [*labelled(4), (f"{name}.png", b""), (f"{name}.cls", b"0")]
    stream = write_stream(tmp_path, sizes=(4,), a_test=members)
    prepared = open_stream(stream)
    (batch,) = eval_loader(prepared, 0, CutAndNoise(), batch=8)
    error = "two\\nlines\\x1b[2J in a-test.tar: its image is empty (0 bytes)"
    assert batch.errors == (error,)
    assert prepared.reader(0, "test").key(4) == name


def test_no_flipped_byte_of_a_header_changes_what_is_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"one"), ("a.png", b"two"), ("b.txt", b"x")])
    whole, shard = path.read_bytes(), opened(path)
    expected = [shard.read(place) for place in range(2)]
    refused = []
    for number in range(1024, 1536):
        data = bytearray(whole)
        data[number] ^= 1 << number % 8
        # Each under its own name: some file systems flush a file that is cut off and written anew.
        other = tmp_path / f"{number}.tar"
        other.write_bytes(data)
        try:
            again = opened(other)
        except BadShard as error:
            refused.append(str(error))
        else:
            found = [replace(again.read(place), shard="x.tar") for place in range(2)]
            assert found == expected
    assert len(refused) >= 510
    assert all("is damaged: there is no tar header at byte 1024" in error for error in refused)


def test_plain_headers_are_read_as_tarfile_reads_them():
    draw = random.Random(0)
    kinds = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, b"Z", b"\0"]
    plain = 0
    for _ in range(2000):
        name = draw.choice(["a.png", "d/" * 40 + "a.txt", "x" * 100, "d/", "", "n\n.txt"])
        block = bytearray(header(name, draw.choice(kinds), draw.choice([0, 1, 513, 1 << 30])))
        for _ in range(draw.choice([0, 0, 1, 3])):
            place = draw.choice([*range(100, 160), 0, 5, 99, 257, 345, 400, 511])
            block[place] = draw.choice([0, 32, 45, 48, 55, 56, 95, 128, 255])
        if draw.random() < 0.9:
            block[148:156] = b" " * 8
            block[148:155] = b"%06o\0" % sum(block)
        found = mmcl.data.shards.tar.plain_header(bytes(block))
        if found is None:
            continue
        plain += 1
        try:
            theirs = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            # One of the numbers that are not needed, such as the owner's, is none.
            assert block[100:124] + block[136:148] != header(name, found.kind, 0)[100:124]
            continue
        own = theirs.name.encode("utf-8", "surrogateescape")
        assert (found.name.rstrip(b"/"), found.kind, found.size) == (
            own.rstrip(b"/"), theirs.type, theirs.size
        )  # fmt: skip
    assert plain > 500


def test_the_checksum_of_a_header_is_the_sum_of_its_bytes():
    draw = random.Random(0)
    blocks = [b"\xff" * 256, bytes(256), b"", *(draw.randbytes(256) for _ in range(200))]
    for block in blocks:
        total = 0
        for byte in block:
            total += byte
        assert mmcl.data.shards.tar._sum_of(block) == total
    # The largest sums that a header can have, in a name that is read all the same.
    block = bytearray(header("a", tarfile.REGTYPE, 7))
    block[:100], block[157:257], block[265:345] = b"\xff" * 100, b"\xff" * 100, b"\xff" * 80
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    assert mmcl.data.shards.tar.plain_header(bytes(block)) == (b"\xff" * 100, tarfile.REGTYPE, 7)
    for place in (0, 200, 300):
        for change in (254, 0):
            other = bytearray(block)
            other[place] = change
            assert mmcl.data.shards.tar.plain_header(bytes(other)) is None


def damaged(whole, draw):
    """A tar with one change: a bit, a block, a cut, a repeated block, or a header that adds up."""
    data, start = bytearray(whole), draw.randrange(len(whole))
    block = slice(start // 512 * 512, start // 512 * 512 + 512)
    change = draw.choice(["flip", "zero", "cut", "copy", "sum"])
    if change == "flip":
        data[start] ^= 1 << draw.randrange(8)
    elif change == "zero":
        data[block] = bytes(len(data[block]))
    elif change == "cut":
        del data[start : start + draw.choice([1, 512, 1024])]
    elif change == "copy":
        data[start:start] = data[block]
    elif len(data[block]) == 512:
        data[block.start + start % 148] = draw.randrange(256)
        data[block.start + 148 : block.start + 156] = b" " * 8
        data[block.start + 148 : block.start + 155] = b"%06o\0" % sum(data[block])
    return data or bytearray(1)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_damaged_at_random_is_refused_or_read_but_never_a_crash(tmp_path, format):
    draw = random.Random(1)
    members = [("d/" * 80 + "é.txt", b"x"), ("a.png", b"y" * 600), ("a.cls", b"1"), ("b.txt", b"")]
    whole = write_tar(tmp_path / "x.tar", members, format).read_bytes()[: 13 * 512]
    read, refused = 0, 0
    for number in range(300):
        data = whole
        for _ in range(draw.randint(1, 4)):
            data = damaged(data, draw)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        try:
            shard = opened(path)
        except BadShard:
            refused += 1
            continue
        for place in range(len(shard)):
            with contextlib.suppress(BadSample):
                assert shard.read(place).key == shard.key(place)
                read += 1
    assert read > 30
    assert refused > 100
