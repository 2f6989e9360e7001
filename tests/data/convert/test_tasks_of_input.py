"""Tasks of an input: classes in a seeded order, a large first task, and tasks by a column."""

import datetime
import json

import numpy as np
import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from mmcl.data.shards.open_stream import open_stream
from tests.data.convert.llava_files import asked, jpeg, put, samples_of
from tests.data.convert.test_convert import class_folders, contents, parquet, pictures, read


def made(source, out, column=None, level=None, in_place=None, test=None, **options):
    """Convert in one process; return the card's content and the notes."""
    opened = [
        one and open_input(one, task_column=column, task_level=level) for one in (source, test)
    ]
    options = ConvertOptions("mine", **{"test_fraction": 0.3, **options})
    path, converted = convert(*opened, out, options, in_place=in_place)
    open_stream(TaskStream.read(path), verify_hashes=True)
    return yaml.safe_load(path.read_text()), list(converted.notes)


def names_of(card):
    return [task["name"] for task in card["tasks"]]


def labels_table(folder, num_classes):
    """Write a csv of two images for each class; return its path, and the class of each image."""
    rows = []
    for number in range(2 * num_classes):
        put(folder / f"{number}.jpg", jpeg(number))
        rows.append(f"{number}.jpg,{number % num_classes}")
    of = {jpeg(number): number % num_classes for number in range(2 * num_classes)}
    return put(folder / "t.csv", "path,label\n" + "\n".join(rows)), of


