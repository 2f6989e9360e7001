"""Splits of an input: their names, and that validation samples are never learned from."""

import json

import pytest

from mmcl.data.convert.convert import open_input
from mmcl.data.convert.record import split_of
from tests.data.convert.llava_files import asked, jpeg, put
from tests.data.convert.test_columns import made, table
from tests.data.convert.test_convert import parquet, pictures, read

COUNTS = {"train": 6, "validation": 3, "test": 2}
FIRST = {"train": 0, "validation": 20, "test": 40}


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train", "Training", "RESTVAL", " train "], "train"),
        (["val", "valid", "VALIDATION", "Dev"], "validation"),
        (["test", "Testing", "TEST"], "test"),
        (["", "extra", "test2015", "train_small", "eval", "0"], None),
    ],
)
def test_a_split_is_known_by_its_usual_names_in_any_case(names, split):
    assert [split_of(name) for name in names] == [split] * len(names)


def numbers(split):
    return range(FIRST[split], FIRST[split] + COUNTS[split])


def written(root, kind, names):
    """Write a source of the splits ``{split: its name}``; return its path."""
    rows = [(n, "ab"[n % 2], name) for split, name in names.items() for n in numbers(split)]
    home = root / "set"
    for n, label, name in rows:
        place = {
            "folders": f"{name}/{label}", "inner folders": f"{label}/{name}",
            "texts": f"{name}/00000", "metadata": name, "csv": ".", "json": ".",
        }.get(kind)  # fmt: skip
        if place is not None:
            put(home / place / f"{n}.jpg", jpeg(n))
        if kind == "texts":
            put(home / place / f"{n}.txt", f"thing {n}")
    for split, name in names.items():
        own = [(f"{n}.jpg", "ab"[n % 2]) for n in numbers(split)]
        if kind == "metadata":
            table(home / name / "metadata.csv", ["file_name", "label"], own)
        if kind.startswith("parquet"):
            columns = {"image": [jpeg(n) for n in numbers(split)], "label": [b for _, b in own]}
            parquet(home / kind.removeprefix("parquet ").format(name), columns)
    if kind == "csv":
        lines = [(f"{n}.jpg", label, name) for n, label, name in rows]
        return table(home / "t.csv", ["path", "label", "split"], lines)
    if kind == "json":
        return put(home / "t.json", [asked(n, f"{n}.jpg", split=name) for n, _, name in rows])
    return home


FILES = "parquet {}-00000-of-00001.parquet"
KINDS = [
    "folders", "inner folders", "texts", "metadata", "csv", "json", FILES,
    "parquet data/{}-00000-of-00001.parquet", "parquet plain_text/{}-00000-of-00001.parquet",
    "parquet {}/0000.parquet", "parquet default/{}/0000.parquet",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        {"train": "train", "validation": "validation"},
        {"train": "training", "validation": "val", "test": "test"},
        {"train": "Train", "validation": "dev"},
        {"train": "train", "test": "testing", "validation": "valid"},
    ],
)
def test_validation_samples_are_never_learned_from(tmp_path, kind, names):
    card, notes = made(written(tmp_path, kind, names), tmp_path / "out")
    scored = "test" if "test" in names else "validation"
    for part, split in (("train", "train"), ("test", scored)):
        samples = read(tmp_path / "out", card, card["tasks"][0]["name"], part)
        assert sorted(s["jpg"] for s in samples) == sorted(jpeg(n) for n in numbers(split))
    every = " ".join(notes)
    if "test" not in names:
        assert "3 validation samples are the test samples" in every
    elif kind in ("csv", "json"):
        assert "3 validation samples are left out" in every
    else:
        assert "3 validation samples left out: there is a test split" in every


def test_only_a_train_split_has_test_samples_held_out(tmp_path):
    source = written(tmp_path, FILES, {"train": "train"})
    card, _ = made(source, tmp_path / "out", options={"test_fraction": 0.34})
    assert (card["tasks"][0]["size"], card["tasks"][0]["test_size"]) == (4, 2)


@pytest.mark.parametrize("kind", ["folders", "texts", "metadata", *KINDS[6:]])
@pytest.mark.parametrize("name", ["extra", "test2015", "unlabeled"])
def test_a_split_of_unknown_name_among_known_ones_is_refused(tmp_path, kind, name):
    source = written(tmp_path, kind, {"train": "train", "validation": "val", "test": name})
    with pytest.raises(ValueError, match=f"{name}.* is of no known split"):
        made(source, tmp_path / "out")


def test_files_whose_names_only_look_like_splits_are_refused(tmp_path):
    source = written(tmp_path, FILES, {"train": "train2017", "validation": "val2017"})
    with pytest.raises(ValueError, match=r"train2017-.*parquet is of no known split among the 2"):
        made(source, tmp_path / "out")
    source = written(tmp_path / "b", FILES, {"train": "part0", "validation": "part1"})
    card, _ = made(source, tmp_path / "out")
    assert card["tasks"][0]["size"] + card["tasks"][0]["test_size"] == 9


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_an_unknown_value_of_a_split_is_a_bad_sample(tmp_path, kind):
    names = {"train": "train", "validation": "val", "test": "extra"}
    with pytest.raises(ValueError, match="(?s)2 of 11 .*its split is 'extra', expected train, val"):
        made(written(tmp_path, kind, names), tmp_path / "out")


