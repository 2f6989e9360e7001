"""Folders: texts beside images are captions, metadata tables are read, the rest is named once."""

import pytest

from mmcl.data.convert.convert import open_input
from mmcl.data.convert.record import ConvertOptions, InvalidRecord
from tests.data.convert.llava_files import jpeg, put
from tests.data.convert.test_columns import made, table
from tests.data.convert.test_convert import class_folders, convert, parquet, read


def captioned(folder, count, first=0, ending=".txt"):
    for n in range(first, first + count):
        put(folder / f"{n}.jpg", jpeg(n))
        put(folder / f"{n}{ending}", f"thing {n}\n")


def texts_of(out, card):
    every = [s for p in ("train", "test") for s in read(out, card, card["tasks"][0]["name"], p)]
    return {sample["jpg"]: sample["txt"].decode() for sample in every}


@pytest.mark.parametrize("layout", ["flat", "img2dataset", "deep", "captions", "with parquet"])
@pytest.mark.parametrize("task_type", [None, "captioning", "retrieval"])
def test_texts_beside_images_are_captions(tmp_path, layout, task_type):
    home = tmp_path / "set"
    ending = ".caption" if layout == "captions" else ".txt"
    for number, shard in enumerate(("00000", "00001")):
        place = {"flat": ".", "captions": ".", "deep": f"a/b/{shard}"}.get(layout, shard)
        captioned(home / place, 5, 5 * number, ending)
        if layout in ("img2dataset", "with parquet"):
            for n in range(5 * number, 5 * number + 5):
                put(home / place / f"{n}.json", {"status": "success", "key": n})
            put(home / f"{shard}_stats.json", {"count": 5})
        if layout == "with parquet":
            parquet(home / f"{shard}.parquet", {"url": ["http://x"] * 5, "caption": ["x"] * 5})
    card, notes = made(home, tmp_path / "out", task_type=task_type)
    assert card["task_type"] == (task_type or "captioning")
    assert texts_of(tmp_path / "out", card) == {jpeg(n): f"thing {n}" for n in range(10)}
    assert "classes" not in card
    counts = {"img2dataset": "12 files are no images", "with parquet": "14 files are no images"}
    assert notes == [] if layout not in counts else counts[layout] in notes[0]


def test_an_image_without_a_text_is_a_bad_sample_and_some_texts_are_a_question(tmp_path):
    captioned(tmp_path / "set", 19)
    put(tmp_path / "set" / "bare.jpg", jpeg(99))
    put(tmp_path / "set" / "0.txt", b"")
    put(tmp_path / "set" / "1.txt", b"\xff\xfe")
    (chunk,) = open_input(tmp_path / "set").chunks
    reasons = {r.name: r.reason for r in chunk.read() if isinstance(r, InvalidRecord)}
    assert reasons == {
        "set/0.jpg": "its text '0.txt' is empty",
        "set/1.jpg": "its text '1.txt' is not UTF-8: save it as UTF-8",
        "set/bare.jpg": "its text is missing: there is no 'bare.txt'",
    }
    class_folders(tmp_path / "other", {"a": 8, "b": 8})
    put(tmp_path / "other" / "a" / "0.txt", "a text")
    with pytest.raises(ValueError, match="1 of 16 images .* such as 0.txt: choose --task_type cap"):
        open_input(tmp_path / "other")
    opened = open_input(tmp_path / "other", "classification")
    assert opened.notes == ["not used: 1 file is no image (a/0.txt)"]


def test_boxes_beside_images_are_no_captions(tmp_path):
    for n in range(4):
        put(tmp_path / "set" / "a" / f"{n}.jpg", jpeg(n))
        put(tmp_path / "set" / "a" / f"{n}.txt", "0 0.5 0.5 0.25 0.25")
    with pytest.raises(ValueError, match="hold no words .such as 0.txt: '0 0.5.* --task_type"):
        open_input(tmp_path / "set")


