"""The stream `scenes_pretraining`: captions, then general dialogues, on scenes of every kind.

Two cards of one task each, as LLaVA is trained in two stages. Nothing in them shows a composition
or a number that a test split of `scenes`, `scenes_looks` or `scenes_words` shows. Questions and
answers (in sentences) are worded differently from those of the stream's tasks; the facts are the
same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from numpy.random import Generator

from mmcl.data.shards.stream_writer import Progress, card_task
from mmcl.streams.scene_drawing import PAGES
from mmcl.streams.scene_model import (
    COLORS,
    CORNERS,
    COUNTS,
    OBJECT_NAMES,
    PLACES,
    SHAPES,
    TEXTURES,
    Plate,
    Scene,
    Thing,
    count_things,
    draw_corners,
    draw_crowd,
    draw_pair,
    draw_plate,
    join,
    pick,
    plural,
    with_article,
)
from mmcl.streams.scenes import PAIR_SIDES, Made, plan_shards, start_card, write_scenes

CAPTIONS, INSTRUCTIONS, TEST = 30_000, 40_000, 300
KINDS = ("corners", "crowd", "plate", "object", "pair")
KIND_WEIGHTS = (0.42, 0.18, 0.24, 0.10, 0.06)
LOOKS = ("clean",) * 16 + ("noisy",) * 2 + ("outlines",) * 2
MOST_TURNS = 4
REQUESTS = (
    "Describe the picture.",
    "What do you see?",
    "What is in the picture?",
    "Tell me what is here.",
    "Give a caption.",
)

MOST_KINDS = 3  # of a crowd that a caption tells apart by color and shape

Turn = tuple[str, str]
"""A question and its answer."""
Ask = Callable[[Scene, Generator], Turn]


def build(
    folder: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    captions: int = CAPTIONS,
    instructions: int = INSTRUCTIONS,
    test: int = TEST,
) -> list[Path]:
    """Build `scenes_captions` and `scenes_instructions`.

    Args:
        folder: output folder of shards and cards.
        seed: of every choice.
        progress: called with (samples done, samples in total).
        captions: images of the first stage, each with its caption.
        instructions: images of the second stage, each with two to four questions.
        test: held-out images of each stage; in the second with one question each.

    Returns:
        The paths of the two cards.

    Raises:
        ValueError: if a size is below 1.
    """
    sizes = {"captions": captions, "instructions": instructions, "test": test}
    make_question = partial(make_dialogue, turns=1)
    stages = (
        ("captions", "cpt", "captioning", captions, make_caption, make_caption),
        ("instructions", "cft", "exact", instructions, make_dialogue, make_question),
    )
    planned = []
    for name, stage, scorer, count, learned, scored in stages:
        learn = plan_shards(f"{name}-train", count, learned, seed)
        score = plan_shards(f"{name}-test", test, scored, seed)
        text = f"The {name} on which a tiny LLaVA is trained before it meets `scenes`."
        card = start_card(f"scenes_{name}", "domain", text, stage, scorer=scorer, max_new_tokens=64)
        card["tasks"].append(card_task(name, learn, score))
        planned.append((card, [*learn, *score]))
    return write_scenes("scenes_pretraining", folder, planned, seed, sizes, progress)


def draw_any(rng: Generator) -> tuple[Scene, tuple[Ask, ...]]:
    """Make a scene of any kind, and return the questions that fit it."""
    kind = KINDS[int(rng.choice(len(KINDS), p=KIND_WEIGHTS))]
    page, look = pick(tuple(PAGES), rng), pick(LOOKS, rng)
    if kind == "plate":
        look = "clean" if look == "outlines" else look
        return Scene(page, plate=draw_plate("train", rng), look=look), QUESTIONS_OF_PLATES
    if kind == "crowd":
        things = draw_crowd("train", choose_crowd(rng), rng)
        return Scene(page, things, look=look, is_crowd=True), QUESTIONS_OF_CROWDS
    if kind == "pair":
        pair = draw_pair("train", (pick(PAIR_SIDES, rng), pick(PAIR_SIDES, rng)), rng)
        return Scene("shelf", pair, look=look), QUESTIONS_OF_PAIRS
    if kind == "object":
        page = pick(("white", "grey", "squared", "checkered", "wood", "window"), rng)
        things = draw_corners("train", 1, rng, sides=(4,), names=OBJECT_NAMES, places=PLACES)
        return Scene(page, things), QUESTIONS_OF_ONE
    count = 1 + int(rng.integers(4))
    things = draw_corners(
        "train",
        count,
        rng,
        sides=pick(((2, 4), (2, 3, 4), (3, 4)), rng),
        places=PLACES if count == 1 else CORNERS,
        textures=TEXTURES[:1] if look == "outlines" else TEXTURES,
    )
    return Scene(page, things, look=look), QUESTIONS_OF_ONE if count == 1 else QUESTIONS_OF_MANY


def choose_crowd(rng: Generator) -> list[tuple[str, str]]:
    """Choose the patterns of a crowd: one to three kinds, or one color or shape among others."""
    if rng.random() < 0.5:
        kinds = [(pick(COLORS, rng), pick(SHAPES, rng)) for _ in range(1 + rng.integers(3))]
        return [kind for kind in kinds for _ in range(1 + rng.integers(5))]
    count, others = 1 + int(rng.integers(6)), int(rng.integers(1, 6))
    if rng.random() < 0.5:
        shape = pick(SHAPES, rng)
        return [("", shape)] * count + [("", f"not {shape}")] * others
    color = pick(COLORS, rng)
    return [(color, "")] * count + [(f"not {color}", "")] * others


def make_caption(rng: Generator) -> Made:
    """Make an image with a caption; one in twenty-five has its colors inverted."""
    scene, _ = draw_any(rng)
    if scene.plate is None and not scene.is_crowd and rng.random() < 0.04:
        scene = Scene("white", scene.things, look="inverted")
    turn = ask_caption(scene, rng)
    return Made(scene, (turn,), (turn[1],))


def make_dialogue(rng: Generator, turns: int = 0) -> Made:
    """Make an image with a number of questions, two to four if it is 0."""
    scene, asks = draw_any(rng)
    found = talk(scene, asks, turns or int(rng.integers(2, MOST_TURNS + 1)), rng)
    return Made(scene, found, (found[-1][1],))


def talk(scene: Scene, asks: Sequence[Ask], turns: int, rng: Generator) -> tuple[Turn, ...]:
    """Return questions on a scene with their answers, no question twice.

    Args:
        scene: the scene.
        asks: the kinds of questions to choose from.
        turns: number of questions; fewer come if a scene gives no more in three tries each.
        rng: source of all choices.
    """
    found: dict[str, str] = {}
    for _ in range(3 * turns):
        question, answer = pick(asks, rng)(scene, rng)
        found.setdefault(question, answer)
        if len(found) == turns:
            break
    return tuple(found.items())


def name_place(place: str) -> str:
    """Name a place: "at the top left", "in the middle"."""
    return f"in the {place}" if place == "middle" else f"at the {place}"


def caption(scene: Scene, rng: Generator) -> str:
    """Write a caption as the pre-training has them, without a full stop.

    The things of a crowd are counted by their kinds; others are named with their places. An image
    whose colors are inverted is described by its shapes alone.
    """
    if scene.plate is not None:
        return caption_plate(scene.plate, rng)
    if scene.is_crowd:
        return caption_crowd(scene.things, rng)
    things = [scene.things[number] for number in rng.permutation(len(scene.things))]
    if scene.look == "inverted":
        phrases = [f"{with_article(one.shape)} {name_place(one.place)}" for one in things]
    else:
        phrases = [f"{with_article(one.name)} {name_place(one.place)}" for one in things]
    return join(phrases)


def caption_crowd(things: tuple[Thing, ...], rng: Generator) -> str:
    """Count a crowd by its kinds: "three red stars and a blue circle".

    With more than three kinds it is counted by shape or by color: "four stars and a circle".
    """
    counts = Counter((thing.color, thing.shape) for thing in things)
    if len(counts) > MOST_KINDS:
        is_by_shape = rng.random() < 0.5
        counts = Counter(
            ("", thing.shape) if is_by_shape else (thing.color, "thing") for thing in things
        )
    kinds = [list(counts)[number] for number in rng.permutation(len(counts))]
    return join(
        [
            count_things(
                counts[color, shape],
                f"{color} {shape}".strip(),
                f"{color} {plural(shape)}".strip(),
            )
            for color, shape in kinds
        ]
    )


def caption_plate(plate: Plate, rng: Generator) -> str:
    """Read a plate with its colors: "the number 47 in white on red"."""
    return pick(
        (
            f"the number {plate.number} in {plate.ink} on {plate.ground}",
            f"{with_article(plate.ground)} plate with the number {plate.number}",
        ),
        rng,
    )


def ask_caption(scene: Scene, rng: Generator) -> Turn:
    """Ask for a description."""
    return pick(REQUESTS, rng), f"{caption(scene, rng)}."


def ask_color(scene: Scene, rng: Generator) -> Turn:
    """Ask for the color of a shape."""
    thing = pick(scene.things, rng)
    wordings = ("Tell me the colour of the {}.", "Name the colour of the {}.")
    return pick(wordings, rng).format(thing.shape), f"the {thing.shape} is {thing.color}."


def ask_shape(scene: Scene, rng: Generator) -> Turn:
    """Ask for the shape of a color."""
    thing = pick(scene.things, rng)
    wordings = ("Which form is {}?", "Name the {} thing.")
    answer = f"the {thing.color} thing is {with_article(thing.shape)}."
    return pick(wordings, rng).format(thing.color), answer


def ask_place(scene: Scene, rng: Generator) -> Turn:
    """Ask for the place of a thing."""
    thing = pick(scene.things, rng)
    name = thing.shape if rng.random() < 0.5 else f"{thing.color} {thing.shape}"
    wordings = ("Tell me the place of the {}.", "In which part of the picture is the {}?")
    return pick(wordings, rng).format(name), f"the {name} is {name_place(thing.place)}."


def ask_at_place(scene: Scene, rng: Generator) -> Turn:
    """Ask what is at a place, three times in four at one that is taken."""
    taken = {thing.place: thing for thing in scene.things}
    place = pick(list(taken), rng) if rng.random() < 0.75 else pick(CORNERS, rng)
    wordings = ("Which thing is {}?", "Name the thing {}.")
    name = with_article(taken[place].name) if place in taken else "nothing"
    where = name_place(place)
    return pick(wordings, rng).format(where), f"{name} is {where}."


def ask_texture(scene: Scene, rng: Generator) -> Turn:
    """Ask for the pattern of a shape."""
    thing = pick(scene.things, rng)
    wordings = ("Which pattern does the {} have?", "Is the {} plain, striped or dotted?")
    return pick(wordings, rng).format(thing.shape), f"the {thing.shape} is {thing.texture}."


def ask_size(scene: Scene, rng: Generator) -> Turn:
    """Ask for the size of a thing."""
    thing = pick(scene.things, rng)
    size = thing.size or "of middle size"
    wordings = ("Is the {} big or small?", "Tell me the size of the {}.")
    return pick(wordings, rng).format(thing.shape), f"the {thing.shape} is {size}."


def ask_extent(scene: Scene, rng: Generator) -> Turn:
    """Ask from where to where a thing goes."""
    thing = pick(scene.things, rng)
    left, upper, right, lower = (f"{value:.1f}" for value in thing.box)
    wordings = ("From where to where does the {} reach?", "Which space does the {} take?")
    answer = f"the {thing.shape} reaches from {left}, {upper} to {right}, {lower}."
    return pick(wordings, rng).format(thing.shape), answer


def ask_larger(scene: Scene, rng: Generator) -> Turn:
    """Ask which of two things is larger."""
    first, second = (scene.things[number] for number in rng.permutation(len(scene.things))[:2])
    sides = [thing.box[2] - thing.box[0] for thing in (first, second)]
    question = f"Which is larger, the {first.shape} or the {second.shape}?"
    if abs(sides[0] - sides[1]) < 0.01:
        return question, f"the {first.shape} and the {second.shape} are equally large."
    larger = first if sides[0] > sides[1] else second
    return question, f"the {larger.shape} is larger."


def ask_side(scene: Scene, rng: Generator) -> Turn:
    """Ask on which side of another thing a thing is."""
    first, second = (scene.things[number] for number in rng.permutation(len(scene.things))[:2])
    # By their corners: things of one row are neither above nor below each other.
    rows = [thing.place.split()[0] for thing in (first, second)]
    columns = [thing.place.split()[-1] for thing in (first, second)]
    sides = []
    if columns[0] != columns[1]:
        sides.append(("left or right of", f"{columns[0]} of"))
    if rows[0] != rows[1]:
        sides.append(("above or below", "above" if rows[0] == "top" else "below"))
    options, answer = pick(sides, rng)
    question = f"Is the {first.shape} {options} the {second.shape}?"
    return question, f"the {first.shape} is {answer} the {second.shape}."


def ask_total(scene: Scene, rng: Generator) -> Turn:
    """Ask for the number of things."""
    count = len(scene.things)
    question = pick(("Count all things.", "Count everything."), rng)
    return question, say_count(count, "thing")


def ask_existence(scene: Scene, rng: Generator) -> Turn:
    """Ask whether there is a thing of a color and a shape; half the time there is."""
    own = {(thing.color, thing.shape) for thing in scene.things}
    color, shape = pick(sorted(own), rng)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            color = pick(COLORS, rng)
        else:
            shape = pick(SHAPES, rng)
    wordings = ("Can you find {}?", "Did somebody draw {}?")
    question = pick(wordings, rng).format(with_article(f"{color} {shape}"))
    if (color, shape) in own:
        return question, f"yes, there is {with_article(f'{color} {shape}')}."
    return question, f"no, there is no {color} {shape}."


def ask_count(scene: Scene, rng: Generator) -> Turn:
    """Ask for the number of things of a shape or of a color."""
    if rng.random() < 0.5:
        shape = pick(scene.things, rng).shape if rng.random() < 0.85 else pick(SHAPES, rng)
        count = sum(thing.shape == shape for thing in scene.things)
        one = shape
    else:
        color = pick(scene.things, rng).color if rng.random() < 0.85 else pick(COLORS, rng)
        count = sum(thing.color == color for thing in scene.things)
        one = f"{color} thing"
    wordings = ("Count the {}.", "Tell me the count of the {}.")
    return pick(wordings, rng).format(plural(one)), say_count(count, one)


def say_count(count: int, one: str) -> str:
    """Say how many there are: "there is one star.", "there are three stars."."""
    if count == 1:
        return f"there is one {one}."
    return f"there are {count_things(count, one, plural(one))}."


def ask_more(scene: Scene, rng: Generator) -> Turn:
    """Ask of which shape there are more."""
    first, second = (SHAPES[number] for number in rng.permutation(len(SHAPES))[:2])
    own = sorted({thing.shape for thing in scene.things})
    if len(own) > 1:
        first, second = (own[number] for number in rng.permutation(len(own))[:2])
    counts = [sum(thing.shape == shape for thing in scene.things) for shape in (first, second)]
    question = f"Which are more, the {plural(first)} or the {plural(second)}?"
    if counts[0] == counts[1]:
        return question, f"there are as many {plural(first)} as {plural(second)}."
    more = first if counts[0] > counts[1] else second
    return question, f"there are more {plural(more)}."


def ask_number(scene: Scene, rng: Generator) -> Turn:
    """Ask for the number on a plate."""
    question = pick(("Read the number.", "Which number is written on the plate?"), rng)
    return question, f"the number is {_plate(scene).number}."


def ask_plate(scene: Scene, rng: Generator) -> Turn:
    """Ask for the colors of a plate, or for the length or one figure of its number."""
    plate = _plate(scene)
    length = COUNTS[len(plate.number)]
    figures = "figure" if len(plate.number) == 1 else "figures"
    turns = (
        ("Name the colour of the plate.", f"the plate is {plate.ground}."),
        ("Name the colour of the number.", f"the number is {plate.ink}."),
        ("How long is the number?", f"the number has {length} {figures}."),
        ("Read the first figure.", f"the first figure is {plate.number[0]}."),
        ("Read the last figure.", f"the last figure is {plate.number[-1]}."),
    )
    return pick(turns, rng)


def _plate(scene: Scene) -> Plate:
    if scene.plate is None:
        raise ValueError("the scene has no plate: ask for something else")
    return scene.plate


QUESTIONS_OF_ONE: tuple[Ask, ...] = (
    ask_caption, ask_color, ask_shape, ask_place, ask_at_place, ask_texture, ask_size, ask_extent,
    ask_existence,
)  # fmt: skip
QUESTIONS_OF_MANY: tuple[Ask, ...] = (*QUESTIONS_OF_ONE, ask_larger, ask_side, ask_total)
QUESTIONS_OF_PAIRS: tuple[Ask, ...] = (ask_larger, ask_larger, ask_side, ask_color, ask_shape)
QUESTIONS_OF_CROWDS: tuple[Ask, ...] = (
    *(ask_count,) * 5,
    ask_more,
    ask_total,
    ask_existence,
    ask_caption,
)
QUESTIONS_OF_PLATES: tuple[Ask, ...] = (ask_number, ask_number, ask_caption, ask_plate, ask_plate)
