"""The streams of generated scenes: eight skills, five looks of one skill, sixteen growing words.

A sample is a picture of 64 x 64 (PNG) and a conversation (JSON) as in LLaVA's files. At test a
model gets only the picture and the question: task and form of answer follow from the question.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.random import Generator

from mmcl.data.writing.card_writer import card_counts, card_task, card_text
from mmcl.data.writing.shard_writer import Progress, Sample, ShardPlan, build_stream
from mmcl.streams.scene_drawing import draw_scene
from mmcl.streams.scene_model import OBJECTS, SHAPES
from mmcl.streams.scene_tasks import LOOKS, SKILLS, Made, make_look, make_object

TRAIN, TEST = 1500, 200
LOOK_TRAIN, LOOK_TEST = 800, 200
WORD_TRAIN, WORD_TEST = 600, 160
SHARD_SIZE = 2000
LICENSE = "CC0-1.0 (made by this program)"
SOURCE = "drawn by mmcl"
RECIPE = 1  # counts up whenever the same seed would give other bytes
_SPLIT = (
    "No composition of colour, shape, texture and place of a test part is in a train part, nor "
    "a number of two or three figures, nor a single figure in the same two colours."
)

Card = dict[str, Any]
Draw = Callable[[Generator], Made]
"""Makes the next sample."""


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
        "train": train,
        "test": test,
        "look_train": look_train,
        "look_test": look_test,
        "word_train": word_train,
        "word_test": word_test,
    }
    expect_sizes(sizes)
    planned = (
        plan_skills(seed, train, test),
        plan_looks(seed, look_train, look_test),
        plan_words(seed, word_train, word_test),
    )
    return write("scenes", folder, planned, seed, sizes, progress)


def expect_sizes(sizes: Mapping[str, int]) -> None:
    """Check that no split is empty.

    Raises:
        ValueError: if a size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: ask for at least 1 sample")


def plan_skills(seed: int, train: int, test: int) -> tuple[Card, list[ShardPlan]]:
    """Plan the card `scenes` and its shards."""
    card = start_card("scenes", "domain", f"Eight skills tested on generated scenes. {_SPLIT}")
    plans: list[ShardPlan] = []
    for name, skill in SKILLS.items():
        learn = plan_shards(
            f"scenes-{name}-train", train, partial(skill.make, "train"), seed, skill.answers
        )
        score = plan_shards(
            f"scenes-{name}-test", test, partial(skill.make, "test"), seed, skill.answers
        )
        fields = {"scorer": skill.scorer, "max_new_tokens": skill.max_new_tokens}
        card["tasks"].append(card_task(name, learn, score, **fields))
        plans += [*learn, *score]
    return card, plans


def plan_looks(seed: int, train: int, test: int) -> tuple[Card, list[ShardPlan]]:
    """Plan the card `scenes_looks` and its shards."""
    text = f"One skill, the shape of the big thing, in five looks of the picture. {_SPLIT}"
    card = start_card("scenes_looks", "domain", text)
    card |= {"classes": list(SHAPES), "scorer": "exact", "max_new_tokens": 8}
    plans: list[ShardPlan] = []
    for look in LOOKS:
        make = partial(make_look, look)
        learn = plan_shards(f"looks-{look}-train", train, partial(make, "train"), seed, len(SHAPES))
        score = plan_shards(f"looks-{look}-test", test, partial(make, "test"), seed, len(SHAPES))
        card["tasks"].append(card_task(look, learn, score))
        plans += [*learn, *score]
    return card, plans


def plan_words(seed: int, train: int, test: int) -> tuple[Card, list[ShardPlan]]:
    """Plan the card `scenes_words` and its shards."""
    text = f"One question, what is it, with four new answers in every task. {_SPLIT}"
    card = start_card("scenes_words", "class", text)
    card |= {"scorer": "exact", "decoding": "candidates", "max_new_tokens": 8}
    plans: list[ShardPlan] = []
    for group, names in OBJECTS.items():
        make = partial(make_object, group)
        learn = plan_shards(f"words-{group}-train", train, partial(make, "train"), seed, len(names))
        score = plan_shards(f"words-{group}-test", test, partial(make, "test"), seed, len(names))
        card["tasks"].append(card_task(group, learn, score, classes=list(names)))
        plans += [*learn, *score]
    return card, plans


def start_card(name: str, scenario: str, description: str, stage: str = "cft") -> Card:
    """Begin a card of answer tasks, without tasks yet."""
    return {
        "name": name,
        "scenario": scenario,
        "description": description,
        "license": LICENSE,
        "source": SOURCE,
        "task_type": "instruction",
        "stage": stage,
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
        png = io.BytesIO()
        draw_scene(made.scene, rng).save(png, "PNG", compress_level=4)
        yield {
            "__key__": f"{name}-{number:05d}",
            "png": png.getvalue(),
            "json": json.dumps(dialogue(made), ensure_ascii=False),
        }


def dialogue(made: Made) -> dict[str, Any]:
    """Write a sample's questions and answers as LLaVA's files have them."""
    turns: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(made.turns):
        start = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": f"{start}{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"conversations": turns, "answers": list(made.answers)}


def write(
    name: str,
    folder: Path,
    planned: Sequence[tuple[Card, Sequence[ShardPlan]]],
    seed: int,
    sizes: Mapping[str, int],
    progress: Progress | None,
) -> list[Path]:
    """Write the shards of all cards, then the cards.

    Returns:
        The paths of the cards, in their order.
    """
    files = [f"{card['name']}.yaml" for card, _ in planned]

    def texts(hashes: Mapping[str, str]) -> dict[str, str]:
        found = {}
        for file, (card, plans) in zip(files, planned, strict=True):
            header = (
                f"Made by: mmcl data build {name} --seed {seed}",
                f"License: {LICENSE}",
                f"Samples: {sum(plan.count for plan in plans)} in {len(plans)} shards",
            )
            own = {plan.name: hashes[plan.name] for plan in plans}
            tasks = card["tasks"]
            fields = {key: value for key, value in card.items() if key != "tasks"}
            whole = {**fields, "tasks": tasks, "eval_only": [], "hashes": own}
            whole["counts"] = card_counts(plans)
            found[file] = card_text(whole, header)
        return found

    versions = {module.__name__: module.__version__ for module in (np, PIL)}
    recipe = {"number": RECIPE, "seed": seed, **sizes, **versions}
    plans = [plan for _, own in planned for plan in own]
    return build_stream(folder, name, plans, files, texts, recipe=recipe, progress=progress)
