"""Estimated time and memory of an evaluation, by hand."""

import pytest

from mmcl.cli.check import _memory
from mmcl.core import Task, TaskStream
from mmcl.lightning.dry_run import (
    DryRunReport,
    _TaskLength,
    estimate_eval_memory,
    estimate_eval_seconds,
)


def stream(*sizes, kind="instruction"):
    tasks = [Task(n, f"t{n}", task_type=kind, test_size=size) for n, size in enumerate(sizes)]
    return TaskStream("s", "domain", tasks)


def test_seconds_are_in_proportion_to_the_test_samples_of_all_rows():
    # 64 samples in 2 s; 640 samples in each of 3 rows.
    assert estimate_eval_seconds(2.0, stream(32, 32), stream(600, 40)) == 3 * 20.0


def test_memory_grows_with_the_batch_size():
    # 32 samples took 320 bytes beside the weights; the largest test split has 300.
    whole = stream(100, 300)
    assert estimate_eval_memory(1000, 1320, whole, 256) == 1000 + 256 * 10
    assert estimate_eval_memory(1000, 1320, whole, 1024) == 1000 + 300 * 10
    assert estimate_eval_memory(1000, 1320, whole, 32) == 0
    assert estimate_eval_memory(0, 0, whole, 256) == 0
    assert estimate_eval_memory(1000, 1320, stream(300, kind="classification"), 256) == 0


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (0, "2.0 GiB peak so far"),
        (9 * 2**30, "2.0 GiB peak so far; about 9.0 GiB to generate a batch of 256"),
    ],
)
def test_memory_is_printed_as_a_sentence(estimate, words):
    found = DryRunReport(
        stream(1), (), (), 0.0, 0.0, 0.0, "cpu", 1, 0, 0, 2 * 2**30, 0, 0, 0, 0, (), estimate, 256
    )
    assert _memory(found) == words


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (_TaskLength(2, 1.0, None), 20),
        (_TaskLength(2, 3, None), 6),
        (_TaskLength(2, 0.55, None), 10),
        (_TaskLength(2, 1.0, 7), 7),
        (_TaskLength(-1, 1.0, 35), 35),
    ],
)
def test_the_steps_of_a_task_respect_the_trainers_limits(length, steps):
    assert length.steps(10, None) == steps
    assert _TaskLength(2, 1.0, None).steps(10, 5) == 50  # epochs of the card
