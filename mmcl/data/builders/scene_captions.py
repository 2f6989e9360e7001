"""What can be said of a scene: names of things, captions, and sets of captions that are right."""

from __future__ import annotations

from collections import Counter

from numpy.random import Generator

from mmcl.data.builders.scene_things import Plate, Scene, Thing, pick
from mmcl.data.builders.scene_words import count_things, join, plural, with_article

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
    """Say where: "at the top left", "in the middle"."""
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
