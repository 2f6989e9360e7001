"""`check_stream`: everything that is wrong with a stream in one go, and nothing that is not."""

import hashlib
import io
import json
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from mmcl.data.image_formats import READABLE
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.validate import validate
from mmcl.data.validate.results import value_range
from mmcl.data.validate.shard_check import check_shard
from mmcl.data.validate.validate import check_stream
from tests.data.small_stream import (
    coloured,
    dialogue,
    labelled,
    picture,
    write_tar,
)
from tests.data.small_stream import write_answer_stream as write_any_answer_stream
from tests.data.small_stream import write_stream as write_any_stream


def write_stream(folder, *rest, **changes):
    """A small stream without twins: by default two of its pictures are of the same noise."""
    return write_any_stream(
        folder, *rest, **{"b_test": labelled(5, (2, 3), name="bexam"), **changes}
    )


def write_answer_stream(folder, **changes):
    """Likewise of questions."""
    write_any_answer_stream(folder, **{"b_test": coloured(5, 1, name="bexam"), **changes})


def rewrite(folder, change, name="small.yaml"):
    card = yaml.safe_load((folder / name).read_text())
    change(card)
    (folder / name).write_text(yaml.safe_dump(card, sort_keys=False))


def hashed(folder):
    """Put the hash of every shard on the card."""
    names = sorted(path.name for path in folder.glob("*.tar"))
    hashes = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    rewrite(folder, lambda card: card.update(hashes=hashes))


def replaced(members, changes):
    """Exchange the content of members; None leaves one out."""
    made = [(name, changes.get(name, content)) for name, content in members]
    return [pair for pair in made if pair[1] is not None]


