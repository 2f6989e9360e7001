import pytest
import torch

from mmcl.memory.selection import inscl_counts, largest_remainder, repeat_to_counts


def test_samples_are_divided_by_largest_remainders():
    # 10 * (0.55, 0.27, 0.18): floors 5, 2, 1, and the two left go to remainders .8 and .7.
    assert largest_remainder(10, torch.tensor([0.55, 0.27, 0.18])).tolist() == [5, 3, 2]
    assert largest_remainder(7, torch.tensor([1.0, 1.0])).tolist() == [4, 3]
    assert largest_remainder(5, torch.zeros(3)).tolist() == [2, 2, 1]
    assert largest_remainder(0, torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_no_task_is_off_its_part_by_a_place(seed):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(9, generator=g) ** 4
    counts = largest_remainder(131, weights)
    assert int(counts.sum()) == 131
    assert float((counts - 131 * weights / weights.sum()).abs().max()) < 1


def test_farther_tasks_come_more_often():
    assert inscl_counts(100, {3: 0.3, 5: 0.1}) == {3: 75, 5: 25}
    assert inscl_counts(10, {0: -1e-17, 2: 0.4}) == {0: 0, 2: 10}


def test_samples_of_a_task_come_equally_often_and_the_first_once_more():
    tasks = torch.tensor([0, 1, 0, 1, 0])
    indices = repeat_to_counts(tasks, {0: 7, 1: 1})
    assert indices.tolist() == [0, 0, 0, 1, 2, 2, 4, 4]
    assert repeat_to_counts(tasks, {0: 0, 1: 2}).tolist() == [1, 3]


def test_weights_below_zero_are_refused():
    with pytest.raises(ValueError, match="expected numbers of 0 or more"):
        largest_remainder(3, torch.tensor([1.0, -0.1]))
