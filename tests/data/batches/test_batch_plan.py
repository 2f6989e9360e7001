import numpy as np
import pytest
import torch

from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.data.batches.batch_plan import EpochPlan, Mixture, rank_slice

CASES = [  # new, recalled, share, global_batch_size, sources
    (23, 0, None, 4, ()),
    (23, 0, 0.25, 4, ()),
    (23, 5, 0.25, 8, ()),
    (23, 5, 0.01, 8, ()),
    (100, 3, 0.5, 10, ()),
    (7, 50, 0.3, 64, ()),
    (40, 13, None, 8, ()),
    (1, 1, 0.5, 2, ()),
    (23, 5, 0.25, 8, ((11, 0.25),)),
    (23, 0, None, 8, ((3, 0.25), (40, 0.1))),
    (40, 13, None, 8, ((9, 0.2),)),
]


def mixture(case):
    new, recalled, share, global_batch_size, sources = case
    return Mixture(new, global_batch_size, recalled, share, sources)


def plans(case, epochs=3, **settings):
    settings = {"seed": 7, "task": 2, **settings}
    return [EpochPlan(mixture(case), epoch=epoch, **settings) for epoch in range(epochs)]


def entries(plan):
    return np.concatenate([plan.batch(number) for number in range(len(plan))])


def lengths(case, seed=0):
    total = case[0] + case[1] + sum(count for count, _ in case[4])
    return np.random.default_rng(seed).integers(1, 500, total)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_new_sample_comes_exactly_once_in_every_epoch(case, group):
    for plan in plans(case, group=group, lengths=lengths(case)):
        new = entries(plan)
        assert sorted(new[new < case[0]].tolist()) == list(range(case[0]))


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_global_batch_holds_exactly_the_slots_of_every_kind_in_order(case, group):
    new, recalled, share, global_batch_size, sources = case
    firsts = np.cumsum([0, new, recalled, *(count for count, _ in sources)])
    wanted = [round(share * global_batch_size) if share and recalled else None]
    wanted += [round(share * global_batch_size) for _, share in sources]
    for plan in plans(case, group=group, lengths=lengths(case)):
        for number in range(len(plan)):
            kind = np.searchsorted(firsts, plan.batch(number), side="right") - 1
            assert (np.diff(kind) >= 0).all()
            for index, slots in enumerate(wanted, start=1):
                if slots is not None:
                    assert (kind == index).sum() == max(1, slots)


@pytest.mark.parametrize("case", CASES)
def test_batches_differ_by_one_sample_at_most_and_never_exceed_the_global_batch(case):
    for plan in plans(case):
        sizes = np.array([len(plan.batch(number)) for number in range(len(plan))])
        assert sizes.max() - sizes.min() <= 1
        assert sizes.max() <= case[3]
        assert sizes.min() == plan.mixture.min_batch


@pytest.mark.parametrize("group", [0, 3])
def test_replayed_samples_and_sources_come_equally_often_over_epochs(group):
    case = (23, 5, 0.25, 8, ((7, 0.25),))
    drawn = np.concatenate(
        [entries(plan) for plan in plans(case, epochs=10, group=group, lengths=lengths(case))]
    )
    for first, count in ((23, 5), (28, 7)):
        own = drawn[(drawn >= first) & (drawn < first + count)] - first
        counts = np.bincount(own, minlength=count)
        assert counts.max() - counts.min() <= 1


def test_replayed_samples_follow_the_permutations_written_out_as_loops():
    new, recalled, slots, steps = 6, 4, 3, 3
    plan = EpochPlan(Mixture(new, 5, recalled, 0.6), seed=1, task=3, epoch=2)
    endless = []
    for cycle in range(20):
        numbers = torch.arange(recalled) + cycle * recalled
        keys = hash_priorities(hash_seed(1, 3, 2), 0, numbers).tolist()
        endless += sorted(range(recalled), key=keys.__getitem__)
    start = 2 * steps * slots
    for number in range(steps):
        got = plan.batch(number)[-slots:] - new
        assert got.tolist() == endless[start + number * slots :][:slots]


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_together_hold_the_global_batch_in_order(parts):
    world, accumulation = parts
    case = (61, 5, 0.25, 16, ((9, 0.2),))
    for plan in plans(case, group=2, lengths=lengths(case)):
        for number in range(len(plan)):
            whole = plan.batch(number)
            laid = np.full(len(whole), -1)
            for micro_batch in range(accumulation):
                for rank in range(world):
                    own = rank_slice(whole, micro_batch, accumulation, rank, world)
                    laid[micro_batch * world + rank :: world * accumulation] = own
            assert (laid == whole).all()


def test_the_order_depends_on_seed_task_and_epoch_and_on_nothing_else():
    def first(**changes):
        settings = {"seed": 1, "task": 0, "epoch": 0, **changes}
        return entries(EpochPlan(Mixture(50, 8), **settings)).tolist()

    assert first() == first()
    for other in ({"seed": 2}, {"task": 1}, {"epoch": 1}):
        assert first(**other) != first()


def test_every_sample_is_equally_likely_to_come_first():
    counts = np.bincount(
        [int(EpochPlan(Mixture(4, 4), seed=0, task=0, epoch=e).batch(0)[0]) for e in range(2000)]
    )
    assert (abs(counts - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_samples_of_similar_length_come_together_and_the_batches_in_random_order():
    case = (4096, 512, 0.25, 32, ())
    sizes = lengths(case)
    grouped, plain = (plans(case, epochs=1, group=group, lengths=sizes)[0] for group in (64, 0))

    def padded(plan):
        batches = [plan.batch(n) for n in range(len(plan))]
        return sum(sizes[batch].max() * len(batch) for batch in batches)

    real = sizes[entries(grouped)].sum()
    assert padded(grouped) < 1.05 * real
    assert padded(plain) > 1.8 * real
    longest = np.array([sizes[grouped.batch(n)].max() for n in range(64)])
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.4


def test_a_share_that_leaves_nothing_for_new_samples_is_refused():
    with pytest.raises(ValueError, match="leave none for new samples"):
        _ = Mixture(10, 2, 5, 0.9).replay_slots
    with pytest.raises(ValueError, match="take 8 of the 8 samples"):
        _ = Mixture(10, 8, 5, 0.5, ((3, 0.5),)).replay_slots


@pytest.mark.parametrize("epoch_steps", [None, 2])
def test_samples_are_counted_ahead_as_the_batches_hold_them(epoch_steps):
    mixture = Mixture(20, 8, 5, 0.25)
    plans = [EpochPlan(mixture, seed=3, task=1, epoch=epoch) for epoch in range(3)]
    sizes = [len(p.batch(n)) for p in plans for n in range(epoch_steps or mixture.steps)]
    for step in range(len(sizes) + 1):
        assert mixture.samples_after(step, epoch_steps) == sum(sizes[:step])
