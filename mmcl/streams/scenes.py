"""The streams of generated scenes: eight skills, five looks of one skill, sixteen growing words.

A sample is an image of 64 x 64 (PNG) and a conversation (JSON) as in LLaVA's files. At test a
model gets only the image and the question. Each skill has its own page, question and form of
answer. The questions are made of the same words and ask about the same things; the form of the
answer is fixed by their last sentence, as in the public sets. A model that learns one form after
the other forgets the earlier ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL
from numpy.random import Generator

from mmcl.data.shards.stream_writer import Progress, Sample, ShardPlan, card_task
from mmcl.streams.scene_drawing import draw_scene
from mmcl.streams.scene_model import (
    COLORS,
    CORNERS,
    LETTERS,
    OBJECTS,
    PLACES,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    draw_corners,
    draw_crowd,
    draw_pair,
    draw_plate,
    join,
    pick,
    plural,
    with_article,
)
from mmcl.streams.stream_files import Card, png_bytes, write_stream

TRAIN, TEST = 1500, 200
LOOK_TRAIN, LOOK_TEST = 800, 200
WORD_TRAIN, WORD_TEST = 600, 160
SHARD_SIZE = 2000
LICENSE = "CC0-1.0 (made by this program)"
SOURCE = "drawn by mmcl"
RECIPE = 1  # counts up whenever the same seed would give other bytes
_SKILLS = "Eight skills tested on generated scenes."
_LOOKS = "One skill, the shape of the big thing, in five looks of the picture."
_WORDS = "One question, what is it, with four new answers in every task."
_SPLIT = (
    "No composition of colour, shape, texture and place of a test part is in a train part, nor "
    "a number of two or three figures, nor a single figure in the same two colours."
)
MOST_COUNTED = 6
PAIR_SIDES = (0.18, 0.3, 0.46)
WORD_PAGES = ("white", "grey", "squared", "checkered")


@dataclass(frozen=True)
class Made:
    """A scene, its conversation as (question, answer), and every right last answer."""

    scene: Scene
    turns: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]


Make = Callable[[str, Generator], Made]
"""Function ("train" or "test", generator) -> sample."""
Draw = Callable[[Generator], Made]
"""Makes the next sample."""


def ask(scene: Scene, question: str, *answers: str) -> Made:
    """Ask one question; the first answer is the one to learn."""
    return Made(scene, ((question, answers[0]),), answers)


def make_color(split: str, rng: Generator) -> Made:
    """Ask for the color of a shape: one word."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(3, 4))
    shape = things[0].shape
    question = pick((f"What colour is the {shape}?", f"What is the colour of the {shape}?"), rng)
    return ask(Scene("white", things), f"{question} Answer with one word.", things[0].color)


def make_pointing(split: str, rng: Generator) -> Made:
    """Ask for the box of a thing."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(2, 3, 4))
    name = f"{things[0].color} {things[0].shape}"
    question = pick((f"Where is the {name}?", f"Where do you see the {name}?"), rng)
    box = "[" + ", ".join(f"{value:.1f}" for value in things[0].box) + "]"
    return ask(Scene("checkered", things), f"{question} Answer with a box.", box)


def make_counting(split: str, rng: Generator) -> Made:
    """Ask how many things of a shape or of a color are in a crowd: one figure."""
    count, others = 1 + int(rng.integers(MOST_COUNTED)), int(rng.integers(1, 6))
    if rng.random() < 0.5:
        shape = pick(SHAPES, rng)
        wanted = [("", shape)] * count + [("", f"not {shape}")] * others
        name = plural(shape)
    else:
        color = pick(COLORS, rng)
        wanted = [(color, "")] * count + [(f"not {color}", "")] * others
        name = f"{color} things"
    things = draw_crowd(split, wanted, rng)
    question = pick((f"How many {name} are there?", f"How many {name} do you see?"), rng)
    return ask(Scene("squared", things), f"{question} Answer with one figure.", str(count))


def make_shape(split: str, rng: Generator) -> Made:
    """Ask for the shape of a colored thing: the letter of one of four options."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(3, 4))
    others = [shape for shape in SHAPES if shape != things[0].shape]
    right = int(rng.integers(len(LETTERS)))
    options = [others[number] for number in rng.permutation(len(others))[: len(LETTERS) - 1]]
    options.insert(right, things[0].shape)
    listed = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, options, strict=True))
    thing = f"{things[0].color} thing"
    question = pick((f"What is the {thing}?", f"What shape is the {thing}?"), rng)
    return ask(
        Scene("wood", things), f"{question} {listed}. Answer with one letter.", LETTERS[right]
    )


