"""Caption files of COCO and Flickr30k become streams of images with lists of captions."""

import json

import pytest

from mmcl.core import TaskStream
from mmcl.data import open_stream
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.inputs.caption_input import caption_layout
from mmcl.data.convert.inputs.columns import ColumnOptions
from mmcl.data.convert.record import ConvertOptions, InvalidRecord
from tests.data.small_stream import picture

SPLITS = ["train", "restval", "val", "test", "train", "test"]


def karpathy(folder, splits=SPLITS, filepath="val2014", **changes):
    entries = []
    (folder / filepath).mkdir(exist_ok=True)
    for number, split in enumerate(splits):
        name = f"COCO_val2014_{number:012d}.jpg"
        (folder / filepath / name).write_bytes(picture(number, "JPEG"))
        texts = [f"picture {number} in way {way}." for way in "abcde"]
        sentences = [
            {"tokens": text[:-1].split(), "raw": text, "imgid": number, "sentid": 5 * number + n}
            for n, text in enumerate(texts)
        ]
        entry = {
            "filepath": filepath, "sentids": [], "filename": name, "imgid": number,
            "split": split, "sentences": sentences, "cocoid": 100 + number,
        }  # fmt: skip
        entries.append({**entry, **changes})
    return entries


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def converted(path, folder, **options):
    card, done = convert(open_input(path), None, folder, ConvertOptions("s", **options))
    stream = TaskStream.read(card)
    assert stream[0].text_field == "json.captions"
    return open_stream(stream), done


def captions_of(reader):
    return [
        json.loads(reader.read(number).members["json"])["captions"] for number in range(len(reader))
    ]


def test_karpathys_splits(tmp_path):
    path = write(tmp_path / "dataset_coco.json", {"images": karpathy(tmp_path), "dataset": "coco"})
    prepared, done = converted(path, tmp_path / "s")
    train, test = (prepared.reader(0, split) for split in ("train", "test"))
    assert sorted(texts[0] for texts in captions_of(train)) == [
        f"picture {n} in way a." for n in (0, 1, 4)
    ]
    assert sorted(texts[0] for texts in captions_of(test)) == [
        f"picture {n} in way a." for n in (3, 5)
    ]
    assert all(len(texts) == 5 for texts in captions_of(train))
    assert any("1 validation samples are left out" in note for note in done.notes)
    assert train.read(0).members.keys() == {"jpg", "json"}


def test_validation_is_the_test_split_where_there_is_none(tmp_path):
    images = karpathy(tmp_path, ["train", "val", "restval"])
    prepared, done = converted(write(tmp_path / "d.json", {"images": images}), tmp_path / "s")
    assert [texts[0] for texts in captions_of(prepared.reader(0, "test"))] == [
        "picture 1 in way a."
    ]
    assert len(prepared.reader(0, "train")) == 2


def test_flickrs_own_folder_and_words_without_a_sentence(tmp_path):
    images = karpathy(tmp_path, ["train", "test"], "flickr30k-images")
    for image in images:
        del image["filepath"]
        image["sentences"] = [{"tokens": ["a", "man"]}, {"raw": "A dog."}]
    prepared, _ = converted(write(tmp_path / "d.json", {"images": images}), tmp_path / "s")
    assert captions_of(prepared.reader(0, "train")) == [["a man", "A dog."]]


def coco(folder, count=6, year="val2014"):
    (folder / year).mkdir()
    images = []
    for number in range(count):
        name = f"COCO_{year}_{number:012d}.jpg" if year.endswith("14") else f"{number:012d}.jpg"
        (folder / year / name).write_bytes(picture(number, "JPEG"))
        images.append({"license": 1, "file_name": name, "coco_url": "", "id": 50 + number})
    notes = [
        {"image_id": 50 + number, "id": 10 * number + n, "caption": f"picture {number} {n}\n"}
        for n in range(5)
        for number in range(count)
    ]
    return {"info": {}, "images": images, "licenses": [], "annotations": notes}


@pytest.mark.parametrize("year", ["val2014", "val2017"])
def test_cocos_own_captions(tmp_path, year):
    path = write(tmp_path / f"captions_{year}.json", coco(tmp_path, year=year))
    prepared, _ = converted(path, tmp_path / "s", test_fraction=0.3)
    found = [captions_of(prepared.reader(0, split)) for split in ("train", "test")]
    assert [len(part) for part in found] == [4, 2]
    assert sorted(found[0] + found[1]) == [
        [f"picture {number} {n}" for n in range(5)] for number in range(6)
    ]


def test_a_test_file_of_coco(tmp_path):
    train = write(tmp_path / "captions_train2017.json", coco(tmp_path, 3, "train2017"))
    test = write(tmp_path / "captions_val2017.json", coco(tmp_path, 2, "val2017"))
    card, _ = convert(open_input(train), open_input(test), tmp_path / "s", ConvertOptions("s"))
    task = open_stream(TaskStream.read(card)).stream[0]
    assert (task.size, task.test_size) == (3, 2)