def again(data):
    """The same pixels in another PNG file."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "PNG", compress_level=1)
    assert file.getvalue() != data
    return file.getvalue()


def check(folder, **options):
    return check_stream(folder / "small.yaml", cache_dir=folder / "cache", num_workers=0, **options)


def test_a_good_stream_has_no_fault_and_is_counted_right(tmp_path):
    write_stream(tmp_path)
    hashed(tmp_path)
    found = check(tmp_path)
    assert (found.errors, found.warnings) == ((), ())
    assert [task.task.name for task in found.tasks] == ["task-a", "task-b", "task-c"]
    assert [(t.train.samples, t.test.samples) for t in found.tasks] == [(10, 5), (7, 5), (5, 5)]
    first = found.tasks[0]
    assert first.classes == ("c0", "c1")
    assert (first.train.labels, first.test.labels) == ((5, 5), (3, 2))
    assert first.train.sizes == ((8, 6), (8, 6), (8, 6))
    assert first.train.lengths is None
    assert first.train.size_bytes == (tmp_path / "a-train.tar").stat().st_size
    assert found.tasks[1].classes == ("c2", "c3")
    assert found.tasks[1].train.labels == (4, 3)


def test_every_sort_of_fault_is_told_in_one_go(tmp_path):
    train, test = labelled(12, (0, 1), name="atrain"), labelled(5, (0, 1), name="atest")
    bad = {
        "atrain000.png": b"",
        "atrain001.png": picture(1)[:60],
        "atrain002.png": picture(2, size=(400, 300)),
        "atrain003.png": b"8BPS\0\1",
        "atrain004.png": None,
        "atrain005.cls": b"one",
        "atrain006.cls": b"77",
        "atrain007.cls": b"2",
        "atrain008.cls": None,
    }
    write_stream(
        tmp_path,
        a_train=replaced(train, bad),
        a_test=replaced(test, {"atest003.png": dict(train)["atrain009.png"]}),
        b_train=labelled(7, (2, 3), name="btrain") + labelled(1, (2,), name="btrain"),
    )
    whole = (tmp_path / "b-test.tar").read_bytes()
    (tmp_path / "b-test.tar").write_bytes(whole[:3000])
    (tmp_path / "c-train.tar").unlink()
    own = hashlib.sha256((tmp_path / "c-test.tar").read_bytes()).hexdigest()

    def change(card):
        card["hashes"] = {"c-test.tar": "0" * 64}
        card["tasks"][0]["size"] = 999

    rewrite(tmp_path, change)
    found = check(tmp_path, max_pixels=10_000)
    where = "task 'task-a' (train): atrain00"
    assert list(found.errors) == [
        "task 'task-a' has size 999 on the card and its train shards hold 12 samples: correct the "
        "card or fetch the shards again",
        f"{where}0 in a-train.tar: its image is empty (0 bytes)",
        f"{where}1 in a-train.tar: {found.errors[2].partition('a-train.tar: ')[2]}",
        f"{where}2 in a-train.tar: its image is 400 x 300, more than 10000 pixels: shrink it or "
        "raise max_pixels",
        f"{where}3 in a-train.tar: its image is Photoshop, not {READABLE}: convert it to one of "
        "these, for example with ImageMagick (magick IN OUT.png)",
        f"{where}4 in a-train.tar: it has no image (.{', .'.join(IMAGES[:12])} and "
        f"{len(IMAGES) - 12} more): its members are "
        ".cls, .de.txt, .txt",
        f"{where}5 in a-train.tar: its label is b'one', expected a whole number or one of the "
        "card's classes",
        f"{where}6 in a-train.tar: its label is 77, the card has classes 0 to 5",
        f"{where}7 in a-train.tar: its label is 2, which is not a class of task 'task-a'",
        f"{where}8 in a-train.tar: it has no label (.cls): its members are .png, .de.txt, .txt",
        "task 'task-b' (train): key 'btrain000' comes twice, in b-train.tar and in b-train.tar: "
        "give every sample its own key",
        "task 'task-b': shard b-test.tar is truncated: it ends at byte 3000 without the end mark "
        "of a tar: fetch or build it again",
        f"task 'task-c': shard c-train.tar is missing, there is no file {tmp_path}/c-train.tar: "
        "build the stream or correct the card",
        f"task 'task-c': shard c-test.tar has the sha256 {own} and the card says {'0' * 64}: it is "
        f"not the shard that the card was written for; delete {tmp_path}/c-test.tar and fetch or "
        "build it again",
        "task 'task-a' (test): atest003 in a-test.tar is trained on, it has the image of "
        "atrain009 in a-train.tar of task 'task-a': remove it from one of them",
    ]
    assert "its image cannot be decoded" in found.errors[2]
    assert found.tasks[0].train.bad == 9


def test_every_sort_of_fault_of_questions_is_told_in_one_go(tmp_path):
    members = coloured(10, 0, name="atrain")
    bad = {
        "atrain000.json": None,
        "atrain001.json": b"{nonsense",
        "atrain002.json": b"\xff\xfe",
        "atrain003.json": json.dumps({"conversations": []}).encode(),
        "atrain004.json": dialogue("Colour?", " "),
        "atrain005.json": dialogue("<image><image> Colour?", "red"),
        "atrain006.png": None,
        "atrain007.json": dialogue("<image>\nColour?", "red", answers="red"),
    }
    write_answer_stream(tmp_path, a_train=replaced(members, bad))
    reasons = [line.partition("a-train.tar: ")[2] for line in check(tmp_path).errors]
    assert [reason[:46] for reason in reasons] == [
        "it has no conversation (.json): its members ar",
        "its conversation (.json) is not JSON (Expectin",
        "its conversation (.json) is not JSON ('utf-8' ",
        "its conversation has 0 turns, expected 'conver",
        "turn 1 of its conversation is not a text from ",
        "its conversation shows 2 images and it has one",
        "its conversation shows 1 images and it has non",
        "its 'answers' are not a list of texts",
    ]


def test_empty_and_undecodable_captions_are_errors(tmp_path):
    members = labelled(5, name="atrain")
    bad = {"atrain001.txt": b" \n", "atrain002.txt": b"\xff", "atrain003.txt": None}
    write_stream(tmp_path, task_type="captioning", a_train=replaced(members, bad))
    found = check(tmp_path)
    assert [line.partition("a-train.tar: ")[2] for line in found.errors] == [
        "its caption (.txt) is empty",
        "its caption (.txt) is not UTF-8 (invalid start byte)",
        "it has no caption (.txt): its members are .png, .cls, .de.txt",
    ]
    assert found.tasks[0].test.lengths == (15, 21)


def test_of_many_errors_of_a_sort_five_are_named_and_the_others_counted(tmp_path):
    members = [(n, b"9" if n.endswith(".cls") else c) for n, c in labelled(12, name="atrain")]
    twice = labelled(8, name="x") + labelled(8, name="x")
    write_stream(tmp_path, a_train=members, b_test=[(n, b"2" if n.endswith(".cls") else c)
                                                    for n, c in twice])  # fmt: skip
    errors = check(tmp_path).errors
    assert sum("its label is 9, the card has" in line for line in errors) == 5
    (rest,) = [line for line in errors if line.startswith("and 7 more")]
    assert rest.startswith("and 7 more in task 'task-a' (train) of this sort: its label is")
    assert sum("comes twice" in line for line in errors) == 5
    assert "and 3 more repeated keys in task 'task-b' (test)" in errors


def test_errors_of_the_card_come_with_those_of_its_shards(tmp_path):
    write_stream(tmp_path, a_train=[(n, b"" if n.endswith("png") else c)
                                    for n, c in labelled(3)])  # fmt: skip
    (tmp_path / "b-train.tar").unlink()
    rewrite(tmp_path, lambda card: card.update(scenario="clas", sise=3))
    found = check(tmp_path)
    assert len(found.errors) == 3
    assert "unknown key 'sise'" in found.errors[0]
    assert "scenario 'clas', expected one of task, class, domain" in found.errors[1]
    assert "shard b-train.tar is missing" in found.errors[2]
    assert found.warnings[0] == "no sample was decoded: correct the card first"
    (tmp_path / "small.yaml").write_text("a: [")
    (line,) = check(tmp_path).errors
    assert "is not YAML" in line
    with pytest.raises(FileNotFoundError, match="no stream card"):
        check_stream(tmp_path / "none.yaml")


def test_a_count_of_the_card_is_compared_with_its_shard(tmp_path):
    write_stream(tmp_path)
    rewrite(tmp_path, lambda card: card.update(counts={"a-train.tar": 10, "b-train.tar": 8}))
    (line,) = check(tmp_path).errors
    assert line.startswith("task 'task-b': shard b-train.tar holds 7 samples and the card says 8")


def test_a_test_picture_of_one_task_in_the_training_of_another_is_found(tmp_path):
    shared = dict(labelled(5, name="ctrain"))["ctrain004.png"]
    members = replaced(labelled(5, name="atest"), {"atest002.png": shared})
    write_stream(tmp_path, a_test=members)
    (line,) = check(tmp_path).errors
    assert "(test): atest002 in a-test.tar is trained on, it has the image of ctrain004" in line
    assert "in c-train.tar of task 'task-c'" in line


def test_a_picture_saved_again_is_found_by_its_pixels_alone(tmp_path):
    shared = again(dict(labelled(5, name="atrain"))["atrain004.png"])
    write_stream(tmp_path, a_test=replaced(labelled(5, name="atest"), {"atest002.png": shared}))
    assert check(tmp_path).errors == ()
    (line,) = check(tmp_path, pixels=True).errors
    assert "atest002 in a-test.tar is trained on, it has the image of atrain004" in line


def test_an_eval_only_task_that_is_trained_on_is_found(tmp_path):
    write_stream(tmp_path, sizes=(10, 7))
    write_tar(tmp_path / "p.tar", labelled(3, name="ptest") + labelled(1, name="btrain"))
    far = {"name": "far", "classes": ["c0", "c1"], "test": "p.tar"}
    rewrite(tmp_path, lambda card: card.update(eval_only=[far]))
    (line,) = check(tmp_path).errors
    assert line.startswith("task 'far' (test): btrain000 in p.tar is trained on")


def test_a_source_is_checked_and_counts_as_trained_on(tmp_path):
    write_stream(tmp_path, sizes=(10, 7))
    pictures = [pair for pair in labelled(4, name="general") if pair[0].endswith("png")]
    pictures += [("x.png", b""), ("y.png", dict(labelled(5, name="bexam"))["bexam001.png"])]
    write_tar(tmp_path / "g.tar", pictures)
    source = {"general": {"task_type": "image", "shards": "g.tar", "size": 7}}
    rewrite(tmp_path, lambda card: card.update(sources=source))
    found = check(tmp_path)
    assert found.errors == (
        "source 'general' has size 7 on the card and its train shards hold 6 samples: correct the "
        "card or fetch the shards again",
        "source 'general': x in g.tar: its image is empty (0 bytes)",
        "task 'task-b' (test): bexam001 in b-test.tar is trained on, it has the image of y in "
        "g.tar of source 'general': remove it from one of them",
    )
    assert (found.tasks[2].role, found.tasks[2].test) == ("source", None)


def test_another_question_about_a_known_picture_is_a_remark_and_the_same_one_a_error(tmp_path):
    train, test = coloured(6, 0, name="atrain"), coloured(4, 0, name="atest")
    known = dict(train)
    other = {"atest001.png": known["atrain003.png"], "atest001.json": dialogue("Shape?", "round")}
    same = {"atest002.png": known["atrain005.png"], "atest002.json": known["atrain005.json"]}
    write_answer_stream(tmp_path, a_train=train, a_test=replaced(test, {**other, **same}))
    found = check(tmp_path)
    (line,) = found.errors
    assert "atest002 in a-test.tar is trained on, it has the image and question of atrain005" \
        in line  # fmt: skip
    assert (
        "1 test samples of task 'task-a' have another question about an image that is trained on, "
        "such as atest001 in a-test.tar and atrain003 in a-train.tar of task 'task-a'"
    ) in found.warnings


def test_questions_without_pictures_are_compared_by_their_words(tmp_path):
    train = [(f"s{n}.json", dialogue(f"What is {n}?", "a number")) for n in range(5)]
    test = [(f"t{n}.json", dialogue(f"What is {n}?", "a number")) for n in range(4, 9)]
    write_answer_stream(tmp_path, a_train=train, a_test=test)
    found = check(tmp_path)
    (line,) = found.errors
    assert "t4 in a-test.tar is trained on, it has the image and question of s4" in line
    assert not any("have another question" in remark for remark in found.warnings)


def test_samples_that_come_twice_and_classes_that_are_absent_are_remarks(tmp_path):
    known = dict(labelled(10, name="atrain"))
    same = {f"atrain003.{kind}": known[f"atrain001.{kind}"] for kind in ("png", "txt", "de.txt")}
    write_stream(
        tmp_path, a_train=replaced(labelled(10, name="atrain"), same),
        c_test=labelled(4, (5,), name="ctest"),
    )  # fmt: skip
    found = check(tmp_path)
    assert found.errors == ()
    assert found.warnings[:2] == (
        "task 'task-a' (train) has 1 duplicate sample",
        "task 'task-c' has no test sample of 1 of its 2 classes: 'c4'",
    )
    assert "no shard has a hash on the card" in found.warnings[2]
    assert check(tmp_path, max_samples=1).warnings == found.warnings[2:]


@pytest.mark.parametrize(("limit", "looked"), [(4, [4, 4, 4]), (0.5, [5, 4, 2]), (99, [10, 7, 5])])
def test_a_limit_looks_into_some_samples_and_counts_them_all(tmp_path, limit, looked):
    write_stream(tmp_path)
    found = check(tmp_path, max_samples=limit)
    assert [task.train.decoded for task in found.tasks] == looked
    assert [task.train.samples for task in found.tasks] == [10, 7, 5]
    assert [sum(task.train.labels) for task in found.tasks] == looked


def test_a_glance_opens_some_shards_only(tmp_path):
    write_stream(tmp_path, sizes=(10,))
    for number in range(6):
        write_tar(tmp_path / f"more-{number}.tar", labelled(3, name=f"m{number}x"))

    def change(card):
        card["tasks"][0] |= {"train": [f"more-{number}.tar" for number in range(6)], "size": 18}

    rewrite(tmp_path, change)
    (tmp_path / "more-1.tar").unlink()
    found = check(tmp_path, shards=3)
    assert found.errors == ()
    part = found.tasks[0].train
    assert (part.shards, part.counted, part.samples) == (6, 3, 9)
    assert len(check(tmp_path).errors) == 1


def test_progress_counts_shards_and_bad_options_are_sentences(tmp_path):
    write_stream(tmp_path)
    told = []
    check(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    with pytest.raises(ValueError, match="max_samples is 0"):
        check(tmp_path, max_samples=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        check_stream(tmp_path / "small.yaml", num_workers=-1)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    members = labelled(12, name="atrain")
    bad = {"atrain003.png": b"x", "atrain004.cls": b"9"}
    shared = {"ctest001.png": dict(members)["atrain007.png"]}
    write_stream(
        tmp_path, a_train=replaced(members, bad),
        c_test=replaced(labelled(5, (4, 5), name="ctest"), shared),
    )  # fmt: skip
    alone = check(tmp_path)
    assert len(alone.errors) == 3
    both = check_stream(tmp_path / "small.yaml", cache_dir=tmp_path / "cache", num_workers=2)
    assert both.plain() == alone.plain()


def test_a_killed_process_is_reported_with_what_to_do(tmp_path, monkeypatch):
    def lost(self, function, work):
        raise RuntimeError("a process was killed")
        yield

    monkeypatch.setattr(validate.WorkerPool, "map", lost)
    write_stream(tmp_path)
    with pytest.raises(
        RuntimeError, match="that validated a shard was killed.*smaller num_workers"
    ):
        check_stream(tmp_path / "small.yaml", cache_dir=tmp_path, num_workers=2)


def test_loose_files_are_checked_where_they_lie(tmp_path):
    (tmp_path / "pictures").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    records = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(6)]
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "all.json").write_text(json.dumps(records))
    np.save(tmp_path / "train.npy", np.arange(4))
    np.save(tmp_path / "test.npy", np.array([4, 5]))
    content = (tmp_path / "all.json").read_bytes()
    for part, samples in (("train", 4), ("test", 2)):
        stated = {
            "format": "mmcl-loose/1", "records": "all.json", "images": "pictures", "keys": part,
            "samples": samples, "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content), "indices": f"{part}.npy",
        }  # fmt: skip
        (tmp_path / f"{part}.loose.json").write_text(json.dumps(stated))
    task = {"name": "asked", "train": "train.loose.json", "test": "test.loose.json", "size": 4}
    card = {"name": "x", "scenario": "domain", "task_type": "instruction", "tasks": [task]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(card))
    found = check(tmp_path)
    assert found.errors == (
        "task 'asked' (test): test-0000005-5 in test.loose.json: its image '5.png' is missing",
    )
    assert found.tasks[0].train.answers == (("noise", 4),)
    shown = sum(len(picture(number)) for number in range(4))
    assert shown < found.tasks[0].train.size_bytes < shown + 1000


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_median_is_the_lower_of_the_two_in_the_middle(count):
    values = np.random.default_rng(count).integers(0, 5, count).tolist()
    ordered = sorted(values)
    wanted = ordered[0], ordered[(count - 1) // 2], ordered[-1]
    assert value_range(Counter(values), lambda value: value) == wanted
    assert value_range(Counter(), lambda value: value) is None


@pytest.mark.parametrize("limit", [None, 6, 0.5])
def test_a_shard_in_pieces_is_found_to_be_what_it_is_as_a_whole(tmp_path, limit, monkeypatch):
    members = labelled(25, name="atrain") + labelled(2, name="atrain")
    bad = {"atrain003.png": b"x", "atrain012.cls": b"9", "atrain024.png": b""}
    shared = {"ctest001.png": dict(members)["atrain020.png"]}
    write_stream(
        tmp_path, a_train=replaced(members, bad),
        c_test=replaced(labelled(5, (4, 5), name="ctest"), shared),
    )  # fmt: skip
    rewrite(tmp_path, lambda card: card["tasks"][0].update(size=27))
    whole = check(tmp_path, max_samples=limit)
    assert len(whole.errors) >= 2
    one_by_one = lambda works, workers: ((work, check_shard(work)) for work in works)  # noqa: E731
    monkeypatch.setattr(validate, "_results", one_by_one)
    monkeypatch.setattr(validate, "_CHUNK_BYTES", 7000)
    told = []
    found = check_stream(
        tmp_path / "small.yaml", cache_dir=tmp_path, num_workers=2, max_samples=limit,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert found.plain() == whole.plain()
    assert told[-1][0] == told[-1][1] > 12
