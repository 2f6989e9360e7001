"""Columns of tables and keys of JSON: known by usual names, chosen, or refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.inputs.columns import ColumnOptions, find_columns
from mmcl.data.convert.record import ConvertOptions, Record
from tests.data.convert.llava_files import jpeg, put
from tests.data.convert.test_convert import parquet, pictures, read


def made(source, out, images=None, test=None, task_type=None, task_column=None, options=None,
         **more):  # fmt: skip
    """Convert with options about columns; return the card's content and the notes."""
    columns = ColumnOptions(**more)
    opened = [
        one and open_input(one, task_type, images, task_column=task_column, options=columns)
        for one in (source, test)
    ]
    path, converted = convert(*opened, out, ConvertOptions("mine", **(options or {})))
    return yaml.safe_load(path.read_text()), list(converted.notes)


def table(path, header, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def chosen(header, task_type=None, peek=lambda _: (), images=(), **options):
    columns = find_columns(
        header.split(","), ColumnOptions(task_type, **options), "t.csv", peek=peek, images=images
    )
    return columns.task_type, dict(columns.names), columns.unused


@pytest.mark.parametrize(
    ("header", "task_type", "image", "other"),
    [
        ("filepath,title", "captioning", "filepath", "title"),
        ("image_path,caption", "captioning", "image_path", "caption"),
        ("Image Path,Caption", "captioning", "Image Path", "Caption"),
        ("img-path,alt_text", "captioning", "img-path", "alt_text"),
        ("imageFile,sentences", "captioning", "imageFile", "sentences"),
        ("file_name,text", "captioning", "file_name", "text"),
        ("image,captions", "captioning", "image", "captions"),
        ("filename,description", "captioning", "filename", "description"),
        ("image,prompt", "captioning", "image", "prompt"),
        ("path,labels", "classification", "path", "labels"),
        ("img,fine_label", "classification", "img", "fine_label"),
        ("image_file_path,class_name", "classification", "image_file_path", "class_name"),
        ("FILENAME,Category", "classification", "FILENAME", "Category"),
        ("image,species", "classification", "image", "species"),
        ("filepaths,target", "classification", "filepaths", "target"),
    ],
)
def test_the_usual_names_of_columns_are_known(header, task_type, image, other):
    use = "text" if task_type == "captioning" else "label"
    assert chosen(header) == (task_type, {"path": image, use: other}, ())


@pytest.mark.parametrize(
    ("header", "options", "sentence"),
    [
        ("img,fine_label,coarse_label", {}, "'fine_label' and 'coarse_label', which could each be "
         "the label: choose one with --label_column fine_label"),
        ("path,caption,title", {}, "'caption' and 'title', .* --text_column caption"),
        ("image,file,text", {}, "'image' and 'file', .* --image_column image"),
        ("path,text,Text", {}, "'text' and 'Text', .* --text_column text"),
        ("path,text,split,Split", {}, "'split' and 'Split', .* split: choose one with"),
        ("path,text,bbox", {}, "column 'bbox', which looks like a part of the image, .* give "
         "--ignore_columns bbox if that is right"),
        ("path,label,sample_weight", {}, "'sample_weight', .*--ignore_columns sample_weight"),
        ("path,text,negative_caption", {}, "'negative_caption', .* a negative"),
        ("path,text,caption_de", {}, "'caption_de', which looks like a second caption"),
        ("path,text,domain", {}, "'domain', .* a task .*, or --task_column domain"),
        ("url,caption", {}, "addresses of images .'url'. and no images.* download them"),
        ("image_url,label", {}, "addresses of images .'image_url'."),
        ("cat.jpg,a cat", {}, "has no header, its first row is cat.jpg, a cat: .* --columns"),
        ("a,b", {}, "has the columns a, b: expected .*--image_column, --text_column"),
        ("a,text", {"image_column": "c"}, "no column 'c' for --image_column, it has a, text"),
    ],
)  # fmt: skip
def test_what_is_not_certain_or_meaningful_is_refused_by_name(header, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        chosen(header, **options)


@pytest.mark.parametrize(
    ("header", "options", "names", "unused"),
    [
        ("a,b,c", {"image_column": "b", "text_column": "c"}, {"path": "b", "text": "c"}, ("a",)),
        ("a,B b", {"image_column": "a", "label_column": "b_b"}, {"path": "a", "label": "B b"}, ()),
        ("img,fine_label,coarse_label", {"label_column": "coarse_label"},
         {"path": "img", "label": "coarse_label"}, ("fine_label",)),
        ("img,fine_label,coarse_label", {"ignore_columns": ("coarse_label",)},
         {"path": "img", "label": "fine_label"}, ()),
        ("path,text,label", {"text_column": "text"}, {"path": "path", "text": "text"}, ("label",)),
        ("path,image,text", {}, {"path": "path", "text": "text"}, ("image",)),
        ("path,class_id,class_name", {}, {"path": "path", "label": "class_name"}, ("class_id",)),
        ("path,text,height,width,url", {}, {"path": "path", "text": "text"},
         ("height", "width", "url")),
        ("path,text,caption_length,label", {"task_type": "captioning"},
         {"path": "path", "text": "text"}, ("caption_length", "label")),
        ("path,text,domain,year", {"task_column": "year"},
         {"path": "path", "text": "text", "task": "year"}, ("domain",)),
    ],
)  # fmt: skip
def test_options_choose_columns_and_the_rest_is_listed(header, options, names, unused):
    assert chosen(header, **options)[1:] == (names, unused)


@pytest.mark.parametrize(
    ("name", "values", "is_split"),
    [
        ("split", {"anything"}, True),
        ("set", {"train", "Test", ""}, True),
        ("data set", {"train", "valid", "test"}, True),
        ("partition", {"dev", "training"}, True),
        ("is_train", {"0", "1"}, True),
        ("subset", {"only"}, False),
    ],
)
def test_a_column_of_less_certain_name_is_the_split_by_its_values(name, values, is_split):
    _, names, unused = chosen(f"path,text,{name}", peek=lambda _: values)
    assert names.get("split") == (name if is_split else None)
    assert unused == (() if is_split else (name,))


@pytest.mark.parametrize("values", [{"train", "extra"}, {"coco", "flickr"}, {"0", "1", "2"}])
def test_a_column_that_may_be_a_split_or_a_task_is_refused_unless_it_is_chosen(values):
    with pytest.raises(ValueError, match="'fold' with values such as '.*--ignore_columns fold"):
        chosen("path,text,fold", peek=lambda _: values)
    assert chosen("path,text,fold", peek=lambda _: values, task_column="fold")[2] == ()
    assert chosen("path,text,fold", peek=lambda _: values, split_column="fold")[2] == ()
    assert chosen("path,text,fold", peek=lambda _: values, ignore_columns=("fold",))[2] == ()


def test_an_image_in_a_table_is_preferred_to_a_path_and_a_second_one_is_refused():
    found = chosen("image_file_path,image,labels", images=("image",))
    assert found[1] == {"path": "image", "label": "labels"}
    assert chosen("pixels,label", images=("pixels",))[1]["path"] == "pixels"
    with pytest.raises(ValueError, match="'mask', which looks like a second image"):
        chosen("image,mask,label", images=("image", "mask"))
    with pytest.raises(ValueError, match="'a' and 'b', which could each be the path"):
        chosen("a,b,label", images=("a", "b"))


def test_what_is_not_used_is_listed_once(tmp_path):
    pictures(tmp_path, 4)
    rows = [(f"{n}.jpg", f"thing {n}", 8, 10, "http://x") for n in range(4)]
    source = table(tmp_path / "t.csv", ["filepath", "title", "height", "width", "url"], rows)
    _, notes = made(source, tmp_path / "out")
    assert notes == ["not used of t.csv: height, width, url"]


def test_a_name_to_ignore_that_an_input_does_not_have_is_listed(tmp_path):
    pictures(tmp_path, 4)
    rows = [(f"{n}.jpg", f"thing {n}", 8) for n in range(4)]
    source = table(tmp_path / "t.csv", ["filepath", "title", "height"], rows)
    _, notes = made(source, tmp_path / "a", ignore_columns=("height", "bboxx"))
    assert notes == ["--ignore_columns names bboxx, which t.csv does not have"]
    for label in ("cat", "dog"):
        pictures(tmp_path / "set" / label, 3)
        put(tmp_path / "set" / label / "notes.md", "x")
    _, notes = made(tmp_path / "set", tmp_path / "b", ignore_columns=("notes.md", "masks"))
    assert notes == ["--ignore_columns names masks, which set does not have"]
    put(tmp_path / "c.token", "".join(f"{n}.jpg#0\ta thing {n}\n" for n in range(4)))
    _, notes = made(tmp_path / "c.token", tmp_path / "c", ignore_columns=("split",))
    assert notes == ["--ignore_columns names split, which c.token does not have"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "jsonl"])
def test_every_field_of_every_source_is_used_listed_or_refused(tmp_path, kind):
    pictures(tmp_path, 4)
    rows = [{"path": f"{n}.jpg", "text": f"thing {n}", "hue": n, "note": "x"} for n in range(4)]

    def source(more):
        fields = [{**row, **more} for row in rows]
        names = list(fields[0])
        if kind == "csv":
            return table(tmp_path / "t.csv", names, [row.values() for row in fields])
        if kind == "parquet":
            columns = {name: [row[name] for row in fields] for name in names}
            return parquet(tmp_path / "t.parquet", columns)
        lines = fields if kind == "json" else "\n".join(map(json.dumps, fields))
        return put(tmp_path / f"t.{kind}", lines)

    _, notes = made(source({}), tmp_path / "out")
    assert notes == [f"not used of t.{kind}: hue, note"]
    for name in ("sample weight", "bbox", "negative_text", "caption_long", "session", "masks"):
        with pytest.raises(ValueError, match=f"{name!r}.* --ignore_columns {name}"):
            made(source({name: "1"}), tmp_path / "other")
        made(source({name: "1"}), tmp_path / "other", ignore_columns=(name,))
        for path in (tmp_path / "other").iterdir():
            path.unlink()


@pytest.mark.parametrize("kind", ["parquet", "json list", "python list", "jsonl", "raw"])
def test_lists_of_captions_become_one_member_with_all_of_them(tmp_path, kind):
    pictures(tmp_path, 4)
    captions = [[f"a {n}", f'ein {n}, "é"'] for n in range(4)]
    paths = [f"{n}.jpg" for n in range(4)]
    if kind in ("parquet", "raw"):
        values = captions if kind == "parquet" else [[{"raw": c} for c in cs] for cs in captions]
        source = parquet(tmp_path / "t.parquet", {"filename": paths, "sentences": values})
    elif kind == "jsonl":
        records = [{"image": p, "caption": c} for p, c in zip(paths, captions, strict=True)]
        source = put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, records)))
    else:
        write = json.dumps if kind == "json list" else repr
        rows = [(p, write(c)) for p, c in zip(paths, captions, strict=True)]
        source = table(tmp_path / "t.csv", ["image", "caption"], rows)
    card, _ = made(source, tmp_path / "out")
    assert card["tasks"][0]["text_field"] == "json.captions"
    samples = [s for p in ("train", "test") for s in read(tmp_path / "out", card, "mine", p)]
    of_image = {jpeg(n): {"captions": captions[n]} for n in range(4)}
    assert len(samples) == 4
    for sample in samples:
        assert json.loads(sample["json"]) == of_image[sample["jpg"]]
        assert set(sample) == {"jpg", "json"}


