"""`mmcl data convert`: from your own data to a stream, in one command."""

import json

import pytest

from mmcl.core import TaskStream
from mmcl.evaluation.predictions import predictions_path
from tests.data.convert.llava_files import jpeg, put, quizzed, train_set
from tests.data.convert.test_convert import class_folders, pictures


def test_a_folder_of_classes_becomes_a_stream(desk):
    class_folders(desk.folder / "flowers", {"a": 6, "b": 6, "c": 6, "d": 6})
    words = ("flowers", "--out", "out", "--classes_per_task", 2, "--license", "CC0")
    status, out, err = desk.give("data", "convert", *words)
    assert (status, err) == (0, "")
    assert "classes-0-1      10 training and 2 test samples, 2 classes" in out
    assert out.splitlines()[-1] == "out/flowers.yaml"
    stream = TaskStream.read(desk.folder / "out" / "flowers.yaml")
    assert (len(stream), stream.scenario, stream.license) == (2, "class", "CC0")


def test_a_large_first_task_and_a_remainder_are_reported(desk):
    class_folders(desk.folder / "flowers", {name: 4 for name in "abcdefg"})
    words = ("--classes_per_task", 2, "--first_task_classes", 4, "--class_order_seed", 1993)
    status, out, err = desk.give("data", "convert", "flowers", "--out", "out", *words)
    assert (status, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines() if line.startswith("classes-")]
    assert names == ["classes-0-3", "classes-4-5", "classes-6-6"]
    assert "classes are in the order of seed 1993, drawn as in iCaRL, PyCIL and PILOT\n" in out
    assert "the last task has 1 of 2 classes: 7 classes do not fill all tasks\n" in out
    card = TaskStream.read(desk.folder / "out" / "flowers.yaml")
    assert [len(task.classes) for task in card] == [4, 2, 1]
    status, _, err = desk.run("--data.stream", "out/flowers.yaml")
    assert (status, err) == (0, "")


def test_a_column_of_a_table_becomes_tasks_in_a_given_order(desk):
    pictures(desk.folder, 8)
    rows = [f"{n}.jpg,x,{('new, York', 'old')[n % 2]}" for n in range(8)]
    rows = [row.replace("new, York", '"new, York"') for row in rows]
    put(desk.folder / "t.csv", "path,text,place\n" + "\n".join(rows))
    words = ("data", "convert", "t.csv", "--out", "out", "--task_column", "place")
    status, out, err = desk.give(*words, "--task_order", "old", "new, York")
    assert (status, err) == (0, "")
    stream = TaskStream.read(desk.folder / "out" / "t.yaml")
    assert [task.name for task in stream] == ["old", "new, York"]
    assert "compared as" not in out
    status, out, _ = desk.give(*words, "--name", "again")
    assert status == 0
    assert "tasks are in the order of 'place', compared as texts\n" in out


def test_a_run_learns_a_converted_stream(desk):
    class_folders(desk.folder / "flowers", {"a": 6, "b": 6, "c": 6, "d": 6})
    desk.give("data", "convert", "flowers", "--out", "out", "--classes_per_task", 2)
    status, _, err = desk.run("--data.stream", "out/flowers.yaml")
    assert (status, err) == (0, "")


def test_a_json_is_used_in_place_and_learned(asking):
    train_set(asking.folder, 12)
    words = ("train.json", "--images", "pictures", "--out", "out", "--in_place", "--name", "vqa")
    status, out, err = asking.give("data", "convert", *words)
    assert (status, err) == (0, "")
    assert "vqa              11 training and 1 test samples, scored by exact" in out
    names = sorted(path.name for path in (asking.folder / "out").iterdir())
    assert "vqa-train.loose.json" in names
    assert not [name for name in names if name.endswith(".tar")]
    status, _, err = asking.run("--data.stream", "out/vqa.yaml")
    assert (status, err) == (0, "")


def test_what_is_left_out_is_reported(desk):
    pictures(desk.folder / "pics", 9)
    put(desk.folder / "t.csv", "path,text\n" + "".join(f"{n}.jpg,x\n" for n in range(10)))
    words = ("data", "convert", "t.csv", "--images", "pics", "--out", "out")
    status, _, err = desk.give(*words)
    assert status == 1
    assert "1 of 10 samples in t.csv cannot be used: correct them, or leave them out with" in err
    assert "--skip_bad or --max_bad_fraction 0.10:" in err
    assert "t.csv, sample 9 (id '9.jpg'): its " in err
    assert "'9.jpg' is missing" in err
    for option in (["--skip_bad"], ["--max_bad_fraction", "0.1"]):
        status, out, _ = desk.give(*words, *option)
        assert status == 0
        assert "1 bad samples left out (listed in out/t.left_out.txt):\n- t.csv, sample 9" in out


