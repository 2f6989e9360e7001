import numpy as np
import pytest
import torch

from mmcl.core.randomness import mix, ranks_of
from mmcl.data.order import epoch_plan, replay_slots, smallest_batch, steps_per_epoch

CASES = [  # new, recalled, share, global_batch
    (23, 0, None, 4),
    (23, 0, 0.25, 4),
    (23, 5, 0.25, 8),
    (23, 5, 0.01, 8),
    (100, 3, 0.5, 10),
    (7, 50, 0.3, 64),
    (40, 13, None, 8),
    (1, 1, 0.5, 2),
]


def plans(new, recalled, share, global_batch, epochs=3, seed=7, task=2):
    return [
        epoch_plan(
            new, recalled=recalled, share=share, global_batch=global_batch,
            seed=seed, task=task, epoch=epoch,
        )
        for epoch in range(epochs)
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_new_sample_comes_exactly_once_in_every_epoch(case):
    for plan in plans(*case):
        new = plan.entries[plan.entries < case[0]]
        assert sorted(new.tolist()) == list(range(case[0]))


@pytest.mark.parametrize("case", CASES)
def test_every_global_batch_holds_exactly_the_slots_and_the_new_rows_come_first(case):
    new, recalled, share, global_batch = case
    if share is None or recalled == 0:
        return
    slots = max(1, round(share * global_batch))
    for plan in plans(*case):
        for number in range(len(plan)):
            is_old = plan.batch(number) >= new
            assert is_old.sum() == slots
            assert is_old[-slots:].all()


@pytest.mark.parametrize("case", CASES)
def test_batches_differ_by_one_row_at_most_and_never_exceed_the_global_batch(case):
    for plan in plans(*case):
        rows = np.diff(plan.starts)
        assert len(rows) == steps_per_epoch(*case)
        assert rows.max() - rows.min() <= 1
        assert rows.max() <= case[3]
        assert rows.min() == smallest_batch(*case)


def test_recalled_samples_come_equally_often_over_epochs():
    new, recalled, share, global_batch = 23, 5, 0.25, 8
    epochs = plans(new, recalled, share, global_batch, epochs=10)
    drawn = np.concatenate([plan.entries[plan.entries >= new] for plan in epochs]) - new
    counts = np.bincount(drawn, minlength=recalled)
    assert counts.max() - counts.min() <= 1
    in_order = [plan.batch(n)[plan.batch(n) >= new] - new for plan in epochs for n in range(4)]
    pieces = np.concatenate(in_order)
    for start in range(0, len(pieces) - recalled, recalled):
        assert sorted(pieces[start : start + recalled].tolist()) == list(range(recalled))


def test_recalled_rows_follow_the_permutations_written_out_as_loops():
    new, recalled, slots, steps = 6, 4, 3, 3
    plan = epoch_plan(new, recalled=recalled, share=0.6, global_batch=5, seed=1, task=3, epoch=2)
    endless = []
    for cycle in range(20):
        numbers = torch.arange(recalled) + cycle * recalled
        keys = ranks_of(mix(1, 3, 2), 0, numbers).tolist()
        endless += sorted(range(recalled), key=keys.__getitem__)
    start = 2 * steps * slots
    found = [row - new for n in range(steps) for row in plan.batch(n).tolist() if row >= new]
    assert found == endless[start : start + steps * slots]


def test_joint_visits_the_union_once_and_spreads_the_old_samples():
    plan = plans(40, 40, None, 8, epochs=1)[0]
    assert sorted(plan.entries.tolist()) == list(range(80))
    mixed = [(plan.batch(n) >= 40).any() and (plan.batch(n) < 40).any() for n in range(len(plan))]
    assert sum(mixed) == len(plan)
    for number in range(len(plan)):
        is_old = plan.batch(number) >= 40
        assert (np.sort(is_old) == is_old).all()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_parts_put_together_are_the_global_batch(world, accumulation):
    plan = plans(23, 5, 0.25, 8, epochs=1)[0]
    for number in range(len(plan)):
        batch = plan.batch(number)
        put_together = np.full(len(batch), -1)
        for rank in range(world):
            own = []
            for part in range(accumulation):
                micro = plan.micro_batch(
                    number, part=part, accumulation=accumulation, rank=rank, world=world
                )
                for row, entry in enumerate(micro):
                    gathered = row * world + rank  # place among all ranks' rows of this part
                    step, lane = divmod(gathered, world)
                    put_together[(step * accumulation + part) * world + lane] = entry
                own += micro.tolist()
            assert sorted(own) == sorted(batch[rank::world].tolist())
        assert put_together.tolist() == batch.tolist()


def test_order_depends_on_seed_task_and_epoch_and_on_nothing_else():
    first = epoch_plan(50, global_batch=8, seed=1, task=0, epoch=0).entries
    torch.manual_seed(99)
    assert (epoch_plan(50, global_batch=8, seed=1, task=0, epoch=0).entries == first).all()
    for other in ({"seed": 2}, {"task": 1}, {"epoch": 1}):
        changed = epoch_plan(50, global_batch=8, **{"seed": 1, "task": 0, "epoch": 0, **other})
        assert (changed.entries != first).any()


def test_first_places_are_uniform_over_epochs():
    firsts = [
        int(epoch_plan(4, global_batch=4, seed=0, task=0, epoch=epoch).entries[0])
        for epoch in range(800)
    ]
    counts = np.bincount(firsts, minlength=4)
    assert abs(counts - 200).max() < 5 * np.sqrt(800 * 0.25 * 0.75)


def test_a_share_that_leaves_no_new_rows_is_refused():
    with pytest.raises(ValueError, match=r"takes 2 of the 2 rows .* leaves none for new samples"):
        replay_slots(5, 0.9, 2)
