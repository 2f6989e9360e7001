"""LLaVA-style data become streams: nothing is changed, bad samples are counted and named."""

import json
import os
import tarfile

import pytest
import yaml

from mmcl.core import ProcessedSample, TaskStream
from mmcl.data.batches.collate import make_example
from mmcl.data.convert.convert import convert
from mmcl.data.convert.inputs.llava_input import ImageFolders, open_instructions
from mmcl.data.convert.record import ConvertOptions, SkippedRecord
from mmcl.data.convert.task_files import InPlace
from mmcl.data.decode import decode_image
from mmcl.data.shards.llava_json import open_references, read_sample
from mmcl.data.shards.open_stream import open_stream
from mmcl.data.stored_sample import BadSample
from tests.data.convert.llava_files import asked, jpeg, put, quizzed, samples_of, train_set


def made(folder, records=None, name="vqa", out="out", test=None, images=None, **more):
    """Convert five samples, or the records given; return the stream and what was converted."""
    train, own = train_set(folder)
    if records is not None:
        put(train, records)
    calls = {key: more.pop(key) for key in ("append", "allow_duplicates", "card", "in_place")
             if key in more}  # fmt: skip
    opens = {key: more.pop(key) for key in ("references", "answer_field") if key in more}
    images = images or own
    sources = [open_instructions(train, images, **({} if test else opens))]
    sources.append(open_instructions(test, images, **opens) if test else None)
    options = ConvertOptions(name, **{"test_fraction": 0.5, **more})
    card, converted = convert(*sources, folder / out, options, **calls)
    return open_stream(TaskStream.read(card)), converted


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
        return ProcessedSample(None)

    stream, _ = made(tmp_path, [asked(n, f"sub/{n}.jpg") for n in range(4)])
    for number in range(2):
        sample = stream.reader(0, "train").read(number)
        make_example(sample, number, stream.stream[0], keep, seed=0, max_pixels=1000)
        pixels, dialogue = seen[-1]
        place = int(sample.key.rpartition("-")[2])
        assert pixels.equal(decode_image(jpeg(place)))
        assert [(turn.role, turn.text) for turn in dialogue.turns] == [
            ("user", "<image>\nWhat is this?"), ("assistant", f"thing {place}"),
        ]  # fmt: skip


def test_the_card_says_kind_scorer_sizes_and_hashes(tmp_path):
    stream, _ = made(tmp_path, scorer="vqa", license="CC0", max_new_tokens=9)
    card = yaml.safe_load((tmp_path / "out" / "vqa.yaml").read_text())
    (task,) = stream.stream
    assert (card["name"], card["scenario"], card["license"]) == ("vqa", "domain", "CC0")
    assert (task.task_type, task.scorer, task.size, task.test_size) == ("instruction", "vqa", 3, 2)
    assert task.max_new_tokens == 9
    assert set(card["hashes"]) == {*task.train, *task.test}
    open_stream(stream.stream, verify_hashes=True)


SAID = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes"}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (7, "it is not a mapping"),
        ({"image": "a.jpg"}, "neither 'conversations' nor a 'text'"),
        ({"text": "Hm?", "reply": "yes"}, r"no right answer \('answer'\)"),
        ({"conversations": SAID, "image": ["a.jpg"] * 65}, "it has 65 images, more than 64"),
        ({"conversations": SAID, "video": "a.mp4"}, "it has a video"),
        ({"conversations": SAID, "image": 3}, "its 'image' is '3', expected a path"),
        ({"conversations": SAID[:1]}, "its conversation has 1 turns"),
        ({"conversations": SAID[::-1]}, "turn 0 of its conversation"),
        ({"conversations": [*SAID, SAID[1], SAID[0]]}, "turn 2 of its conversation"),
        ({"conversations": [{"from": "system", "value": "x"}, SAID[1]]}, "has 1 turns beside that"),
        ({"conversations": "Hm?"}, "its conversation has no turns"),
        ({"text": "<image>", "answer": "a"}, r"has 1 image tokens \(<image>\) and it has no image"),
        ({"text": "<image><image>", "answer": "a", "image": "a.jpg"}, "has 2 .* it has one image"),
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
def test_a_path_that_leads_outside_of_the_image_folders_is_refused(tmp_path, stated):
    put(tmp_path / "secret.jpg", jpeg())
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    with pytest.raises(BadSample, match="leads outside of the image folder"):
        ImageFolders((tmp_path / "pictures",)).read(stated)


def test_the_first_image_folder_that_has_the_file_is_used_and_links_are_followed(tmp_path):
    put(tmp_path / "far" / "a.jpg", jpeg(1))
    put(tmp_path / "second" / "b.jpg", jpeg(2))
    (tmp_path / "first").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "first" / "linked")
    images = ImageFolders((tmp_path / "nowhere", tmp_path / "first", tmp_path / "second"))
    assert images.read("./linked/a.jpg") == ("jpg", jpeg(1))
    assert images.read("b.jpg") == ("jpg", jpeg(2))
    for name, reason in {
        "z.jpg": "is missing",
        "x\0.jpg": "is missing",
        "linked": "not a file",
    }.items():
        with pytest.raises(BadSample, match=reason):
            images.read(name)


