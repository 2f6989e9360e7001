"""The tasks of the scene streams: scene, question and answer of each.

Each of the eight skills of `scenes` has its own page, question and form of answer. The questions
are made of the same words and ask about the same things; the form of the answer is fixed by their
last sentence, as in the public sets. A model that learns one form after the other forgets the
earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from numpy.random import Generator

from mmcl.streams.scene_dialogues import corner_captions
from mmcl.streams.scene_model import (
    COLOURS,
    CORNERS,
    LETTERS,
    OBJECTS,
    PLACES,
    SHAPES,
    Scene,
    draw_corners,
    draw_crowd,
    draw_pair,
    draw_plate,
    pick,
    plural,
)

MOST_COUNTED = 6
PAIR_SIDES = (0.18, 0.3, 0.46)


@dataclass(frozen=True)
class Made:
    """A scene, its conversation as (question, answer), and every right last answer."""

    scene: Scene
    turns: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]


Make = Callable[[str, Generator], Made]
"""Function ("train" or "test", generator) -> sample."""


def ask(scene: Scene, question: str, *answers: str) -> Made:
    """Ask one question; the first answer is the one to learn."""
    return Made(scene, ((question, answers[0]),), answers)


def make_colour(split: str, rng: Generator) -> Made:
    """Ask for the colour of a shape: one word."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(3, 4))
    shape = things[0].shape
    question = pick((f"What colour is the {shape}?", f"What is the colour of the {shape}?"), rng)
    return ask(Scene("white", things), f"{question} Answer with one word.", things[0].colour)


def make_pointing(split: str, rng: Generator) -> Made:
    """Ask for the box of a thing."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(2, 3, 4))
    name = f"{things[0].colour} {things[0].shape}"
    question = pick((f"Where is the {name}?", f"Where do you see the {name}?"), rng)
    box = "[" + ", ".join(f"{value:.1f}" for value in things[0].box) + "]"
    return ask(Scene("checkered", things), f"{question} Answer with a box.", box)


def make_counting(split: str, rng: Generator) -> Made:
    """Ask how many things of a shape or of a colour are in a crowd: one figure."""
    count, others = 1 + int(rng.integers(MOST_COUNTED)), int(rng.integers(1, 6))
    if rng.random() < 0.5:
        shape = pick(SHAPES, rng)
        wanted = [("", shape)] * count + [("", f"not {shape}")] * others
        name = plural(shape)
    else:
        colour = pick(COLOURS, rng)
        wanted = [(colour, "")] * count + [(f"not {colour}", "")] * others
        name = f"{colour} things"
    things = draw_crowd(split, wanted, rng)
    question = pick((f"How many {name} are there?", f"How many {name} do you see?"), rng)
    return ask(Scene("squared", things), f"{question} Answer with one figure.", str(count))


def make_shape(split: str, rng: Generator) -> Made:
    """Ask for the shape of a coloured thing: the letter of one of four options."""
    things = draw_corners(split, 2 + int(rng.integers(2)), rng, sides=(3, 4))
    others = [shape for shape in SHAPES if shape != things[0].shape]
    right = int(rng.integers(len(LETTERS)))
    options = [others[number] for number in rng.permutation(len(others))[: len(LETTERS) - 1]]
    options.insert(right, things[0].shape)
    listed = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, options, strict=True))
    thing = f"{things[0].colour} thing"
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
    name = f"{things[0].colour} {things[0].shape}"
    question = pick((f"Where is the {name}?", f"Where do you see the {name}?"), rng)
    return ask(Scene("window", things), f"{question} Answer with two words.", things[0].place)


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
        if small.place != big.place and small.shape != big.shape and small.colour != big.colour:
            break
    page, drawn = LOOKS[look]
    question = "What shape is the big thing? Answer with one word."
    return ask(Scene(page, (big, small), look=drawn), question, big.shape)


WORD_PAGES = ("white", "grey", "squared", "checkered")


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
    """One task of `scenes`.

    Args:
        make: makes its samples.
        scorer: scorer of the answers.
        max_new_tokens: tokens of an answer, enough for answers of another task's form.
        answers: how many different answers there are, to be given equally often; 0 for many.
    """

    make: Make
    scorer: str
    max_new_tokens: int
    answers: int = 0


SKILLS: Mapping[str, Skill] = MappingProxyType(
    {
        "colour": Skill(make_colour, "exact", 8, len(COLOURS)),
        "pointing": Skill(make_pointing, "box", 40),
        "counting": Skill(make_counting, "exact", 8, MOST_COUNTED),
        "captioning": Skill(make_captioning, "caption", 64),
        "shape": Skill(make_shape, "exact", 8, len(LETTERS)),
        "digits": Skill(make_digits, "exact", 8),
        "comparison": Skill(make_comparison, "exact", 8, 3),
        "position": Skill(make_position, "exact", 8, len(CORNERS)),
    }
)
"""Name of the task -> skill, in the order of the tasks: neighbours differ in their answers."""
