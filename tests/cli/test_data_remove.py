"""`mmcl data remove`: a task is taken off a card, and what that means is printed."""

import json

import pytest
import yaml

from tests.cli.conftest import SIZES


def probed(card):
    card["eval_only"] = [{"name": "probe", "test": "b-test.tar", "classes": ["c2", "c3"]}]


def test_a_task_is_removed_and_its_shards_are_named(desk):
    status, out, err = desk.give("data", "remove", desk.card, "task-b")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "task 'task-b' is no longer on the card",
        "classes that no task has are kept, because the numbers of those after them must not "
        "change: c2, c3",
        "2 shards are kept, and no card of the folder lists them any more (--delete_shards deletes "
        "them): b-train.tar, b-test.tar",
        "task 1 was removed, so the numbers of the 1 tasks after it (data.task_order) are one less",
        "a run that has trained on it is refused with the card as it is now: start another "
        "one (--run_name)",
        str(desk.card),
    ]
    status, _, err = desk.run()
    assert (status, err) == (0, "")


def test_a_removed_task_and_its_shards_are_gone(desk):
    status, out, _ = desk.give("data", "remove", desk.card.parent, "task-c", "--delete_shards")
    assert status == 0
    assert "classes that only it had are removed: c4, c5" in out
    assert "2 shards were deleted: c-train.tar, c-test.tar" in out
    assert not (desk.card.parent / "c-train.tar").exists()
    assert desk.run()[0] == 0


@pytest.mark.parametrize("name", ["task-a", "task-b", "task-c"])
def test_a_run_that_trained_on_it_is_refused(learned, name):
    assert learned.give("data", "remove", learned.card, name)[0] == 0
    status, _, err = learned.run()
    assert status == 1
    assert "--run_name" in err
    assert "task" in err


def test_a_run_that_evaluated_it_resumes_without_its_column(desk):
    desk.rewrite_card(probed)
    assert desk.run()[0] == 0
    before = (desk.results / "matrix.json").read_bytes()
    status, out, _ = desk.give("data", "remove", desk.card, "probe")
    assert status == 0
    assert "eval-only task 'probe' is no longer on the card" in out
    assert "a finished run keeps its column of it, one that resumes has none any more" in out
    assert "eval_only" not in yaml.safe_load(desk.card.read_text())
    assert desk.run()[0] == 0
    assert (desk.results / "matrix.json").read_bytes() == before
    desk.stream((*SIZES, 12))  # a fourth task
    assert desk.run()[0] == 0
    old, new = json.loads(before), json.loads((desk.results / "matrix.json").read_text())
    assert new["columns"] == ["task-a", "task-b", "task-c", "task-d"]
    assert [row[:3] for row in new["values"][:4]] == [row[:3] for row in old["values"]]


def test_a_task_that_is_not_there_is_refused(desk):
    before = desk.card.read_bytes()
    status, _, err = desk.give("data", "remove", desk.card, "task-z")
    assert (status, desk.card.read_bytes()) == (1, before)
    assert "error: card 'small' has no task, eval-only task or source 'task-z': did you mean" in err
    status, _, err = desk.give("data", "remove", desk.card, "--section", "probes", "task-a")
    assert status == 2
