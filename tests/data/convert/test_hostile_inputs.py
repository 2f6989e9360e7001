"""What is given by mistake or on purpose: told in a sentence, before anything is written."""

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from tests.data.convert.llava_files import asked, jpeg, put
from tests.data.convert.test_convert import class_folders, contents, made, pictures, read


def refused(tmp_path, source, said, **more):
    """Check that nothing is written and the error says why; return its text."""
    out = tmp_path / "out"
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        made(source, out, **more)
    assert not out.exists()
    return str(raised.value)


def test_all_errors_are_told_before_anything_is_written_and_may_be_left_out(tmp_path):
    class_folders(tmp_path / "set", {"a": 30, "b": 4})
    for number in range(12):
        put(tmp_path / "set" / "a" / f"{number}.jpg", b"" if number else b"8BPS\0\1" + bytes(30))
    put(tmp_path / "set" / "b" / "0.jpg", jpeg(1)[:-60])
    put(tmp_path / "set" / "b" / "notes.txt", "passed over")
    text = refused(
        tmp_path, tmp_path / "set", "13 of 34 samples in .*--skip_bad or --max_bad_fraction 0.39:"
    )
    assert re.search(
        r"sample 0 \(id 'a/0.jpg'\): its image 'a/0.jpg' is Photoshop, not JPEG, PNG, WebP, GIF",
        text,
    )
    assert re.search(r"sample 1 \(id 'a/1.jpg'\): its \w+ 'a/1.jpg' has 0 bytes", text)
    assert text.endswith("and 3 more")
    options = ConvertOptions("mine", max_bad_fraction=0.4)
    _, result = convert(open_input(tmp_path / "set"), None, tmp_path / "out", options)
    assert (result.num_bad, len(result.left_out)) == (13, 13)
    assert sum(entry["size"] + entry["test_size"] for entry in result.entries) == 21
    listed = (tmp_path / "out" / "mine.left_out.txt").read_text().splitlines()
    assert len(listed) == 13
    assert "sample 30" in listed[-1]
    assert "its JPEG is broken" in listed[-1]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("photo_id,words", "columns photo_id, words: expected path,text .captions., "),
        ("path", "has the columns path: expected path,text"),
        ("path,text,label", "could be captioning or classification: choose one with --task_type"),
        ("", "has the columns 1, 2, 3: expected"),
        ("\x1b[31m", "expected path,text"),
    ],
)
def test_missing_columns_are_told_with_those_that_are_there(tmp_path, header, said):
    put(tmp_path / "t.csv", f"{header}\n1,2,3\n")
    text = refused(tmp_path, tmp_path / "t.csv", said)
    assert "\x1b" not in text


def test_a_kind_that_the_columns_do_not_allow_names_what_is_missing(tmp_path):
    put(tmp_path / "t.csv", "path,text\n0.jpg,x\n")
    refused(
        tmp_path,
        tmp_path / "t.csv",
        "lacks the column question and answer",
        task_type="instruction",
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("/etc/passwd,x", "'/etc/passwd' leads outside of the image folder"),
        ("../../etc/passwd,x", "leads outside"),
        ("/proc/self/environ,x", "leads outside"),
        ("link.jpg,x", "leads outside"),
        ("0.jpg,", "its text is empty"),
        ("0.jpg,\xff", "its text is not UTF-8"),
        ("0.jpg,a,b", "its row has 3 cells, the header has 2"),
        ("0.jpg", "its row has 1 cells, the header has 2"),
        (",x", "its image is '', expected a path"),
        ("a\0b.jpg,x", "is missing"),
        ('"a\nb.jpg",x', r"'a\\nb.jpg' is missing"),
        ("0.jpg," + "x" * 100_000 + "," * 9, "its row has 11 cells"),
    ],
)
def test_a_bad_row_is_named_and_nothing_outside_is_read(tmp_path, row, said):
    pictures(tmp_path / "pics", 2)
    put(tmp_path / "secret.jpg", jpeg(9))
    (tmp_path / "pics" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    put(tmp_path / "t.csv", f"path,text\n0.jpg,x\n{row}\n1.jpg,y\n".encode("latin-1"))
    images = tmp_path / "pics"
    text = refused(tmp_path, tmp_path / "t.csv", "1 of 3 samples", images=images)
    assert "sample 1" in text
    card = made(tmp_path / "t.csv", tmp_path / "out", images=images, max_bad_fraction=1.0)
    assert read(tmp_path / "out", card, "mine", "train")
    assert re.search(said, (tmp_path / "out" / "mine.left_out.txt").read_text())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('0.jpg,"' + "x\n" * 200_000, "perhaps a quote was opened and not closed"),
        ("0.jpg," + "x" * (5 << 20), "its text has 5242880 bytes, more than 1048576"),
        ("", "has a header and no rows"),
    ],
)
def test_a_table_that_cannot_be_cut_into_rows_says_where(tmp_path, rows, said):
    put(tmp_path / "0.jpg", jpeg(0))
    put(tmp_path / "t.csv", f"path,text\n{rows}")
    refused(tmp_path, tmp_path / "t.csv", said)