def test_b50_inc10_of_seed_1993_has_the_labels_and_tasks_of_pilot(tmp_path):
    source, class_of = labels_table(tmp_path, 100)
    card, notes = made(
        source, tmp_path / "out", classes_per_task=10, first_task_classes=50, class_order_seed=1993
    )
    np.random.seed(1993)
    order = np.random.permutation(100).tolist()
    assert card["classes"] == [str(label) for label in order]
    assert names_of(card) == ["classes-0-49", *(f"classes-{n}-{n + 9}" for n in range(50, 100, 10))]
    seen = 0
    for number, task in enumerate(card["tasks"]):
        for part in ("train", "test"):
            for sample in read(tmp_path / "out", card, task["name"], part):
                label = order.index(class_of[sample["jpg"]])
                assert int(sample["cls"]) == label
                assert number == (0 if label < 50 else 1 + (label - 50) // 10)
                seen += 1
    assert seen == 200
    assert card["tasks"][1]["description"] == (
        "classes 50 to 59 of numpy.random.RandomState(1993).permutation(100)"
    )
    assert notes[0] == "classes are in the order of seed 1993, drawn as in iCaRL, PyCIL and PILOT"
    assert notes[1].startswith("remark: 100 of 100 class names are as no caption has them ('0', ")
    assert len(notes) == 2


def test_a_class_order_gives_the_same_bytes_again_and_others_for_another_seed(tmp_path):
    class_folders(tmp_path / "set", {f"c{n}": 4 for n in range(7)})
    made_by = {}
    for out, seed in (("a", 5), ("b", 5), ("c", 6), ("d", None)):
        card, notes = made(
            tmp_path / "set", tmp_path / out, classes_per_task=3, class_order_seed=seed
        )
        expected = [f"c{n}" for n in range(7)]
        if seed is not None:
            expected = [f"c{n}" for n in np.random.RandomState(seed).permutation(7)]
        assert card["classes"] == expected
        assert [task["classes"] for task in card["tasks"]] == [
            expected[:3], expected[3:6], expected[6:],
        ]  # fmt: skip
        assert notes[-1] == "the last task has 1 of 3 classes: 7 classes do not fill all tasks"
        made_by[out] = contents(tmp_path / out)
    assert made_by["a"] == made_by["b"]
    assert made_by["a"] != made_by["c"]
    before = made_by["a"]
    made(tmp_path / "set", tmp_path / "a", classes_per_task=3, class_order_seed=5)
    assert contents(tmp_path / "a") == before
    with pytest.raises(ValueError, match="was made from other files or options"):
        made(tmp_path / "set", tmp_path / "a", classes_per_task=3, class_order_seed=6)


def test_a_stream_without_a_class_order_has_the_recipe_that_it_had(tmp_path):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    made(tmp_path / "set", tmp_path / "out", classes_per_task=1)
    recipe = json.loads((tmp_path / "out" / "mine.build.json").read_text())["recipe"]
    assert set(recipe["options"]) == {
        "name", "task", "classes_per_task", "test_fraction", "seed", "max_samples",
        "shard_samples", "shard_bytes",
    }  # fmt: skip


def test_appended_classes_are_put_in_order_behind_those_of_the_card(tmp_path):
    class_folders(tmp_path / "first", {"b": 4, "d": 4})
    class_folders(tmp_path / "second", {name: 4 for name in "aceg"}, start=50)
    made(tmp_path / "first", tmp_path / "out")
    options = ConvertOptions(
        "more", classes_per_task=2, class_order_seed=1993, test_fraction=0.3, license="CC0"
    )
    path, _ = convert(open_input(tmp_path / "second"), None, tmp_path / "out", options, append=True)
    card = yaml.safe_load(path.read_text())
    new = ["aceg"[n] for n in np.random.RandomState(1993).permutation(4)]
    assert card["classes"] == ["b", "d", *new]
    assert [task["classes"] for task in card["tasks"][1:]] == [new[:2], new[2:]]
    assert card["tasks"][2]["description"] == (
        "classes 2 to 3 of numpy.random.RandomState(1993).permutation(4); license: CC0"
    )


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"class_order_seed": 1993}, "class_order_seed is 1993 and classes are not split into"),
        ({"first_task_classes": 5}, "first_task_classes is 5 and classes are not split into"),
        ({"first_task_classes": 0, "classes_per_task": 1}, "first_task_classes is 0, expected 1"),
        ({"class_order_seed": -1, "classes_per_task": 1}, "class_order_seed is -1, expected 0 to"),
    ],
)
def test_an_option_that_cannot_be_obeyed_is_refused(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConvertOptions("mine", **option)


@pytest.mark.parametrize(
    ("option", "name"), [({"task": "a"}, "--task "), ({"task_order": ("a", "b")}, "--task_order ")]
)
def test_names_for_tasks_of_classes_are_refused(tmp_path, option, name):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=f"{name}is for tasks of names, and --classes_per_task"):
        made(tmp_path / "set", tmp_path / "out", classes_per_task=1, **option)


YEARS = ["2015", "2014", "0999", "2014", "2015", "0999"] * 2


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "jsonl", "in place"])
def test_a_column_of_years_becomes_tasks_in_the_order_of_time(tmp_path, kind):
    pictures(tmp_path, 12)
    paths = [f"{n}.jpg" for n in range(12)]
    records = [asked(n, f"{n}.jpg", Year=int(year)) for n, year in enumerate(YEARS)]
    if kind == "csv":
        rows = [",".join(row) for row in zip(paths, YEARS, paths, strict=True)]
        source = put(tmp_path / "t.csv", "path,Year,text\n" + "\n".join(rows))
    elif kind == "parquet":
        columns = {"path": paths, "text": paths, "Year": [float(year) for year in YEARS]}
        source = parquet(tmp_path / "t.parquet", columns, rows=5)
    elif kind == "jsonl":
        source = put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, records)))
    else:
        source = put(tmp_path / "t.json", records)
    in_place = InPlace(tmp_path, tmp_path) if kind == "in place" else None
    card, notes = made(source, tmp_path / "out", "Year", in_place=in_place)
    assert names_of(card) == [["999", "0999"][kind == "csv"], "2014", "2015"]
    assert notes == ["tasks are in the order of 'Year', compared as numbers"]
    assert card["scenario"] == "domain"
    prepared = open_stream(TaskStream.read(tmp_path / "out" / "mine.yaml"))
    for column, year in enumerate(("0999", "2014", "2015")):
        found = []
        for part in ("train", "test"):
            reader = prepared.reader(column, part)
            found += [reader.read(n).members["jpg"] for n in range(len(reader))]
        assert sorted(found) == sorted(jpeg(n) for n in range(12) if YEARS[n] == year)


