from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from mmcl.evaluation.strict_json import Amount, Count, load, parse, to_bytes


@dataclass(frozen=True)
class Inner:
    name: str
    value: float | None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("its name is bad")


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    count: Count
    seconds: Amount
    cells: tuple[tuple[float | None, ...], ...]
    notes: Sequence[str | Mapping[str, str]]
    inner: Sequence[Inner]
    flag: bool = False


GOOD = {
    "kind": "a", "count": 2, "seconds": 1, "cells": [[1, None]], "notes": ["x", {"k": "v"}],
    "inner": [{"name": "n", "value": None}], "flag": True,
}  # fmt: skip


def test_a_dataclass_is_made_of_parsed_json_with_tuples_and_floats():
    found = load(Outer, GOOD, "f")
    assert found == Outer("a", 2, 1.0, ((1.0, None),), ("x", {"k": "v"}), (Inner("n", None),), True)
    assert isinstance(found.seconds, float)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "c"}, "'kind' is 'c', expected one of a, b"),
        ({"kind": ["a"]}, "'kind' is ['a'], expected one of a, b"),
        ({"count": True}, "'count' is True, expected integer of at least 0"),
        ({"count": 2**63}, "expected integer of at least 0"),
        ({"seconds": float("nan")}, "'seconds' is nan, expected finite number of at least 0"),
        ({"seconds": 1e301}, "expected finite number of at least 0"),
        ({"cells": [[None], ["x"]]}, "'cells'[1][0] is 'x', expected finite number or null"),
        ({"cells": "x"}, "'cells' is 'x', expected list of list of finite number or null"),
        ({"notes": [1]}, "'notes'[0] is 1, expected string or object of string"),
        ({"inner": [{"name": "bad", "value": 1}]}, "'inner'[0]: its name is bad"),
        ({"inner": [{"name": "n"}]}, "'inner'[0]: 'value' is missing"),
        ({"inner": 7}, "'inner' is 7, expected list of object with name, value"),
        ({"flag": 1}, "'flag' is 1, expected boolean"),
        ({"other": 1}, "unknown keys ['other']"),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_the_expected_type(change, sentence):
    with pytest.raises(
        ValueError, match=r"^f is not valid: .*: correct it or write it again$"
    ) as e:
        load(Outer, GOOD | change, "f")
    assert sentence in str(e.value)


def test_all_wrong_keys_are_named_at_once():
    raw = {key: value for key, value in GOOD.items() if key != "kind"} | {"count": -1, "flag": 0}
    with pytest.raises(ValueError, match=r"'kind' is missing; 'count' is -1.*; 'flag' is 0"):
        load(Outer, raw, "f")


def test_an_optional_key_may_be_missing():
    raw = {key: value for key, value in GOOD.items() if key != "flag"}
    assert load(Outer, raw, "f", optional=["flag"]).flag is False
    with pytest.raises(ValueError, match="'flag' is missing"):
        load(Outer, raw, "f")


def test_a_huge_value_makes_a_short_error():
    with pytest.raises(ValueError, match="'kind' is 'xxx") as caught:
        load(Outer, GOOD | {"kind": "x" * 10**6} | {f"k{n}": 0 for n in range(10**4)}, "f")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["{", "[NaN]", "[Infinity]", "[" * 10**5])
def test_text_that_is_no_strict_json_is_refused(text):
    with pytest.raises(ValueError, match="^f is n.*: write it again$"):
        parse(text, "f")


def test_a_number_that_is_not_finite_is_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_bytes([float("inf")])
