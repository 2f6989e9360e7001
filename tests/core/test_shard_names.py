"""Names of shards on a card: braces, joined lists, patterns of files, and what is refused."""

import itertools

import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.core.card import expand


@pytest.fixture
def folder(tmp_path):
    """Folder with shards of several names, and files beside them that are none."""
    names = (
        "shards/train-1.tar", "shards/train-2.tar", "shards/train-10.tar", "shards/val-1.tar",
        "shards/train-1.tar.index", "shards/deep/x.tar", "shards/q.loose.json", "shards/README.md",
        "test.tar", "packed/a.tar.gz", "a[1].tar",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def shards(folder, train):
    task = {"name": "one", "train": train, "test": "test.tar"}
    card = {"name": "s", "scenario": "domain", "task_type": "captioning", "tasks": [task]}
    (folder / "s.yaml").write_text(yaml.safe_dump(card))
    return list(TaskStream.read(folder / "s.yaml")[0].train)


TRAIN = ["shards/train-1.tar", "shards/train-2.tar", "shards/train-10.tar"]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("shards/train-*.tar", TRAIN),
        ("shards/train-?.tar", TRAIN[:2]),
        ("shards/train-[12].tar", TRAIN[:2]),
        ("shards/t*", TRAIN),
        ("shards/*", ["shards/q.loose.json", *TRAIN, "shards/val-1.tar"]),
        ("./shards/train-*.tar", [f"./{name}" for name in TRAIN]),
        ("shards/**/x.tar", ["shards/deep/x.tar"]),
        ("**/x.tar", ["shards/deep/x.tar"]),
        ("shards/{train-*,val-1}.tar", [*TRAIN, "shards/val-1.tar"]),
        ("shards/{train,val}-1.tar", ["shards/train-1.tar", "shards/val-1.tar"]),
        ("shards/train-{1,2}.tar::shards/deep/x.tar", [*TRAIN[:2], "shards/deep/x.tar"]),
        ("a[1].tar", ["a[1].tar"]),
        ("http://[::1]:80/a.tar?x=*", None),
        ("http://[::1]:80/{0..1}.tar", ["http://[::1]:80/0.tar", "http://[::1]:80/1.tar"]),
        ("s3://b/0.tar::s3://b/1.tar", ["s3://b/0.tar", "s3://b/1.tar"]),
        ("https://h/a.tar?name=[b]", ["https://h/a.tar?name=[b]"]),
        ("pipe:cut -d{a,b} $F | cat * :: x", ["pipe:cut -d{a,b} $F | cat * :: x"]),
        ("pipe:cat {0..1}.tar", ["pipe:cat 0.tar", "pipe:cat 1.tar"]),
    ],
)
def test_names_of_shards_are_found_in_natural_order(folder, train, expected):
    if expected is None:
        with pytest.raises(ValueError, match="is a pattern of addresses"):
            shards(folder, train)
    else:
        assert shards(folder, train) == expected


def test_absolute_patterns_and_those_of_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "shards"))
    deep = str(folder / "shards" / "deep" / "x.tar")
    assert shards(folder, str(folder / "shards" / "deep" / "*.tar")) == [deep]
    assert shards(folder, "~/deep/*.tar") == [deep]
    assert shards(folder, ["~/deep/x.tar", str(folder / "a[1].tar")])[0] == "~/deep/x.tar"
    assert TaskStream.read(folder / "s.yaml").shard("~/deep/x.tar") == deep


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("none/*.tar", ["'none/*.tar' finds no shard", "there is no folder"]),
        ("packed/*.tar", ["finds no shard", "packed' has 'a.tar.gz', and a shard is a .tar"]),
        ("packed/*", ["finds no shard", "it matches 'packed/a.tar.gz', and a shard is a .tar"]),
        ("shards", ["'shards' is a folder: write 'shards/*.tar'"]),
        ("s3://b/*.tar", ["'s3://b/*.tar' is a pattern of addresses", "write {000..099}"]),
        ("$DATA/a.tar", ["holds the environment variable $DATA", "write the path out"]),
        ("http://h/${KEY}.tar", ["holds the environment variable ${KEY}"]),
        ("**/**/x.tar", ["has ** more than once"]),
        ("{a,a}.tar", ["'{a,a}.tar' names a shard twice"]),
        (["shards/train-*.tar", "shards/train-2.tar"], ["['shards/train-2.tar'] twice"]),
        ("*.tar", ["tests on shards it trains on: ['test.tar']"]),
        ("[" * 3000, ["finds no shard"]),
    ],
)
def test_a_name_that_finds_nothing_says_what_to_write(folder, train, words):
    with pytest.raises(ValueError, match=r"s\.yaml has 1 error") as caught:
        shards(folder, train)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_braces_are_those_of_bash():
    # What bash 5 prints for `echo <name>`.
    assert expand("{{0..2},{7..8}}-{a,b{x,y}}") == [
        f"{number}-{letters}" for number in (0, 1, 2, 7, 8) for letters in ("a", "bx", "by")
    ]
    assert expand("{01..07..3}{x..z}") == [
        f"{number}{letter}" for number, letter in itertools.product(("01", "04", "07"), "xyz")
    ]
    for plain in ("{a}", "{}", "a{b", "a}b", "{a..3}", "{" * 5000, "}" * 5000, "{}" * 5000):
        assert expand(plain) == [plain]
    assert expand("{,x}") == ["", "x"]