def test_tasks_are_folders_of_captioned_images(tmp_path):
    for split, first in (("train", 0), ("val", 20)):
        for number, task in enumerate(("2015", "850")):
            captioned(tmp_path / "set" / split / task, 3, first + 10 * number)
    opened = open_input(tmp_path / "set", task_level=1)
    path, converted = convert(opened, None, tmp_path / "out", ConvertOptions("mine"))
    assert [(e["name"], e["size"], e["test_size"]) for e in converted.entries] == [
        ("850", 3, 3), ("2015", 3, 3),
    ]  # fmt: skip
    assert path.is_file()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("key", ["text", "label"])
def test_metadata_of_an_image_folder_is_read_by_the_rules_of_columns(tmp_path, kind, key):
    home = tmp_path / "set"
    for n in range(6):
        put(home / "sub" / f"{n}.jpg", jpeg(n))
    put(home / "extra.jpg", jpeg(99))
    rows = [{"file_name": f"sub/{n}.jpg", key: f"{'ab'[n % 2]} thing", "width": 3}
            for n in range(6)]  # fmt: skip
    if kind == "csv":
        table(home / "metadata.csv", rows[0], [row.values() for row in rows])
    elif kind == "jsonl":
        import json

        put(home / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        parquet(home / "metadata.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    card, notes = made(home, tmp_path / "out")
    assert card["task_type"] == {"text": "captioning", "label": "classification"}[key]
    assert f"not used of metadata.{kind}: width" in notes
    assert f"not used: 1 images that no metadata.{kind} lists" in notes
    samples = [s for p in ("train", "test") for s in read(tmp_path / "out", card, "mine", p)]
    assert sorted(s["jpg"] for s in samples) == sorted(jpeg(n) for n in range(6))


def test_files_that_are_no_images_are_named_once(tmp_path):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    for n in range(3):
        put(tmp_path / "set" / "a" / f"Thumbs{n}.db", "x")
    put(tmp_path / "set" / "README.md", "x")
    put(tmp_path / "set" / ".hidden", "x")
    _, notes = made(tmp_path / "set", tmp_path / "out")
    listed = "README.md, a/Thumbs0.db, a/Thumbs1.db, ..."
    assert notes == [f"not used: 4 files are no images ({listed})"]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("preview.jpg", "has 1 images beside its folders, such as 'preview.jpg': move .* or give"),
        ("a/more/9.jpg", "a has images, and a folder of images 'more': put all images of a class"),
        ("train.csv", "has the table 'train.csv' beside its folders, .* as SOURCE, or"),
        ("labels.json", "has the table 'labels.json'"),
        ("captions.txt", "has the table 'captions.txt'"),
    ],
)
def test_what_a_folder_may_mean_otherwise_is_refused_unless_it_is_ignored(
    tmp_path, extra, sentence
):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    put(tmp_path / "set" / extra, "0.jpg,a dog\n" if extra == "captions.txt" else jpeg(50))
    with pytest.raises(ValueError, match=sentence):
        open_input(tmp_path / "set")
    name = extra.rpartition("/")[0] or extra
    card, _ = made(tmp_path / "set", tmp_path / "out", ignore_columns=(name,))
    assert card["tasks"][0]["size"] + card["tasks"][0]["test_size"] == 8


def test_options_of_tables_and_shards_are_refused_for_folders(tmp_path):
    class_folders(tmp_path / "set", {"a": 4, "b": 4})
    with pytest.raises(ValueError, match="--text_column is for tables, and .*set is none"):
        made(tmp_path / "set", tmp_path / "out", text_column="text")
    with pytest.raises(ValueError, match="--images is for tables and JSON, and .* is a folder"):
        open_input(tmp_path / "set", images=tmp_path)
    put(tmp_path / "shards" / "00000.tar", b"x")
    with pytest.raises(ValueError, match="holds shards .* list them on a card"):
        open_input(tmp_path / "shards")
