import io
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mmcl.core import IGNORE_INDEX, begin_task, end_task
from mmcl.core.seeding import hash_priorities
from mmcl.strategies.experience_replay import ExperienceReplay, pool_counts
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def replayed(strategy):
    replay_plan = strategy.replay_plan()
    return list(zip(replay_plan.task_ids.tolist(), replay_plan.sample_ids.tolist(), strict=True))


def after(strategy, tasks, size=24):
    model = StandIn()
    for index in range(tasks):
        begin_task(model, strategy, a_task(index, size=size))
        end_task(model, strategy, a_task(index, size=size), task_batches(index, size))
    return strategy


def test_nothing_is_replayed_before_a_task_ended_and_that_is_reported():
    strategy = ExperienceReplay()
    assert strategy.replay_plan() is None
    assert strategy.inactive_parts() == ("memory is empty",)


def test_replay_names_the_smallest_hashes_and_the_share():
    strategy = after(
        ExperienceReplay(buffer_size=10, replay_ratio=0.25, storage="copy", seed=3), tasks=3
    )
    hashes = [
        (rank, task, sample)
        for task in range(3)
        for sample, rank in enumerate(hash_priorities(3, task, torch.arange(24)).tolist())
    ]
    assert replayed(strategy) == sorted((t, s) for _, t, s in sorted(hashes)[:10])
    assert strategy.replay_plan().replay_ratio == 0.25
    assert strategy.replay_plan().storage == "copy"
    assert strategy.inactive_parts() == ()


def test_a_reservoir_with_a_card_does_not_read_the_pass():
    def untouched():
        raise AssertionError("the pass was read")
        yield

    strategy = ExperienceReplay(buffer_size=5)
    end_task(StandIn(), strategy, a_task(size=9), untouched())
    assert len(strategy.replay_plan()) == 5


def test_without_a_card_samples_are_named_by_the_batches():
    strategy = ExperienceReplay(buffer_size=100)
    end_task(StandIn(), strategy, a_task(size=0), [a_batch(4, start=30), a_batch(4, start=50)])
    assert replayed(strategy) == [(0, n) for n in (30, 31, 32, 33, 50, 51, 52, 53)]


def test_without_card_and_numbers_samples_are_named_by_their_place():
    strategy = ExperienceReplay(buffer_size=100)
    batches = [replace(a_batch(4), sample_ids=None), replace(a_batch(3), sample_ids=None)]
    end_task(StandIn(), strategy, a_task(size=0), batches)
    assert replayed(strategy) == [(0, n) for n in range(7)]


def test_balanced_stores_equally_many_of_every_class():
    strategy = after(ExperienceReplay(buffer_size=12, selection="class_balanced"), tasks=3)
    classes = Counter(strategy.memory.labels.tolist())
    assert classes == dict.fromkeys(range(6), 2)
    for task, label in zip(strategy.memory.task_ids, strategy.memory.labels, strict=True):
        assert int(label) // 2 == int(task)


def test_a_checkpoint_resumes_as_the_original():
    for selection in ("reservoir", "class_balanced"):
        original = after(ExperienceReplay(buffer_size=9, selection=selection), tasks=2)
        fresh = ExperienceReplay(buffer_size=9, selection=selection)
        fresh.load_state_dict(through_a_file(original.state_dict()))
        assert replayed(fresh) == replayed(original)
        for strategy in (original, fresh):
            end_task(StandIn(), strategy, a_task(2), task_batches(2))
        assert replayed(fresh) == replayed(original)


def test_balanced_refuses_samples_without_a_class():
    strategy = ExperienceReplay(selection="class_balanced")
    batch = replace(a_batch(4), labels=torch.full((4,), IGNORE_INDEX))
    with pytest.raises(ValueError, match="choose selection='reservoir' for captions"):
        end_task(StandIn(), strategy, a_task(), [batch])


def pool_by_hand(pool, stored, current, total):
    """Shares of a pool by loops: whole parts first, then the largest remainders."""
    weights = {}
    for task in stored:
        weights[task] = 1.0
        if pool == "exponential":
            for _ in range(current - task - 1):
                weights[task] /= 2
    exact = {task: total * weight / sum(weights.values()) for task, weight in weights.items()}
    counts = {task: int(share) for task, share in exact.items()}
    rest = sorted(exact, key=lambda task: (counts[task] - exact[task], task))
    for task in rest[: total - sum(counts.values())]:
        counts[task] += 1
    return counts


@pytest.mark.parametrize("pool", ["exponential", "equal"])
@pytest.mark.parametrize("size", [7, 30])
def test_a_pool_replays_its_share_of_every_earlier_task(pool, size):
    strategy = after(ExperienceReplay(buffer_size=size, replay_pool=pool), tasks=4)
    stored = sorted(set(strategy.memory.task_ids.tolist()))
    begin_task(StandIn(), strategy, a_task(4, size=24))
    counts = Counter(task for task, _ in replayed(strategy))
    by_hand = pool_by_hand(pool, stored, 4, size)
    assert counts == {task: count for task, count in by_hand.items() if count}
    memory = strategy.memory
    held = zip(memory.task_ids.tolist(), memory.sample_ids.tolist(), strict=True)
    assert set(replayed(strategy)) <= set(held)


def test_the_exponential_pool_halves_with_age():
    assert pool_counts(70, "exponential", 3, [0, 1, 2]) == {0: 10, 1: 20, 2: 40}
    assert pool_counts(70, "exponential", 3, [2]) == {2: 70}
    assert pool_counts(70, "equal", 3, [0, 2]) == {0: 35, 2: 35}


def test_the_pool_of_all_is_the_whole_buffer():
    plain, pooled = (
        after(ExperienceReplay(buffer_size=9, **given), 3) for given in ({}, {"replay_pool": "all"})
    )
    for strategy in (plain, pooled):
        begin_task(StandIn(), strategy, a_task(3, size=24))
    assert replayed(plain) == replayed(pooled)
    assert len(replayed(plain)) == len(set(replayed(plain))) == 9


def test_a_pool_lists_all_that_is_stored_when_a_task_has_ended():
    strategy = after(ExperienceReplay(buffer_size=9, replay_pool="equal"), 3)
    assert len(set(replayed(strategy))) == 9


def test_a_pool_resumes_with_the_same_plan():
    strategy = after(ExperienceReplay(buffer_size=9, replay_pool="exponential"), 3)
    resumed = ExperienceReplay(buffer_size=9, replay_pool="exponential")
    resumed.load_state_dict(through_a_file(strategy.state_dict()))
    for each in (strategy, resumed):
        begin_task(StandIn(), each, a_task(3, size=24))
    assert replayed(resumed) == replayed(strategy)


def test_a_wrong_pool_and_a_pool_beside_inscl_are_refused():
    with pytest.raises(
        ValueError, match=r"replay_pool is 'half': choose one of all, exponential, equal"
    ):
        ExperienceReplay(replay_pool="half")
    with pytest.raises(ValueError, match="replay_pool is 'equal' and allocation 'inscl'"):
        ExperienceReplay(replay_pool="equal", allocation="inscl")
