"""Anticipatory recovery: the index by hand, the cycles of a stream, and what is undefined."""

import math

import pytest

from mmcl.core import TaskStream
from mmcl.diagnostics.recovery import recovery, recovery_index, repetitions
from mmcl.diagnostics.task_loss import measure_task
from tests.data.small_stream import write_stream
from tests.diagnostics.diagnosed import clip_module, probes_of, small_data


def test_the_index_by_hand():
    # Trained: 1. Forgotten up to 5, recovered to 2 before it is trained again.
    assert recovery_index([1.0, 5.0, 4.0, 2.0]) == (pytest.approx(0.6), pytest.approx(0.75))
    assert recovery_index([1.0, 2.0, 3.0]) == (0.0, 0.0)  # the peak is just before: no recovery
    assert recovery_index([2.0, 1.0, 1.0]) == (0.5, None)  # nothing was forgotten


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 2.0], "two other tasks"),
        ([1.0, None, 2.0], "1 of 3 losses are not measured"),
        ([1.0, math.inf, 2.0], "negative or not finite"),
        ([1.0, -1.0, 2.0], "negative or not finite"),
        ([0.0, 0.0, 0.0], "every loss is 0"),
    ],
)
def test_an_index_without_a_value_says_why(losses, words):
    with pytest.raises(ValueError, match=words):
        recovery_index(losses)


def test_every_repetition_starts_where_the_task_was_last_trained(tmp_path):
    write_stream(tmp_path, (3, 3, 3), test_size=2)
    stream = TaskStream.read(tmp_path / "small.yaml", repeats=3)
    found = repetitions(stream)
    # Rows: 1 = after a, 3 = after c, just before a (2), whose row is 4.
    assert found == [(0, 1, 3), (1, 2, 4), (2, 3, 5), (0, 4, 6), (1, 5, 7), (2, 6, 8)]


def test_losses_of_all_rows_give_the_indices(tmp_path):
    data = small_data(tmp_path, sizes=(6, 6, 6), repeats=2)
    modules = {row: clip_module(tmp_path, seed=row) for row in range(7)}
    found = recovery(modules.get, probes_of(data), range(7))
    first = [measure_task(modules[row], probes_of(data), row, 0).loss for row in range(7)]
    assert found.panels[0].series[0].values == pytest.approx(first)
    assert len(found.panels[0].series) == 3
    values = {metric.name: metric.value for metric in found.metrics}
    peak = max(first[1:4])
    expected = (peak - first[3]) / peak
    assert values["recovery index before 'task-a (2)'"] == pytest.approx(expected)
    each = [v for name, v in values.items() if name.startswith("recovery index before")]
    assert values["mean recovery index"] == pytest.approx(sum(each) / 3)


def test_a_lost_checkpoint_leaves_its_cycle_undefined(tmp_path):
    data = small_data(tmp_path, sizes=(6, 6, 6), repeats=2)
    modules = {row: clip_module(tmp_path, seed=row) for row in range(7)} | {2: None}
    found = recovery(modules.get, probes_of(data), range(7))
    gaps = {metric.name: metric.reason for metric in found.metrics}
    assert gaps["recovery index before 'task-a (2)'"] == "1 of 3 losses are not measured"
    assert gaps["recovery index before 'task-c (2)'"] is None
    assert "after 'task-b' is lost" in found.notes[0]


def test_a_stream_that_repeats_nothing_has_no_recovery(tmp_path):
    data = small_data(tmp_path)
    with pytest.raises(ValueError, match=r"train a run with data\.repeats 2"):
        recovery(lambda row: clip_module(tmp_path), probes_of(data), [0, 1, 2])
