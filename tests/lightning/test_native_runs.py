"""Runs over samples with no image, one and two, of any size, by a model's own processor."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.behaviour.kill_runs import KILLED
from tests.data.small_stream import dialogue, write_tar
from tests.distributed.ranks import on_ranks
from tests.distributed.test_two_processes import PLAIN, far
from tests.lightning.small_runs import SmallRuns
from tests.models.small_families import write_family

MOMENTS = [("step", 3), ("ended", 1), ("step", 5), ("answers", 2)]
COLORS = {"red": (250, 10, 10), "blue": (10, 20, 250)}


def mixed(count, name, marks=None):
    """Members of ``count`` samples of 0, 1 and 2 images in turn, or of ``marks`` images each."""
    members = []
    for number in range(count):
        key, color = f"{name}{number:03d}", list(COLORS)[number % 2]
        images = number % 3 if marks is None else marks
        draw = np.random.default_rng(number)
        for index in range(images):
            height, width = (int(side) for side in draw.integers(14, 50, 2))
            file = io.BytesIO()
            Image.new("RGB", (width, height), COLORS[color]).save(file, "PNG")
            member = f"{index}.png" if images > 1 else "png"
            members.append((f"{key}.{member}", file.getvalue()))
        text = ["what is red?", "<image>hue?", "is <image> as <image> or not?"][images]
        members.append((f"{key}.json", dialogue(text, color, answers=[color])))
    return members


def runs_of(folder, family):
    changes = {f"{letter}_{part}": mixed(12 if part == "train" else 5, f"{letter}{part}")
               for letter in "ab" for part in ("train", "test")}  # fmt: skip
    runs = SmallRuns(folder, sizes=(12, 12), kind="instruction", changes=changes)
    (folder / "model").mkdir()
    write_family(folder / "model", family)
    options = {"model": str(folder / "model"), "max_length": 4096}
    runs.model = {"class_path": "mmcl.models.ImageTextToText", "init_args": options}
    return runs


def replay(storage):
    arguments = {"buffer_size": 6, "storage": storage}
    return {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": arguments}


LORA = {"class_path": "mmcl.strategies.LoRA", "init_args": {"rank": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("qwen2_vl", replay("copy")), ("llava_next", replay("reference")), ("qwen2_5_vl", LORA),
        ("llava_onevision", LORA), ("idefics3", replay("copy")),
    ],
)  # fmt: skip
def test_a_killed_run_over_mixed_samples_ends_as_one_left_alone(tmp_path, family, strategy):
    runs = runs_of(tmp_path, family)
    runs.finish("alone", strategy)
    for moment in MOMENTS:
        status, output = runs.start("killed", strategy, kill=moment)
        assert status == KILLED, (moment, output)
    runs.finish("killed", strategy)
    assert runs.differences("killed", "alone") == []


@pytest.mark.slow
def test_two_workers_make_the_batches_of_none(tmp_path):
    runs = runs_of(tmp_path, "qwen2_vl")
    runs.finish("none", replay("copy"))
    runs.finish("two", replay("copy"), data__num_workers=2)
    assert runs.differences("two", "none") == []


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    runs = runs_of(tmp_path, "qwen2_vl")
    one = runs.words("one", replay("reference"), **PLAIN)
    two = runs.words("two", replay("reference"), **PLAIN)
    assert on_ranks(one, tmp_path / "rank", world=1) == [0]
    assert on_ranks(two, tmp_path / "ranks") == [0, 0]
    assert far(runs.kept("two"), runs.kept("one"), tolerance=1e-3) == []
    assert far(runs.kept("one", 0), runs.kept("one"), tolerance=1e-3) != []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FeatureReplay", "AGEM"])
def test_what_stores_images_of_one_size_is_refused_with_what_to_give(tmp_path, strategy):
    runs = runs_of(tmp_path, "idefics3")
    one = [f"{letter}{part}" for letter in "ab" for part in ("train", "test")]
    for name in one:
        write_tar(tmp_path / "stream" / f"{name[0]}-{name[1:]}.tar", mixed(12, name, marks=1))
    status, output = runs.start("run", strategy)
    assert status != 0
    assert "image_inputs='square'" in output