def make_digits(split: str, rng: Generator) -> Made:
    """Ask for the number on a plate: its figures."""
    plate = draw_plate(split, rng)
    question = pick(("What number is there?", "What number do you see?"), rng)
    return ask(Scene("asphalt", plate=plate), f"{question} Answer with the number.", plate.number)


def make_captioning(split: str, rng: Generator) -> Made:
    """Ask for a caption of one or two things: a sentence."""
    things = draw_corners(split, 1 + int(rng.integers(2)), rng)
    question = pick(("What is there?", "What do you see?"), rng)
    return ask(
        Scene("night", things), f"{question} Answer with a sentence.", *corner_captions(things)
    )


def make_comparison(split: str, rng: Generator) -> Made:
    """Ask whether a thing is bigger than another: yes, no or equal."""
    answer = pick(("yes", "no", "equal"), rng)
    small, large = sorted(rng.permutation(len(PAIR_SIDES))[:2].tolist())
    sides = {"yes": (large, small), "no": (small, large), "equal": (small, small)}[answer]
    order = [int(number) for number in rng.permutation(2)]
    placed = (PAIR_SIDES[sides[order[0]]], PAIR_SIDES[sides[order[1]]])
    things = draw_pair(split, placed, rng)
    first, second = (things[order.index(number)].shape for number in range(2))
    question = f"Is the {first} bigger than the {second}?"
    return ask(Scene("shelf", things), f"{question} Answer with yes, no or equal.", answer)


def make_position(split: str, rng: Generator) -> Made:
    """Ask for the corner in which a thing is: two words."""
    things = draw_corners(split, 2 + int(rng.integers(3)), rng, sides=(2, 3, 4))
    name = f"{things[0].color} {things[0].shape}"
    question = pick((f"Where is the {name}?", f"Where do you see the {name}?"), rng)
    return ask(Scene("window", things), f"{question} Answer with two words.", things[0].place)


def corner_captions(things: tuple[Thing, ...]) -> list[str]:
    """Write every caption of a scene that the stream accepts, the one to learn first.

    Another style than that of the pre-training: "in this scene we see ... in the ... corner".
    """
    texts = []
    for order in (things, things[::-1]):
        phrases = [f"{with_article(one.name)} in the {one.place} corner" for one in order]
        texts += [
            f"in this scene we see {join(phrases)}.",
            f"we see {join(phrases)} in this scene.",
        ]
    return list(dict.fromkeys(texts))


LOOKS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "clean": ("white", "clean"),
        "inverted": ("white", "inverted"),
        "noisy": ("white", "noisy"),
        "outlines": ("white", "outlines"),
        "textured": ("spots", "clean"),
    }
)
"""Task of `scenes_looks` -> its page and its look."""


def make_look(look: str, split: str, rng: Generator) -> Made:
    """Ask for the shape of the big one of two plain things, in a look: one word."""
    big = draw_corners(split, 1, rng, sides=(4,), textures=("plain",))[0]
    while True:
        small = draw_corners(split, 1, rng, sides=(2,))[0]
        if small.place != big.place and small.shape != big.shape and small.color != big.color:
            break
    page, drawn = LOOKS[look]
    question = "What shape is the big thing? Answer with one word."
    return ask(Scene(page, (big, small), look=drawn), question, big.shape)


