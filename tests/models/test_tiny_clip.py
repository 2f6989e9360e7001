"""What ships: size, hash, licence of the data, and that it sees handwriting it never met."""

import hashlib
from pathlib import Path

import pytest

import mmcl.models.tiny
from tests.benchmarks.zero_shot import scans, zero_shot

FOLDER = Path(mmcl.models.tiny.__file__).parent


def test_the_weights_are_small_enough_to_ship():
    assert (FOLDER / "tiny-clip.safetensors").stat().st_size <= 4_000_000


def test_the_model_card_names_the_weights_by_hash():
    mark = hashlib.sha256((FOLDER / "tiny-clip.safetensors").read_bytes()).hexdigest()
    assert mark in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_handwritten_digits_are_told_apart_though_none_was_ever_seen():
    assert zero_shot(*scans()) > 0.5  # chance is 0.1
