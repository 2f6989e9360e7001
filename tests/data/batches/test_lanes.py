import numpy as np
import pytest

from mmcl.data.batches.batch_plan import EpochPlan, Mixture, WindowedShuffle, rank_slice
from mmcl.data.batches.lanes import LanedShuffle, Lanes, lanes_of_rank, lanes_warning

SIZES = [  # samples of each shard
    [10] * 12,
    [7, 1, 0, 30, 5, 5, 12, 3],
    [61],
    [1] * 40,
]
MIXTURES = [  # global batch, recalled, share, sources
    (8, 0, None, ()),
    (13, 5, 0.25, ()),
    (16, 5, 0.25, ((9, 0.2),)),
    (1, 0, None, ()),
]


def plan_of(sizes, mixed, lanes, own=None, *, epoch=0, window=4, lengths=None, group=0, seed=7):
    batch, recalled, share, sources = mixed
    mixture = Mixture(sum(sizes), batch, recalled, share, sources)
    divided = Lanes(lanes, sum(sizes), mixture.steps)
    own = range(lanes) if own is None else own
    order = LanedShuffle(seed + epoch, np.array(sizes), window, lanes=divided, own=own)
    return EpochPlan(
        mixture, seed=seed, task=2, epoch=epoch, order=order, lanes=lanes, lengths=lengths,
        group=group,
    )  # fmt: skip


def lengths_of(plan, seed=0):
    count = plan.mixture.new + plan.mixture.num_replay + sum(n for n, _ in plan.mixture.sources)
    return np.random.default_rng(seed).integers(1, 500, count)


def batches(plan):
    return [plan.batch(number) for number in range(len(plan))]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("mixed", MIXTURES)
@pytest.mark.parametrize("sizes", SIZES)
def test_lanes_are_those_of_a_loop_over_the_batches(sizes, mixed, lanes):
    plan = plan_of(sizes, mixed, lanes)
    divided, taken, places = plan.order.lanes, [0] * lanes, []
    for step in range(len(plan)):
        used = divided.used(np.full(lanes, step), np.arange(lanes))
        assert used.tolist() == taken
        for number in range(plan.mixture.start_of(step + 1) - plan.mixture.start_of(step)):
            places.append((number % lanes, taken[number % lanes]))
            taken[number % lanes] += 1
    assert list(zip(*map(np.ndarray.tolist, divided.places(0, sum(sizes))), strict=True)) == places
    assert np.diff(divided.edges).tolist() == taken
    assert sum(taken) == sum(sizes)
    assert max(taken) - min(taken) <= len(plan)


@pytest.mark.parametrize("group", [0, 3])
@pytest.mark.parametrize("lanes", [2, 3, 8, 64])
@pytest.mark.parametrize("mixed", MIXTURES)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_new_sample_comes_once_from_the_lane_of_its_place(sizes, mixed, lanes, group):
    for epoch in range(2):
        plan = plan_of(sizes, mixed, lanes, epoch=epoch, group=group)
        plan.lengths = lengths_of(plan)
        edges, seen = plan.order.lanes.edges, []
        for batch in batches(plan):
            new = batch[batch < sum(sizes)]
            assert (new == batch[: len(new)]).all()
            lane = np.searchsorted(edges, new, side="right") - 1
            # An empty lane begins where the next does, which then is the one that is found.
            assert (edges[lane] == edges[np.arange(len(new)) % lanes]).all()
            seen += new.tolist()
        assert sorted(seen) == list(range(sum(sizes)))


@pytest.mark.parametrize("group", [0, 3])
@pytest.mark.parametrize("mixed", MIXTURES)
def test_replayed_samples_and_sources_take_the_slots_that_they_take_without_lanes(mixed, group):
    sizes = SIZES[0]
    batch, recalled, share, sources = mixed
    mixture = Mixture(sum(sizes), batch, recalled, share, sources)
    for epoch in range(2):
        laned = plan_of(sizes, mixed, 4, epoch=epoch, group=group)
        laned.lengths = lengths_of(laned)
        plain = EpochPlan(
            mixture, seed=7, task=2, epoch=epoch, lengths=laned.lengths, group=group
        )  # fmt: skip
        for left, right in zip(batches(laned), batches(plain), strict=True):
            assert len(left) == len(right)
            assert left[left >= sum(sizes)].tolist() == right[right >= sum(sizes)].tolist()


@pytest.mark.parametrize(("lanes", "world"), [(4, 2), (4, 4), (8, 2), (6, 3), (6, 4), (3, 2)])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("group", [0, 3])
def test_a_rank_reads_only_its_lanes(lanes, world, accumulation, group):
    sizes = SIZES[0]
    plan = plan_of(sizes, (16, 5, 0.25, ()), lanes, group=group)
    plan.lengths = lengths_of(plan)
    for rank in range(world):
        own = lanes_of_rank(lanes, rank, world)
        if lanes % world == 0:
            assert list(own) == list(range(rank, lanes, world))
        wanted = set(plan.order.lanes.numbers(own).tolist())
        read = set()
        for whole in batches(plan):
            for micro_batch in range(accumulation):
                taken = rank_slice(whole, micro_batch, accumulation, rank, world)
                read |= set(taken[taken < sum(sizes)].tolist())
        assert read <= wanted
        assert read == wanted or lanes % world