def lines(form, count=6):
    return "".join(form.format(name=f"{n}.jpg", n=n, k=k) for n in range(count) for k in range(5))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results_20130124.token", lines("{name}#{k}\tA man {n} {k} .\n")),
        ("Flickr8k.token.txt", lines("{name}#{k}\tA man {n} {k} .\r\n")),
        (
            "results.csv",
            "image_name| comment_number| comment\n" + lines("{name}| {k}| A man {n} {k} .\n"),
        ),
        (
            "results.csv",
            "image_name|comment_number|comment\n" + lines("{name}| {k}   A man {n} {k} .\n"),
        ),
    ],
)
def test_lines_of_captions(tmp_path, name, content):
    folder = tmp_path / "flickr30k-images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
    prepared, _ = converted(write(tmp_path / name, content), tmp_path / "s", test_fraction=0.3)
    found = [each for split in ("train", "test") for each in captions_of(prepared.reader(0, split))]
    assert sorted(found) == [[f"A man {n} {k} ." for k in range(5)] for n in range(6)]


def test_the_same_image_stays_in_one_split(tmp_path):
    content = coco(tmp_path, 12)
    for number in range(12):  # every image twice, under two ids
        name = content["images"][number]["file_name"]
        (tmp_path / "val2014" / name).write_bytes(picture(number // 2, "JPEG"))
    path = write(tmp_path / "captions.json", content)
    prepared, _ = converted(path, tmp_path / "s", test_fraction=0.4)
    images = [
        {reader.read(n).members["jpg"] for n in range(len(reader))}
        for reader in (prepared.reader(0, split) for split in ("train", "test"))
    ]
    assert len(images[1]) >= 2
    assert not images[0] & images[1]


def bad(path, **options):
    found = [
        record for chunk in open_input(path, **options).chunks for record in chunk.read()
        if isinstance(record, InvalidRecord)
    ]  # fmt: skip
    assert len(found) == 1
    return found[0].reason


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split": "trian"}, "its split is 'trian', expected train, restval, val, test"),
        ({"sentences": []}, "it has no caption"),
        ({"sentences": [{"raw": " "}]}, "one of its captions is empty"),
        ({"sentences": [{"raw": 3}]}, "one of its captions is no text"),
        ({"sentences": [{}]}, "one of its captions is no text"),
        ({"filename": "gone.jpg"}, "'val2014/gone.jpg' is missing"),
        ({"filename": "../x.jpg", "filepath": ""}, "leads outside"),
        ({"filename": None}, "it has no filename"),
    ],
)
def test_a_bad_entry_of_karpathys_is_named(tmp_path, changes, sentence):
    images = karpathy(tmp_path, ["train", "test"])
    images[1] |= changes
    assert sentence in bad(write(tmp_path / "d.json", {"images": images}))


def test_annotations_that_do_not_fit_are_named(tmp_path):
    content = coco(tmp_path)
    content["annotations"].append({"image_id": 999, "caption": "lost"})
    path = write(tmp_path / "captions.json", content)
    assert bad(path) == "an annotation is of image 999, which is not among the images"
    content["annotations"] = content["annotations"][1:-1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 52]
    assert bad(write(path, content)) == "it has no caption"


def test_a_file_of_boxes_is_no_file_of_captions(tmp_path):
    content = coco(tmp_path)
    content["annotations"] = [{"image_id": 50, "bbox": [0, 0, 1, 1], "category_id": 3}]
    path = write(tmp_path / "instances_val2014.json", content)
    with pytest.raises(ValueError, match="annotations without captions, with the keys image_id"):
        open_input(path)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture(1, "JPEG"))
    path = write(tmp_path / "r.token", "1.jpg#0\tA man.\nno image at all\n")
    assert bad(path) == "line 2 is no image with a number and a caption"


def test_options_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "d.json", {"images": karpathy(tmp_path)})
    for options, sentence in (
        ({"task_type": "classification"}, "--task_type is classification, .*with captions"),
        ({"references": path}, "--references is for answers"),
        ({"answer_field": "x"}, "--answer_field is for answers"),
        ({"options": ColumnOptions(text_column="x")}, "--text_column is for tables"),
        ({"task_level": 1}, "are for image folders"),
    ):
        with pytest.raises(ValueError, match=sentence):
            open_input(path, **options)
    assert open_input(path, "retrieval").task_type == "retrieval"


def test_a_meaningful_key_is_refused_and_a_harmless_one_listed(tmp_path):
    content = coco(tmp_path)
    content["annotations"][0]["text_detected"] = True
    path = write(tmp_path / "captions.json", content)
    _, done = converted(path, tmp_path / "s")
    assert "not used of captions.json: text_detected" in done.notes
    content["annotations"][0]["weight"] = 0.5
    with pytest.raises(ValueError, match="weight"):
        converted(write(path, content), tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", [{"image": "a.jpg", "conversations": []}]),
        ("a.json", '{"id": 1, "images": ["a.jpg"]}\n{"id": 2}\n'),
        ("a.json", {"images": {"a": 1}}),
        ("a.json", "{"),
        ("a.jsonl", "{}"),
        ("a.csv", "path,text\na.jpg,A dog #1\n"),
        ("a.txt", "a.jpg 3\n"),
    ],
)
def test_other_files_are_left_to_others(tmp_path, name, content):
    assert caption_layout(write(tmp_path / name, content)) is None
