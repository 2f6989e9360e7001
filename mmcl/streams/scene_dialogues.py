"""General questions on scenes with answers in sentences: pretraining of a tiny LLaVA for `scenes`.

Wordings and answers differ from those of the stream's tasks; the facts are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from numpy.random import Generator

from mmcl.streams.scene_model import (
    COLOURS,
    CORNERS,
    COUNTS,
    SHAPES,
    Plate,
    Scene,
    Thing,
    count_things,
    join,
    pick,
    plural,
    with_article,
)

REQUESTS = (
    "Describe the picture.",
    "What do you see?",
    "What is in the picture?",
    "Tell me what is here.",
    "Give a caption.",
)

MOST_KINDS = 3  # of a crowd that a caption tells apart by colour and shape


def name_thing(thing: Thing, *, with_size: bool = True, with_texture: bool = True) -> str:
    """Name a thing: "big red striped star"."""
    words = [thing.colour, thing.shape]
    if with_texture and thing.texture != "plain":
        words.insert(1, thing.texture)
    if with_size and thing.size:
        words.insert(0, thing.size)
    return " ".join(words)


def name_place(place: str) -> str:
    """Name a place: "at the top left", "in the middle"."""
    return f"in the {place}" if place == "middle" else f"at the {place}"


def caption(scene: Scene, rng: Generator) -> str:
    """Write a caption as the pre-training has them, without a full stop.

    The things of a crowd are counted by their kinds; others are named with their places. A picture
    whose colours are inverted is described by its shapes alone.
    """
    if scene.plate is not None:
        return caption_plate(scene.plate, rng)
    if scene.is_crowd:
        return caption_crowd(scene.things, rng)
    things = [scene.things[number] for number in rng.permutation(len(scene.things))]
    if scene.look == "inverted":
        phrases = [f"{with_article(one.shape)} {name_place(one.place)}" for one in things]
    else:
        phrases = [f"{with_article(name_thing(one))} {name_place(one.place)}" for one in things]
    return join(phrases)


def caption_crowd(things: tuple[Thing, ...], rng: Generator) -> str:
    """Count a crowd by its kinds: "three red stars and a blue circle".

    With more than three kinds it is counted by shape or by colour: "four stars and a circle".
    """
    counts = Counter((thing.colour, thing.shape) for thing in things)
    if len(counts) > MOST_KINDS:
        is_by_shape = rng.random() < 0.5
        counts = Counter(
            ("", thing.shape) if is_by_shape else (thing.colour, "thing") for thing in things
        )
    kinds = [list(counts)[number] for number in rng.permutation(len(counts))]
    return join(
        [
            count_things(
                counts[colour, shape],
                f"{colour} {shape}".strip(),
                f"{colour} {plural(shape)}".strip(),
            )
            for colour, shape in kinds
        ]
    )


def caption_plate(plate: Plate, rng: Generator) -> str:
    """Read a plate with its colours: "the number 47 in white on red"."""
    return pick(
        (
            f"the number {plate.number} in {plate.ink} on {plate.ground}",
            f"{with_article(plate.ground)} plate with the number {plate.number}",
        ),
        rng,
    )


def corner_captions(things: tuple[Thing, ...]) -> list[str]:
    """Write every caption of a scene that the stream accepts, the one to learn first.

    Another style than that of the pre-training: "in this scene we see ... in the ... corner".
    """
    texts = []
    for order in (things, things[::-1]):
        phrases = [f"{with_article(name_thing(one))} in the {one.place} corner" for one in order]
        texts += [
            f"in this scene we see {join(phrases)}.",
            f"we see {join(phrases)} in this scene.",
        ]
    return list(dict.fromkeys(texts))


Turn = tuple[str, str]
"""A question and its answer."""

Ask = Callable[[Scene, Generator], Turn]


def ask_caption(scene: Scene, rng: Generator) -> Turn:
    """Ask for a description."""
    return pick(REQUESTS, rng), f"{caption(scene, rng)}."


def ask_colour(scene: Scene, rng: Generator) -> Turn:
    """Ask for the colour of a shape."""
    thing = pick(scene.things, rng)
    wordings = ("Tell me the colour of the {}.", "Name the colour of the {}.")
    return pick(wordings, rng).format(thing.shape), f"the {thing.shape} is {thing.colour}."


def ask_shape(scene: Scene, rng: Generator) -> Turn:
    """Ask for the shape of a colour."""
    thing = pick(scene.things, rng)
    wordings = ("Which form is {}?", "Name the {} thing.")
    answer = f"the {thing.colour} thing is {with_article(thing.shape)}."
    return pick(wordings, rng).format(thing.colour), answer


def ask_place(scene: Scene, rng: Generator) -> Turn:
    """Ask for the place of a thing."""
    thing = pick(scene.things, rng)
    name = thing.shape if rng.random() < 0.5 else f"{thing.colour} {thing.shape}"
    wordings = ("Tell me the place of the {}.", "In which part of the picture is the {}?")
    return pick(wordings, rng).format(name), f"the {name} is {name_place(thing.place)}."


def ask_at_place(scene: Scene, rng: Generator) -> Turn:
    """Ask what is at a place, three times in four at one that is taken."""
    taken = {thing.place: thing for thing in scene.things}
    place = pick(list(taken), rng) if rng.random() < 0.75 else pick(CORNERS, rng)
    wordings = ("Which thing is {}?", "Name the thing {}.")
    name = with_article(name_thing(taken[place])) if place in taken else "nothing"
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
    """Ask whether there is a thing of a colour and a shape; half the time there is."""
    own = {(thing.colour, thing.shape) for thing in scene.things}
    colour, shape = pick(sorted(own), rng)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            colour = pick(COLOURS, rng)
        else:
            shape = pick(SHAPES, rng)
    wordings = ("Can you find {}?", "Did somebody draw {}?")
    question = pick(wordings, rng).format(with_article(f"{colour} {shape}"))
    if (colour, shape) in own:
        return question, f"yes, there is {with_article(f'{colour} {shape}')}."
    return question, f"no, there is no {colour} {shape}."


def ask_count(scene: Scene, rng: Generator) -> Turn:
    """Ask for the number of things of a shape or of a colour."""
    if rng.random() < 0.5:
        shape = pick(scene.things, rng).shape if rng.random() < 0.85 else pick(SHAPES, rng)
        count = sum(thing.shape == shape for thing in scene.things)
        one = shape
    else:
        colour = pick(scene.things, rng).colour if rng.random() < 0.85 else pick(COLOURS, rng)
        count = sum(thing.colour == colour for thing in scene.things)
        one = f"{colour} thing"
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
    return question, f"the number is {the_plate(scene).number}."


def the_plate(scene: Scene) -> Plate:
    """Give the plate of a scene that has one.

    Raises:
        ValueError: if it has none.
    """
    if scene.plate is None:
        raise ValueError("the scene has no plate: ask for something else")
    return scene.plate


def ask_plate(scene: Scene, rng: Generator) -> Turn:
    """Ask for the colours of a plate, or for the length or one figure of its number."""
    plate = the_plate(scene)
    length = COUNTS[len(plate.number)]
    figures = "figure" if len(plate.number) == 1 else "figures"
    return pick(
        (
            ("Name the colour of the plate.", f"the plate is {plate.ground}."),
            ("Name the colour of the number.", f"the number is {plate.ink}."),
            ("How long is the number?", f"the number has {length} {figures}."),
            ("Read the first figure.", f"the first figure is {plate.number[0]}."),
            ("Read the last figure.", f"the last figure is {plate.number[-1]}."),
        ),
        rng,
    )


QUESTIONS_OF_ONE: tuple[Ask, ...] = (
    ask_caption,
    ask_colour,
    ask_shape,
    ask_place,
    ask_at_place,
    ask_texture,
    ask_size,
    ask_extent,
    ask_existence,
)
QUESTIONS_OF_MANY: tuple[Ask, ...] = (*QUESTIONS_OF_ONE, ask_larger, ask_side, ask_total)
QUESTIONS_OF_PAIRS: tuple[Ask, ...] = (ask_larger, ask_larger, ask_side, ask_colour, ask_shape)
QUESTIONS_OF_CROWDS: tuple[Ask, ...] = (
    *(ask_count,) * 5,
    ask_more,
    ask_total,
    ask_existence,
    ask_caption,
)
QUESTIONS_OF_PLATES: tuple[Ask, ...] = (ask_number, ask_number, ask_caption, ask_plate, ask_plate)


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
