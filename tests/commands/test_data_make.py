"""`mmcl data make`: from what a person has to a stream, in one command."""

import pytest

from mmcl.core import TaskStream
from tests.data.builders.llava_files import jpeg, put, train_set
from tests.data.builders.test_make import class_folders, pictures


def test_a_folder_of_classes_becomes_a_stream(desk):
    class_folders(desk.folder / "flowers", {"a": 6, "b": 6, "c": 6, "d": 6})
    words = ("flowers", "--out", "out", "--classes_per_task", 2, "--licence", "CC0")
    status, out, err = desk.give("data", "make", *words)
    assert (status, err) == (0, "")
    assert "classes-0-1      10 to learn from, 2 to test on of 2 classes" in out
    assert out.splitlines()[-1] == "out/flowers.yaml"
    stream = TaskStream.read(desk.folder / "out" / "flowers.yaml")
    assert (len(stream), stream.scenario, stream.licence) == (2, "class", "CC0")


def test_a_run_learns_a_stream_that_was_made(desk):
    class_folders(desk.folder / "flowers", {"a": 6, "b": 6, "c": 6, "d": 6})
    desk.give("data", "make", "flowers", "--out", "out", "--classes_per_task", 2)
    status, _, err = desk.run("--data.stream", "out/flowers.yaml")
    assert (status, err) == (0, "")


def test_a_json_is_used_in_place_and_learned(asking):
    train_set(asking.folder, 12)
    words = ("train.json", "--images", "pictures", "--out", "out", "--in_place", "--name", "vqa")
    status, out, err = asking.give("data", "make", *words)
    assert (status, err) == (0, "")
    assert "vqa              11 to learn from, 1 to test on" in out
    names = sorted(path.name for path in (asking.folder / "out").iterdir())
    assert "vqa-train.loose.json" in names
    assert not [name for name in names if name.endswith(".tar")]
    status, _, err = asking.run("--data.stream", "out/vqa.yaml")
    assert (status, err) == (0, "")


def test_what_is_left_out_is_told(desk):
    pictures(desk.folder / "pics", 9)
    put(desk.folder / "t.csv", "path,text\n" + "".join(f"{n}.jpg,x\n" for n in range(10)))
    words = ("data", "make", "t.csv", "--images", "pics", "--out", "out")
    status, _, err = desk.give(*words)
    assert status == 1
    assert "1 of 10 samples in t.csv cannot be used: correct them, or give --skip_bad" in err
    assert "t.csv, sample 9 (id '9.jpg'): its picture '9.jpg' is missing" in err
    status, out, _ = desk.give(*words, "--skip_bad")
    assert status == 0
    assert "1 left out:\n- t.csv, sample 9" in out


def test_pictures_in_both_given_parts_are_counted(desk):
    class_folders(desk.folder / "train", {"a": 4, "b": 4})
    class_folders(desk.folder / "later", {"a": 4, "b": 2}, start=6)
    put(desk.folder / "later" / "b" / "9.jpg", jpeg(50))
    status, out, _ = desk.give("data", "make", "train", "--test", "later", "--out", "out")
    assert status == 0
    assert "2 test samples have a picture that is also learned from" in out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "the following arguments are required: SOURCE, --out"),
        (["nowhere", "--out", "o"], 1, "there is nothing at nowhere: correct SOURCE"),
        (["t.csv", "--images", "nowhere", "--out", "o"], 1, "no folder of pictures nowhere"),
        (["t.csv", "--out", "o"], 1, "t.csv has the columns file, words: expected path,text"),
        (["pics", "--out", "o"], 1, "pics has no class folders and 2 pictures: expected pics/"),
        (["pics/0.jpg", "--out", "o"], 1, "ends in '.jpg': expected .csv"),
        (["t.csv", "--out", "o", "--in_place"], 2, "--in_place needs LLaVA-style JSON"),
        (["t.csv", "--out", "o", "--tasks_are_folders"], 1, "give tables a column task"),
        (["pics", "--out", "o", "--kind", "caption"], 1, "--kind is caption, and pics is a folder"),
        (["t.csv", "--out", "o", "--card", "c.yaml"], 2, "give --append as well"),
        (["u.csv", "--out", "o", "--append"], 1, "there is no card in o to append to"),
        (["t.csv", "--out", "o", "--test_share", "1"], 1, "test_share is 1.0, expected a share"),
        (["t.csv", "--out", "o", "--name", "../x"], 1, "name is '../x', expected up to 64"),
        (["t.csv", "--out", "o", "--scorer", "exakt"], 1, "there is no scorer 'exakt'"),
        (["t.csv", "--out", "o", "--shard_samples", "0"], 1, "shard_samples is 0"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(desk, words, status, said):
    pictures(desk.folder / "pics", 2)
    put(desk.folder / "t.csv", "file;words\n0.jpg;x\n")
    put(desk.folder / "u.csv", "path,text\npics/0.jpg,x\n")
    got, _, err = desk.give("data", "make", *words)
    assert (got, err.count("\n")) == (status, 1), err
    assert said in err


def test_help_has_three_examples_and_every_action_is_listed(desk):
    status, out, _ = desk.give("data", "make", "--help")
    assert status == 0
    assert out.count("  mmcl data make ") == 3
    status, out, _ = desk.give("data", "--help")
    assert status == 0
    assert all(name in out for name in ("make", "check", "show", "list", "build", "convert"))


def test_an_unknown_action_is_told(desk):
    status, _, err = desk.give("data", "mke")
    assert status == 2
    assert "invalid choice: 'mke'" in err