def test_a_line_beyond_the_limit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcl.data.convert.inputs.table_input._MAX_LINE", 1 << 16)
    put(tmp_path / "t.csv", "path,text\n0.jpg," + "x" * (1 << 16))
    refused(tmp_path, tmp_path / "t.csv", "has a line of more than 65536 bytes at 2")


def test_names_with_newlines_and_bytes_that_are_no_text_are_read(tmp_path):
    folder = os.fsencode(tmp_path / "set" / "a")
    os.makedirs(folder)
    for number, name in enumerate([b"a\nb.jpg", b"\xff\xfe.jpg", b"\x1b[31m.jpg", b"x.y.jpg"]):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(jpeg(number))
    os.rename(folder, os.fsencode(tmp_path / "set") + b"/cl\xff")
    card = made(tmp_path / "set", tmp_path / "out")
    assert card["classes"] == ["cl\\xff"]
    every = [one for p in ("train", "test") for one in read(tmp_path / "out", card, "mine", p)]
    assert sorted(one["jpg"] for one in every) == sorted(jpeg(n) for n in range(4))


def test_a_name_in_a_table_need_not_be_utf8(tmp_path):
    for name in (b"\xe9.jpg", b"1.jpg"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(jpeg(name[0]))
    put(tmp_path / "t.csv", b"path,text\n\xe9.jpg,x\n1.jpg,y\n")
    assert made(tmp_path / "t.csv", tmp_path / "out")["tasks"][0]["size"] == 1


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (["0.jpg", "1.jpg"], "has no class folders and 2 images: expected .*<class>/image.jpg"),
        ([], "has no class folders and 0 images"),
        (["a/x/0.jpg"], "a has no images .* give --tasks_are_folders"),
        (["a/readme.txt"], "a has no images"),
    ],
)
def test_a_folder_laid_out_otherwise_says_what_was_found(tmp_path, layout, said):
    (tmp_path / "set").mkdir()
    for name in layout:
        put(tmp_path / "set" / name, jpeg())
    refused(tmp_path, tmp_path / "set", said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "in the middle of its list"),
        ("{}" * 10, "1 of 1 samples"),
        ("[" * 100_000 + "]" * 100_000, "1 of 1 samples .*|nested more than 64 deep"),
        ('{"a":' * 100_000, "1 of 1 samples"),
        ("null", "holds no samples"),
        (b"\x00\x01\x02", "holds no samples"),
        (b"PK\x03\x04", "holds no samples .it starts with byte 0x50."),
        ('[1, "x", null, [], {"conversations": {"from": 3}}, {"image": {}}]', "6 of 6 samples"),
    ],
)
def test_json_that_is_nonsense_is_told(tmp_path, content, said):
    refused(tmp_path, put(tmp_path / "x.json", content), said)


