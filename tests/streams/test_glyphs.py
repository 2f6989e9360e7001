"""The stream of generated images: its drawings, and that a build is reproducible to the byte."""

import io
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mmcl.core.task import TaskStream
from mmcl.streams.glyph_drawing import (
    COLORS,
    SHAPES,
    TEXTURES,
    choose_colors,
    draw_outline,
    draw_shape,
    draw_strokes,
    fill,
    place_freely,
    read_skeletons,
    scan_coarsely,
    smooth_curve,
)
from mmcl.streams.glyphs import (
    DIGITS,
    FACES,
    HELD_OUT_FACES,
    LETTER_FACES,
    LETTERS,
    bend,
    build,
    draw_any,
    draw_digit,
    draw_letter,
    draw_print,
    print_character,
)

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
pytestmark = pytest.mark.skipif(
    not (FONTS / "cmti10.ttf").is_file(), reason="matplotlib before 3.11 ships fewer faces"
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return build(tmp_path_factory.mktemp("glyphs"), seed=3, train=40, test=12)


def read_samples(path):
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def test_a_curve_goes_through_its_points_and_keeps_a_line_straight():
    bent = smooth_curve(np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]]), steps=4)
    np.testing.assert_allclose(bent[[0, 4, 8]], [[0, 0], [1, 2], [3, 1]])
    straight = smooth_curve(np.array([[0.0, 0.0], [1.0, 1.0]]), steps=4)
    np.testing.assert_allclose(straight, np.linspace(0, 1, 5)[:, None].repeat(2, axis=1))


def test_every_way_of_writing_a_digit_is_inside_its_box():
    assert sorted(read_skeletons()) == list(range(10))
    points = [curve for ways in read_skeletons().values() for way in ways for curve in way]
    assert all(len(curve) >= 2 for curve in points)
    assert all(curve.min() >= 0 and curve.max() <= 1 for curve in points)


@pytest.mark.parametrize("digit", range(10))
def test_a_written_digit_is_ink_in_the_middle_of_an_empty_page(digit, rng):
    for _ in range(5):
        ink = np.asarray(draw_strokes(digit, rng), dtype=float) / 255
        assert ink.shape == (64, 64)
        assert 0.03 < ink.mean() < 0.45
        assert ink[[0, -1]].max() == ink[:, [0, -1]].max() == 0


def test_every_face_prints_every_character_differently_from_its_neighbour():
    for face in (*FACES, *HELD_OUT_FACES):
        printed = {c: print_character(face, c).tobytes() for c in (*"0123456789", *LETTERS)}
        assert len(set(printed.values())) == 36, face
    letters = {print_character(LETTER_FACES[0], c).tobytes() for c in LETTERS}
    assert len(letters) == 26


def test_no_face_is_both_learned_from_and_held_out():
    assert not set(HELD_OUT_FACES) & {*FACES, *LETTER_FACES}


def test_a_missing_face_names_the_version_of_matplotlib():
    with pytest.raises(FileNotFoundError, match="ships no face 'Nonesuch'"):
        print_character("Nonesuch", "a")


def test_bending_by_the_identity_changes_nothing(rng):
    ink = print_character(FACES[0], "R")
    same = bend(ink, np.eye(2), strength=0.0, rng=rng)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(ink))


def test_a_coarse_scan_of_a_full_block_fills_cells_evenly(rng):
    block = Image.new("L", (64, 64))
    block.paste(255, (16, 16, 48, 48))
    scan = np.asarray(scan_coarsely(block, 8, rng))
    assert scan.shape == (64, 64)
    assert scan.max() == 255


def test_a_placed_glyph_stays_whole_on_the_page(rng):
    for _ in range(20):
        page = place_freely(draw_print("W", FACES, rng), rng)
        left, upper, right, lower = page.getbbox()
        assert right - left >= 15
        assert lower - upper >= 5


def test_ink_and_paper_differ_in_brightness(rng):
    for _ in range(100):
        ink, paper = choose_colors(rng, 0.4)
        assert abs(sum(ink) - sum(paper)) > 250


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_neither_empty_nor_the_whole_page(shape, rng):
    share = np.asarray(draw_outline(shape, 24.0, rng)).mean() / 255
    assert 0.05 < share < 0.6


@pytest.mark.parametrize("texture", TEXTURES)
def test_only_a_plain_page_has_one_tone(texture, rng):
    tones = np.unique(np.asarray(fill(texture, COLORS["red"], rng)).reshape(-1, 3), axis=0)
    assert len(tones) == (1 if texture == "plain" else 2)


def test_a_shape_never_has_the_color_of_its_page(rng):
    for _ in range(100):
        _, facts = draw_shape(rng)
        assert facts["color"] != facts["page"]


def test_a_caption_names_what_is_drawn(rng):
    for _ in range(50):
        _, caption, digit = draw_digit(FACES, rng)
        assert digit in caption or str(DIGITS.index(digit)) in caption
        _, caption, letter = draw_letter(FACES, rng)
        assert caption.rstrip(".").endswith(letter)


def test_all_kinds_of_images_are_drawn(rng):
    captions = " ".join(draw_any(FACES, rng)[1] for _ in range(200))
    assert all(word in captions for word in ("digit", "handwritten", "letter", "background"))


def test_the_card_reads_as_a_stream_with_four_probes(card):
    stream = TaskStream.read(card)
    assert [task.name for task in stream] == ["glyphs"]
    assert (stream[0].task_type, stream[0].stage, stream[0].size) == ("captioning", "cpt", 40)
    assert [probe.name for probe in stream.eval_only_tasks] == [
        "digits",
        "letters",
        "colours",
        "shapes",
    ]
    assert [len(probe.classes) for probe in stream.eval_only_tasks] == [10, 26, 11, 11]


def test_a_sample_is_a_small_image_with_its_caption_and_label(card):
    samples = read_samples(card.parent / "test-digits.tar")
    assert len(samples) == 12
    for sample in samples.values():
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.size, image.mode) == ((64, 64), "RGB")
        label = int(sample["cls"])
        words = sample["txt"].decode()
        assert DIGITS[label] in words or str(label) in words


def test_a_second_build_gives_the_same_bytes_and_another_seed_others(card, tmp_path):
    again = build(tmp_path / "again", seed=3, train=40, test=12)
    other = build(tmp_path / "other", seed=4, train=40, test=12)
    assert again.read_bytes() == card.read_bytes()
    shards = [folder.parent / "train-000.tar" for folder in (card, again, other)]
    assert shards[0].read_bytes() == shards[1].read_bytes() != shards[2].read_bytes()


def test_a_killed_build_keeps_its_whole_shards_and_ends_the_same(card, tmp_path):
    def stop_late(done, total):
        if done == total - 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, seed=3, train=40, test=12, progress=stop_late)
    kept = (tmp_path / "train-000.tar").stat().st_mtime_ns
    assert not (tmp_path / "glyphs.yaml").exists()
    assert build(tmp_path, seed=3, train=40, test=12).read_bytes() == card.read_bytes()
    assert (tmp_path / "train-000.tar").stat().st_mtime_ns == kept


def test_an_empty_split_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(ValueError, match="train is 0 and test is 5"):
        build(tmp_path, train=0, test=5)
