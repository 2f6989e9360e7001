import numpy as np
import pytest

from mmcl.core.seeding import hash_seed
from mmcl.data.batches.batch_plan import (
    SORTED,
    FeistelPermutation,
    HashPermutation,
    WindowedShuffle,
    shuffled,
)


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17, 1000, 4097, 65536])
@pytest.mark.parametrize("kind", [HashPermutation, FeistelPermutation])
def test_an_order_is_a_permutation_read_in_any_pieces(kind, count):
    order = kind(3, count)
    whole = order.slice(0, count)
    assert sorted(whole.tolist()) == list(range(count))
    cuts = sorted([0, 1, count // 3, count // 2, count])
    pieces = [order.slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert (np.concatenate(pieces) == whole).all()


def test_scattered_numbers_are_uniform_and_their_neighbours_unrelated():
    count, bins = 40_000, 20
    for seed in range(3):
        whole = FeistelPermutation(hash_seed(seed), count).slice(0, count)
        table, _, _ = np.histogram2d(np.arange(count), whole, bins=bins)
        expected = count / bins**2
        chi = ((table - expected) ** 2 / expected).sum()
        free = (bins - 1) ** 2
        assert abs(chi - free) < 5 * np.sqrt(2 * free)
        steps = np.diff(whole)
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.03
        assert len(np.unique(steps)) > 0.5 * count


def test_ten_billion_samples_are_shuffled_without_a_list():
    order = shuffled(1, 10_000_000_000)
    assert isinstance(order, FeistelPermutation)
    taken = order.slice(9_999_999_000, 9_999_999_500)
    assert len(np.unique(taken)) == 500
    assert taken.min() >= 0
    assert taken.max() < 10_000_000_000
    assert taken.std() > 2e9


def test_up_to_a_million_numbers_are_sorted():
    assert isinstance(shuffled(0, SORTED), HashPermutation)
    assert isinstance(shuffled(0, SORTED + 1), FeistelPermutation)


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_windows_hold_whole_shards_and_every_sample_once(window):
    sizes = [5, 1, 0, 8, 3, 7]
    order = WindowedShuffle(4, sizes, window)
    whole = order.slice(0, len(order))
    assert sorted(whole.tolist()) == list(range(24))
    shard_of = np.repeat(np.arange(6), sizes)[whole]
    met = [set(shard_of[place : place + 1].tolist()) for place in range(24)]
    spans = [[p for p in range(24) if shard in met[p]] for shard in range(6)]
    # No more than `window` shards are open at a time.
    for place in range(24):
        open_now = [s for s in spans if s and s[0] <= place <= s[-1]]
        assert len(open_now) <= window
    pieces = [order.slice(a, a + 5) for a in range(0, 24, 5)]
    assert (np.concatenate(pieces) == whole).all()


def test_the_shards_ahead_are_those_of_the_next_window():
    sizes = [4, 4, 4, 4]
    order = WindowedShuffle(0, sizes, 2)
    first = set((order.slice(0, 8) // 4).tolist())
    assert set(order.window(3, ahead=1).tolist()) == {0, 1, 2, 3} - first
    assert len(order.window(9, ahead=1)) == 0


def test_a_window_of_no_shards_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        WindowedShuffle(0, [3], 0)
