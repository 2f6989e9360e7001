import math

import pytest
import torch

from mmcl.core.seeding import hash_priorities
from mmcl.memory.selection import (
    herding,
    k_center_greedy,
    smallest_priorities,
    smallest_priorities_in_range,
)


def test_lowest_without_groups_is_a_sort():
    ranks = torch.tensor([5, 1, 4, 2, 3])
    assert smallest_priorities(ranks, 3).tolist() == [1, 3, 4]
    assert smallest_priorities(ranks, 9).tolist() == [1, 3, 4, 2, 0]


def loop_balanced(ranks, groups, capacity):
    """Give every group one place after the other until none is left, lowest ranks first."""
    waiting = {}
    for index in sorted(range(len(ranks)), key=lambda i: ranks[i]):
        waiting.setdefault(groups[index], []).append(index)
    chosen = []
    while len(chosen) < capacity and any(waiting.values()):
        turn = sorted((own.pop(0) for own in waiting.values() if own), key=lambda i: ranks[i])
        chosen.extend(turn[: capacity - len(chosen)])
    return chosen


@pytest.mark.parametrize("capacity", [1, 4, 7, 11, 30, 100])
def test_groups_take_turns(capacity):
    g = torch.Generator().manual_seed(capacity)
    ranks = torch.randperm(40, generator=g)
    groups = torch.randint(5, (40,), generator=g) ** 2
    expected = loop_balanced(ranks.tolist(), groups.tolist(), capacity)
    assert smallest_priorities(ranks, capacity, groups).tolist() == expected


@pytest.mark.parametrize("capacity", [1, 3, 40, 500, 0])
def test_a_long_range_is_sifted_piece_by_piece(monkeypatch, capacity):
    monkeypatch.setattr("mmcl.memory.selection._HASH_CHUNK", 64)
    ranks = hash_priorities(5, 2, torch.arange(333))
    expected = ranks.argsort()[: capacity or None].sort().values
    assert torch.equal(smallest_priorities_in_range(333, capacity, 5, 2), expected)
    middle = int(ranks.sort().values[100])
    below = [n for n in expected.tolist() if int(ranks[n]) < middle]
    assert smallest_priorities_in_range(333, capacity, 5, 2, bound=middle).tolist() == below


def test_choosing_in_pieces_equals_choosing_at_once():
    g = torch.Generator().manual_seed(0)
    ranks, groups = torch.randperm(200, generator=g), torch.randint(7, (200,), generator=g)
    for capacity in (5, 23, 90):
        kept = torch.zeros(0, dtype=torch.int64)
        for piece in torch.arange(200).split(13):
            both = torch.cat([kept, piece])
            kept = both[smallest_priorities(ranks[both], capacity, groups[both])]
        assert set(kept.tolist()) == set(smallest_priorities(ranks, capacity, groups).tolist())


def test_a_reservoir_keeps_every_item_equally_often():
    items, capacity, seeds = 30, 6, 3000
    counts = torch.zeros(items, dtype=torch.float64)
    for seed in range(seeds):
        priorities = hash_priorities(seed, 0, torch.arange(items))
        counts[smallest_priorities(priorities, capacity)] += 1
    share = capacity / items
    deviations = (counts - seeds * share) ** 2 / (seeds * share * (1 - share))
    # Inclusions of one seed sum to the capacity, so the statistic has items - 1 degrees.
    statistic = float(deviations.sum()) * (items - 1) / items
    assert abs(statistic - (items - 1)) < 4 * math.sqrt(2 * (items - 1))


def loop_herding(features, capacity):
    unit = [row / row.norm() for row in features.double()]
    mean = sum(unit) / len(unit)
    chosen = []
    while len(chosen) < min(capacity, len(unit)):
        best, nearest = None, math.inf
        for index in range(len(unit)):
            if index in chosen:
                continue
            candidate = sum((unit[i] for i in chosen), unit[index]) / (len(chosen) + 1)
            distance = float((mean - candidate).square().sum())
            if distance < nearest - 1e-12:
                best, nearest = index, distance
        chosen.append(best)
    return chosen


def test_herding_is_the_greedy_loop():
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(2))
    assert herding(features, 10).tolist() == loop_herding(features, 10)
    assert herding(features, 4).tolist() == herding(features, 10)[:4].tolist()
    assert sorted(herding(features, 99).tolist()) == list(range(25))


def test_herding_by_hand():
    # The mean of the three directions is (1/3, 1/3): the diagonal is nearest, then any axis.
    features = torch.tensor([[2.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
    assert herding(features, 1).tolist() == [1]


def test_k_center_always_takes_the_farthest():
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(3)).double()
    chosen = k_center_greedy(points, 8, seed=1).tolist()
    for step in range(1, 8):
        gaps = [min(float((p - points[c]).norm()) for c in chosen[:step]) for p in points]
        assert gaps[chosen[step]] == pytest.approx(max(gaps))


def test_k_center_chooses_copies_once_each():
    assert sorted(k_center_greedy(torch.zeros(5, 2), 5, seed=0).tolist()) == [0, 1, 2, 3, 4]
    assert k_center_greedy(torch.zeros(0, 2), 5, seed=0).tolist() == []


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="capacity is 0, expected at least 1"):
        herding(torch.eye(4), 0)


def test_priorities_do_not_depend_on_other_items():
    assert hash_priorities(1, 2, torch.arange(9))[4] == hash_priorities(1, 2, torch.tensor([4]))[0]