def test_a_single_text_among_lists_is_a_list_of_one(tmp_path):
    pictures(tmp_path, 4)
    rows = [("0.jpg", "[draft] plain"), ("1.jpg", '["a", "b"]'), ("2.jpg", "c"), ("3.jpg", "d")]
    card, _ = made(table(tmp_path / "t.csv", ["path", "text"], rows), tmp_path / "out")
    samples = [s for p in ("train", "test") for s in read(tmp_path / "out", card, "mine", p)]
    texts = {s["jpg"]: json.loads(s["json"])["captions"] for s in samples}
    assert texts == {
        jpeg(0): ["[draft] plain"], jpeg(1): ["a", "b"], jpeg(2): ["c"], jpeg(3): ["d"],
    }  # fmt: skip


def records_of(source, **options):
    opened = open_input(source, options=ColumnOptions(**options))
    return [record for chunk in opened.chunks for record in chunk.read()], opened


def test_labels_in_lists_are_read_if_there_is_one(tmp_path):
    columns = {"image": [jpeg(n) for n in range(3)], "labels": [[1], [0], [0, 1]]}
    note = {"info": {"features": {"labels": {"feature": {"names": ["ant", "bee"]}}}}}
    source = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(note)})
    pyarrow.parquet.write_table(source, tmp_path / "t.parquet")
    records, opened = records_of(tmp_path / "t.parquet")
    assert [record.label for record in records[:2]] == ["bee", "ant"]
    assert opened.classes == ("ant", "bee")
    assert records[2].reason == (
        "its label is a list of 2 values, expected one: a sample has one class"
    )