def test_with_a_test_source_only_train_samples_are_learned_from(tmp_path):
    source = written(tmp_path, "csv", {"train": "train", "validation": "val", "test": "test"})
    for n in range(60, 64):
        put(tmp_path / f"{n}.jpg", jpeg(n))
    rows = [(f"{n}.jpg", "ab"[n % 2], ["train", "test"][n // 62]) for n in range(60, 64)]
    test = table(tmp_path / "u.csv", ["path", "label", "split"], rows)
    card, notes = made(source, tmp_path / "out", test=test)
    learned = read(tmp_path / "out", card, "mine", "train")
    assert sorted(s["jpg"] for s in learned) == sorted(jpeg(n) for n in numbers("train"))
    scored = read(tmp_path / "out", card, "mine", "test")
    assert sorted(s["jpg"] for s in scored) == sorted([jpeg(62), jpeg(63)])
    assert [note.split(": ")[1] for note in notes] == [
        "6 train samples are trained on, 3 validation samples are left out, "
        "2 test samples are left out",
        "2 train samples are left out, 2 test samples are the test samples",
    ]


def test_a_class_of_validation_samples_that_are_left_out_is_none(tmp_path):
    pictures(tmp_path, 7)
    rows = [(f"{n}.jpg", "ab"[n % 2], ["train", "test"][n > 3]) for n in range(6)]
    source = table(tmp_path / "t.csv", ["path", "label", "split"], [*rows, ("6.jpg", "c", "val")])
    card, _ = made(source, tmp_path / "out")
    assert card["classes"] == ["a", "b"]


def test_images_of_a_folder_below_images_are_split(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for n in range(count):
            put(tmp_path / "set" / "images" / split / "ab"[n % 2] / f"{split}{n}.jpg", jpeg(n))
    put(tmp_path / "set" / "annotations" / "list.txt", "x")
    card, notes = made(tmp_path / "set", tmp_path / "out")
    assert (card["classes"], card["tasks"][0]["size"], card["tasks"][0]["test_size"]) == (
        ["a", "b"], 4, 2,
    )  # fmt: skip
    assert "not used: folders without images (annotations)" in notes


def test_train_among_vehicles_is_a_class(tmp_path):
    for label in ("bus", "car", "train"):
        for n in range(4):
            put(tmp_path / "set" / label / f"{n}.jpg", jpeg(n + 9 * len(label)))
    card, _ = made(tmp_path / "set", tmp_path / "out")
    assert card["classes"] == ["bus", "car", "train"]


def test_splits_without_classes_are_no_classes(tmp_path):
    for n in range(4):
        put(tmp_path / "set" / ["train", "test"][n // 2] / f"{n}.jpg", jpeg(n))
    with pytest.raises(ValueError, match="only folders of splits .test, train. and no folders of"):
        open_input(tmp_path / "set")


@pytest.mark.parametrize("kind", ["folders", "texts"])
@pytest.mark.parametrize("names", [("train2017", "val2017"), ("seg_train", "seg_test")])
def test_folders_whose_names_look_like_splits_are_refused(tmp_path, kind, names):
    source = written(tmp_path, kind, dict(zip(("train", "test"), names, strict=True)))
    with pytest.raises(
        ValueError, match=f"folders .*'{names[0]}'.* look like splits .*: name them"
    ):
        open_input(source)
    with pytest.raises(ValueError, match="look like splits"):
        open_input(source, task_level=1)


def test_a_split_that_is_laid_out_otherwise_is_refused(tmp_path):
    for n in range(4):
        put(tmp_path / "set" / "train" / f"n0{n % 2}" / "images" / f"{n}.jpg", jpeg(n))
        put(tmp_path / "set" / "val" / "images" / f"{n}.jpg", jpeg(n + 9))
    with pytest.raises(
        ValueError, match="validation split of .* has none of the classes .*'images'"
    ):
        made(tmp_path / "set", tmp_path / "out")
    assert list(open_input(tmp_path / "set" / "train").classes) == ["n00", "n01"]


def test_several_configurations_are_refused_by_name(tmp_path):
    for name in ("easy", "hard"):
        parquet(tmp_path / "set" / name / "train-0.parquet", {"image": [jpeg(0)], "label": ["a"]})
    with pytest.raises(ValueError, match="tables in several folders: give one of .*easy, .*hard"):
        open_input(tmp_path / "set")


def test_splits_of_a_jsonl_of_captions_are_read(tmp_path):
    pictures(tmp_path, 6)
    rows = [{"image": f"{n}.jpg", "caption": f"thing {n}", "split": ["train", "val"][n > 3]}
            for n in range(6)]  # fmt: skip
    source = put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    card, _ = made(source, tmp_path / "out")
    assert (card["tasks"][0]["size"], card["tasks"][0]["test_size"]) == (4, 2)
