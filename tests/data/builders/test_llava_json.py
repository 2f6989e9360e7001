"""LLaVA-style data become streams: nothing is changed, faults are counted and named."""

import json
import subprocess
import sys
import tarfile

import pytest
import yaml

from mmcl.core import Row, TaskStream
from mmcl.data.builders.llava_convert import convert
from mmcl.data.builders.llava_json import read_records, read_sample
from mmcl.data.builders.llava_pictures import Pictures
from mmcl.data.builders.llava_task import LeftOut, LlavaTask, Options
from mmcl.data.decode import decode_image
from mmcl.data.faults import BadSample
from mmcl.data.prepare import prepare
from mmcl.data.row import make_row
from tests.data.builders.llava_files import asked, jpeg, put, quizzed, samples_of, train_set

HALF = Options(hold_out=0.5)


def made(folder, records=None, options=HALF, name="vqa", out="out", per_picture=1, **more):
    """Convert five samples, or the records given, and read the stream back."""
    train, images = train_set(folder, per_picture=per_picture)
    if records is not None:
        put(train, records)
    task_words = {key: more.pop(key) for key in ("test", "references", "scorer") if key in more}
    task = LlavaTask(name, train, (images,), **task_words)
    card, built = convert(task, folder / out, options, **more)
    return prepare(TaskStream.read(card)), built


def contents(folder):
    names = (path for path in sorted(folder.iterdir()) if path.suffix != ".index")
    return {path.name: path.read_bytes() for path in names}


def test_what_is_read_back_is_what_was_written(tmp_path):
    records = [
        asked(0, "./sub/0.jpg", " Ünïcode?\n\nAnswer briefly. ", "  kept as it is "),
        asked(1, question="no picture at all"),
        asked(2, ["sub/2.jpg"]),
        {"question_id": 7, "image": "sub/3.jpg", "conversations": asked(3, "x")["conversations"]},
    ]
    records[2]["conversations"] += [
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": "the same"},
    ]
    test = put(tmp_path / "test.json", [quizzed(0, "sub/4.jpg"), quizzed(1, "sub/0.jpg")])
    stream, _ = made(tmp_path, records, test=test)
    train = list(samples_of(stream, 0, "train"))
    assert [key for key, _, _ in train] == [
        "vqa-train-0000000-id-0", "vqa-train-0000001-id-1", "vqa-train-0000002-id-2",
        "vqa-train-0000003-7",
    ]  # fmt: skip
    assert [picture for _, picture, _ in train] == [jpeg(0), None, jpeg(2), jpeg(3)]
    for (_, _, member), record in zip(train, records, strict=True):
        assert member == {"conversations": record["conversations"]}
    questions = list(samples_of(stream, 0, "test"))
    assert [picture for _, picture, _ in questions] == [jpeg(4), jpeg(0)]
    assert questions[0][2] == {
        "conversations": [
            {"from": "human", "value": "What is this?"},
            {"from": "gpt", "value": "thing 0"},
        ],
        "answers": ["thing 0"],
    }


def test_a_run_sees_the_dialogue_and_the_pixels_of_the_source(tmp_path):
    seen = []

    def keep(pixels, text, seed):
        seen.append((pixels, text))
        return Row(None)

    stream, _ = made(tmp_path, [asked(n, f"sub/{n}.jpg") for n in range(4)])
    for number in range(2):
        sample = stream.reader(0, "train").read(number)
        make_row(sample, number, stream.stream[0], keep, seed=0, max_pixels=1000)
        pixels, dialogue = seen[-1]
        place = int(sample.key.rpartition("-")[2])
        assert pixels.equal(decode_image(jpeg(place)))
        assert [(turn.speaker, turn.text) for turn in dialogue.turns] == [
            ("human", "<image>\nWhat is this?"), ("assistant", f"thing {place}"),
        ]  # fmt: skip


def test_the_card_says_kind_scorer_sizes_and_hashes(tmp_path):
    stream, _ = made(tmp_path, scorer="vqa", licence="CC0")
    card = yaml.safe_load((tmp_path / "out" / "vqa.yaml").read_text())
    (task,) = stream.stream
    assert (card["name"], card["scenario"], card["licence"]) == ("vqa", "domain", "CC0")
    assert (task.kind, task.scorer, task.size, task.test_size) == ("answer", "vqa", 3, 2)
    assert set(card["hashes"]) == {*task.train, *task.test}
    prepare(stream.stream, verify_hashes=True)