def test_samples_of_a_lane_are_those_of_a_windowed_shuffle_of_its_parts_of_shards():
    sizes, window = [6, 6, 6, 6], 4
    plan = plan_of(sizes, (6, 0, None, ()), 2, window=window)
    assert plan.order.lanes.edges.tolist() == [0, 12, 24]
    for lane in (0, 1):
        taken = np.concatenate([batch[lane::2] for batch in batches(plan)])
        seed = plan.order._shuffled_lane(lane)[1].seed
        expected = WindowedShuffle(seed, [6, 6], window // 2).slice(0, 12) + 12 * lane
        assert taken.tolist() == expected.tolist()


def test_a_shard_at_the_edge_of_two_lanes_is_cut():
    plan = plan_of([5, 10, 5], (4, 0, None, ()), 2, window=2)
    assert plan.order.lanes.edges.tolist() == [0, 10, 20]
    first, second = (np.concatenate([b[lane::2] for b in batches(plan)]) for lane in (0, 1))
    for taken, parts in ((first, [(0, 5), (5, 10)]), (second, [(10, 15), (15, 20)])):
        halves = [sorted(taken[:5].tolist()), sorted(taken[5:].tolist())]
        assert sorted(halves) == [list(range(*part)) for part in parts]


def test_lanes_are_read_in_another_order_in_another_epoch():
    first, second = (
        np.concatenate(batches(plan_of(SIZES[0], MIXTURES[0], 4, epoch=epoch))) for epoch in (0, 1)
    )
    assert first.tolist() != second.tolist()
    starts = [{int(plan_of(SIZES[0], MIXTURES[0], 4, window=4, epoch=epoch).batch(0)[0]) // 10
               for epoch in range(40)}]  # fmt: skip
    assert starts == [{0, 1, 2}]  # any shard of the first lane may come first


@pytest.mark.parametrize(("lanes", "world"), [(4, 2), (4, 4), (6, 4)])
def test_the_lengths_of_its_lanes_are_all_that_a_rank_needs_to_group_by_length(lanes, world):
    sizes = SIZES[0]
    whole = plan_of(sizes, (12, 5, 0.25, ()), lanes, group=4)
    whole.lengths = lengths_of(whole)
    for rank in range(world):
        own = plan_of(sizes, (12, 5, 0.25, ()), lanes, group=4)
        own.lengths = whole.lengths.copy()
        others = np.ones(sum(sizes), dtype=bool)
        others[whole.order.lanes.numbers(lanes_of_rank(lanes, rank, world))] = False
        own.lengths[: sum(sizes)][others] = 0
        for left, right in zip(batches(own), batches(whole), strict=True):
            taken = (rank_slice(batch, 0, 1, rank, world).tolist() for batch in (left, right))
            assert next(taken) == next(taken)


def test_samples_of_similar_length_come_together_inside_of_lanes():
    sizes = [256] * 16
    grouped, plain = (plan_of(sizes, (64, 0, None, ()), 4, group=group) for group in (32, 0))
    grouped.lengths = lengths_of(grouped)

    def padded(plan):
        return sum(grouped.lengths[batch].max() * len(batch) for batch in batches(plan))

    real = grouped.lengths.sum()
    assert padded(grouped) < 1.15 * real
    assert padded(plain) > 1.8 * real


def test_the_next_windows_are_the_shards_of_the_own_lanes_that_are_read_next():
    sizes, lanes = [8] * 16, 4
    plan = plan_of(sizes, (16, 0, None, ()), lanes, own=[1], window=lanes)
    shards = [sorted(set((plan.batch(step)[1::4] // 8).tolist())) for step in range(len(plan))]
    assert all(len(found) == 1 for found in shards)  # 32 samples a lane, 4 a batch
    for step in range(len(plan)):
        coming = [found for found in shards[step:] if found != shards[step]][:1]
        expected = coming[0] if coming else []
        index = plan.mixture.start_of(step)
        assert plan.order.window(index).tolist() == shards[step]
        assert plan.order.window(index, ahead=1).tolist() == expected


def test_ten_billion_samples_have_lanes_without_a_list_or_an_overflow():
    samples, steps, lanes = 10_000_000_000, 406_901, 512
    divided = Lanes(lanes, samples, steps)
    start = 123_456 * samples // steps
    lane, index = divided.places(start, start + 1000)
    smaller = samples // steps
    for number in (0, 1, 511, 512, 999):
        assert lane[number] == number % lanes
        larger = start - 123_456 * smaller
        counts = [(smaller + extra - int(lane[number]) + lanes - 1) // lanes for extra in (0, 1)]
        assert index[number] == (
            (123_456 - larger) * counts[0] + larger * counts[1] + number // lanes
        )
    assert divided.edges[-1] == samples


@pytest.mark.parametrize(
    ("lanes", "joint", "words"),
    [
        (None, False, r"data.shuffle_lanes is not set: start a run with 8, or another multiple"),
        (12, False, "data.shuffle_lanes is 12, no multiple of 8 devices"),
        (8, True, "old samples are shuffled among new ones: keep its shards on a file system"),
    ],
)
def test_nodes_that_fetch_the_same_shards_are_told_why(lanes, joint, words):
    sentence = lanes_warning(lanes, "birds", 8, nodes=2, is_joint=joint, is_remote=True)
    assert sentence.startswith("several nodes fetch the same shards of task 'birds', ")
    assert words in sentence


@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_nodes_with_lanes_of_their_own_or_a_shared_cache_are_told_nothing(lanes):
    assert lanes_warning(lanes, "birds", 8, nodes=2, is_joint=False, is_remote=True) == ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_lanes_of_local_shards_are_without_effect_and_a_warning_says_so(nodes):
    def warned(lanes):
        return lanes_warning(lanes, "birds", 8, nodes=nodes, is_joint=False, is_remote=False)

    assert "data.shuffle_lanes is 16 and has no effect on task 'birds'" in warned(16)
    assert warned(None) == warned(1) == ""