def test_a_bad_record_between_good_ones_is_named(tmp_path):
    pictures(tmp_path, 2)
    records = [json.dumps(asked(n, f"{n}.jpg")) for n in range(2)]
    deep = '{"id": "deep", "x": ' + "[" * 5000 + "]" * 5000 + "}"
    put(tmp_path / "x.json", f"[{records[0]}, {deep}, {records[1]}]")
    text = refused(tmp_path, tmp_path / "x.json", "1 of 3 samples")
    assert "sample 1 (id ''): its record is nested more than 64 deep" in text


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"path": [1, 2], "text": ["a", "b"]}, "its image is '1', expected a path"),
        ({"image": [[1], [2]], "text": ["a", "b"]}, "expected a path"),
        ({"image": [{"bytes": None, "path": None}] * 2, "text": ["a", "b"]}, "'None'"),
        ({"image": [{"bytes": b"", "path": "/etc/passwd"}] * 2, "text": ["a", "b"]}, "outside"),
        ({"image": [b"no picture"] * 2, "text": ["a", "b"]}, "not JPEG, PNG, WebP, GIF"),
        ({"image": [jpeg(0)] * 2, "text": [[], []]}, "its text is a list, expected a text"),
        ({"image": [jpeg(0)] * 2, "text": [None, ""]}, "its text is empty"),
        ({"image": [jpeg(0)] * 2, "label": [None, None]}, "its label is empty"),
        ({"image": [jpeg(0)] * 2, "text": ["a", "b"], "split": ["extra"] * 2},
         "its split is 'extra', expected train, val or test (row 1 of t.parquet)"),
    ],
)  # fmt: skip
def test_a_parquet_of_wrong_types_is_told_row_by_row(tmp_path, columns, said):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    text = refused(tmp_path, tmp_path / "t.parquet", "2 of 2 samples")
    assert said in text


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"path,text\n"])
def test_a_parquet_that_is_none_is_told(tmp_path, content):
    refused(tmp_path, put(tmp_path / "t.parquet", content), "is no parquet file")


def test_a_label_that_the_table_has_no_class_for_is_told(tmp_path):
    table = pyarrow.table({"image": [jpeg(n) for n in range(4)], "label": [0, 1, 7, -1]})
    note = '{"info": {"features": {"label": {"names": ["a", "b"]}}}}'
    table = table.replace_schema_metadata({"huggingface": note})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    refused(tmp_path, tmp_path / "t.parquet", "2 of 4 samples")


@pytest.mark.parametrize("note", ["{", "[]", "[" * 9999, '{"info": {"features": {"label": 3}}}'])
def test_a_note_of_classes_that_is_nonsense_is_passed_over(tmp_path, note):
    table = pyarrow.table({"image": [jpeg(n) for n in range(4)], "label": [0, 1, 0, 1]})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": note}), tmp_path / "t.parquet"
    )
    assert made(tmp_path / "t.parquet", tmp_path / "out")["classes"] == ["0", "1"]


def test_a_source_that_changes_between_the_passes_is_told(tmp_path):
    class_folders(tmp_path / "set", {"a": 3, "b": 3})

    def spoil(what, done, total):
        if what.startswith("reading") and done == total:
            for path in (tmp_path / "set").glob("*/*.jpg"):
                put(path, b"")

    with pytest.raises(RuntimeError, match="changed while the stream was written .* same command"):
        made(tmp_path / "set", tmp_path / "out", progress=spoil)
    assert not (tmp_path / "out" / "mine.yaml").exists()


def test_nothing_to_test_on_is_told(tmp_path):
    class_folders(tmp_path / "set", {"a": 1, "b": 1})
    refused(tmp_path, tmp_path / "set", "has no test samples .* give --test")


def test_tasks_stated_twice_are_refused(tmp_path):
    pictures(tmp_path, 4)
    put(tmp_path / "t.csv", "path,label,task\n" + "".join(f"{n}.jpg,c{n},t\n" for n in range(4)))
    refused(tmp_path, tmp_path / "t.csv", "states its tasks itself .*'t'.: leave out",
            classes_per_task=2)  # fmt: skip


def test_a_name_of_a_task_cannot_leave_the_folder(tmp_path):
    pictures(tmp_path, 6)
    rows = [f"{n}.jpg,x{n},../../{'ab'[n % 2]}\n" for n in range(6)]
    put(tmp_path / "t.csv", "path,text,task\n" + "".join(rows))
    before = set(tmp_path.iterdir())
    card = made(tmp_path / "t.csv", tmp_path / "out")
    assert [task["name"] for task in card["tasks"]] == ["../../a", "../../b"]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    assert [name for name in contents(tmp_path / "out") if name.endswith(".tar")] == [
        "a-test-00000.tar", "a-train-00000.tar", "b-test-00000.tar", "b-train-00000.tar",
    ]  # fmt: skip
