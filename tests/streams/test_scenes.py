"""The streams of generated scenes: drawings, questions and held-out compositions."""

import io
import json
import re
import tarfile
from collections import Counter
from functools import cache, partial

import numpy as np
import pytest
import yaml
from PIL import Image

from mmcl.core.task import TaskStream
from mmcl.streams import scene_pretraining, scenes
from mmcl.streams.registry import STREAMS, find_stream
from mmcl.streams.scene_model import (
    COLORS,
    LETTERS,
    OBJECTS,
    PLACES,
    SHAPES,
    SPLITS,
    TEXTURES,
    Plate,
    is_kept,
    is_kept_plate,
    plural,
)
from mmcl.streams.scene_pretraining import talk
from mmcl.streams.scenes import LOOKS, SKILLS, make_look, make_object
from tests.vocabularies.scene_words import scene_words

SMALL = {
    "train": 6,
    "test": 4,
    "look_train": 3,
    "look_test": 2,
    "word_train": 3,
    "word_test": 2,
}
MAKES = {
    **{name: skill.make for name, skill in SKILLS.items()},
    **{look: partial(make_look, look) for look in LOOKS},
    **{group: partial(make_object, group) for group in OBJECTS},
}
FORMS_OF_ANSWERS = {
    "colour": "[a-z]+",
    "pointing": r"\[[01]\.\d, [01]\.\d, [01]\.\d, [01]\.\d\]",
    "counting": "[1-6]",
    "captioning": r"in this scene we see .+\.",
    "shape": "[ABCD]",
    "digits": r"\d{1,3}",
    "comparison": "yes|no|equal",
    "position": "(top|bottom) (left|right)",
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    return scenes.build(tmp_path_factory.mktemp("scenes"), seed=3, **SMALL)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    return scene_pretraining.build(folder, seed=3, captions=30, instructions=30, test=5)


@cache
def made(task, part, count=150):
    rng = np.random.default_rng([7, *task.encode(), *part.encode()])
    return [MAKES[task](part, rng) for _ in range(count)]


def pretraining_samples(count):
    rng = np.random.default_rng(11)
    makes = (scene_pretraining.make_caption, scene_pretraining.make_dialogue)
    return [make(rng) for make in makes for _ in range(count)]


def shown(samples):
    """All compositions and numbers that the images show."""
    found = {thing.composition for one in samples for thing in one.scene.things}
    plates = [one.scene.plate for one in samples if one.scene.plate]
    return found | {p if len(p.number) == 1 else p.number for p in plates}


def read_samples(path):
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def words_of(sample):
    texts = [text for turn in sample.turns for text in turn] + list(sample.answers)
    return {word for text in texts for word in re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", text)}


@pytest.mark.parametrize("task", MAKES)
def test_no_composition_of_a_test_split_is_trained_on(task):
    learned, scored = (shown(made(task, part)) for part in SPLITS)
    assert learned
    assert scored
    assert not learned & scored


def test_the_pretraining_shows_no_composition_of_a_test_split():
    learned = shown(pretraining_samples(400))
    assert not learned & {found for task in MAKES for found in shown(made(task, "test"))}


def test_every_fifth_composition_is_kept_and_each_color_is_learned_with_all_else():
    everything = [(c, s, t, p) for c in COLORS for s in SHAPES for t in TEXTURES for p in PLACES]
    learned = [one for one in everything if not is_kept(one)]
    assert len(learned) == 0.8 * len(everything)
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        pairs = {(one[first], one[second]) for one in everything}
        assert pairs == {(one[first], one[second]) for one in learned}


def test_a_kept_number_is_kept_in_all_colors_and_a_figure_only_in_some():
    plates = [Plate("47", ink, "white") for ink in ("red", "blue")]
    assert len({is_kept_plate(plate) for plate in plates}) == 1
    single = {is_kept_plate(Plate("4", ink, "white")) for ink in ("black", "blue", "red", "purple")}
    assert single == {True, False}


@pytest.mark.parametrize("task", SKILLS)
def test_answers_have_the_form_of_their_task(task):
    for one in (*made(task, "train"), *made(task, "test")):
        assert re.fullmatch(FORMS_OF_ANSWERS[task], one.answers[0])
        assert one.turns[-1][1] == one.answers[0]
        assert "Answer with" in one.turns[0][0]


@pytest.mark.parametrize("task", [name for name, skill in SKILLS.items() if skill.answers])
def test_answers_are_given_equally_often(task, rng):
    skill = SKILLS[task]
    drawn = scenes.draw_evenly(200, partial(skill.make, "test"), skill.answers, rng)
    counts = Counter(one.answers[0] for one in drawn)
    assert (len(counts), counts.total()) == (skill.answers, 200)
    assert max(counts.values()) <= -(-200 // skill.answers) <= 0.35 * 200


@pytest.mark.parametrize("task", ["pointing", "captioning", "digits"])
def test_no_free_answer_is_frequent(task):
    counts = Counter(one.answers[0] for one in made(task, "test"))
    assert max(counts.values()) / counts.total() < 0.1


def test_counts_colors_and_places_are_those_of_the_scene():
    for one in (*made("counting", "train"), *made("counting", "test")):
        name = re.match(r"How many (.+?) (are|do)", one.turns[0][0])[1]
        things = one.scene.things
        count = sum(name in (plural(t.shape), f"{t.color} things") for t in things)
        assert one.answers == (str(count),)
    for one in made("colour", "test"):
        matching = [thing for thing in one.scene.things if f" {thing.shape}?" in one.turns[0][0]]
        assert [thing.color for thing in matching] == list(one.answers)
    for one in made("position", "test"):
        matching = [t for t in one.scene.things if f"{t.color} {t.shape}?" in one.turns[0][0]]
        assert [thing.place for thing in matching] == list(one.answers)


def test_the_letter_is_that_of_the_option_with_the_named_color():
    for one in made("shape", "test"):
        question = one.turns[0][0]
        color = re.search(r"the (\w+) thing", question)[1]
        options = dict(re.findall(r"\b([ABCD]) (\w+)", question))
        shape = next(thing.shape for thing in one.scene.things if thing.color == color)
        assert list(options) == list(LETTERS)
        assert options[one.answers[0]] == shape


def test_bigger_is_judged_by_the_width_of_the_boxes():
    for one in made("comparison", "test"):
        first, second = re.match(r"Is the (\w+) bigger than the (\w+)\?", one.turns[0][0]).groups()
        width = {thing.shape: thing.box[2] - thing.box[0] for thing in one.scene.things}
        gap = width[first] - width[second]
        assert one.answers[0] == ("equal" if abs(gap) < 0.01 else "yes" if gap > 0 else "no")


def test_a_dialogue_asks_no_question_twice(rng):
    for _ in range(50):
        scene, asks = scene_pretraining.draw_any(rng)
        turns = talk(scene, asks, 4, rng)
        assert 1 <= len({question for question, _ in turns}) == len(turns) <= 4


def test_every_word_is_in_the_list_of_words():
    known = scene_words()
    samples = [one for task in MAKES for part in SPLITS for one in made(task, part)]
    for one in (*samples, *pretraining_samples(300)):
        assert words_of(one) <= known


def test_the_pretraining_never_answers_as_the_tasks_do():
    forms = [form for name, form in FORMS_OF_ANSWERS.items()]
    for one in pretraining_samples(300):
        assert not [turn for turn in one.turns if any(re.fullmatch(f, turn[1]) for f in forms)]


def test_the_three_cards_read_as_streams_of_answers(cards):
    skills, looks, words = (TaskStream.read(card) for card in cards)
    assert [task.name for task in skills] == list(SKILLS)
    assert {task.task_type for stream in (skills, looks, words) for task in stream} == {
        "instruction"
    }
    assert [task.scorer for task in skills] == [skill.fields["scorer"] for skill in SKILLS.values()]
    assert [task.name for task in looks] == list(LOOKS)
    assert all(task.decoding == "candidates" for task in words)
    raw = yaml.safe_load(cards[2].read_text())
    assert (raw["scenario"], raw["tasks"][1]["classes"]) == ("class", list(OBJECTS["street"]))
    assert (skills[0].size, skills[0].test_size, skills[1].max_new_tokens) == (6, 4, 40)


def test_a_sample_is_an_image_and_a_conversation(cards, pretraining):
    for path in sorted(cards[0].parent.glob("*.tar")) + sorted(pretraining[0].parent.glob("*.tar")):
        for sample in read_samples(path).values():
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.size, image.mode) == ((64, 64), "RGB")
            conversation = json.loads(sample["json"])
            turns = conversation["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert not any("<image>" in turn["value"] for turn in turns[1:])
            assert conversation["answers"][0] == turns[-1]["value"]


def test_captions_have_two_references_or_more(cards):
    for sample in read_samples(cards[0].parent / "scenes-captioning-test.tar").values():
        assert len(json.loads(sample["json"])["answers"]) >= 2


def test_a_second_build_gives_the_same_bytes_and_another_seed_others(cards, tmp_path):
    again = scenes.build(tmp_path / "again", seed=3, **SMALL)
    other = scenes.build(tmp_path / "other", seed=4, **SMALL)
    for path in sorted(cards[0].parent.iterdir()):
        if path.is_file() and path.suffix in (".tar", ".yaml"):
            assert (again[0].parent / path.name).read_bytes() == path.read_bytes()
    name = "scenes-colour-train.tar"
    assert (other[0].parent / name).read_bytes() != (again[0].parent / name).read_bytes()


def test_the_pretraining_has_a_card_for_each_stage(pretraining, tmp_path):
    captions, instructions = (TaskStream.read(card) for card in pretraining)
    assert (captions[0].stage, captions[0].scorer, captions[0].size) == ("cpt", "captioning", 30)
    assert (instructions[0].stage, instructions[0].size, instructions[0].test_size) == (
        "cft",
        30,
        5,
    )
    again = scene_pretraining.build(tmp_path, seed=3, captions=30, instructions=30, test=5)
    assert [card.read_bytes() for card in again] == [card.read_bytes() for card in pretraining]


def test_large_splits_are_cut_into_shards(monkeypatch):
    monkeypatch.setattr(scenes, "SHARD_SIZE", 4)
    plans = scenes.plan_shards("x", 10, partial(SKILLS["colour"].make, "train"), 0)
    assert [(plan.name, plan.count) for plan in plans] == [
        ("x-000.tar", 4),
        ("x-001.tar", 4),
        ("x-002.tar", 2),
    ]


@pytest.mark.parametrize("size", SMALL)
def test_an_empty_split_is_refused_by_its_name(size, tmp_path):
    with pytest.raises(ValueError, match=f"{size} is 0: ask for at least 1"):
        scenes.build(tmp_path, **{size: 0})


def test_the_table_of_streams_finds_every_card(cards, pretraining):
    assert tuple(card.name for card in cards) == STREAMS["scenes"].cards
    assert tuple(card.name for card in pretraining) == STREAMS["scenes_pretraining"].cards
    assert find_stream("scenes_looks") == (STREAMS["scenes"], "scenes_looks.yaml")
    stream, card = find_stream("scenes_captions")
    assert (stream.builder(), card) == (scene_pretraining.build, "scenes_captions.yaml")