def test_broken_images_are_named_and_odd_endings_are_good(tmp_path):
    files = {
        "b.jpg": jpeg(1)[:-60],
        "e.png": jpeg(2, "PNG")[:-30],
        "d.png": jpeg(2, "WEBP"),
        "trailing.jpg": jpeg(1) + bytes(1 << 17),
    }
    for name, data in files.items():
        put(tmp_path / "pictures" / name, data)
    records = [asked(number, name) for number, name in enumerate(files)]
    with pytest.raises(ValueError, match="2 of 4 samples") as raised:
        made(tmp_path, records)
    assert "sample 0 (id 'id/0'): its JPEG is broken" in str(raised.value)
    assert "sample 1 (id 'id/1'): " in str(raised.value)


def test_too_many_bad_samples_end_with_a_listing(tmp_path):
    records = [asked(number, f"sub/{number}.jpg") for number in range(4)]
    records[1]["image"] = "../out.jpg"
    records.append(asked(9, "sub/none.jpg"))
    said = "2 of 5 samples in .* correct them, or .* --max_bad_fraction 0.40:"
    with pytest.raises(ValueError, match=said) as raised:
        made(tmp_path, records, max_bad_fraction=0.39)
    text = str(raised.value)
    assert "train.json, sample 1 (id 'id/1'): its " in text
    assert "'../out.jpg' leads outside" in text
    assert "sample 4 (id 'id/9'): its " in text
    assert "'sub/none.jpg' is missing" in text
    assert not (tmp_path / "out").exists()


def test_an_input_of_bad_samples_alone_cannot_be_left_out(tmp_path):
    records = [asked(number, "sub/none.jpg") for number in range(4)]
    with pytest.raises(ValueError, match="4 of 4 samples in .* cannot be used: correct them:"):
        made(tmp_path, records, max_bad_fraction=1.0)


def test_few_bad_samples_are_left_out_and_listed(tmp_path):
    records = [asked(number, f"sub/{number}.jpg") for number in range(5)]
    records[2]["image"] = ["a.jpg", "b.jpg"]
    stream, built = made(tmp_path, records, max_bad_fraction=0.2)
    assert [bad.position for bad in built.left_out] == [2]
    assert "it has 2 images" in (tmp_path / "out" / "vqa.left_out.txt").read_text()
    keys = [key for part in ("train", "test") for key, _, _ in samples_of(stream, 0, part)]
    assert len(keys) == 4
    assert not any("0000002" in key for key in keys)


def test_what_a_file_says_cannot_steer_a_terminal():
    error = str(
        SkippedRecord("a.json", 0, "x\x1b[31m\n", "its picture \ud83d\u00fc.jpg" + "y" * 999)
    )
    assert error.startswith(
        "a.json, sample 0 (id 'x\\x1b[31m\\n'): its picture \\ud83d\u00fc.jpgyyy"
    )
    assert len(error.encode()) < 400


def test_no_image_is_in_both_splits(tmp_path):
    train, images = train_set(tmp_path, 30, per_picture=3)
    for seed in range(3):
        options = ConvertOptions("vqa", seed=seed, test_fraction=0.2)
        card, _ = convert(open_instructions(train, images), None, tmp_path / f"out{seed}", options)
        stream = open_stream(TaskStream.read(card))
        shown = [{picture for _, picture, _ in samples_of(stream, 0, p)} for p in ("train", "test")]
        assert shown[0] & shown[1] == set()
        assert len(shown[0] | shown[1]) == 10
        assert stream.stream[0].test_size == 6
    cards = {(tmp_path / f"out{seed}" / "vqa.yaml").read_text() for seed in range(3)}
    assert len(cards) == 3