def test_json_lines_and_a_byte_order_mark_are_read(tmp_path):
    records = [asked(number, f"sub/{number}.jpg", "two\u2028lines") for number in range(3)]
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in records)
    assert read_records(put(tmp_path / "a.jsonl", lines + "\n\n")) == records
    assert read_records(put(tmp_path / "lines.json", lines)) == records
    assert read_records(put(tmp_path / "b.json", b"\xef\xbb\xbf" + json.dumps(records).encode()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe[\x00]\x00", "is not UTF-8 .byte 0xff at place 0.: save it as UTF-8"),
        ("[{", "is not JSON"),
        ('{"a": 1}\n{"a": }', "is not JSON .line 2, "),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no samples"),
        ("3", "holds no samples"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_records(put(tmp_path / "x.json", content))


SAID = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes"}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (7, "it is not a mapping"),
        ({"image": "a.jpg"}, "neither 'conversations' nor a 'text'"),
        ({"text": "Hm?", "reply": "yes"}, r"no right answer \('answer'\)"),
        ({"conversations": SAID, "image": ["a.jpg", "b.jpg"]}, "it shows 2 pictures: one is"),
        ({"conversations": SAID, "video": "a.mp4"}, "it shows a video"),
        ({"conversations": SAID, "image": 3}, "its 'image' is '3', expected a path"),
        ({"conversations": SAID[:1]}, "its dialogue has 1 turns"),
        ({"conversations": SAID[::-1]}, "turn 0 of its dialogue"),
        ({"conversations": [*SAID, SAID[1], SAID[0]]}, "turn 2 of its dialogue"),
        ({"conversations": [{"from": "system", "value": "x"}, SAID[1]]}, "turn 0"),
        ({"conversations": "Hm?"}, "its dialogue has no turns"),
        ({"text": "<image>", "answer": "a"}, r"shows 1 pictures \(<image>\) and it has none"),
        ({"text": "<image><image>", "answer": "a", "image": "a.jpg"}, "shows 2 .* it has one"),
        ({"text": "\ud83d", "answer": "a"}, "half of a character"),
        ({"text": "ä" * 600_000, "answer": "a"}, "its texts have 1200.* bytes, more than 1048576"),
        ({"text": "Hm?", "answer": {"a": 1}}, "its right answers are not texts"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record, said):
    with pytest.raises(BadSample, match=said):
        read_sample(record)


def test_several_right_answers_and_numbers_are_kept_as_given():
    def answers(stated):
        return json.loads(read_sample({"text": "Hm?", "answer": stated}).data)["answers"]

    assert answers(["a", "b", "a"]) == ["a", "b", "a"]
    assert answers([{"answer": "a"}, {"answer": "b"}]) == ["a", "b"]
    assert answers(3) == ["3"]
    both = json.loads(read_sample({"conversations": SAID, "answers": ["Yes", "yes"]}).data)
    assert both["answers"] == ["Yes", "yes"]


@pytest.mark.parametrize(
    "stated", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", ".", "C:/x.jpg"]
)
def test_a_path_that_leads_outside_is_refused(tmp_path, stated):
    put(tmp_path / "secret.jpg", jpeg())
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    with pytest.raises(BadSample, match="leads outside of the image folder"):
        Pictures([tmp_path / "pictures"]).find(stated)


def test_pictures_are_found_and_broken_ones_named(tmp_path):
    put(tmp_path / "a.gif", b"GIF89a" + bytes(40))
    put(tmp_path / "b.jpg", jpeg(1)[:-60])
    put(tmp_path / "c.jpg", b"")
    put(tmp_path / "d.png", jpeg(2, "WEBP"))
    put(tmp_path / "e.png", jpeg(2, "PNG")[:-30])
    (tmp_path / "folder.jpg").mkdir()
    pictures = Pictures([tmp_path / "nowhere", tmp_path])
    said = {"a.gif": "not JPEG", "b.jpg": "broken", "c.jpg": "0 bytes", "e.png": "decoded",
            "folder.jpg": "not a file", "z.jpg": "is missing", "x\0.jpg": "is missing"}  # fmt: skip
    for name, reason in said.items():
        with pytest.raises(BadSample, match=f"its picture {name}.*{reason}"):
            pictures.find(name)
    assert pictures.find("./d.png").extension == "webp"


def test_pictures_without_an_end_that_can_be_decoded_are_good(tmp_path):
    put(tmp_path / "trailing.jpg", jpeg(1) + bytes(1 << 17))
    assert Pictures([tmp_path]).find("trailing.jpg").extension == "jpg"


def test_too_many_faults_end_with_a_listing(tmp_path):
    records = [asked(number, f"sub/{number}.jpg") for number in range(4)]
    records[1]["image"] = "../out.jpg"
    records.append(asked(9, "sub/none.jpg"))
    with pytest.raises(ValueError, match="2 of 5 samples .* more than max_faults 0.01") as raised:
        made(tmp_path, records)
    assert "train.json, sample 1 (id 'id/1'): its picture ../out.jpg leads outside" in str(
        raised.value
    )
    assert "sample 4 (id 'id/9'): its picture sub/none.jpg is missing" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_few_faults_are_left_out_and_listed(tmp_path):
    records = [asked(number, f"sub/{number}.jpg") for number in range(5)]
    records[2]["image"] = ["a.jpg", "b.jpg"]
    stream, built = made(tmp_path, records, Options(hold_out=0.5, max_faults=0.2))
    assert [fault.position for fault in built.left_out] == [2]
    assert "it shows 2 pictures" in (tmp_path / "out" / "vqa.left_out.txt").read_text()
    keys = [key for part in ("train", "test") for key, _, _ in samples_of(stream, 0, part)]
    assert len(keys) == 4
    assert not any("0000002" in key for key in keys)


def test_what_a_file_says_cannot_steer_a_terminal():
    fault = str(LeftOut("a.json", 0, "x\x1b[31m\n", "its picture \ud83d\u00fc.jpg" + "y" * 999))
    assert fault.startswith(
        "a.json, sample 0 (id 'x\\x1b[31m\\n'): its picture \\ud83d\u00fc.jpgyyy"
    )
    assert len(fault.encode()) < 400


def test_no_picture_is_in_both_parts(tmp_path):
    train, images = train_set(tmp_path, 30, per_picture=3)
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        task = LlavaTask("vqa", train, (images,))
        card, _ = convert(task, out, Options(seed=seed, hold_out=0.2))
        stream = prepare(TaskStream.read(card))
        shown = [{picture for _, picture, _ in samples_of(stream, 0, p)} for p in ("train", "test")]
        assert shown[0] & shown[1] == set()
        assert len(shown[0] | shown[1]) == 10
        assert stream.stream[0].test_size == 6
    cards = {(tmp_path / f"out{seed}" / "vqa.yaml").read_text() for seed in range(3)}
    assert len(cards) == 3


def test_shards_are_closed_at_their_size(tmp_path):
    stream, _ = made(tmp_path, options=Options(hold_out=0.2, shard_bytes=4096))
    (task,) = stream.stream
    assert len(task.train) > 1
    for name in task.train:
        with tarfile.open(tmp_path / "out" / name) as tar:
            assert sum(512 + -(-member.size // 512) * 512 for member in tar) <= 4096


def test_a_limit_takes_a_seeded_part_in_the_files_order(tmp_path):
    keys = []
    for seed in (0, 0, 1):
        out = f"out{len(keys)}"
        stream, _ = made(tmp_path, options=Options(hold_out=0.3, limit=4, seed=seed), out=out)
        parts = [key for part in ("train", "test") for key, _, _ in samples_of(stream, 0, part)]
        keys.append(sorted(key[-12:] for key in parts))
        assert len(parts) == 4
    assert keys[0] == keys[1]


def test_the_same_call_again_changes_nothing_and_an_unfinished_one_goes_on(tmp_path):
    options = Options(hold_out=0.2, shard_bytes=4096)
    made(tmp_path, options=options)
    whole = contents(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    made(tmp_path, options=options)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    last = sorted(before)[-1]
    last.unlink()
    (tmp_path / "out" / "vqa.yaml").unlink()
    (tmp_path / "out" / f".{last.name}.1.tmp").write_bytes(b"half")
    made(tmp_path, options=options)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_killed_conversion_ends_the_same_to_the_byte(tmp_path):
    train, images = train_set(tmp_path, 40)
    code = """
import os, sys
from pathlib import Path
from mmcl.data.builders.llava_convert import convert
from mmcl.data.builders.llava_task import LeftOut, LlavaTask, Options
def die(what, done, total):
    if what.startswith("writing") and done == int(sys.argv[4]):
        os.kill(os.getpid(), 9)
task = LlavaTask("vqa", Path(sys.argv[1]), (Path(sys.argv[2]),))
convert(task, Path(sys.argv[3]), Options(shard_bytes=8192), progress=die)
"""
    for place, out in ((-1, "whole"), (9, "cut"), (30, "cut"), (-1, "cut")):
        words = [sys.executable, "-c", code, train, images, tmp_path / out, str(place)]
        assert subprocess.run(words, check=False).returncode == (0 if place < 0 else -9)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_stream_grows_by_a_task(tmp_path):
    made(tmp_path / "a", out="../out")
    card = tmp_path / "out" / "vqa.yaml"
    card.write_text("# mine\n" + card.read_text())
    for _ in range(2):
        stream, _ = made(tmp_path / "b", name="count", out="../out", append=True, licence="CC0")
    assert [task.name for task in stream.stream] == ["vqa", "count"]
    assert card.read_text().startswith("# mine\n# Task vqa made by")
    assert card.read_text().count("# Task count made by") == 1
    prepare(stream.stream, verify_hashes=True)


def test_a_task_of_answers_joins_a_card_of_another_kind(tmp_path):
    card = tmp_path / "out" / "old.yaml"
    tar = tmp_path / "out" / "x.tar"
    put(card, "name: old\nscenario: class\nclasses: [a, b]\ntemplates: ['a photo of {}.']\n"
        "tasks:\n- {name: first, train: x.tar, test: y.tar}\n")  # fmt: skip
    put(tar, b"")
    train, images = train_set(tmp_path)
    path, _ = convert(LlavaTask("vqa", train, (images,)), tmp_path / "out", HALF, append=True)
    first, second = TaskStream.read(path)
    assert (path, first.kind, second.kind) == (card, "classify", "answer")
    assert (first.templates, second.templates) == (("a photo of {}.",), ("{}",))


@pytest.mark.parametrize(
    ("cards", "error", "said"),
    [([], FileNotFoundError, "no card in"), (["a", "b"], ValueError, r"a.yaml, b.yaml\): name")],
)
def test_append_needs_one_card(tmp_path, cards, error, said):
    for name in cards:
        put(tmp_path / "out" / f"{name}.yaml", "name: x")
    with pytest.raises(error, match=said):
        made(tmp_path, append=True)


def test_shards_that_a_card_uses_are_not_overwritten_by_other_data(tmp_path):
    made(tmp_path)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="task 'vqa' in .* was made from other files"):
        made(tmp_path, [asked(number, question="new") for number in range(4)])
    assert contents(tmp_path / "out") == before


def test_captions_are_joined_by_file_name_and_votes_by_question(tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "0.jpg"}],
        "annotations": [
            {"image_id": image, "caption": f"{text} {image}"} for image in (1, 2) for text in "ab"
        ],
    }
    test = put(tmp_path / "test.json", [quizzed(0, "sub/0.jpg"), quizzed(1, "sub/1.jpg")])
    captions = put(tmp_path / "coco.json", json.dumps(coco, indent=4))
    stream, _ = made(tmp_path, test=test, references=captions)
    got = [member["answers"] for _, _, member in samples_of(stream, 0, "test")]
    assert got == [["a 2", "b 2"], ["a 1", "b 1"]]
    votes = {"data": [{"question_id": f"q{n}", "answers": ["x"] * 9 + [str(n)]} for n in range(2)]}
    votes = put(tmp_path / "votes.json", votes)
    stream, _ = made(tmp_path, test=test, references=votes, out="votes")
    got = [member["answers"] for _, _, member in samples_of(stream, 0, "test")]
    assert got == [["x"] * 9 + ["0"], ["x"] * 9 + ["1"]]


@pytest.mark.parametrize(("scorer", "right"), [("option", "B"), ("box", "[0.1, 0.2, 0.30, 1.0]")])
def test_right_answers_that_a_scorer_cannot_use_are_faults(tmp_path, scorer, right):
    good = put(tmp_path / "good.json", [quizzed(0, "sub/0.jpg", answer=right)])
    made(tmp_path, test=good, scorer=scorer)
    bad = put(tmp_path / "bad.json", [quizzed(0, "sub/0.jpg", answer="a cat")])
    with pytest.raises(ValueError, match=f"'a cat', which the scorer '{scorer}' cannot use"):
        made(tmp_path, test=bad, scorer=scorer, out="bad")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"hold_out": 1.0}, "hold_out is 1.0"),
        ({"max_faults": -0.1}, "max_faults is -0.1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 2.5}, "limit is 2.5"),
    ],
)
def test_options_outside_their_range_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        Options(**words)


@pytest.mark.parametrize("name", ["", "../x", "a.b", "a b", "-a"])
def test_a_task_name_that_is_no_safe_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="task name is"):
        made(tmp_path, name=name)
