import pytest

from mmcl.core.quoting import MAX_QUOTED, repr_short, sanitize


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**6)), {"a": ["b" * 10**6]}, 10**3000])
def test_a_quote_is_short_and_on_one_line(value):
    text = repr_short(value)
    assert len(text) <= MAX_QUOTED + 3
    assert text.isprintable()


def test_a_short_value_is_quoted_whole():
    assert repr_short(["a", 1, None]) == "['a', 1, None]"
    assert repr_short("abcdef", limit=3) == "'ab..."


def test_nothing_in_a_sanitized_text_steers_a_terminal():
    assert sanitize("a\x1b[2J\nb\ud800") == r"a\x1b[2J\nb\ud800"
    assert sanitize("größe ok") == "größe ok"
