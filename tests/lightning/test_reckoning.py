"""What scoring will take, by hand."""

import pytest

from mmcl.commands.check import _memory
from mmcl.core import Task, TaskStream
from mmcl.lightning.checking import Check
from mmcl.lightning.reckoning import Scored, scoring_bytes, scoring_seconds, unlike_columns


def asked(index, length, size, decode="generate", kind="answer"):
    return Task(
        index, f"t{index}", kind=kind, test_size=size, decode=decode, max_new_tokens=length,
        scorer="exact" if kind == "answer" else "",
    )  # fmt: skip


def tried(rows, seconds_of, beside=0.0, peak=0):
    """What ``rows`` rows of some columns took."""
    rows = dict.fromkeys(seconds_of, rows)
    return Scored(None, rows, sum(seconds_of.values()) + beside, seconds_of, peak, [])


STREAM = TaskStream(
    "s",
    "domain",
    [asked(0, 8, 100), asked(1, 64, 200), asked(2, 8, 300)],
    [asked(3, 0, 40, kind="classify")],
)


def test_columns_whose_answers_are_as_long_are_tried_once():
    assert unlike_columns(STREAM) == [0, 1, 3]
    classes = [asked(n, 0, 10, kind="classify") for n in range(4)]
    assert unlike_columns(TaskStream("s", "class", classes)) == [0]


def test_long_answers_cost_what_they_cost_and_every_cell_its_beginning():
    # 10 ms a short answer, 100 ms a long one, 1 ms a class; 0.5 s of beginning in each of 4 cells.
    more = tried(64, {0: 0.64, 1: 6.4, 3: 0.064})
    few = tried(8, {0: 0.08, 1: 0.8, 2: 0.08, 3: 0.008}, beside=2.0)
    row = 100 * 0.01 + 200 * 0.1 + 300 * 0.01 + 40 * 0.001 + 4 * 0.5
    assert scoring_seconds(few, more, STREAM) == pytest.approx(4 * row)


def test_memory_grows_with_the_rows_that_answer_at_once():
    few, more = tried(8, {0: 1.0}, peak=1000), tried(64, {0: 1.0}, peak=1000 + 56 * 10)
    assert scoring_bytes(few, more, STREAM, 256) == 1000 + 248 * 10
    # The largest test part has 300 rows; 64 at once were tried; a CPU tells nothing.
    assert scoring_bytes(few, more, STREAM, 1024) == 1000 + 292 * 10
    assert scoring_bytes(few, more, STREAM, 64) == 0
    assert scoring_bytes(tried(8, {0: 1.0}), tried(64, {0: 1.0}), STREAM, 256) == 0
    classes = TaskStream("s", "class", [asked(0, 0, 300, kind="classify")])
    assert scoring_bytes(few, more, classes, 256) == 0


@pytest.mark.parametrize(
    ("reckoned", "words"),
    [
        (0, "2.0 GB at most until now"),
        (9 * 10**9, "2.0 GB at most until now; about 9.0 GB to answer 256 rows at once"),
    ],
)
def test_memory_is_said_in_words(reckoned, words):
    found = Check(
        STREAM, (), (), 0.0, 0.0, 0.0, 0.0, "cpu", 1, 0, 0, 2 * 10**9, 0, 0, 0, 0, (), reckoned, 256
    )
    assert _memory(found) == words
