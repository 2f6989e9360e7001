"""Folders, tables and JSON of one's own become streams that a run reads."""

import hashlib
import json
import os
import signal

import pyarrow
import pyarrow.parquet
import pytest
import yaml

import mmcl.data.convert.convert as convert_module
from mmcl.core import TaskStream
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.shards.open_stream import open_stream
from tests.behaviour.kill_runs import KILLED, in_process
from tests.data.convert.llava_files import jpeg, put, train_set
from tests.data.shards.shard_files import read_samples


def made(source, out, name="mine", test=None, task_type=None, images=None, folders=False, **more):
    """Convert in one process; return the card's content."""
    calls = {key: more.pop(key) for key in ("append", "card", "progress") if key in more}
    opened = [
        one and open_input(one, task_type, images, task_level=1 if folders else None)
        for one in (source, test)
    ]
    path, _ = convert(*opened, out, ConvertOptions(name, **more), **calls)
    open_stream(TaskStream.read(path), verify_hashes=True)
    return yaml.safe_load(path.read_text())


def read(folder, card, task, part):
    """Return the members of a part's samples, in order."""
    names = next(entry for entry in card["tasks"] if entry["name"] == task)[part]
    samples = read_samples(folder / name for name in names)
    assert sum(card["counts"][name] for name in names) == len(samples)
    return list(samples.values())


def class_folders(root, counts, start=0):
    """Write ``root/<class>/<n>.jpg``; return the bytes by class."""
    written = {}
    for name, count in counts.items():
        written[name] = [jpeg(start + number) for number in range(count)]
        start += count
        for number, data in enumerate(written[name]):
            put(root / name / f"{number}.jpg", data)
    return written


def contents(folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".index"
    }


def test_class_folders_become_tasks_of_some_classes_in_natural_order(tmp_path):
    written = class_folders(tmp_path / "set", {"c10": 5, "c2": 5, "c1": 5})
    card = made(tmp_path / "set", tmp_path / "out", classes_per_task=2, test_fraction=0.4)
    assert card["classes"] == ["c1", "c2", "c10"]
    assert [(t["name"], t["classes"]) for t in card["tasks"]] == [
        ("classes-0-1", ["c1", "c2"]), ("classes-2-2", ["c10"]),
    ]  # fmt: skip
    assert (card["scenario"], card["task_type"], card["source"]) == (
        "class",
        "classification",
        "set",
    )
    seen = {}
    for entry in card["tasks"]:
        for part in ("train", "test"):
            for sample in read(tmp_path / "out", card, entry["name"], part):
                seen.setdefault(card["classes"][int(sample["cls"])], []).append(sample["jpg"])
    assert {name: sorted(own) for name, own in seen.items()} == {
        name: sorted(own) for name, own in written.items()
    }
    assert [entry["test_size"] for entry in card["tasks"]] == [4, 2]


def test_a_train_and_a_test_folder_are_taken_as_they_are(tmp_path):
    train = class_folders(tmp_path / "set" / "train", {"a": 3, "b": 2})
    test = class_folders(tmp_path / "set" / "test", {"a": 1, "b": 1}, start=50)
    class_folders(tmp_path / "set" / "val", {"a": 2}, start=90)
    card = made(tmp_path / "set", tmp_path / "out")
    (task,) = card["tasks"]
    assert (task["name"], task["size"], task["test_size"]) == ("mine", 5, 2)
    learned = read(tmp_path / "out", card, "mine", "train")
    assert {one["jpg"] for one in learned} == set(train["a"] + train["b"])
    scored = read(tmp_path / "out", card, "mine", "test")
    assert {(one["jpg"], one["cls"]) for one in scored} == {
        (test["a"][0], b"0"), (test["b"][0], b"1"),
    }  # fmt: skip