def make_object(group: str, split: str, rng: Generator) -> Made:
    """Ask what an object is: one word."""
    things = draw_corners(split, 1, rng, sides=(4,), names=OBJECTS[group], places=PLACES)
    return ask(
        Scene(pick(WORD_PAGES, rng), things),
        "What is it? Answer with one word.",
        things[0].shape,
    )


@dataclass(frozen=True)
class Skill:
    """One task of a stream of scenes.

    Args:
        make: makes its samples.
        answers: how many different answers there are, to be given equally often; 0 for many.
        fields: of its card entry, such as the scorer, and ``max_new_tokens``, enough for answers of
            another task's form.
    """

    make: Make
    answers: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)


_EXACT = MappingProxyType({"scorer": "exact", "max_new_tokens": 8})
SKILLS: Mapping[str, Skill] = MappingProxyType(
    {
        "colour": Skill(make_color, len(COLORS), _EXACT),
        "pointing": Skill(make_pointing, 0, {"scorer": "box", "max_new_tokens": 40}),
        "counting": Skill(make_counting, MOST_COUNTED, _EXACT),
        "captioning": Skill(make_captioning, 0, {"scorer": "caption", "max_new_tokens": 64}),
        "shape": Skill(make_shape, len(LETTERS), _EXACT),
        "digits": Skill(make_digits, 0, _EXACT),
        "comparison": Skill(make_comparison, 3, _EXACT),
        "position": Skill(make_position, len(CORNERS), _EXACT),
    }
)
"""Name of the task -> skill, in the order of the tasks: neighbours differ in their answers."""
LOOK_SKILLS = {look: Skill(partial(make_look, look), len(SHAPES)) for look in LOOKS}
WORD_SKILLS = {
    group: Skill(partial(make_object, group), len(names), {"classes": list(names)})
    for group, names in OBJECTS.items()
}


def build(
    folder: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    train: int = TRAIN,
    test: int = TEST,
    look_train: int = LOOK_TRAIN,
    look_test: int = LOOK_TEST,
    word_train: int = WORD_TRAIN,
    word_test: int = WORD_TEST,
) -> list[Path]:
    """Build `scenes`, `scenes_looks` and `scenes_words`.

    Args:
        folder: output folder of shards and cards.
        seed: of every choice.
        progress: called with (samples done, samples in total).
        train: samples to learn from in each of the eight tasks of `scenes`.
        test: samples to score on in each of them.
        look_train: the same for the five tasks of `scenes_looks`.
        look_test: the same.
        word_train: the same for the four tasks of `scenes_words`.
        word_test: the same.

    Returns:
        The paths of the three cards.

    Raises:
        ValueError: if a size is below 1.
    """
    sizes = {
        "train": train, "test": test, "look_train": look_train, "look_test": look_test,
        "word_train": word_train, "word_test": word_test,
    }  # fmt: skip
    looks: Card = {"classes": list(SHAPES), "scorer": "exact", "max_new_tokens": 8}
    words: Card = {"scorer": "exact", "decoding": "candidates", "max_new_tokens": 8}
    cards = (
        start_card("scenes", "domain", f"{_SKILLS} {_SPLIT}"),
        start_card("scenes_looks", "domain", f"{_LOOKS} {_SPLIT}", shift="content", **looks),
        start_card("scenes_words", "class", f"{_WORDS} {_SPLIT}", shift="content", **words),
    )
    planned = (
        plan_tasks(cards[0], "scenes", SKILLS, (train, test), seed),
        plan_tasks(cards[1], "looks", LOOK_SKILLS, (look_train, look_test), seed),
        plan_tasks(cards[2], "words", WORD_SKILLS, (word_train, word_test), seed),
    )
    return write_scenes("scenes", folder, planned, seed, sizes, progress)


