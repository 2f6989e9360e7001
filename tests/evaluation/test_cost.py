import json

import pytest

from mmcl.evaluation import Ledger, TaskCost

FIRST = TaskCost("a", 10.0, 100, 800, 200, 1e9, 5_000, 77, 7, 1_000)
SECOND = TaskCost("b", 5.0, 50, 400, 100, 1e9, 6_000, 80, 3, 2_000)


def test_an_interrupted_task_adds_its_parts():
    ledger = Ledger([FIRST])
    ledger.add(TaskCost("a", 2.5, 20, 160, 40, 5e8, 9_000, 77, 7, 1_500))
    assert list(ledger) == [TaskCost("a", 12.5, 120, 960, 240, 1.5e9, 9_000, 77, 7, 1_500)]


def test_put_replaces_an_entry_in_its_place():
    ledger = Ledger([FIRST, SECOND])
    ledger.put(TaskCost("a", 1.0))
    assert [entry.task for entry in ledger] == ["a", "b"]
    assert next(iter(ledger)).seconds == 1.0


def test_the_total_adds_what_adds_up_and_keeps_the_last_state():
    total = Ledger([FIRST, SECOND]).total()
    assert total == TaskCost("total", 15.0, 150, 1200, 300, 2e9, 6_000, 80, 10, 2_000)


def test_an_unknown_part_makes_the_sum_unknown():
    ledger = Ledger([FIRST, TaskCost("b", 1.0)])
    assert ledger.total().flops is None
    assert ledger.total().peak_memory_bytes == 5_000


def test_an_empty_ledger_has_a_total():
    assert Ledger().total() == TaskCost("total")


def test_a_ledger_comes_back_as_it_was(tmp_path):
    ledger = Ledger([FIRST, TaskCost("b", 1.0)])
    ledger.write(tmp_path / "ledger.json")
    assert list(Ledger.read(tmp_path / "ledger.json")) == list(ledger)


def test_parts_of_different_tasks_are_not_merged():
    with pytest.raises(ValueError, match="'a' and 'b'"):
        FIRST.merge(SECOND)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seconds": -1.0}, "'tasks'[0]: 'seconds' is -1.0, expected finite number of at least 0"),
        ({"seconds": None}, "'seconds' is None"),
        ({"steps": 1.5}, "'steps' is 1.5"),
        ({"task": 3}, "'task' is 3"),
        ({"flops": "many"}, "'flops' is 'many'"),
        ({"peak_memory_bytes": -2}, "'peak_memory_bytes' is -2"),
        ({"colour": 1}, "unknown keys ['colour']"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, sentence):
    path = tmp_path / "ledger.json"
    Ledger([FIRST]).write(path)
    raw = json.loads(path.read_text())
    raw["tasks"][0].update(change)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="ledger.json is not valid") as caught:
        Ledger.read(path)
    assert sentence in str(caught.value)


def test_two_entries_of_a_task_in_a_file_are_refused(tmp_path):
    path = tmp_path / "ledger.json"
    Ledger([FIRST]).write(path)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({"tasks": raw["tasks"] * 2}))
    with pytest.raises(ValueError, match="two entries of one task"):
        Ledger.read(path)


def test_something_else_is_no_ledger(tmp_path):
    (tmp_path / "ledger.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"ledger.json is not valid: got \[\], expected object with tasks"
    ):
        Ledger.read(tmp_path / "ledger.json")