@pytest.mark.parametrize("split", ["none", "above", "below"])
def test_folders_of_tasks_are_domains_of_the_same_classes(tmp_path, split):
    for place, domain in enumerate(("photo", "sketch")):
        if split == "none":
            class_folders(tmp_path / "set" / domain, {"a": 4, "b": 4}, start=20 * place)
        for part in ("train", "test") if split != "none" else ():
            inner = (part, domain) if split == "above" else (domain, part)
            start = 20 * place + 10 * (part == "test")
            class_folders(tmp_path.joinpath("set", *inner), {"a": 4, "b": 4}, start=start)
    card = made(tmp_path / "set", tmp_path / "out", folders=True)
    assert card["scenario"] == "domain"
    assert [task["name"] for task in card["tasks"]] == ["photo", "sketch"]
    assert [task["classes"] for task in card["tasks"]] == [["a", "b"]] * 2
    sizes = {"none": (6, 2), "above": (8, 8), "below": (8, 8)}[split]
    assert [(task["size"], task["test_size"]) for task in card["tasks"]] == [sizes] * 2


def test_a_picture_in_two_classes_is_never_on_both_sides(tmp_path):
    class_folders(tmp_path / "set", {"a": 20, "b": 20})
    for number in range(20):
        put(tmp_path / "set" / "b" / f"{number}.jpg", jpeg(number))
    card = made(tmp_path / "set", tmp_path / "out", classes_per_task=1, test_fraction=0.25)
    sides = {"train": set(), "test": set()}
    for entry in card["tasks"]:
        for part, own in sides.items():
            own |= {one["jpg"] for one in read(tmp_path / "out", card, entry["name"], part)}
    assert not sides["train"] & sides["test"]
    assert len(sides["test"]) == 5


def test_every_shard_of_classes_holds_all_of_them(tmp_path):
    class_folders(tmp_path / "set", {"a": 20, "b": 10})
    card = made(tmp_path / "set", tmp_path / "out", shard_samples=9, test_fraction=0.1)
    for name in card["tasks"][0]["train"]:
        labels = [one["cls"] for one in read_samples([tmp_path / "out" / name]).values()]
        assert len(labels) == 9
        assert set(labels) == {b"0", b"1"}