def test_labels_of_other_types_become_names(tmp_path):
    for values, names in (([True, False], ["True", "False"]), ([1.0, 2.0], ["1", "2"])):
        columns = {"image": [jpeg(n) for n in range(2)], "label": values}
        records, _ = records_of(parquet(tmp_path / "t.parquet", columns))
        assert [record.label for record in records] == names
    columns = {"image": [jpeg(n) for n in range(2)], "text": [float("nan"), 1.5]}
    records, _ = records_of(parquet(tmp_path / "t.parquet", columns))
    assert records[0].reason == "its text is empty"
    assert records[1].members["txt"] == b"1.5"


def test_a_label_without_a_name_is_told_with_its_number(tmp_path):
    columns = {"image": [jpeg(n) for n in range(2)], "label": [-1, 1]}
    records, _ = records_of(parquet(tmp_path / "t.parquet", columns, ["ant", "bee"]))
    assert records[0].reason == "its label is -1, and the table names 2 (row 1 of t.parquet)"


def test_json_records_of_captions_and_labels_are_rows_of_a_table(tmp_path):
    pictures(tmp_path, 2)
    for key, values, kind in (
        ("caption", ["a", "b"], "captioning"),
        ("label", [3, 5], "classific"),
    ):
        rows = [{"image": f"{n}.jpg", key: values[n], "image_id": n} for n in range(2)]
        records, opened = records_of(put(tmp_path / "t.json", rows))
        assert opened.task_type.startswith(kind)
        assert [record.members["jpg"] for record in records] == [jpeg(0), jpeg(1)]
        assert opened.notes == ["not used of t.json: image_id"]
    rows = [{"image": "0.jpg", "question": "what?", "answer": "a", "question_id": 7}]
    records, opened = records_of(put(tmp_path / "t.json", rows))
    assert opened.task_type == "instruction"
    assert b"what?" in records[0].members["json"]


