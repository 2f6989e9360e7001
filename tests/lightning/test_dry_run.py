"""Estimated time and memory of an evaluation, by hand."""

import pytest

from mmcl.cli.check import _memory
from mmcl.core import Task, TaskStream
from mmcl.lightning.dry_run import (
    DryRunReport,
    TimedEvaluation,
    distinct_cost_tasks,
    estimate_eval_memory,
    estimate_eval_seconds,
)


def task(index, length, size, decode="generate", kind="instruction"):
    return Task(
        index, f"t{index}", task_type=kind, test_size=size, decoding=decode, max_new_tokens=length,
        scorer="exact" if kind == "instruction" else "",
    )  # fmt: skip


def tried(rows, seconds_of, overhead=0.0, peak=0):
    """Measurements of ``rows`` samples of some columns."""
    rows = dict.fromkeys(seconds_of, rows)
    return TimedEvaluation(None, rows, sum(seconds_of.values()) + overhead, seconds_of, peak, [])


STREAM = TaskStream(
    "s",
    "domain",
    [task(0, 8, 100), task(1, 64, 200), task(2, 8, 300)],
    [task(3, 0, 40, kind="classification")],
)


def test_columns_of_equal_answer_length_are_timed_once():
    assert distinct_cost_tasks(STREAM) == [0, 1, 3]
    classes = [task(n, 0, 10, kind="classification") for n in range(4)]
    assert distinct_cost_tasks(TaskStream("s", "class", classes)) == [0]


def test_seconds_are_those_of_all_samples_and_one_overhead_per_cell():
    # 10 ms a short answer, 100 ms a long one, 1 ms a class; 0.5 s overhead in each of 4 cells.
    more = tried(64, {0: 0.64, 1: 6.4, 3: 0.064})
    few = tried(8, {0: 0.08, 1: 0.8, 2: 0.08, 3: 0.008}, overhead=2.0)
    row = 100 * 0.01 + 200 * 0.1 + 300 * 0.01 + 40 * 0.001 + 4 * 0.5
    assert estimate_eval_seconds(few, more, STREAM) == pytest.approx(4 * row)


def test_memory_grows_with_the_batch_size():
    few, more = tried(8, {0: 1.0}, peak=1000), tried(64, {0: 1.0}, peak=1000 + 56 * 10)
    assert estimate_eval_memory(few, more, STREAM, 256) == 1000 + 248 * 10
    # The largest test split has 300 samples; batches of 64 were timed; a CPU has no estimate.
    assert estimate_eval_memory(few, more, STREAM, 1024) == 1000 + 292 * 10
    assert estimate_eval_memory(few, more, STREAM, 64) == 0
    assert estimate_eval_memory(tried(8, {0: 1.0}), tried(64, {0: 1.0}), STREAM, 256) == 0
    classes = TaskStream("s", "class", [task(0, 0, 300, kind="classification")])
    assert estimate_eval_memory(few, more, classes, 256) == 0


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (0, "2.0 GiB peak so far"),
        (9 * 2**30, "2.0 GiB peak so far; about 9.0 GiB to generate a batch of 256"),
    ],
)
def test_memory_is_printed_as_a_sentence(estimate, words):
    found = DryRunReport(
        STREAM, (), (), 0.0, 0.0, 0.0, 0.0, "cpu", 1, 0, 0, 2 * 2**30, 0, 0, 0, 0, (), estimate, 256
    )
    assert _memory(found) == words