def pictures(folder, count):
    for number in range(count):
        put(folder / f"{number}.jpg", jpeg(number))
    return folder


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_table_of_captions_with_tasks_and_splits(tmp_path, sign):
    pictures(tmp_path / "pics", 6)
    rows = [["Path", "text", "task", "split"]]
    for number in range(6):
        part = "test" if number % 3 == 2 else "train"
        rows.append([f"{number}.jpg", f'"a ""red"" one,;\t\n{number}"', "ab"[number // 3], part])
    name = "t.tsv" if sign == "\t" else "t.csv"
    put(tmp_path / name, "\ufeff" + "\r\n".join(sign.join(row) for row in rows))
    card = made(tmp_path / name, tmp_path / "out", images=tmp_path / "pics")
    assert (card["task_type"], card["scenario"]) == ("captioning", "domain")
    assert [(t["name"], t["size"], t["test_size"]) for t in card["tasks"]] == [
        ("a", 2, 1), ("b", 2, 1),
    ]  # fmt: skip
    assert read(tmp_path / "out", card, "b", "train") == [
        {"jpg": jpeg(n), "txt": f'a "red" one,;\t\n{n}'.encode()} for n in (3, 4)
    ]


def test_a_table_longer_than_a_piece_is_cut_at_rows(tmp_path):
    pictures(tmp_path, 3)
    rows = [f'{number % 3}.jpg,"line\n{number}"' for number in range(2500)]
    put(tmp_path / "t.csv", "path,text\n" + "\n\n".join(rows) + "\n")
    put(tmp_path / "u.csv", "path,text\n0.jpg,x\n")
    card = made(tmp_path / "t.csv", tmp_path / "out", test=tmp_path / "u.csv", shard_samples=1100)
    texts = [one["txt"] for one in read(tmp_path / "out", card, "mine", "train")]
    assert texts == [f"line\n{number}".encode() for number in range(2500)]
    assert len(card["tasks"][0]["train"]) == 3


def test_labels_of_a_table_are_classes(tmp_path):
    pictures(tmp_path, 8)
    rows = [f"{number},{number}.jpg,dog {10 - number % 2}" for number in range(8)]
    put(tmp_path / "t.csv", "id,file_name,label\n" + "\n".join(rows))
    card = made(tmp_path / "t.csv", tmp_path / "out")
    assert card["classes"] == ["dog 9", "dog 10"]
    assert {one["cls"] for one in read(tmp_path / "out", card, "mine", "test")} == {b"0", b"1"}


def test_questions_of_a_table_become_dialogues(tmp_path):
    pictures(tmp_path, 3)
    rows = [f"{n}.jpg,What is it?,thing {n}" for n in range(3)] + [",And without?,nothing"]
    put(tmp_path / "t.csv", "path,question,answer\n" + "\n".join(rows))
    card = made(tmp_path / "t.csv", tmp_path / "out", scorer="contains")
    assert (card["task_type"], card["tasks"][0]["scorer"]) == ("instruction", "contains")
    every = [one for p in ("train", "test") for one in read(tmp_path / "out", card, "mine", p)]
    assert sum("jpg" not in one for one in every) == 1
    assert b'"value": "What is it?"' in next(one for one in every if "jpg" in one)["json"]


def parquet(path, columns, names=None, rows=2):
    """Write a table; ``names`` are those of the classes, noted as the hub's library does."""
    table = pyarrow.table(columns)
    if names:
        note = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def test_a_folder_of_parquet_from_the_hub_is_read_with_its_class_names(tmp_path):
    for part, first in (("train", 0), ("test", 5)):
        images = [{"bytes": jpeg(n), "path": None} for n in range(first, first + 5)]
        columns = {"image": images, "label": [n % 2 for n in range(5)], "other": ["x"] * 5}
        file = tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet"
        parquet(file, columns, ["ant", "bee"])
    card = made(tmp_path / "set", tmp_path / "out")
    assert card["classes"] == ["ant", "bee"]
    learned = read(tmp_path / "out", card, "mine", "train")
    assert [one["jpg"] for one in learned] == [jpeg(n) for n in range(5)]
    assert [one["cls"] for one in learned] == [b"0", b"1", b"0", b"1", b"0"]
    assert card["tasks"][0]["test_size"] == 5


def test_paths_and_plain_bytes_in_parquet_are_pictures_too(tmp_path):
    pictures(tmp_path / "pics", 4)
    by_path = parquet(
        tmp_path / "a.parquet", {"path": [f"{n}.jpg" for n in range(4)], "text": list("abcd")}
    )
    by_bytes = parquet(
        tmp_path / "b.parquet", {"image": [jpeg(n) for n in range(4)], "caption": list("abcd")}
    )
    cards = [
        made(one, tmp_path / one.stem, images=tmp_path / "pics") for one in (by_path, by_bytes)
    ]
    assert cards[0]["hashes"] == cards[1]["hashes"]


def test_a_task_of_new_classes_is_appended_without_renumbering(tmp_path):
    class_folders(tmp_path / "first", {"b": 4, "d": 4})
    class_folders(tmp_path / "second", {"a": 4, "d": 4}, start=50)
    out = tmp_path / "out"
    made(tmp_path / "first", out)
    for _ in range(2):  # the same again changes nothing
        card = made(tmp_path / "second", out, name="more", append=True, license="CC0")
    assert card["classes"] == ["b", "d", "a"]
    assert [(t["name"], t["classes"]) for t in card["tasks"]] == [
        ("mine", ["b", "d"]), ("more", ["d", "a"]),
    ]  # fmt: skip
    assert {one["cls"] for one in read(out, card, "more", "train")} == {b"1", b"2"}
    assert card["tasks"][1]["description"] == "license: CC0"


def test_a_task_of_another_kind_says_so_on_the_card(tmp_path):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    source, images = train_set(tmp_path)
    made(tmp_path / "set", tmp_path / "out")
    card = made(source, tmp_path / "out", name="vqa", images=images, append=True)
    assert [entry.get("task_type") for entry in card["tasks"]] == [None, "instruction"]
    assert card["classes"] == ["a", "b"]


def test_the_same_call_again_changes_nothing_and_a_damaged_shard_is_made_again(tmp_path):
    class_folders(tmp_path / "set", {"a": 6, "b": 6})
    out = tmp_path / "out"
    made(tmp_path / "set", out, shard_samples=3)
    whole = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    made(tmp_path / "set", out, shard_samples=3)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    victim = out / "mine-train-00001.tar"
    victim.write_bytes(bytes(len(victim.read_bytes())))
    made(tmp_path / "set", out, shard_samples=3)
    assert contents(out) == whole


def test_other_data_under_a_name_in_use_is_refused(tmp_path):
    class_folders(tmp_path / "set", {"a": 6, "b": 6})
    made(tmp_path / "set", tmp_path / "out")
    put(tmp_path / "set" / "a" / "0.jpg", jpeg(99))
    with pytest.raises(ValueError, match="card mine.yaml uses it: choose another --out"):
        made(tmp_path / "set", tmp_path / "out")


def test_a_card_of_very_many_shards_has_ranges_and_is_protected_as_well(tmp_path, monkeypatch):
    for module in ("mmcl.core.card.shard_lists", "mmcl.data.shards.stream_writer"):
        monkeypatch.setattr(f"{module}.MAX_INLINE", 3)
    class_folders(tmp_path / "set", {"a": 6, "b": 6})
    card = made(tmp_path / "set", tmp_path / "out", shard_samples=1)
    assert card["tasks"][0]["train"] == ["mine-train-{00000..00009}.tar"]
    assert card["hashes"] == "mine.hashes.tsv"
    class_folders(tmp_path / "more", {"c": 4}, start=50)
    card = made(tmp_path / "more", tmp_path / "out", name="more", append=True, shard_samples=1)
    lines = (tmp_path / "out" / "mine.hashes.tsv").read_text().splitlines()
    assert len(lines) == 12 + 4
    assert all(len(line.split("\t")[1]) == 64 and line.endswith("\t1") for line in lines)
    put(tmp_path / "set" / "a" / "0.jpg", jpeg(99))
    with pytest.raises(ValueError, match="card mine.yaml uses it: choose another --out"):
        made(tmp_path / "set", tmp_path / "out", shard_samples=1)


def test_progress_tells_of_both_passes(tmp_path):
    class_folders(tmp_path / "set", {"a": 3, "b": 3})
    told = []
    made(tmp_path / "set", tmp_path / "out", progress=lambda *words: told.append(words))
    assert told[0] == (f"reading {tmp_path / 'set'}", 3, 6)
    assert told[-1] == ("writing shards", 6, 6)


def test_pictures_are_not_changed_by_a_byte(tmp_path):
    strange = jpeg(1) + b"trailing bytes of some camera"
    files = {"0.jpg": jpeg(2), "1.jpg": strange, "2.png": jpeg(3, "PNG"), "3.jpg": jpeg(4, "WEBP")}
    for name, data in files.items():
        put(tmp_path / "set" / "a" / name, data)
    card = made(tmp_path / "set", tmp_path / "out")
    every = [one for p in ("train", "test") for one in read(tmp_path / "out", card, "mine", p)]
    kept = {hashlib.sha256(data).hexdigest() for one in every for data in one.values()}
    assert {hashlib.sha256(data).hexdigest() for data in files.values()} < kept
    assert sorted(kind for one in every for kind in one if kind != "cls") == [
        "jpg", "jpg", "png", "webp",
    ]  # fmt: skip


def convert_with_two_workers(folder, is_killed):
    """Convert a table in worker processes, and die while the shards are written if told so."""

    def progress(what, done, total):
        if is_killed and what == "writing shards" and done > 900:
            os.kill(os.getpid(), signal.SIGKILL)

    convert_module._MIN_SAMPLES_PER_WORKER = 1
    options = ConvertOptions("mine", shard_samples=300, test_fraction=0.3, num_workers=2)
    convert(open_input(folder / "t.csv"), None, folder / "two", options, progress=progress)


@pytest.mark.slow
def test_processes_write_the_same_bytes_as_one_and_a_kill_loses_nothing(tmp_path):
    pictures(tmp_path, 4)
    rows = [f"{number % 4}.jpg,text {number}" for number in range(4500)]
    put(tmp_path / "t.csv", "path,text\n" + "\n".join(rows))
    made(tmp_path / "t.csv", tmp_path / "one", shard_samples=300, test_fraction=0.3)
    assert in_process(convert_with_two_workers, tmp_path, True) == KILLED
    assert in_process(convert_with_two_workers, tmp_path, False) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