def test_dates_and_numbered_names_of_parquet_become_tasks(tmp_path):
    days = [datetime.date(2014, 3, day) for day in (10, 9, 10, 9, 10, 9)]
    columns = {"image": [jpeg(n) for n in range(6)], "text": ["x"] * 6, "day": days}
    card, notes = made(parquet(tmp_path / "a.parquet", columns), tmp_path / "a", "day")
    assert names_of(card) == ["2014-03-09", "2014-03-10"]
    assert notes == ["tasks are in the order of 'day', compared as dates"]
    # The hub's library stores a ClassLabel as a number; here it is also the label.
    columns = {"image": [jpeg(n) for n in range(6)], "label": [1, 0] * 3}
    source = parquet(tmp_path / "b.parquet", columns, ["sketch", "photo"])
    card, _ = made(source, tmp_path / "b", "label")
    assert names_of(card) == ["photo", "sketch"]
    assert [task["classes"] for task in card["tasks"]] == [["photo"], ["sketch"]]


@pytest.mark.parametrize("split", ["none", "above", "below"])
def test_folders_below_the_classes_may_be_the_tasks(tmp_path, split):
    written = {}
    for start, (label, year) in enumerate([("a", "2015"), ("a", "850"), ("b", "2015")]):
        for part in ("train", "test") if split != "none" else ("train",):
            inner = {"none": (label, year), "above": (part, label, year),
                     "below": (label, year, part)}[split]  # fmt: skip
            folder = tmp_path.joinpath("set", *inner)
            written[label, year, part] = [
                jpeg(20 * start + 10 * (part == "test") + n) for n in range(4)
            ]
            for number, data in enumerate(written[label, year, part]):
                put(folder / f"{number}.jpg", data)
    card, _ = made(tmp_path / "set", tmp_path / "out", level=2)
    assert [(task["name"], task["classes"]) for task in card["tasks"]] == [
        ("850", ["a"]), ("2015", ["a", "b"]),
    ]  # fmt: skip
    for year in ("850", "2015"):
        every = {}
        for part in ("train", "test"):
            for sample in read(tmp_path / "out", card, year, part):
                where = "train" if split == "none" else part
                every.setdefault((card["classes"][int(sample["cls"])], year, where), []).append(
                    sample["jpg"]
                )
        own = {key: sorted(data) for key, data in written.items() if key[1] == year}
        assert {key: sorted(data) for key, data in every.items()} == own


def test_a_given_order_of_tasks_is_obeyed_and_has_to_name_them_all(tmp_path):
    class_folders(tmp_path / "set" / "photo", {"a": 4})
    class_folders(tmp_path / "set" / "sketch, old", {"a": 4}, start=9)
    card, notes = made(
        tmp_path / "set", tmp_path / "out", level=1, task_order=("sketch, old", "photo")
    )
    assert (names_of(card), notes) == (["sketch, old", "photo"], [])
    wrong = {
        ("photo",): "--task_order lacks 'sketch, old': list each task of",
        ("photo", "sketch"): "--task_order names 'sketch': list each task of",
        ("photo", "photo", "sketch, old"): "--task_order names a task twice",
    }
    for order, sentence in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            made(tmp_path / "set", tmp_path / "other", level=1, task_order=order)
    with pytest.raises(ValueError, match="is one task: say with --task_column"):
        made(tmp_path / "set" / "photo", tmp_path / "other", task_order=("a",))
    with pytest.raises(ValueError, match="states its tasks itself .*: leave out --task$"):
        made(tmp_path / "set", tmp_path / "other", level=1, task="mine")
    assert not (tmp_path / "other").exists()


