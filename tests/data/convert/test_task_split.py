"""Class order, tasks, hold-out and shard slices, against loops and cases solved by hand."""

import random

import numpy as np
import pytest

from mmcl.data.convert.record import task_name
from mmcl.data.convert.task_split import (
    class_groups,
    class_order,
    grouped_holdout,
    interleave_classes,
    shard_slices,
    sort_tasks,
)
from mmcl.data.stored_sample import BadSample

# The order of CIFAR-100's classes in iCaRL, as FACIL lists it under cifar100_icarl.
ICARL_CIFAR100 = [
    68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9, 26, 80, 43, 38, 58, 70, 77, 1,
    85, 19, 17, 50, 28, 53, 13, 81, 45, 82, 6, 59, 83, 16, 15, 44, 91, 41, 72, 60, 79, 52, 20, 10,
    31, 54, 37, 95, 14, 71, 96, 98, 97, 2, 64, 66, 42, 22, 35, 86, 24, 34, 87, 21, 99, 0, 88, 27,
    18, 94, 11, 12, 47, 25, 30, 46, 62, 69, 36, 61, 7, 63, 75, 5, 32, 4, 51, 48, 73, 93, 39, 67,
    29, 49, 57, 33,
]  # fmt: skip


def sizes_in_pilot(count, init_cls, increment):
    """Classes of each task in PyCIL and PILOT: what is left goes to a last, smaller task."""
    sizes, left = [init_cls], count - init_cls
    while left:
        sizes.append(min(increment, left))
        left -= sizes[-1]
    return sizes


def test_the_class_order_of_seed_1993_is_the_published_one():
    before = np.random.get_state()[1].copy()
    assert class_order(100, 1993) == ICARL_CIFAR100
    assert (np.random.get_state()[1] == before).all()
    assert class_order(100, 0) != ICARL_CIFAR100


@pytest.mark.parametrize("count", [2, 7, 10, 11, 100, 101])
def test_classes_are_split_as_in_pilot(count):
    for increment in (1, 2, 3, 10, 60):
        for first in (None, 1, 5, 50):
            if (first or 0) >= count or (first is None and increment >= count):
                continue
            groups = class_groups(count, increment, first)
            sizes = sizes_in_pilot(count, first or increment, increment)
            assert [len(group) for group in groups] == sizes
            assert [position for group in groups for position in group] == list(range(count))


def test_a_first_task_of_all_classes_is_refused():
    assert class_groups(3, 5, None) == [range(3)]
    with pytest.raises(ValueError, match="--first_task_classes is 3, and there are 3 classes"):
        class_groups(3, 5, 3)
    with pytest.raises(ValueError, match="first_task_classes is 0, expected 1 or more"):
        class_groups(3, 5, 0)


@pytest.mark.parametrize(
    ("ordered", "kind"),
    [
        (["-3", "0", "0.25", "0.5", "9", "10", "1e3", "2014"], "numbers"),
        (["1999", "2014-2", "2014-03-09", "2014-03-10T01:00", "2014-12", "2015/01/01"], "dates"),
        (["2014-03-10 01:00:00+02:00", "2014-03-10T00:30Z", "2014-03-10 01:00"], "dates"),
        (["de", "en", "fr9x", "fr10"], "texts"),
        (["c2", "c10", "c10b"], "texts"),
        (["9-17", "18-25", "26-35"], "texts"),
        (["2014-02-30", "2014-03-01", "x"], "texts"),
        (["one"], "texts"),
    ],
)
def test_tasks_of_a_column_come_by_number_by_time_or_naturally(ordered, kind):
    for seed in range(5):
        shuffled = random.Random(seed).sample(ordered, len(ordered))
        assert sort_tasks(shuffled, "when") == (ordered, kind)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["2014", "2014.0", "2015"], "'when' has '2014' and '2014.0', which are equal as numbers"),
        (["2014-03-01", "2014", "2014-03"], "'2014-03' and '2014-03-01', which are equal as dates"),
        (["3/4/2014", "12/31/2014"], "dates such as '3/4/2014', whose order is not certain"),
        (["03/2014", "12/2013"], "order is not certain: write them as 2024-03-31"),
        (["Mar 2014", "April 2013"], "order is not certain"),
    ],
)
def test_an_order_that_is_not_certain_is_refused(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        sort_tasks(names, "when")


@pytest.mark.parametrize(
    ("value", "name"),
    [(" a b ", "a b"), (3, "3"), (2014.0, "2014"), (0.5, "0.5"), (True, "True"), (0, "0")],
)
def test_a_value_of_a_task_column_names_its_task(value, name):
    assert task_name(value, "year") == name


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_missing_task_is_named_by_column_and_line(value):
    with pytest.raises(BadSample, match=r"its year is empty \(line 7\): every sample needs a task"):
        task_name(value, "year", "line 7")
    with pytest.raises(BadSample, match="its year is a list, expected a text or a number"):
        task_name([value], "year")
    with pytest.raises(BadSample, match="its year is not UTF-8"):
        task_name("\udc80", "year")


def contents(*numbers):
    return np.array(numbers, dtype=np.uint64)


@pytest.mark.parametrize("seed", range(5))
def test_equal_contents_are_on_one_side_and_every_group_gives_its_share(seed):
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 400, 1000).astype(np.uint64)
    group = content.astype(np.int64) % 4
    held = grouped_holdout(content, group, 0.2, seed)
    assert not set(content[held].tolist()) & set(content[~held].tolist())
    for number in range(4):
        own = held[group == number]
        # A content weighs a few samples, so the share is met to within one of them.
        assert round(0.2 * len(own)) <= own.sum() <= 0.2 * len(own) + 12
    assert (grouped_holdout(content, group, 0.2, seed + 100) != held).any()


def test_a_content_of_two_groups_is_held_out_of_both():
    content = contents(*range(20), *range(20))
    group = np.repeat([0, 1], 20)
    held = grouped_holdout(content, group, 0.3, 0)
    assert held[:20].tolist() == held[20:].tolist()
    assert held[:20].sum() == 6


def test_the_draw_depends_on_contents_alone():
    content = contents(*range(100))
    held = grouped_holdout(content, np.zeros(100, np.int64), 0.1, 3)
    order = np.random.default_rng(0).permutation(100)
    assert grouped_holdout(content[order], np.zeros(100, np.int64), 0.1, 3).tolist() == (
        held[order].tolist()
    )


def test_small_groups_give_one_and_keep_one():
    group = np.array([0, 1, 1, 2, 2, 2])
    held = grouped_holdout(contents(1, 2, 3, 4, 4, 4), group, 0.1, 0)
    assert not held[0]  # the only one
    assert held[1:3].sum() == 1
    assert not held[3:].any()  # the same picture three times
    assert grouped_holdout(contents(), np.zeros(0, np.int64), 0.1, 0).tolist() == []


def test_shards_are_cut_by_count_and_by_bytes():
    def made(sizes, most, most_bytes):
        return [(cut.start, cut.stop) for cut in shard_slices(np.array(sizes), most, most_bytes)]

    assert made([1] * 7, 3, 100) == [(0, 3), (3, 6), (6, 7)]
    assert made([4, 4, 4, 9, 1, 1], 9, 8) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert made([], 3, 100) == []


def test_every_stretch_holds_some_of_every_class():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = interleave_classes(labels)
    assert sorted(order.tolist()) == list(range(100))
    for first in range(0, 100, 10):
        counts = np.bincount(labels[order[first : first + 10]], minlength=3)
        assert (abs(counts - [6, 3, 1]) <= 1).all()
    assert (np.diff(order[labels[order] == 1]) > 0).all()
