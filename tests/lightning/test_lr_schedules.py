"""Schedules over tasks against loops written out here, and what they refuse."""

from dataclasses import replace
from math import cos, pi

import pytest

from mmcl.core import Task
from mmcl.lightning.optimization.lr_schedules import (
    LRSchedule,
    SchedulePosition,
    schedule_position,
)
from mmcl.lightning.optimization.stage_settings import task_span

FIRST, LATER = SchedulePosition(is_first=True), SchedulePosition(is_first=False)


def test_rewarm_cosine_rises_in_every_task_and_ends_at_the_smallest_rate():
    schedule, steps, warmup, lowest = LRSchedule("rewarm_cosine", 4, 0.1), 20, 4, 0.1
    expected = [(n + 1) / warmup for n in range(warmup)]
    for n in range(warmup, steps):
        x = (n - warmup) / (steps - 1 - warmup)
        expected.append(lowest + (1 - lowest) * (1 + cos(pi * x)) / 2)
    for position in (FIRST, LATER):
        assert [schedule.factor(n, steps, position) for n in range(steps)] == pytest.approx(
            expected
        )
    assert schedule.factor(steps - 1, steps) == pytest.approx(lowest)


def test_infinite_cools_down_once_and_is_constant_over_later_tasks():
    schedule = LRSchedule("infinite", 2, 0.1, 0.4, cooldown_steps=4, anneal_steps=3)
    first = [schedule.factor(n, 10, FIRST) for n in range(10)]
    cooling = [0.4 + 0.6 * (1 + cos(pi * k / 4)) / 2 for k in range(4)]
    assert first == pytest.approx([0.5, 1.0, *cooling, *[0.4] * 4])
    assert [schedule.factor(n, 10, LATER) for n in range(10)] == [0.4] * 10


def test_the_annealed_branch_is_exponential_and_ends_at_the_smallest_rate():
    schedule = LRSchedule("infinite", 0, 0.1, 0.4, cooldown_steps=0, anneal_steps=3)
    assert schedule.branch_steps(10) == 3
    ratio = (0.1 / 0.4) ** (1 / 3)
    branch = [schedule.factor(10 + n, 10, LATER) for n in range(3)]
    assert branch == pytest.approx([0.4 * ratio, 0.4 * ratio**2, 0.1])


def test_shares_of_an_infinite_schedule_are_rounded_up():
    schedule = LRSchedule("infinite", 0.05, cooldown_steps=0.25, anneal_steps=0.1)
    assert schedule.branch_steps(31) == 4
    whole = LRSchedule("infinite", 2, cooldown_steps=8, anneal_steps=4)
    assert [schedule.factor(n, 31, FIRST) for n in range(31)] == [
        whole.factor(n, 31, FIRST) for n in range(31)
    ]


def test_meta_is_one_cosine_over_the_samples_of_all_tasks():
    tasks = [Task(i, f"t{i}", size=size, epochs=e) for i, (size, e) in enumerate(
        [(10, None), (30, 2), (20, 1)]
    )]  # fmt: skip
    schedule, samples = LRSchedule("meta", min_lr_ratio=0.2), [10 * 3, 30 * 2, 20]
    seen, found, expected = 0, [], []
    for index, count in enumerate(samples):
        position = schedule_position(tasks, 0, 2, index, epochs=3)
        for n in range(5):
            found.append(schedule.factor(n, 5, position))
            progress = (seen + count * n / 5) / sum(samples)
            expected.append(0.2 + 0.8 * (1 + cos(pi * progress)) / 2)
        seen += count
    assert found == pytest.approx(expected)
    assert found == sorted(found, reverse=True)


def test_the_warmup_of_meta_is_in_the_first_task_only():
    schedule = LRSchedule("meta", 2)
    plain = LRSchedule("meta")
    first = SchedulePosition(0.0, 0.5, is_first=True)
    assert schedule.factor(0, 10, first) == pytest.approx(0.5 * plain.factor(0, 10, first))
    later = SchedulePosition(0.5, 0.5, is_first=False)
    assert schedule.factor(0, 10, later) == plain.factor(0, 10, later) == pytest.approx(0.5)


def test_meta_refuses_a_stream_whose_end_is_not_known():
    tasks = [Task(0, "a", size=10), Task(1, "b")]
    with pytest.raises(ValueError, match="those of 'b' are not known: state its size"):
        schedule_position(tasks, 0, 1, 0, epochs=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "cosine", "min_lr_ratio": 0.1}, "min_lr_ratio is 0.1 and lr_schedule 'cosine'"),
        ({"kind": "constant", "anneal_steps": 3}, "which does not use it: leave it out, or use"),
        ({"kind": "rewarm_cosine"}, "give the steps of the re-warming"),
        ({"kind": "rewarm_cosine", "warmup_steps": 1, "min_lr_ratio": 1.0}, "below 1"),
        ({"kind": "infinite", "min_lr_ratio": 0.0}, "so give 0 < min_lr_ratio"),
        ({"kind": "infinite", "constant_lr_ratio": 1.5}, "<= constant_lr_ratio <= 1"),
        ({"kind": "infinite", "anneal_steps": 0}, "anneal_steps is 0"),
        ({"kind": "infinite", "cooldown_steps": -1}, "cooldown_steps is -1"),
        ({"kind": "infinite", "anneal_steps": 2.5}, "anneal_steps is 2.5"),
        ({"kind": "constant", "warmup_steps": float("nan")}, "warmup_steps is nan"),
    ],
)
def test_an_argument_without_effect_or_out_of_range_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        LRSchedule(**arguments)


def test_a_first_task_that_is_too_short_for_its_cooldown_is_refused():
    schedule = LRSchedule("infinite", 4, cooldown_steps=8)
    schedule.expect_room(12, "a")
    with pytest.raises(ValueError, match="make 12 steps, and task 'a', .* has 11"):
        schedule.expect_room(11, "a")


def test_a_span_is_the_neighbours_with_the_same_settings():
    task = Task(0, "t")
    tasks = [replace(task, index=i, stage=s) for i, s in enumerate(
        ["cpt", "cpt", "dap", "cft", "cft", "cpt"]
    )]  # fmt: skip
    spans = [task_span(tasks, i, {"cpt"}) for i in range(6)]
    assert spans == [(0, 1), (0, 1), (2, 4), (2, 4), (2, 4), (5, 5)]
    assert [task_span(tasks, i, ()) for i in range(6)] == [(0, 5)] * 6
