"""Splits of an input: their names, and that validation samples are never learned from."""

import pytest

from mmcl.data.convert.record import split_of


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train", "Training", "RESTVAL", " train "], "train"),
        (["val", "valid", "VALIDATION", "Dev"], "validation"),
        (["test", "Testing", "TEST"], "test"),
        (["", "extra", "test2015", "train_small", "eval", "0"], None),
    ],
)
def test_a_split_is_known_by_its_usual_names_in_any_case(names, split):
    assert [split_of(name) for name in names] == [split] * len(names)
