"""Drawings of scenes and their captions."""

import re

import numpy as np
import pytest

from mmcl.streams.glyph_drawing import COLORS as TONES
from mmcl.streams.scene_drawing import PAGES, draw_object, draw_page, draw_scene, read_forms
from mmcl.streams.scene_model import (
    OBJECT_NAMES,
    SHAPES,
    SPLITS,
    Plate,
    Scene,
    Thing,
    count_things,
    draw_corners,
    draw_plate,
    join,
)
from mmcl.streams.scene_pretraining import ask_existence, ask_larger, ask_side, caption
from mmcl.streams.scenes import LOOKS, corner_captions


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [*SHAPES, *OBJECT_NAMES])
def test_a_thing_fills_the_stated_box(shape, rng):
    thing = Thing("blue", shape, "plain", "top right", "big", (0.5, 0.1, 0.9, 0.5))
    image = np.asarray(draw_scene(Scene("white", (thing,)), rng)).astype(int)
    is_ink = np.abs(image - image[-1, 0]).max(-1) > 20
    rows, columns = np.flatnonzero(is_ink.any(1)), np.flatnonzero(is_ink.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = np.array(thing.box) * 64
    if shape in SHAPES:
        np.testing.assert_allclose(found, expected, atol=1.5)
    else:  # drawings keep their proportions inside of the box
        assert (np.array([1, 1, -1, -1]) * (found - expected) > -1.5).all()
        assert max(found[2] - found[0], found[3] - found[1]) > 23


def test_every_object_is_drawn_in_its_color_and_unlike_the_others():
    layers = {name: draw_object(name, (200, 30, 40), (48, 48)) for name in read_forms()}
    assert set(read_forms()) == set(OBJECT_NAMES)
    assert len({layer.tobytes() for layer in layers.values()}) == len(OBJECT_NAMES)
    for layer in layers.values():
        assert (np.asarray(layer)[..., :3] == (200, 30, 40)).all(-1).mean() > 0.1


def test_a_plain_square_has_its_color_in_every_look_but_the_inverted(rng):
    thing = Thing("red", "square", "plain", "top left", "big", (0.1, 0.1, 0.5, 0.5))
    tone = np.array(TONES["red"])
    for look, (page, drawn) in LOOKS.items():
        image = np.asarray(draw_scene(Scene(page, (thing,), look=drawn), rng)).astype(int)
        rim = image[8:10, 8:30].mean((0, 1))
        expected = 255 - tone if look == "inverted" else tone
        np.testing.assert_allclose(rim, expected, atol=25)


def test_every_page_is_whole_and_its_own(rng):
    pages = {name: draw_page(name, rng) for name in PAGES}
    assert {(page.size, page.mode) for page in pages.values()} == {((256, 256), "RGB")}
    assert len({page.tobytes() for page in pages.values()}) == len(PAGES)


def test_a_plate_shows_ink_on_its_ground(rng):
    image = draw_scene(Scene("asphalt", plate=Plate("118", "black", "white")), rng)
    grey = np.asarray(image.convert("L"))[16:48, 6:58]
    assert 0.05 < (grey < 80).mean() < 0.5
    assert (grey > 200).mean() > 0.4


def test_no_number_begins_with_a_zero_but_the_zero_itself(rng):
    numbers = {draw_plate(part, rng).number for part in SPLITS for _ in range(200)}
    assert {len(number) for number in numbers} == {1, 2, 3}
    assert all(number[0] != "0" for number in numbers if len(number) > 1)


def test_things_have_places_colors_and_shapes_of_their_own(rng):
    for part in SPLITS:
        for _ in range(50):
            things = draw_corners(part, 4, rng)
            for field in ("place", "color", "shape"):
                assert len({getattr(thing, field) for thing in things}) == 4


def test_a_caption_names_every_thing_and_the_references_agree(rng):
    things = (
        Thing("orange", "star", "dotted", "top left", "big", (0.0, 0.0, 0.4, 0.4)),
        Thing("red", "heart", "plain", "bottom right", "", (0.6, 0.6, 0.9, 0.9)),
    )
    parts = ["a big orange dotted star at the top left", "a red heart at the bottom right"]
    assert caption(Scene("white", things), rng) in (join(parts), join(parts[::-1]))
    references = corner_captions(things)
    assert len(references) == len(set(references)) == 4
    assert references[0] == (
        "in this scene we see a big orange dotted star in the top left corner "
        "and a red heart in the bottom right corner."
    )
    assert len({frozenset(re.findall(r"\w+", text)) for text in references}) == 1


def test_a_crowd_is_counted_and_an_inverted_image_has_no_colors(rng):
    box = (0.0, 0.0, 0.2, 0.2)
    stars = tuple(Thing("red", "star", "plain", "top left", "small", box) for _ in range(3))
    assert caption(Scene("white", stars, is_crowd=True), rng) == "three red stars"
    assert caption(Scene("white", stars[:1], look="inverted"), rng) == "a star at the top left"
    assert [count_things(n, "cross", "crosses") for n in (0, 1, 2)] == [
        "no crosses",
        "a cross",
        "two crosses",
    ]


def test_sentences_about_two_things_are_true(rng):
    things = (
        Thing("red", "star", "plain", "top left", "big", (0.0, 0.0, 0.4, 0.4)),
        Thing("blue", "heart", "plain", "bottom left", "small", (0.1, 0.6, 0.3, 0.8)),
    )
    scene = Scene("white", things)
    answers = {ask_side(scene, rng) for _ in range(20)}
    assert answers == {
        ("Is the star above or below the heart?", "the star is above the heart."),
        ("Is the heart above or below the star?", "the heart is below the star."),
    }
    assert {ask_larger(scene, rng)[1] for _ in range(9)} == {"the star is larger."}
    for question, answer in (ask_existence(scene, rng) for _ in range(30)):
        is_there = "red star" in question or "blue heart" in question
        assert answer.startswith("yes" if is_there else "no")
