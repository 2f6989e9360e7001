"""Runs at equal cost, against values worked out by hand."""

import pytest

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.cost import Ledger, TaskCost
from mmcl.evaluation.matrix import Column
from mmcl.report.equal_cost import compare_at_equal

COLUMNS = tuple(Column(name, "classification", "accuracy", 10) for name in ("a", "b"))


def a_run(folder, rows, costs):
    folder.mkdir()
    matrix = AccuracyMatrix("small", "class", COLUMNS)
    for row, scores in enumerate(rows):
        for column, score in enumerate(scores):
            matrix.set(row, column, score)
    matrix.write(folder / "matrix.json")
    Ledger(costs).write(folder / "ledger.json")
    return folder


@pytest.fixture
def runs(tmp_path):
    cheap = a_run(
        tmp_path / "cheap", [(0.1, 0.1), (0.5, 0.1), (0.4, 0.6)],
        [
            TaskCost("a", samples_new=10, flops=100.0, peak_memory_bytes=2**30, state_bytes=9),
            TaskCost("b", samples_new=10, flops=100.0, peak_memory_bytes=2**31, state_bytes=4),
        ],
    )  # fmt: skip
    dear = a_run(
        tmp_path / "dear", [(0.1, 0.1), (0.9, 0.3), (0.8, 0.8)],
        [
            TaskCost("a", samples_new=10, samples_replayed=5, flops=150.0, state_bytes=5,
                     peak_memory_bytes=2**30),
            TaskCost("b", samples_new=10, samples_replayed=15, flops=250.0, state_bytes=20,
                     peak_memory_bytes=2**30),
        ],
    )  # fmt: skip
    return [cheap, dear]


@pytest.mark.parametrize(
    ("kind", "budget", "tasks", "costs"),
    [
        ("samples", 20, (1, 2), (15, 20)),
        ("flops", 200.0, (1, 2), (150.0, 200.0)),
        ("memory_adjusted_flops", 300.0, (1, 2), (150.0, 300.0)),
        ("bytes", 9, (1, 2), (5, 9)),
    ],
)
def test_runs_are_compared_at_the_cost_of_the_cheapest(runs, kind, budget, tasks, costs):
    found = compare_at_equal(runs, kind)
    assert found.budget == budget
    # The dear run had learned one task by then: (0.9 + 0.3) / 2 against (0.4 + 0.6) / 2.
    assert [curve.label for curve in found.curves] == ["dear", "cheap"]
    at = [curve.at(budget) for curve in found.curves]
    assert tuple(c.tasks[n] for c, n in zip(found.curves, at, strict=True)) == tasks
    assert tuple(c.costs[n] for c, n in zip(found.curves, at, strict=True)) == costs
    assert [c.scores[n] for c, n in zip(found.curves, at, strict=True)] == pytest.approx([0.6, 0.5])


def test_a_stated_cost_below_every_task_shows_the_start(runs):
    found = compare_at_equal(runs, "samples", 3)
    assert [curve.at(3) for curve in found.curves] == [0, 0]
    assert "10.0" in found.text()


def test_a_run_that_is_not_finished_is_named(runs, tmp_path):
    half = a_run(tmp_path / "half", [(0.1, 0.1), (0.5, 0.2)], [TaskCost("a", samples_new=30)])
    found = compare_at_equal([*runs, half], "samples")
    assert "half has learned 1 of 2 tasks" in found.text()


def test_a_cost_that_was_not_counted_is_refused_by_name(runs, tmp_path):
    closed = a_run(tmp_path / "closed", [(0.1, 0.1)], [TaskCost("a", samples_new=0)])
    with pytest.raises(ValueError, match="closed has no FLOPs of training for task 'a'"):
        compare_at_equal([*runs, closed], "flops")


def test_an_unknown_cost_names_the_known_ones(runs):
    with pytest.raises(ValueError, match="at_equal is 'watts': give one of samples, flops"):
        compare_at_equal(runs, "watts")


def test_plot_and_table_are_written(runs, tmp_path):
    compare_at_equal(runs, "samples").write(tmp_path / "out")
    assert (tmp_path / "out" / "equal_samples.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "equal_samples.csv").read_text().splitlines()
    assert table[0] == "run,tasks learned,samples,score"
    assert len(table) == 7
