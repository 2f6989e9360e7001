import pytest
import torch

from mmcl.memory.selection import (
    order_by_information,
    order_by_score,
    order_within_groups,
    van_der_corput_order,
)


def test_high_and_low_are_sorts_in_which_equals_keep_their_order():
    scores = torch.tensor([2.0, 5.0, 2.0, 1.0, 5.0])
    assert order_by_score(scores, "high").tolist() == [1, 4, 0, 2, 3]
    assert order_by_score(scores, "low").tolist() == [3, 0, 2, 1, 4]


def test_spread_over_powers_of_two_is_every_so_manieth_of_the_sorted_list():
    scores = torch.rand(64, generator=torch.Generator().manual_seed(0))
    by_height = scores.argsort().tolist()
    for count in (1, 2, 4, 8, 32):
        few = set(order_by_score(scores, "spread")[:count].tolist())
        assert few == {by_height[j * 64 // count] for j in range(count)}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 24, 100, 129])
def test_any_beginning_is_spread_to_a_factor_of_two(size):
    order = van_der_corput_order(size)
    assert sorted(order.tolist()) == list(range(size))
    for count in range(2, size):
        gaps = order[:count].sort().values.diff()
        assert int(gaps.max()) <= 2 * int(gaps.min())


def test_every_group_is_ordered_by_itself():
    groups = torch.tensor([4, -1, 4, 4, -1])
    scores = torch.tensor([1.0, 9.0, 3.0, 2.0, 8.0])
    indices, positions = order_within_groups(
        groups, lambda members: order_by_score(scores[members], "high")[:2]
    )
    assert indices.tolist() == [1, 4, 2, 3]
    assert positions.tolist() == [0, 1, 0, 1]


def test_instructions_come_once_each_and_then_by_what_they_tell():
    # Instruction 7 tells three times as much as 5, and 9 nothing.
    which = torch.tensor([5] * 10 + [7] * 10 + [9] * 10)
    information = torch.tensor([1.0] * 10 + [3.0] * 10 + [0.0] * 10)
    order = order_by_information(information, which)
    assert order[:3].tolist() == [10, 0, 20]
    first = which[order[:10]].tolist()
    assert (first.count(7), first.count(5), first.count(9)) == (7, 2, 1)
    assert sorted(order.tolist()) == list(range(30))


def test_wrong_words_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="keep is 'best': choose 'high', 'low' or 'spread'"):
        order_by_score(torch.zeros(2), "best")
    with pytest.raises(ValueError, match="1 of 2 scores are nan"):
        order_by_score(torch.tensor([0.0, torch.nan]), "high")