def test_shards_are_closed_at_their_size(tmp_path):
    stream, _ = made(tmp_path, test_fraction=0.2, shard_bytes=4096)
    (task,) = stream.stream
    assert len(task.train) > 1
    for name in task.train:
        with tarfile.open(tmp_path / "out" / name) as tar:
            assert sum(512 + -(-member.size // 512) * 512 for member in tar) <= 4096


@pytest.mark.parametrize("most", [4, 0.8])
def test_max_samples_takes_a_seeded_subset_in_the_files_order(tmp_path, most):
    keys = []
    for seed in (0, 0, 1, 2):
        stream, built = made(tmp_path, max_samples=most, seed=seed, out=f"out{len(keys)}")
        own = [key for split in ("train", "test") for key, _, _ in samples_of(stream, 0, split)]
        numbers = {key: int(key.split("-")[2]) for key in own}
        assert all(key.endswith(f"-id-{number}") for key, number in numbers.items())
        keys.append(sorted(numbers.values()))
        assert (len(own), built.num_bad) == (4, 0)
    assert keys[0] == keys[1]
    assert len({tuple(own) for own in keys}) > 1


def test_max_samples_in_place_points_at_the_chosen_records(tmp_path):
    loose = InPlace(tmp_path / "pictures", tmp_path / "pictures")
    seen = []
    for out, where in (("loose", loose), ("tars", None)):
        stream, _ = made(tmp_path, max_samples=4, in_place=where, out=out)
        seen.append([list(samples_of(stream, 0, split)) for split in ("train", "test")])
    assert seen[0] == seen[1]
    assert sum(map(len, seen[0])) == 4


def test_an_answer_field_is_used_in_shards_and_in_place(tmp_path):
    test = put(tmp_path / "t.json", [quizzed(n, f"sub/{n}.jpg", box=f"b{n}") for n in range(2)])
    in_place = InPlace(tmp_path / "pictures", tmp_path / "pictures", "box")
    for out, where in (("tars", None), ("loose", in_place)):
        stream, _ = made(tmp_path, test=test, answer_field="box", out=out, in_place=where)
        answers = [member["answers"] for _, _, member in samples_of(stream, 0, "test")]
        assert answers == [["b0"], ["b1"]]


def test_a_stream_grows_by_a_task(tmp_path):
    made(tmp_path / "a", out="../out")
    card = tmp_path / "out" / "vqa.yaml"
    card.write_text("# mine\n" + card.read_text())
    for _ in range(2):
        stream, _ = made(tmp_path / "b", name="count", out="../out", append=True,
                         allow_duplicates=True, license="CC0")  # fmt: skip
    assert [task.name for task in stream.stream] == ["vqa", "count"]
    assert card.read_text().startswith("# mine\n# Made by: mmcl data convert train.json\n")
    assert card.read_text().count("# Made by") == 1
    open_stream(stream.stream, verify_hashes=True)


def test_a_task_of_answers_joins_a_card_of_another_kind(tmp_path):
    card = tmp_path / "out" / "old.yaml"
    tar = tmp_path / "out" / "x.tar"
    put(card, "name: old\nscenario: class\nclasses: [a, b]\ntemplates: ['a photo of {}.']\n"
        "tasks:\n- {name: first, train: x.tar, test: y.tar}\n")  # fmt: skip
    put(tar, b"")
    train, images = train_set(tmp_path)
    options = ConvertOptions("vqa", test_fraction=0.5)
    path, _ = convert(
        open_instructions(train, images), None, tmp_path / "out", options, append=True
    )
    first, second = TaskStream.read(path)
    assert (path, first.task_type, second.task_type) == (card, "classification", "instruction")
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
    with pytest.raises(ValueError, match="'vqa' in .* was made from other files"):
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "holds no reference answers"),
        ("[1]", "holds no reference answers"),
        ("{", "is not JSON"),
        (b"\xff\xfe{", "is not JSON in UTF-8"),
        ("[" * 100_000, "is not JSON"),
        ('{"annotations": [{}]}', "is broken: KeyError"),
        ('{"data": 3}', "is broken: TypeError"),
    ],
)
def test_a_file_of_no_references_says_why(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        open_references(put(tmp_path / "x.json", content))
    with pytest.raises(FileNotFoundError, match="no file of references .*none.json"):
        open_references(tmp_path / "none.json")


def test_a_question_without_a_reference_is_a_bad_sample(tmp_path):
    votes = put(tmp_path / "v.json", {"data": [{"question_id": "q0", "answers": ["x"]}]})
    test = put(tmp_path / "test.json", [quizzed(n, f"sub/{n}.jpg") for n in range(2)])
    with pytest.raises(ValueError, match="sample 1 .*right answers are not in the file of refer"):
        made(tmp_path, test=test, references=votes)
    file = open_references(votes)
    put(votes, {"data": []})
    os.utime(votes, ns=(1, 1))
    assert file.answers(0, quizzed(0, "x")) == ["x"]
    with pytest.raises(ValueError, match="2 of 7 samples"):
        made(tmp_path, test=test, references=votes)


@pytest.mark.parametrize(("scorer", "right"), [("option", "B"), ("box", "[0.1, 0.2, 0.30, 1.0]")])
def test_right_answers_that_a_scorer_cannot_use_are_bad_samples(tmp_path, scorer, right):
    good = put(tmp_path / "good.json", [quizzed(0, "sub/0.jpg", answer=right)])
    made(tmp_path, test=good, scorer=scorer)
    bad = put(tmp_path / "bad.json", [quizzed(0, "sub/0.jpg", answer="a cat")])
    with pytest.raises(ValueError, match=f"'a cat', which the scorer '{scorer}' cannot use"):
        made(tmp_path, test=bad, scorer=scorer, out="bad")
    with pytest.raises(ValueError, match="(?s)5 of 5 samples in .* 'thing 0', which the scorer"):
        made(tmp_path, scorer=scorer, out="held_out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction is -0.1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"max_samples": 2.5}, "max_samples is 2.5"),
    ],
)
def test_options_outside_their_range_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        ConvertOptions("x", **words)


@pytest.mark.parametrize("name", ["", "../x", "a.b", "a b", "-a"])
def test_a_name_that_is_no_safe_file_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name is"):
        made(tmp_path, name=name)
