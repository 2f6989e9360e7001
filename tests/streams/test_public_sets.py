"""Miniature copies of the public sets, in the layout in which they are published, are built."""

import json
import shutil

import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.data.shards.open_stream import open_stream
from mmcl.evaluation.scorers import SCORERS
from mmcl.streams.public_sets import build_set, list_sets, locate, read_set
from tests.data.convert.llava_files import asked, jpeg, put, quizzed, samples_of

COUNT = 3


def pair(folder, train, test, images, test_images=None, base="", right=lambda n: f"thing {n}"):
    """Write an instruction file for training, one for test, and the images they name."""
    for file, where, offset, record in (
        (train, images, 0, asked),
        (test, test_images or images, 50, quizzed),
    ):
        names = [f"{where}/{number + offset}.jpg" for number in range(COUNT)]
        for number, name in enumerate(names):
            put(folder / base / name, jpeg(number + offset))
        put(folder / file, [record(n, name, answer=right(n)) for n, name in enumerate(names)])


def captions(folder, place):
    """Write the captions of a test part as COCO has them, two for each image."""
    images = [{"id": n + 1, "file_name": f"{n + 50}.jpg"} for n in range(COUNT)]
    captions = [{"image_id": n + 1, "caption": f"{c} {n}"} for n in range(COUNT) for c in "ab"]
    put(folder / place, {"images": images, "annotations": captions})


def ucit(folder):
    own = {
        "ImageNet-R": ("train", "train/n01", "test/n01"),
        "ArxivQA": ("train_4w", "images", "images"),
        "VizWiz": ("train", "train", "val"),
        "IconQA": ("train", "iconqa_data/iconqa/train/x", "iconqa_data/iconqa/val/x"),
        "CLEVR": ("train_4w", "images/train", "images/val"),
        "Flickr30k": ("train_brief_4w", "train", "val"),
    }
    for name, (train, *images) in own.items():
        files = [f"instructions/{name}/{file}.json" for file in (train, "test_3000")]
        pair(folder, *files, *(f"{name}/{place}" for place in images), base="datasets")
    for name in ("VizWiz", "Flickr30k"):
        captions(folder, f"instructions/{name}/val_coco_type_3000.json")


def coin(folder):
    own = {
        "ScienceQA": ("test", "ScienceQA/images/train/1", "ScienceQA/images/test/1"),
        "TextVQA": ("val", "TextVQA/train_images", None),
        "ImageNet": ("test", "ImageNet/train/n01", "ImageNet/val/n01"),
        "GQA": ("test", "GQA/images", None),
        "VizWiz": ("val", "VizWiz/train", "VizWiz/val"),
        "Grounding": ("test", "COCO2014/train2014", None),
        "VQAv2": ("val", "COCO2014/train2014", "COCO2014/val2014"),
        "OCRVQA": ("test", "OCR-VQA/images", None),
    }
    for name, (test, *images) in own.items():
        files = [f"Instructions_Original/{name}/{file}.json" for file in ("train", test)]
        pair(folder, *files, *images, right="ABC".__getitem__)
    places = [f"COCO2014/train2014/{number + 50}.jpg" for number in range(COUNT)]
    boxes = [quizzed(n, place, answer_bbox="[0.1,0.2,0.3,0.4]") for n, place in enumerate(places)]
    put(folder / "Instructions_Original/Grounding/test.json", boxes)
    votes = [{"question_id": f"q{n}", "answers": ["A"] * 10} for n in range(COUNT)]
    put(folder / "TextVQA/TextVQA_0.5.1_val.json", {"data": votes})


def mllm_dcl(folder):
    for name in ("RS", "Med", "AD", "Sci", "Fin"):
        pair(folder / name, "train.json", "test.json", "images")


def mllm_acl(folder):
    for name in ("OCR", "Math", "VP", "APP"):
        pair(folder / name, "train.json", f"../{name}_test/test.json", "images")
        (folder / f"{name}_test" / "images").mkdir()
        for number in range(50, 50 + COUNT):
            put(folder / f"{name}_test" / "images" / f"{number}.jpg", jpeg(number))
            (folder / name / "images" / f"{number}.jpg").unlink()


def own_file(source, places):
    return next(source / place for place in places if (source / place).is_file())