def test_images_in_both_given_splits_are_counted(desk):
    class_folders(desk.folder / "train", {"a": 4, "b": 4})
    class_folders(desk.folder / "later", {"a": 4, "b": 2}, start=6)
    put(desk.folder / "later" / "b" / "9.jpg", jpeg(50))
    status, out, _ = desk.give("data", "convert", "train", "--test", "later", "--out", "out")
    assert status == 0
    assert "2 test samples have an image that is also a training image" in out


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ([], 2, "the following arguments are required: SOURCE, --out"),
        (["nowhere", "--out", "o"], 1, "there is nothing at nowhere: correct SOURCE"),
        (["t.csv", "--images", "nowhere", "--out", "o"], 1, "no folder of images nowhere"),
        (["t.csv", "--out", "o"], 1, "t.csv has the columns file, words: expected path,text"),
        (["pics", "--out", "o"], 1, "pics has no class folders and 2 images: expected pics/"),
        (["pics/0.jpg", "--out", "o"], 1, "ends in '.jpg': expected .csv"),
        (["t.csv", "--out", "o", "--in_place"], 2, "--in_place needs LLaVA-style JSON"),
        (["t.csv", "--out", "o", "--tasks_are_folders"], 1, "give tables a column task"),
        (
            ["pics", "--out", "o", "--task_type", "captioning"],
            1,
            "--task_type is captioning, and pics is a folder",
        ),
        (["u.csv", "--out", "o", "--task_level", "2"], 1, "or say with --task_column which column"),
        (["pics", "--out", "o", "--task_level", "2"], 1, "expected pics/<class>/<task>/image.jpg"),
        (["pics", "--out", "o", "--task_level", "3"], 2, "invalid choice: 3"),
        (["pics", "--out", "o", "--task_column", "a"], 1, "--task_column is for tables, and pics"),
        (
            ["u.csv", "--out", "o", "--task_column", "a"],
            1,
            "u.csv has no column 'a' for --task_column",
        ),
        (["c.csv", "--out", "o", "--class_order_seed", "1993"], 1, "give classes_per_task as well"),
        (
            ["c.csv", "--out", "o", "--classes_per_task", "1", "--first_task_classes", "1"],
            1,
            "--first_task_classes is 1, and there are 1 classes: leave some to the next task",
        ),
        (["t.csv", "--out", "o", "--card", "c.yaml"], 2, "give --append as well"),
        (["u.csv", "--out", "o", "--append"], 1, "there is no card in o to append to"),
        (["t.csv", "--out", "o", "--test_fraction", "1"], 1, "test_fraction is 1.0, expected a"),
        (["t.csv", "--out", "o", "--name", "../x"], 1, "name is '../x', expected up to 64"),
        (["t.csv", "--out", "o", "--scorer", "exakt"], 1, "there is no scorer 'exakt'"),
        (["t.csv", "--out", "o", "--shard_samples", "0"], 1, "shard_samples is 0"),
        (["t.csv", "--out", "o", "--max_samples", "0"], 1, "max_samples is 0"),
        (["t.csv", "--out", "o", "--max_bad_fraction", "2"], 1, "max_bad_fraction is 2.0"),
        (["u.csv", "--out", "o", "--references", "r.json"], 1, "--references is for LLaVA-style"),
        (["u.csv", "--out", "o", "--max_new_tokens", "9"], 1, "--max_new_tokens is for answers"),
        (["x.json", "--out", "o", "--in_place", "--references", "r"], 2, "leave out one of them"),
        (["x.json", "--out", "o", "--in_place", "--test", "u.csv"], 2, "--in_place needs LLaVA-"),
        (
            ["u.csv", "--test", "c.csv", "--out", "o"],
            1,
            "--test c.csv is classification and SOURCE",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(desk, words, status, sentence):
    pictures(desk.folder / "pics", 2)
    put(desk.folder / "t.csv", "file;words\n0.jpg;x\n")
    put(desk.folder / "u.csv", "path,text\npics/0.jpg,x\n")
    put(desk.folder / "c.csv", "path,label\npics/0.jpg,x\n")
    got, _, err = desk.give("data", "convert", *words)
    assert (got, err.count("\n")) == (status, 1), err
    assert sentence in err


def test_help_has_examples_and_every_action_is_listed(desk):
    status, out, _ = desk.give("data", "convert", "--help")
    assert status == 0
    assert out.count("  mmcl data convert ") == 7
    status, out, _ = desk.give("data", "--help")
    assert status == 0
    assert all(name in out for name in ("convert", "validate", "preview", "list", "build"))


def test_an_unknown_action_is_reported(desk):
    status, _, err = desk.give("data", "convrt")
    assert status == 2
    assert "invalid choice: 'convrt'" in err


def test_a_task_with_references_is_appended(desk):
    train_set(desk.folder)
    shared = ("data", "convert", "train.json", "--images", "pictures", "--out", "out")
    assert desk.give(*shared, "--name", "vqa", "--test_fraction", 0.4)[0] == 0
    put(desk.folder / "test.json", [quizzed(n, f"sub/{n}.jpg", box="?") for n in range(2)])
    votes = [{"question_id": f"q{n}", "answers": ["A"] * 10} for n in range(2)]
    put(desk.folder / "votes.json", {"data": votes})
    status, out, err = desk.give(
        *shared, "--name", "more", "--append", "--test", "test.json", "--references", "votes.json",
        "--scorer", "vqa", "--max_new_tokens", 9, "--max_samples", 4,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "more             4 training and 2 test samples, scored by vqa" in out
    stream = TaskStream.read(desk.folder / "out" / "vqa.yaml")
    assert [(t.name, t.scorer, t.size, t.max_new_tokens) for t in stream] == [
        ("vqa", "exact", 3, 64), ("more", "vqa", 4, 9),
    ]  # fmt: skip


def test_the_answer_field_of_a_test_file_is_named(desk):
    train_set(desk.folder)
    put(desk.folder / "test.json", [quizzed(n, f"sub/{n}.jpg", box=f"b{n}") for n in range(2)])
    words = ("data", "convert", "train.json", "--images", "pictures", "--test", "test.json")
    assert desk.give(*words, "--answer_field", "box", "--out", "out", "--name", "vqa")[0] == 0
    assert b'"answers": ["b0"]' in (desk.folder / "out" / "vqa-test-00000.tar").read_bytes()


def test_columns_and_class_names_are_chosen_and_what_is_not_used_is_listed(desk):
    pictures(desk.folder / "one", 6)
    for number in range(6, 12):
        put(desk.folder / "two" / f"{number}.jpg", jpeg(number))
    rows = [f"{n}.jpg,{n % 2},{n % 3},8,{('train', 'val')[n > 8]}" for n in range(12)]
    put(desk.folder / "t.csv", "where,fine_label,coarse_label,width,set\n" + "\n".join(rows))
    put(desk.folder / "names.txt", "crane\ncrane\n")
    words = ("data", "convert", "t.csv", "--out", "out", "--images", "one", "two")
    status, _, err = desk.give(*words, "--image_column", "where")
    assert status == 1
    assert "'fine_label' and 'coarse_label', which could each be the label" in err
    status, out, err = desk.give(
        *words, "--image_column", "where", "--label_column", "fine_label",
        "--class_names", "names.txt",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "not used of t.csv: coarse_label, width\n" in out
    assert "9 train samples are trained on, 3 validation samples are the test samples\n" in out
    stream = TaskStream.read(desk.folder / "out" / "t.yaml")
    assert stream.class_names == {"0": "crane", "1": "crane"}


def test_a_run_shows_names_of_classes_that_are_told_apart_and_keeps_to_them(desk):
    ids = ["n01440764", "n02012849", "n03126707", "n00005787"]
    class_folders(desk.folder / "imagenet", dict.fromkeys(ids, 6))
    words = ("data", "convert", "imagenet", "--out", "out", "--classes_per_task", 2)
    status, out, err = desk.give(*words)
    assert (status, err) == (0, "")
    assert "4 WordNet ids are named in prompts ('n00005787': benthos)\n" in out
    status, _, err = desk.run("--data.stream", "out/imagenet.yaml")
    assert (status, err) == (0, "")
    predictions = predictions_path(desk.results, 2, 0)
    targets = {json.loads(line)["target"] for line in predictions.read_text().splitlines()}
    assert targets == {"benthos (n00005787)", "tench (n01440764)"}
    card = desk.folder / "out" / "imagenet.yaml"
    card.write_text(card.read_text().replace("benthos", "sea floor"))
    status, _, err = desk.run("--data.stream", "out/imagenet.yaml")
    assert status != 0
