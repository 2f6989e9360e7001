"""Cards changed at random, and cards that are anything at all: a stream, or a ValueError."""

import contextlib
import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcl.core import TaskStream
from mmcl.core.card import expand
from mmcl.core.card.card_reader import parse_yaml
from tests.fuzz.mutation import CHANGES, PLACES, expect_shown, mutated

CARD = {
    "name": "birds", "scenario": "class", "task_type": "classification",
    "classes": ["owl", "jay", "kite"],
    "templates": ["a photo of {}."], "replay_ratio": 0.25, "hashes": {"b.tar": "0" * 64},
    "counts": {"b.tar": 7}, "epochs": 2, "mixture": {"s": 0.25},
    "sources": {"s": {"task_type": "image", "shards": ["s-{0..2}.tar"], "size": 30}},
    "tasks": [
        {"name": "a", "classes": ["owl", "jay"], "train": "a-{000..002}.tar", "test": ["t.tar"]},
        {"name": "b", "classes": ["jay", "kite"], "train": ["b.tar"], "test": ["u.tar"], "size": 7},
    ],
    "eval_only": [
        {"name": "p", "classes": ["kite", "owl"], "test": ["p.tar"], "text_field": "de.txt"}
    ],
}  # fmt: skip
KEYS = sorted(
    {*CARD, *CARD["tasks"][1], *CARD["sources"]["s"], "stage", "decoding", "scorer", "scored"}
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
    st.binary(max_size=8), st.sampled_from(["a.tar", "{0..9}.tar", "{", "answer", "owl", "{}"]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=12,
)


def read(folder, content):
    """Read a card; a ValueError names the card and is short enough to be read."""
    path = folder / "card.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        stream = TaskStream.read(path)
    except ValueError as error:
        expect_shown(error, "card.yaml", limit=40_000)
        return None
    assert all(isinstance(name, str) and name for task in stream for name in task.classes)
    assert all(isinstance(name, str) and name for task in stream for name in task.train)
    return stream


def paths(value, path=()):
    """Every path into a nested value, as a tuple of keys."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


PATHS = [path for path in paths(CARD) if path]


def test_the_card_that_the_others_are_made_of_is_a_good_one(tmp_path):
    assert read(tmp_path, yaml.safe_dump(CARD)) is not None


@pytest.mark.slow
@settings(max_examples=200)
@given(path=st.sampled_from(PATHS), value=ANYTHING, key=st.none() | st.text(max_size=8))
def test_anything_at_any_path_of_a_card_is_a_value_or_an_error(tmp_path_factory, path, value, key):
    card = copy.deepcopy(CARD)
    inner = card
    for step in path[:-1]:
        inner = inner[step]
    if key is not None and isinstance(inner, dict):
        inner[key] = inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    with contextlib.suppress(yaml.YAMLError):  # what cannot be written as YAML is no card
        read(tmp_path_factory.getbasetemp(), yaml.safe_dump(card, allow_unicode=True))


@settings(max_examples=150)
@given(value=ANYTHING)
def test_anything_at_all_is_a_card_or_an_error(tmp_path_factory, value):
    with contextlib.suppress(yaml.YAMLError):
        read(tmp_path_factory.getbasetemp(), yaml.safe_dump(value))


@pytest.mark.slow
@settings(max_examples=250)
@given(changes=CHANGES, flow=st.booleans())
def test_a_changed_file_is_a_card_or_an_error(tmp_path_factory, changes, flow):
    text = yaml.safe_dump(CARD, default_flow_style=flow).encode()
    read(tmp_path_factory.getbasetemp(), mutated(text, changes))


WORDS = st.lists(
    st.sampled_from(
        ["&a ", "*a", "<<: ", "[", "]", "{", "}", ": ", ", ", "\n", "- ", "? ", "!!int ", "!!set ",
         "!!omap ", "!!binary ", "!!timestamp ", "!!python/name:os ", "0x", "1:1", "~", "'", '"',
         "|", ">", "%YAML 9.9\n", "--- ", "...", "\t", "#", "\\", "name", "tasks", "  ", "é", "0"]
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=400)
@given(words=WORDS)
def test_words_of_yaml_in_any_order_are_parsed_or_a_value_error(words):
    with contextlib.suppress(ValueError):
        parse_yaml("".join(words))


@settings(max_examples=200)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from(["{", "}", "..", "{0..3}", "{08..11}", "{7..3}", "a", "{,}", "²"]),
            st.tuples(PLACES, PLACES).map(lambda p: f"{{{p[0]}..{p[1]}}}"),
        ),
        max_size=6,
    )
)
def test_ranges_are_written_out_or_refused(parts):
    name = "".join(parts)
    with contextlib.suppress(ValueError):
        found = expand(name, 1000)
        assert 1 <= len(found) <= 1000
        assert len(set(found)) == len(found)