LAYOUTS = {"ucit": ucit, "coin": coin, "mllm_dcl": mllm_dcl, "mllm_acl": mllm_acl}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def test_every_described_set_has_its_miniature():
    assert list_sets() == sorted(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_is_built_from_its_published_layout(tmp_path, source, name):
    LAYOUTS[name](source)
    described = read_set(name)
    card, built = build_set(described, source, tmp_path / "out")
    stream = TaskStream.read(card)
    prepared = open_stream(stream, verify_hashes=True)
    assert card == tmp_path / "out" / f"{name}.yaml"
    assert [task.name for task in stream] == [task.name for task in described.tasks]
    for task, own, one in zip(stream, described.tasks, built, strict=True):
        assert (task.task_type, task.scorer, task.size) == ("instruction", own.scorer, COUNT)
        assert (task.test_size, task.max_new_tokens) == (COUNT, own.max_new_tokens)
        assert (one.left_out, one.num_bad) == ([], 0)
        for part, offset in (("train", 0), ("test", 50)):
            shown = [image for _, image, _ in samples_of(prepared, task.index, part)]
            assert shown == [jpeg(number + offset) for number in range(COUNT)]
        records = json.loads(own_file(source, own.train).read_text())
        members = [member for _, _, member in samples_of(prepared, task.index, "train")]
        assert members == [{"conversations": record["conversations"]} for record in records]
    license = yaml.safe_load(card.read_text())["license"]
    assert license == described.top["license"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_description_is_complete(name):
    described = read_set(name)
    assert described.name == name
    assert described.summary
    assert described.get.startswith("https://")
    assert set(described.top) >= {"description", "license", "source", "citation"}
    assert all(task.scorer in SCORERS and task.max_new_tokens for task in described.tasks)


def test_captions_and_votes_and_boxes_become_the_right_answers(tmp_path, source):
    ucit(source)
    coin(source)
    found = {}
    for name in ("ucit", "coin"):
        stream = open_stream(TaskStream.read(build_set(read_set(name), source, tmp_path / name)[0]))
        for task in stream.stream:
            answers = [one["answers"] for _, _, one in samples_of(stream, task.index, "test")]
            found[name, task.name] = answers
    assert found["ucit", "VizWiz"] == [["a 0", "b 0"], ["a 1", "b 1"], ["a 2", "b 2"]]
    assert found["ucit", "IconQA"] == [["thing 0"], ["thing 1"], ["thing 2"]]
    assert found["coin", "TextVQA"] == [["A"] * 10] * COUNT
    assert found["coin", "Grounding"] == [["[0.1,0.2,0.3,0.4]"]] * COUNT


def test_all_that_is_missing_is_told_at_once_with_where_to_get_it(source):
    ucit(source)
    shutil.rmtree(source / "datasets" / "VizWiz" / "val")
    (source / "instructions" / "CLEVR" / "test_3000.json").unlink()
    (source / "instructions" / "Flickr30k" / "val_coco_type_3000.json").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        locate(read_set("ucit"), source)
    head, *lines = str(raised.value).splitlines()
    assert "3 things are missing" in head
    assert "task 'VizWiz': image folder datasets/VizWiz/val" in lines[0]
    assert "https://vizwiz.org" in lines[0]
    assert "task 'CLEVR-Math': file instructions/CLEVR/test_3000.json or" in lines[1]
    assert "val_coco_type_3000.json" in lines[2]
    assert "https://huggingface.co/datasets/HaiyangGuo/UCIT" in lines[2]


def test_a_set_in_a_folder_of_its_own_below_the_source_is_found(tmp_path, source):
    mllm_dcl(source / "Domain_data")
    mllm_acl(source / "Ability_data")
    for name in ("mllm_dcl", "mllm_acl"):
        described = read_set(name)
        assert len(locate(described, source)) == len(described.tasks)


def test_some_tasks_and_a_part_of_them_and_later_the_rest(tmp_path, source):
    mllm_dcl(source)
    described = read_set("mllm_dcl")
    out = tmp_path / "out"
    card, _ = build_set(described, source, out, max_samples=2, tasks=["Fin", "Med"])
    assert [(t.name, t.size) for t in TaskStream.read(card)] == [("Med", 2), ("Fin", 2)]
    other = tmp_path / "other"
    card, _ = build_set(described, source, other, tasks=["Fin"])
    before = (other / "Fin-train-00000.tar").stat().st_mtime_ns
    card, _ = build_set(described, source, other)
    assert [task.name for task in TaskStream.read(card)] == ["RS", "Med", "AD", "Sci", "Fin"]
    assert (other / "Fin-train-00000.tar").stat().st_mtime_ns == before


def test_a_task_that_somebody_appended_stays_behind_the_sets_own(tmp_path, source):
    mllm_dcl(source)
    described = read_set("mllm_dcl")
    card, _ = build_set(described, source, tmp_path / "out", tasks=["RS"])
    content = yaml.safe_load(card.read_text())
    content["tasks"].append({"name": "mine", "train": ["a.tar"], "test": ["b.tar"]})
    content["hashes"]["a.tar"] = "0" * 64
    card.write_text(yaml.safe_dump(content, sort_keys=False))
    build_set(described, source, tmp_path / "out", tasks=["RS", "Med"])
    after = yaml.safe_load(card.read_text())
    assert [task["name"] for task in after["tasks"]] == ["RS", "Med", "mine"]
    assert after["hashes"]["a.tar"] == "0" * 64


def test_an_unknown_set_task_or_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no set 'uict': choose one of coin, mllm"):
        read_set("uict")
    with pytest.raises(ValueError, match="ucit has no task 'GQA': it has ImageNet-R, ArxivQA"):
        build_set(read_set("ucit"), tmp_path, tmp_path / "out", tasks=["GQA"])
    with pytest.raises(FileNotFoundError, match="give the downloaded set as --source"):
        locate(read_set("ucit"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: x\ntasks: [{name: a, trian: b}]", "unknown keys .'trian'"),
        ("name: x\ntaks: []\ntasks: []", "unknown keys .'taks'"),
        ("tasks: []", "KeyError: 'name'"),
        ("[", "does not describe a set"),
        ("3", "does not describe a set"),
    ],
)
def test_a_faulty_description_of_ones_own_says_why(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        read_set(str(put(tmp_path / "mine.yaml", text)))


def test_a_description_of_ones_own_is_built(tmp_path, source):
    pair(source, "train.json", "test.json", "pictures")
    tasks = [{"name": "a", "train": "train.json", "test": "test.json", "images": "."}]
    mine = put(tmp_path / "mine.yaml", yaml.safe_dump({"name": "mine", "tasks": tasks}))
    card, _ = build_set(read_set(str(mine)), source, tmp_path / "out")
    (task,) = TaskStream.read(card)
    assert (task.name, task.size, task.scorer) == ("a", COUNT, "exact")