def plan_tasks(
    card: Card, prefix: str, skills: Mapping[str, Skill], counts: tuple[int, int], seed: int
) -> tuple[Card, list[ShardPlan]]:
    """Plan the shards of every task, and put the tasks on the card.

    Args:
        card: without tasks.
        prefix: of the shards' names.
        skills: name of each task -> skill.
        counts: training and test samples of each task.
        seed: of every choice.
    """
    plans: list[ShardPlan] = []
    for name, skill in skills.items():
        learn, score = (
            plan_shards(
                f"{prefix}-{name}-{split}", count, partial(skill.make, split), seed, skill.answers
            )
            for split, count in zip(SPLITS, counts, strict=True)
        )
        card["tasks"].append(card_task(name, learn, score, **skill.fields))
        plans += [*learn, *score]
    return card, plans


def start_card(
    name: str, scenario: str, description: str, stage: str = "cft", **fields: Any
) -> Card:
    """Begin a card of answer tasks, without tasks yet."""
    return {
        "name": name,
        "scenario": scenario,
        "description": description,
        "license": LICENSE,
        "source": SOURCE,
        "task_type": "instruction",
        "stage": stage,
        **fields,
        "tasks": [],
    }


def plan_shards(name: str, count: int, make: Draw, seed: int, answers: int = 0) -> list[ShardPlan]:
    """Plan samples in shards of at most `SHARD_SIZE`, numbered if there are several.

    Args:
        name: of the shards, without number and extension.
        count: samples in all.
        make: makes them.
        seed: of every choice.
        answers: see `draw_evenly`.
    """
    starts = range(0, count, SHARD_SIZE)
    plans = []
    for number, start in enumerate(starts):
        own = name if len(starts) == 1 else f"{name}-{number:03d}"
        size = min(SHARD_SIZE, count - start)
        samples = partial(make_samples, own, size, make, seed, answers)
        plans.append(ShardPlan(f"{own}.tar", size, samples))
    return plans


def draw_evenly(count: int, make: Draw, answers: int, rng: Generator) -> Iterator[Made]:
    """Make samples in which every answer comes equally often, or one time more.

    Args:
        count: samples.
        make: makes one.
        answers: how many different answers there are; 0 takes the samples as they come.
        rng: source of all choices.
    """
    given: Counter[str] = Counter()
    most = -(-count // answers) if answers else count
    for _ in range(count):
        made = make(rng)
        while given[made.answers[0]] >= most:
            made = make(rng)
        given[made.answers[0]] += 1
        yield made


def make_samples(
    name: str, count: int, make: Draw, seed: int, answers: int = 0
) -> Iterator[Sample]:
    """Make the samples of a shard; its random numbers follow from ``seed`` and its name alone."""
    rng = np.random.default_rng([seed, *name.encode()])
    for number, made in enumerate(draw_evenly(count, make, answers, rng)):
        conversations: list[dict[str, str]] = []
        for turn, (question, answer) in enumerate(made.turns):
            start = "" if turn else "<image>\n"
            conversations.append({"from": "human", "value": f"{start}{question}"})
            conversations.append({"from": "gpt", "value": answer})
        dialogue = {"conversations": conversations, "answers": list(made.answers)}
        yield {
            "__key__": f"{name}-{number:05d}",
            "png": png_bytes(draw_scene(made.scene, rng), compress_level=4),
            "json": json.dumps(dialogue, ensure_ascii=False),
        }


def write_scenes(
    name: str,
    folder: Path,
    planned: Iterable[tuple[Card, list[ShardPlan]]],
    seed: int,
    sizes: Mapping[str, int],
    progress: Progress | None,
) -> list[Path]:
    """Write the shards of all cards, then the cards.

    Returns:
        The paths of the cards, in their order.

    Raises:
        ValueError: if one of ``sizes`` is below 1.
    """
    for size_name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{size_name} is {size}: ask for at least 1 sample")
    versions = {module.__name__: module.__version__ for module in (np, PIL)}
    recipe = {"number": RECIPE, "seed": seed, **sizes, **versions}
    return write_stream(name, folder, list(planned), recipe, progress)
