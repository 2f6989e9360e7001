import json

import pytest

from mmcl.core.task import Task, TaskStream
from mmcl.evaluation import AccuracyMatrix, Column


def two_tasks_and_one_eval_only():
    tasks = [Column("zero-one", size=75), Column("two-three", size=70)]
    return AccuracyMatrix("digits", "class", tasks, [Column("letters", "retrieval", "recall@1", 9)])


def test_a_new_matrix_has_a_row_before_training_and_one_per_task_and_nothing_measured():
    matrix = two_tasks_and_one_eval_only()
    assert matrix.rows == ("zero-shot", "zero-one", "two-three")
    assert matrix.names == ("zero-one", "two-three", "letters")
    assert matrix.missing() == [(row, column) for row in range(3) for column in range(3)]
    assert matrix.last_row is None
    assert matrix.last_complete_row is None


def test_a_zero_is_a_measurement():
    matrix = two_tasks_and_one_eval_only()
    matrix.set(1, 0, 0.0)
    assert matrix.get(1, 0) == 0.0
    assert matrix.measured_names() == {"zero-one"}
    assert matrix.missing(rows=[1]) == [(1, 1), (1, 2)]
    assert matrix.last_row == 1


def test_a_row_is_complete_when_every_task_learned_so_far_is_measured():
    matrix = two_tasks_and_one_eval_only()
    matrix.set(1, 0, 0.5)
    matrix.set(2, 1, 0.5)
    assert (matrix.last_row, matrix.last_complete_row) == (2, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5"])
def test_only_finite_numbers_enter_a_cell(value):
    with pytest.raises(ValueError, match="give a finite number"):
        two_tasks_and_one_eval_only().set(0, 0, value)


@pytest.mark.parametrize(("row", "column"), [(3, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_cell_outside_the_matrix_says_what_there_is(row, column):
    with pytest.raises(IndexError, match="give 0 to 2"):
        two_tasks_and_one_eval_only().get(row, column)


def test_the_file_has_exactly_the_agreed_keys():
    matrix = two_tasks_and_one_eval_only()
    matrix.set(1, 0, 0.1)
    assert json.loads(matrix.to_json()) == {
        "scenario": "class",
        "stream": "digits",
        "rows": ["zero-shot", "zero-one", "two-three"],
        "columns": ["zero-one", "two-three", "letters"],
        "tasks": 2,
        "task_types": ["classification", "classification", "retrieval"],
        "scores": ["accuracy", "accuracy", "recall@1"],
        "sizes": [75, 70, 9],
        "values": [[None, None, None], [0.1, None, None], [None, None, None]],
    }


def test_reading_what_was_written_gives_the_same_bytes_again(tmp_path):
    matrix = two_tasks_and_one_eval_only()
    matrix.set(0, 0, 1 / 3)
    matrix.set(2, 2, 2 / 7)
    matrix.write(tmp_path / "matrix.json")
    again = AccuracyMatrix.read(tmp_path / "matrix.json")
    assert again.values == matrix.values
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "matrix.json").read_bytes()


def test_a_half_done_run_may_have_fewer_rows():
    raw = json.loads(two_tasks_and_one_eval_only().to_json())
    raw["rows"], raw["values"] = raw["rows"][:1], raw["values"][:1]
    assert AccuracyMatrix.from_json(json.dumps(raw)).rows == ("zero-shot",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": 9}, "tasks is 9 of 3 columns"),
        ({"tasks": True}, "'tasks' is True, expected integer of at least 0"),
        ({"tasks": 1}, "3 rows for 1 tasks: give 1 to 2"),
        ({"scenario": "open"}, "'scenario' is 'open', expected one of task, class, domain"),
        ({"sizes": [1, 2]}, "'sizes' has 2 entries for 3 columns"),
        ({"sizes": [1, 2, -3]}, "'sizes'[2] is -3, expected integer of at least 0"),
        ({"columns": ["a", "a", "b"]}, "column 'a' occurs twice"),
        ({"columns": "abc"}, "'columns' is 'abc', expected list of string"),
        ({"values": [[None] * 3] * 2}, "'values' has 2 rows, 'rows' names 3"),
        (
            {"values": [[None] * 3, [None] * 3, 7]},
            "'values'[2] is 7, expected list of finite number or null",
        ),
        (
            {"values": [[None] * 3, [None] * 2, [None] * 3]},
            "row 'zero-one' has 2 values for 3 columns",
        ),
        (
            {"values": [["x", None, None]] + [[None] * 3] * 2},
            "'values'[0][0] is 'x', expected finite number or null",
        ),
        ({"values": [[True, None, None]] + [[None] * 3] * 2}, "'values'[0][0] is True"),
        ({"values": [[10**400, None, None]] + [[None] * 3] * 2}, "expected finite number"),
        ({"extra": 1}, "unknown keys ['extra']"),
        ({"kinds": [], "extra": 1}, "'kinds' is called 'task_types' now; unknown keys ['extra']"),
    ],
)
def test_a_wrong_file_is_refused_with_the_error(change, sentence):
    raw = json.loads(two_tasks_and_one_eval_only().to_json()) | change
    with pytest.raises(ValueError, match="matrix.json is not valid") as caught:
        AccuracyMatrix.from_json(json.dumps(raw))
    assert sentence in str(caught.value)


def test_a_matrix_of_the_old_form_is_refused_with_the_new_key():
    raw = json.loads(two_tasks_and_one_eval_only().to_json())
    raw["kinds"] = raw.pop("task_types")
    with pytest.raises(
        ValueError, match="is not valid: the key 'kinds' is called 'task_types' now:"
    ):
        AccuracyMatrix.from_json(json.dumps(raw))


def test_all_errors_are_named_at_once():
    raw = json.loads(two_tasks_and_one_eval_only().to_json())
    del raw["rows"], raw["sizes"]
    with pytest.raises(ValueError, match="'rows' is missing; 'sizes' is missing"):
        AccuracyMatrix.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"a": NaN}', "[" * 100_000, "9" * 5000])
def test_text_that_is_no_matrix_is_a_value_error(text):
    with pytest.raises(ValueError, match="some file"):
        AccuracyMatrix.from_json(text, "some file")


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a run directory"):
        AccuracyMatrix.read(tmp_path / "matrix.json")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "matrix.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        AccuracyMatrix.read(tmp_path / "matrix.json")


def test_a_matrix_needs_a_task():
    with pytest.raises(ValueError, match="give at least one Column"):
        AccuracyMatrix("digits", "class", [])


def test_a_stream_gives_its_tasks_then_its_eval_only_tasks():
    tasks = [Task(0, "one", test_size=3), Task(1, "two", task_type="retrieval", test_size=4)]
    stream = TaskStream("s", "domain", tasks, [Task(2, "far", test_size=5, is_eval_only=True)])
    matrix = AccuracyMatrix.for_stream(stream, {"retrieval": "recall@1"})
    assert matrix.columns == (
        Column("one", "classification", "accuracy", 3),
        Column("two", "retrieval", "recall@1", 4),
        Column("far", "classification", "accuracy", 5),
    )
    assert (matrix.tasks, matrix.scenario) == (2, "domain")