def test_keys_of_conversations_are_listed_or_refused(tmp_path):
    pictures(tmp_path, 4)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "thing"}]
    rows = [{"id": n, "image": f"{n}.jpg", "conversations": turns, "origin": 1} for n in range(4)]
    _, notes = made(put(tmp_path / "t.json", rows), tmp_path / "out")
    assert notes == ["not used of t.json: origin"]
    rows[3]["loss_weight"] = 2
    source = put(tmp_path / "u.json", rows)
    with pytest.raises(ValueError, match="with the key 'loss_weight', .* --ignore_columns loss_w"):
        made(source, tmp_path / "two")
    made(source, tmp_path / "two", ignore_columns=("loss_weight",))
    with pytest.raises(ValueError, match="--text_column is for tables, and .*u.json is none"):
        made(source, tmp_path / "two", text_column="x")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", "|", "\t"])
def test_encodings_and_delimiters_of_tables(tmp_path, encoding, delimiter):
    pictures(tmp_path, 3)
    # U+0A0A and U+010A hold the byte of a line's end.
    texts = ['Ġ "quoted"\nnewline ਊ', "ascii", "日本; é"]
    file = tmp_path / "t.csv"
    mark = "\ufeff" * (encoding == "utf-16-be")
    with file.open("w", newline="", encoding=encoding) as out:
        out.write(mark)
        rows = [("path", "text"), *((f"{n}.jpg", text) for n, text in enumerate(texts))]
        csv.writer(out, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    records, _ = records_of(file)
    assert [record.members["txt"].decode() for record in records] == texts


def test_a_table_in_latin_1_names_the_line(tmp_path):
    pictures(tmp_path, 2)
    put(tmp_path / "t.csv", "path,text\n0.jpg,a\n1.jpg,caf\xe9\n".encode("latin-1"))
    records, _ = records_of(tmp_path / "t.csv")
    assert records[1].reason == "its text is not UTF-8 (line 3): save the table as UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "columns", "texts"),
    [
        ("t.csv", "0.jpg,one\n1.jpg,two\n", ("path", "text"), ["one", "two"]),
        ("t.txt", "0.jpg one dog\n1.jpg two\n", ("path", "text"), ["one dog", "two"]),
        ("t.txt", "0.jpg\tone dog\n1.jpg\ttwo\n", ("path", "text"), ["one dog", "two"]),
    ],
)
def test_tables_and_lists_without_a_header_have_columns_by_option(
    tmp_path, name, content, columns, texts
):
    pictures(tmp_path, 2)
    records, _ = records_of(put(tmp_path / name, content), columns=columns)
    assert [record.members["txt"].decode() for record in records] == texts