def test_the_tasks_of_a_test_source_are_found_by_the_same_column(tmp_path):
    pictures(tmp_path, 8)
    for name, first in (("t", 0), ("u", 4)):
        rows = [f"{first + n}.jpg,x,{'ba'[n % 2]}" for n in range(4)]
        put(tmp_path / f"{name}.csv", "path,text,who\n" + "\n".join(rows))
    card, _ = made(tmp_path / "t.csv", tmp_path / "out", "who", test=tmp_path / "u.csv")
    assert [(t["name"], t["size"], t["test_size"]) for t in card["tasks"]] == [
        ("a", 2, 2), ("b", 2, 2),
    ]  # fmt: skip


def test_a_missing_task_of_a_csv_is_named_by_its_line(tmp_path):
    pictures(tmp_path, 3)
    rows = [f'{n % 3}.jpg,"line\n{n}",{2014 + n % 2}' for n in range(1100)]
    rows[7] = "1.jpg,gone A,"
    rows[1051] = '1.jpg,gone B,"  "'
    text = "path,text,year\r\n" + "\n\n".join(rows) + "\n"
    put(tmp_path / "t.csv", text)
    lines = {
        letter: next(n for n, line in enumerate(text.split("\n"), 1) if f"gone {letter}" in line)
        for letter in "AB"
    }
    with pytest.raises(ValueError, match="2 of 1,100 samples in .* cannot be used") as raised:
        made(tmp_path / "t.csv", tmp_path / "out", "year")
    for number, letter in ((7, "A"), (1051, "B")):
        sentence = f"its year is empty (line {lines[letter]}): every sample needs a task"
        assert f"sample {number} (id '1.jpg'): {sentence}" in str(raised.value)
    card, _ = made(tmp_path / "t.csv", tmp_path / "out", "year", max_bad_fraction=0.01)
    assert names_of(card) == ["2014", "2015"]
    assert sum(task["size"] + task["test_size"] for task in card["tasks"]) == 1098


def test_a_missing_task_of_parquet_and_json_is_named_by_its_row(tmp_path):
    pictures(tmp_path, 5)
    columns = {
        "path": [f"{n}.jpg" for n in range(5)],
        "text": ["x"] * 5,
        "year": [1, 2, 1, None, 2],
    }
    source = parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(ValueError, match=r"its year is empty \(row 4 of t.parquet\)"):
        made(source, tmp_path / "out", "year")
    records = [asked(n, f"{n}.jpg", **({"year": 1} if n != 2 else {})) for n in range(5)]
    source = put(tmp_path / "t.json", records)
    with pytest.raises(ValueError, match=r"id 'id/2'\): its year is empty \(record 3\)"):
        made(source, tmp_path / "out", "year")
    assert not (tmp_path / "out").exists()


def test_a_table_without_the_column_lists_those_that_it_has(tmp_path):
    put(tmp_path / "t.csv", "path,text,year\n0.jpg,x,1\n")
    with pytest.raises(
        ValueError, match="no column 'years' for --task_column, it has path, text, year"
    ):
        made(tmp_path / "t.csv", tmp_path / "out", "years")


def test_the_answers_of_a_converted_task_are_those_of_its_records(tmp_path):
    pictures(tmp_path, 6)
    records = [asked(n, f"{n}.jpg", language="defr"[2 * (n % 2) :][:2]) for n in range(6)]
    made(put(tmp_path / "t.json", records), tmp_path / "out", "language")
    prepared = open_stream(TaskStream.read(tmp_path / "out" / "mine.yaml"))
    for column, first in enumerate((0, 1)):
        answers = {
            data["conversations"][1]["value"]
            for part in ("train", "test")
            for _, _, data in samples_of(prepared, column, part)
        }
        assert answers == {f"thing {n}" for n in range(first, 6, 2)}
