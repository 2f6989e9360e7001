"""Gates against scores worked out by hand."""

import pytest

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.gates import Gate, check_gates, expect_known, parse_gates, read_gates
from mmcl.evaluation.matrix import Column


@pytest.fixture
def matrix():
    columns = tuple(Column(n, "classification", "accuracy", 10) for n in ("a", "b", "general"))
    made = AccuracyMatrix("small", "class", columns[:2], columns[2:])
    rows = [(0.2, 0.3, 0.8), (0.9, 0.2, 0.85), (0.7, 0.6, 0.775)]
    for row, scores in enumerate(rows):
        for column, score in enumerate(scores):
            made.set(row, column, score)
    return made


@pytest.mark.parametrize(
    ("gate", "row", "kept"),
    [
        (Gate(task="general", max_drop=2.5), 2, True),  # 80.0 - 77.5, exactly
        (Gate(task="general", max_drop=2.4), 2, False),
        (Gate(task="general", max_drop=7.5, since="best"), 2, True),  # 85.0 - 77.5
        (Gate(task="general", max_drop=7.4, since="best"), 2, False),
        (Gate(task="a", max_drop=19.9, since="learned"), 2, False),  # 90 - 70
        (Gate(task="a", max_drop=0.0), 2, True),  # better than before training
        (Gate(task="b", max_drop=1.0, since="learned"), 1, None),
        (Gate(task="b", min=60), 2, True),
        (Gate(task="b", min=60.1), 2, False),
        (Gate(task="b", max=59), 2, False),
        (Gate(metric="forgetting", max=20), 2, True),
        (Gate(metric="Forgetting", max=19), 2, False),
        (Gate(metric="forgetting", max=20), 1, None),
        (Gate(metric="average_accuracy", min=65), 2, True),
        (Gate(metric="average accuracy", min=65.5), 2, False),
        (Gate(metric="retention of general", min=0.96), 2, True),  # a ratio: 0.775 / 0.8
    ],
)
def test_a_limit_is_compared_in_percentage_points(matrix, gate, row, kept):
    (result,) = check_gates([gate], matrix, row)
    assert result.is_kept is kept, result.sentence


def test_every_limit_of_a_gate_is_a_result(matrix):
    gate = Gate(task="a", max_drop=1, since="best", min=50, max=60)
    assert [r.is_kept for r in check_gates([gate], matrix, 2)] == [True, False, False]


def test_what_is_broken_is_said_with_numbers(matrix):
    gate = Gate(task="general", max_drop=2.0)
    assert check_gates([gate], matrix, 2)[0].sentence == (
        "general: 77.50, 2.50 below 80.00, and the limit is a drop of 2 from its score before "
        "training"
    )


def test_an_unmeasured_score_is_not_compared(matrix):
    matrix.set(2, 2, None)
    (result,) = check_gates([Gate(task="general", min=1)], matrix, 2)
    assert (result.is_kept, result.measured) == (None, "it was not measured")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"task": "a", "metric": "b", "min": 1}, "give one of them"),
        ({"min": 1}, "give one of them"),
        ({"task": "a"}, "gate 'a' has no limit: give max_drop, min or max"),
        ({"metric": "forgetting", "max_drop": 1}, "is of a metric, which has no drop"),
        ({"task": "a", "min": 1, "since": "best"}, "has since 'best' and no max_drop"),
        ({"task": "a", "max_drop": 1, "since": "then"}, "start, best or learned"),
        ({"task": "a", "max_drp": 1}, r"gates\[0\] has the unknown key 'max_drp': did you mean"),
        ({"task": "a", "min": "high"}, "has min 'high', expected a number"),
        ("a", "expected a mapping"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(entry, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_gates([entry])


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        (Gate(task="generl", min=1), "which the stream does not have: did you mean 'general'"),
        (Gate(metric="forgeting", max=1), "did you mean 'forgetting'"),
        (Gate(task="general", max_drop=1, since="learned"), "that task is never trained"),
    ],
)
def test_an_unknown_subject_is_refused_with_the_nearest(matrix, gate, sentence):
    with pytest.raises(ValueError, match=sentence):
        expect_known([gate], matrix)


def test_gates_are_read_from_a_file_or_a_configuration(tmp_path):
    file = tmp_path / "gates.yaml"
    file.write_text("- {task: a, min: 1}\n")
    assert read_gates(file) == [Gate(task="a", min=1)]
    file.write_text("gates:\n- {task: a, min: 1}\n")
    assert read_gates(file) == [Gate(task="a", min=1)]
    file.write_text("gates: []\n")
    with pytest.raises(ValueError, match="has no list of gates"):
        read_gates(file)