def test_a_list_of_paths_with_spaces_and_labels_is_read(tmp_path):
    put(tmp_path / "a b.jpg", jpeg(0))
    put(tmp_path / "c.jpg", jpeg(1))
    source = put(tmp_path / "train.txt", "a b.jpg 3\n\nc.jpg 12\n")
    records, _ = records_of(source, columns=("path", "label"))
    assert [(r.members["jpg"], r.label) for r in records] == [(jpeg(0), "3"), (jpeg(1), "12")]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("t.csv.gz", "is compressed: unpack it first"),
        ("t.xlsx", "is a spreadsheet: save it as .csv"),
        ("t.tar", "is a shard, which needs no conversion: list it on a card"),
        ("t.arrow", "is part of a saved data set: give its folder"),
        ("t.doc", "ends in '.doc': expected .csv"),
    ],
)
def test_files_of_other_forms_are_refused_by_name(tmp_path, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_input(put(tmp_path / name, b"x"))


def stated(source, paths, images=None):
    """Return for each stated path the image that is read, or the reason why none is."""
    rows = [(path, "x") for path in paths]
    opened = open_input(table(source, ["path", "text"], rows), images=images)
    found = [record for chunk in opened.chunks for record in chunk.read()]
    return [r.members["jpg"] if isinstance(r, Record) else r.reason for r in found], found


def test_paths_are_found_in_the_forms_in_which_tables_state_them(tmp_path):
    put(tmp_path / "pics" / "a b.jpg", jpeg(0))
    put(tmp_path / "pics" / "50%20off.jpg", jpeg(1))
    forms = {
        "a b.jpg": 0, "./a b.jpg": 0, "a%20b.jpg": 0, ".\\a b.jpg": 0, "50%20off.jpg": 1,
        f"{tmp_path}/pics/a b.jpg": 0, f"file://{tmp_path}/pics/a%20b.jpg": 0,
    }  # fmt: skip
    found, _ = stated(tmp_path / "t.csv", forms, tmp_path / "pics")
    assert found == [jpeg(number) for number in forms.values()]


def test_images_on_several_disks_are_searched_in_order_and_nothing_outside_is_read(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    put(one / "a.jpg", jpeg(0))
    put(one / "both.jpg", jpeg(1))
    put(two / "both.jpg", jpeg(2))
    put(two / "b.jpg", jpeg(3))
    put(tmp_path / "secret.jpg", jpeg(4))
    (one / "to_two.jpg").symlink_to(two / "b.jpg")
    (one / "to_secret.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = ["a.jpg", "both.jpg", "b.jpg", str(two / "both.jpg"), "to_two.jpg"]
    found, records = stated(tmp_path / "t.csv", paths, [one, two])
    assert found == [jpeg(0), jpeg(1), jpeg(3), jpeg(2), jpeg(3)]
    assert [bool(record.remarks) for record in records] == [False, True, False, False, False]
    bad = [str(tmp_path / "secret.jpg"), "../secret.jpg", "file:///etc/passwd"]
    reasons, _ = stated(tmp_path / "t.csv", bad, [one, two])
    assert all("leads outside of the image folders " in reason for reason in reasons)
    reasons, _ = stated(tmp_path / "t.csv", ["to_secret.jpg"], [one, two])
    assert "is missing" in reasons[0]
    reasons, _ = stated(
        tmp_path / "t.csv", ["c.jpg", "s3://b/c.jpg", "https://h/c.jpg"], [one, two]
    )
    assert reasons[0] == f"its image 'c.jpg' is missing (no file '{one}/c.jpg')"
    assert all("is remote: download it" in reason for reason in reasons[1:])


def test_images_in_two_folders_and_missing_ones_are_told(tmp_path):
    pictures(tmp_path / "one", 4)
    pictures(tmp_path / "two", 2)
    source = table(tmp_path / "t.csv", ["path", "text"], [(f"{n}.jpg", "x") for n in range(4)])
    _, notes = made(source, tmp_path / "out", images=[tmp_path / "one", tmp_path / "two"])
    text = "images are in several folders of --images: the first is taken"
    assert notes == [f"t.csv, 2 samples: {text}"]
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ValueError, match="(?s)no file '.*/nowhere/0.jpg'.*start from .* --images"):
        made(source, tmp_path / "other", images=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="which is remote: download it first"):
        open_input(type(tmp_path)("s3://bucket/t.csv"))


def test_a_saved_data_set_of_hugging_face_is_read(tmp_path):
    schema = pyarrow.schema({"image": pyarrow.struct({"bytes": pyarrow.binary(),
                                                      "path": pyarrow.string()}),
                             "label": pyarrow.int64()})  # fmt: skip
    note = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    schema = schema.with_metadata({"huggingface": json.dumps(note)})
    put(tmp_path / "set" / "dataset_dict.json", {"splits": ["train", "test"]})
    for first, split in ((0, "train"), (10, "test")):
        home = tmp_path / "set" / split
        put(home / "state.json", {"_data_files": []})
        put(home / "dataset_info.json", {})
        path = str(home / "data-00000-of-00001.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for start in (first, first + 3):
                rows = [
                    {"image": {"bytes": jpeg(n), "path": None}, "label": n % 2}
                    for n in range(start, start + 3)
                ]
                writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    card, notes = made(tmp_path / "set", tmp_path / "out")
    assert card["classes"] == ["ant", "bee"]
    learned = read(tmp_path / "out", card, "mine", "train")
    assert [(s["jpg"], int(s["cls"])) for s in learned] == [(jpeg(n), n % 2) for n in range(6)]
    assert card["tasks"][0]["test_size"] == 6
    assert "6 train samples are trained on, 6 test samples are the test samples" in notes[0]
