"""The stream `scenes_pretraining`: captions, then general dialogues, on scenes of every kind.

Two cards of one task each, as LLaVA is trained in two stages. Nothing in them shows a composition
or a number that a test split of `scenes`, `scenes_looks` or `scenes_words` shows.
"""

from __future__ import annotations

from pathlib import Path

from numpy.random import Generator

from mmcl.data.writing.card_writer import card_task
from mmcl.data.writing.shard_writer import Progress
from mmcl.streams.scene_dialogues import (
    QUESTIONS_OF_CROWDS,
    QUESTIONS_OF_MANY,
    QUESTIONS_OF_ONE,
    QUESTIONS_OF_PAIRS,
    QUESTIONS_OF_PLATES,
    Ask,
    ask_caption,
    talk,
)
from mmcl.streams.scene_drawing import PAGES
from mmcl.streams.scene_model import (
    COLOURS,
    CORNERS,
    OBJECT_NAMES,
    PLACES,
    SHAPES,
    TEXTURES,
    Scene,
    draw_corners,
    draw_crowd,
    draw_pair,
    draw_plate,
    pick,
)
from mmcl.streams.scene_tasks import PAIR_SIDES, Made
from mmcl.streams.scenes import expect_sizes, plan_shards, start_card, write

CAPTIONS, INSTRUCTIONS, TEST = 30_000, 40_000, 300
KINDS = ("corners", "crowd", "plate", "object", "pair")
KIND_WEIGHTS = (0.42, 0.18, 0.24, 0.10, 0.06)
LOOKS = ("clean",) * 16 + ("noisy",) * 2 + ("outlines",) * 2
MOST_TURNS = 4


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
        captions: pictures of the first stage, each with its caption.
        instructions: pictures of the second stage, each with two to four questions.
        test: held-out pictures of each stage; in the second with one question each.

    Returns:
        The paths of the two cards.

    Raises:
        ValueError: if a size is below 1.
    """
    sizes = {"captions": captions, "instructions": instructions, "test": test}
    expect_sizes(sizes)
    stages = (
        ("captions", "cpt", "captioning", captions, make_caption, make_caption),
        ("instructions", "cft", "exact", instructions, make_dialogue, make_question),
    )
    planned = []
    for name, stage, scorer, count, learned, scored in stages:
        learn = plan_shards(f"{name}-train", count, learned, seed)
        score = plan_shards(f"{name}-test", test, scored, seed)
        text = f"The {name} on which a tiny LLaVA is trained before it meets `scenes`."
        card = start_card(f"scenes_{name}", "domain", text, stage)
        card |= {"scorer": scorer, "max_new_tokens": 64}
        card["tasks"].append(card_task(name, learn, score))
        planned.append((card, [*learn, *score]))
    return write("scenes_pretraining", folder, planned, seed, sizes, progress)


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
    """Choose the patterns of a crowd: one to three kinds, or one colour or shape among others."""
    if rng.random() < 0.5:
        kinds = [(pick(COLOURS, rng), pick(SHAPES, rng)) for _ in range(1 + rng.integers(3))]
        return [kind for kind in kinds for _ in range(1 + rng.integers(5))]
    count, others = 1 + int(rng.integers(6)), int(rng.integers(1, 6))
    if rng.random() < 0.5:
        shape = pick(SHAPES, rng)
        return [("", shape)] * count + [("", f"not {shape}")] * others
    colour = pick(COLOURS, rng)
    return [(colour, "")] * count + [(f"not {colour}", "")] * others


def make_caption(rng: Generator) -> Made:
    """Make a picture with a caption; one in twenty-five has its colours inverted."""
    scene, _ = draw_any(rng)
    if scene.plate is None and not scene.is_crowd and rng.random() < 0.04:
        scene = Scene("white", scene.things, look="inverted")
    turn = ask_caption(scene, rng)
    return Made(scene, (turn,), (turn[1],))


def make_dialogue(rng: Generator) -> Made:
    """Make a picture with two to four questions."""
    scene, asks = draw_any(rng)
    turns = talk(scene, asks, int(rng.integers(2, MOST_TURNS + 1)), rng)
    return Made(scene, turns, (turns[-1][1],))


def make_question(rng: Generator) -> Made:
    """Make a picture with one question."""
    scene, asks = draw_any(rng)
    turns = talk(scene, asks, 1, rng)
    return Made(scene, turns, (turns[-1][1],))
