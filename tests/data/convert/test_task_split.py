"""Hold-out, shard slices and interleaved classes, against loops and cases solved by hand."""

import numpy as np
import pytest

from mmcl.data.convert.task_split import grouped_holdout, interleave_classes, shard_slices


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
