import io
from collections import Counter

import pytest
import torch

from mmcl.core.randomness import ranks_of
from mmcl.memory import References


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def held(references):
    return list(zip(references.task.tolist(), references.sample.tolist(), strict=True))


def test_the_reservoir_is_the_smallest_hashes_of_everything_offered():
    references = References(7, seed=5)
    everything = []
    for task, size in enumerate((20, 3, 40)):
        references.offer(task, torch.arange(size))
        hashes = ranks_of(5, task, torch.arange(size)).tolist()
        everything += [(rank, task, sample) for sample, rank in enumerate(hashes)]
        expected = sorted((t, s) for _, t, s in sorted(everything)[:7])
        assert held(references) == expected


def test_grouping_and_order_of_offers_do_not_matter():
    whole, pieces = References(11, seed=2), References(11, seed=2)
    whole.offer(0, torch.arange(50))
    whole.offer(1, torch.arange(30))
    pieces.offer(1, torch.arange(30).flip(0))
    for piece in torch.arange(50).split(7):
        pieces.offer(0, piece)
    assert held(whole) == held(pieces)


def test_over_seeds_every_sample_is_kept_equally_often():
    counts = Counter()
    for seed in range(1500):
        references = References(5, seed=seed)
        references.offer(0, torch.arange(10))
        references.offer(1, torch.arange(10))
        counts.update(held(references))
    expected, spread = 1500 * 5 / 20, (1500 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 20
    assert all(abs(count - expected) < 4 * spread for count in counts.values())


def test_a_sample_offered_twice_is_held_once():
    references = References(0)
    references.offer(0, torch.arange(5))
    references.offer(0, torch.arange(8))
    assert held(references) == [(0, sample) for sample in range(8)]


def test_no_capacity_means_all():
    references = References(None)
    references.offer(0, torch.arange(300))
    assert len(references) == 300


def test_balanced_holds_equally_many_of_every_class():
    references = References(12, "balanced", seed=1)
    references.offer(0, torch.arange(60), torch.arange(60) % 2)
    assert Counter(references.labels.tolist()) == {0: 6, 1: 6}
    references.offer(1, torch.arange(60), torch.arange(60) % 2 + 2)
    assert Counter(references.labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_a_checkpoint_goes_on_as_the_original():
    for policy, limit in (("reservoir", 0), ("balanced", 0), ("reservoir", 700)):
        original, fresh = (References(9, policy, 4, capacity_bytes=limit) for _ in range(2))
        numbers = torch.arange(25)
        for task in range(2):
            original.offer(task, numbers, numbers % 3, sizes=sizes_of(numbers))
        fresh.load_state_dict(through_a_file(original.state_dict()))
        assert held(fresh) == held(original)
        for references in (original, fresh):
            references.offer(2, numbers, numbers % 4, sizes=sizes_of(numbers))
        assert held(fresh) == held(original)


def test_a_range_is_offered_as_its_numbers_are():
    for capacity, by_task in ((7, False), (7, True), (300, False), (0, False)):
        listed, ranged = (References(capacity, seed=3, by_task=by_task) for _ in range(2))
        for task, size in enumerate((90, 5, 200)):
            listed.offer(task, torch.arange(size))
            ranged.offer_range(task, size)
        assert held(listed) == held(ranged)


def sizes_of(samples, task=0):
    return 100 + (samples * 37 + task * 11) % 83


def loop_bytes(offers, seed, limit):
    """Take samples by rising hash, up to the first that does not fit."""
    ranked = [
        (rank, task, sample)
        for task, size in offers
        for sample, rank in enumerate(ranks_of(seed, task, torch.arange(size)).tolist())
    ]
    kept, total = [], 0
    for _, task, sample in sorted(ranked):
        total += int(sizes_of(torch.tensor(sample), task))
        if total > limit:
            break
        kept.append((task, sample))
    return sorted(kept)


@pytest.mark.parametrize("limit", [190, 1000, 3333, 100_000])
def test_bytes_are_filled_by_rising_hash_and_never_exceeded(limit):
    whole, pieces = (References(0, seed=2, capacity_bytes=limit) for _ in range(2))
    offers = []
    for task, size in enumerate((40, 25, 60)):
        offers.append((task, size))
        numbers = torch.arange(size)
        whole.offer(task, numbers, sizes=sizes_of(numbers, task))
        for piece in numbers.flip(0).split(9):
            pieces.offer(task, piece, sizes=sizes_of(piece, task))
        assert held(whole) == held(pieces) == loop_bytes(offers, 2, limit)
        assert int(whole.bytes.sum()) <= limit


def test_samples_and_bytes_both_hold():
    numbers = torch.arange(50)
    for capacity, limit in ((4, 10_000), (40, 1200)):
        references = References(capacity, "balanced", capacity_bytes=limit, by_task=True)
        for task in range(3):
            references.offer(task, numbers, numbers % 3, sizes=sizes_of(numbers, task))
            assert 0 < len(references) <= capacity
            assert int(references.bytes.sum()) <= limit


def test_a_sample_that_could_never_fit_is_passed_over():
    references = References(0, capacity_bytes=100)
    references.offer(0, torch.arange(4), sizes=torch.tensor([101, 40, 500, 60]))
    assert held(references) == [(0, 1), (0, 3)]


def test_every_task_gets_the_same_room():
    references = References(12, seed=1, by_task=True)
    for task, size in enumerate((100, 2, 1000)):
        references.offer_range(task, size)
    assert Counter(references.task.tolist()) == {0: 5, 1: 2, 2: 5}
    alone = References(5, seed=1)
    alone.offer_range(2, 1000)
    assert set(held(alone)) <= set(held(references))


def test_equal_rooms_for_tasks_are_shared_by_their_classes():
    references = References(12, "balanced", by_task=True)
    references.offer(0, torch.arange(60), torch.arange(60) % 2)
    references.offer(1, torch.arange(60), torch.arange(60) % 3)
    kept = Counter(zip(references.task.tolist(), references.labels.tolist(), strict=True))
    assert kept == {(0, 0): 3, (0, 1): 3, (1, 0): 2, (1, 1): 2, (1, 2): 2}


def test_a_memory_that_shrinks_keeps_a_beginning_of_every_list():
    references = References(12, "balanced", seed=4)
    for task in range(4):
        # Sample 50 - p stands at place p of its list.
        numbers = torch.arange(50 - 1, 50 - 21, -1)
        places = torch.arange(20)
        none = torch.full_like(numbers, -1)
        references.offer(task, numbers, none, places=places)
        each = 12 // (task + 1)
        assert held(references) == [
            (t, 50 - each + i) for t in range(task + 1) for i in range(each)
        ]


def test_room_is_what_could_be_held_at_most():
    sizes = torch.tensor([70, 20, 30, 90])
    assert References(0).room(sizes) == 4
    assert References(3).room(sizes) == 3
    assert References(3, capacity_bytes=60).room(sizes) == 2
    assert References(1, capacity_bytes=60).room(sizes) == 1


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="policy is 'ring': choose 'reservoir' or 'balanced'"):
        References(3, "ring")
    with pytest.raises(ValueError, match="capacity is -1"):
        References(-1)
    with pytest.raises(ValueError, match="labels is None: give the class of every sample"):
        References(3, "balanced").offer(0, torch.arange(3))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and samples \(3,\)"):
        References(3).offer(0, torch.arange(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"sizes has shape \(2,\) and samples \(3,\)"):
        References(3).offer(0, torch.arange(3), sizes=torch.arange(2))
    with pytest.raises(ValueError, match="the size of some samples is not known"):
        References(3, capacity_bytes=9).offer(0, torch.arange(3))
    with pytest.raises(ValueError, match="takes 10 bytes and 9 may be held"):
        References(3, capacity_bytes=9).offer(0, torch.arange(1), sizes=torch.tensor([10]))
    with pytest.raises(ValueError, match="capacity_bytes is -2"):
        References(3, capacity_bytes=-2)
    with pytest.raises(ValueError, match="offer samples with classes and sizes"):
        References(3, "balanced").offer_range(0, 9)
