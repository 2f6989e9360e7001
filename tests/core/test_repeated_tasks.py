"""Streams whose tasks are repeated: names, classes, numbers."""

import pytest
import yaml

from mmcl.core import TaskStream
from tests.data.small_stream import write_stream


@pytest.fixture
def card(tmp_path):
    write_stream(tmp_path, (3, 3), test_size=2)
    return tmp_path / "small.yaml"


def test_repeated_tasks_have_names_and_numbers_of_their_own_and_no_new_classes(card):
    stream = TaskStream.read(card, repeats=3)
    names = ["task-a", "task-b", "task-a (2)", "task-b (2)", "task-a (3)", "task-b (3)"]
    assert [task.name for task in stream] == names
    assert [task.index for task in stream] == list(range(6))
    assert [task.repeat_of for task in stream] == [None, None, 0, 1, 0, 1]
    assert stream.classes_seen(5) == ("c0", "c1", "c2", "c3")
    assert stream[5].classes == ()
    assert stream[5].class_ids == stream[1].class_ids == (2, 3)
    assert stream[4].train == stream[0].train


def test_the_order_is_that_of_every_cycle(card):
    stream = TaskStream.read(card, order=[1, 0], repeats=2)
    assert [task.name for task in stream] == ["task-b", "task-a", "task-b (2)", "task-a (2)"]
    assert stream[2].class_ids == (0, 1)


def test_the_occurrences_of_a_task_are_found(card):
    stream = TaskStream.read(card, repeats=3)
    assert [stream.first_occurrence(number) for number in range(6)] == [0, 1, 0, 1, 0, 1]
    # Before training and in the first cycle the first one, then the last one that was trained.
    assert [stream.last_trained(2, row) for row in range(7)] == [0, 0, 0, 2, 2, 4, 4]
    assert [stream.last_trained(1, row) for row in range(7)] == [1, 1, 1, 1, 3, 3, 5]


def test_repeats_below_one_are_refused(card):
    with pytest.raises(ValueError, match="repeats is 0, expected .* from 1"):
        TaskStream.read(card, repeats=0)


def test_a_name_that_a_repeated_task_would_have_is_refused(card):
    content = yaml.safe_load(card.read_text())
    content["tasks"][1]["name"] = "task-a (2)"
    card.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"has a task 'task-a \(2\)'"):
        TaskStream.read(card, repeats=2)
    assert len(TaskStream.read(card)) == 2
