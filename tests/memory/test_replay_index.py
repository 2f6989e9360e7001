import io
from collections import Counter

import pytest
import torch

from mmcl.core.seeding import hash_priorities
from mmcl.memory import ReplayIndex


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def held(references):
    return list(zip(references.task_ids.tolist(), references.sample_ids.tolist(), strict=True))


def test_the_reservoir_is_the_smallest_hashes_of_everything_offered():
    references = ReplayIndex(7, seed=5)
    everything = []
    for task, size in enumerate((20, 3, 40)):
        references.add(task, torch.arange(size))
        hashes = hash_priorities(5, task, torch.arange(size)).tolist()
        everything += [(rank, task, sample) for sample, rank in enumerate(hashes)]
        expected = sorted((t, s) for _, t, s in sorted(everything)[:7])
        assert held(references) == expected


def test_grouping_and_order_of_offers_do_not_matter():
    whole, pieces = ReplayIndex(11, seed=2), ReplayIndex(11, seed=2)
    whole.add(0, torch.arange(50))
    whole.add(1, torch.arange(30))
    pieces.add(1, torch.arange(30).flip(0))
    for piece in torch.arange(50).split(7):
        pieces.add(0, piece)
    assert held(whole) == held(pieces)


def test_over_seeds_every_sample_is_kept_equally_often():
    counts = Counter()
    for seed in range(1500):
        references = ReplayIndex(5, seed=seed)
        references.add(0, torch.arange(10))
        references.add(1, torch.arange(10))
        counts.update(held(references))
    expected, spread = 1500 * 5 / 20, (1500 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 20
    assert all(abs(count - expected) < 4 * spread for count in counts.values())


def test_a_sample_offered_twice_is_held_once():
    references = ReplayIndex(0)
    references.add(0, torch.arange(5))
    references.add(0, torch.arange(8))
    assert held(references) == [(0, sample) for sample in range(8)]


def test_no_capacity_means_all():
    references = ReplayIndex(None)
    references.add(0, torch.arange(300))
    assert len(references) == 300


def test_balanced_holds_equally_many_of_every_class():
    references = ReplayIndex(12, "class_balanced", seed=1)
    references.add(0, torch.arange(60), torch.arange(60) % 2)
    assert Counter(references.labels.tolist()) == {0: 6, 1: 6}
    references.add(1, torch.arange(60), torch.arange(60) % 2 + 2)
    assert Counter(references.labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_a_checkpoint_resumes_as_the_original():
    for selection, limit in (("reservoir", 0), ("class_balanced", 0), ("reservoir", 700)):
        original, fresh = (ReplayIndex(9, selection, 4, capacity_bytes=limit) for _ in range(2))
        numbers = torch.arange(25)
        for task in range(2):
            original.add(task, numbers, numbers % 3, sizes=sample_bytes(numbers))
        fresh.load_state_dict(through_a_file(original.state_dict()))
        assert held(fresh) == held(original)
        for references in (original, fresh):
            references.add(2, numbers, numbers % 4, sizes=sample_bytes(numbers))
        assert held(fresh) == held(original)


def test_a_range_is_offered_as_its_numbers_are():
    for capacity, by_task in ((7, False), (7, True), (300, False), (0, False)):
        listed, ranged = (ReplayIndex(capacity, seed=3, by_task=by_task) for _ in range(2))
        for task, size in enumerate((90, 5, 200)):
            listed.add(task, torch.arange(size))
            ranged.add_range(task, size)
        assert held(listed) == held(ranged)


def sample_bytes(samples, task=0):
    return 100 + (samples * 37 + task * 11) % 83


def loop_bytes(offers, seed, limit):
    """Take samples by rising hash, up to the first that does not fit."""
    order_by_score = [
        (rank, task, sample)
        for task, size in offers
        for sample, rank in enumerate(hash_priorities(seed, task, torch.arange(size)).tolist())
    ]
    kept, total = [], 0
    for _, task, sample in sorted(order_by_score):
        total += int(sample_bytes(torch.tensor(sample), task))
        if total > limit:
            break
        kept.append((task, sample))
    return sorted(kept)


@pytest.mark.parametrize("limit", [190, 1000, 3333, 100_000])
def test_bytes_are_filled_by_rising_hash_and_never_exceeded(limit):
    whole, pieces = (ReplayIndex(0, seed=2, capacity_bytes=limit) for _ in range(2))
    offers = []
    for task, size in enumerate((40, 25, 60)):
        offers.append((task, size))
        numbers = torch.arange(size)
        whole.add(task, numbers, sizes=sample_bytes(numbers, task))
        for piece in numbers.flip(0).split(9):
            pieces.add(task, piece, sizes=sample_bytes(piece, task))
        assert held(whole) == held(pieces) == loop_bytes(offers, 2, limit)
        assert int(whole.num_bytes.sum()) <= limit


def test_samples_and_bytes_both_hold():
    numbers = torch.arange(50)
    for capacity, limit in ((4, 10_000), (40, 1200)):
        references = ReplayIndex(capacity, "class_balanced", capacity_bytes=limit, by_task=True)
        for task in range(3):
            references.add(task, numbers, numbers % 3, sizes=sample_bytes(numbers, task))
            assert 0 < len(references) <= capacity
            assert int(references.num_bytes.sum()) <= limit


def test_a_sample_that_could_never_fit_is_passed_over():
    references = ReplayIndex(0, capacity_bytes=100)
    references.add(0, torch.arange(4), sizes=torch.tensor([101, 40, 500, 60]))
    assert held(references) == [(0, 1), (0, 3)]


def test_every_task_gets_the_same_room():
    references = ReplayIndex(12, seed=1, by_task=True)
    for task, size in enumerate((100, 2, 1000)):
        references.add_range(task, size)
    assert Counter(references.task_ids.tolist()) == {0: 5, 1: 2, 2: 5}
    alone = ReplayIndex(5, seed=1)
    alone.add_range(2, 1000)
    assert set(held(alone)) <= set(held(references))


def test_equal_rooms_for_tasks_are_shared_by_their_classes():
    references = ReplayIndex(12, "class_balanced", by_task=True)
    references.add(0, torch.arange(60), torch.arange(60) % 2)
    references.add(1, torch.arange(60), torch.arange(60) % 3)
    kept = Counter(zip(references.task_ids.tolist(), references.labels.tolist(), strict=True))
    assert kept == {(0, 0): 3, (0, 1): 3, (1, 0): 2, (1, 1): 2, (1, 2): 2}


def test_a_memory_that_shrinks_keeps_a_beginning_of_every_list():
    references = ReplayIndex(12, "class_balanced", seed=4)
    for task in range(4):
        # Sample 50 - p stands at place p of its list.
        numbers = torch.arange(50 - 1, 50 - 21, -1)
        positions = torch.arange(20)
        none = torch.full_like(numbers, -1)
        references.add(task, numbers, none, positions=positions)
        each = 12 // (task + 1)
        assert held(references) == [
            (t, 50 - each + i) for t in range(task + 1) for i in range(each)
        ]


def test_room_is_what_could_be_held_at_most():
    sizes = torch.tensor([70, 20, 30, 90])
    assert ReplayIndex(0).remaining_capacity(sizes) == 4
    assert ReplayIndex(3).remaining_capacity(sizes) == 3
    assert ReplayIndex(3, capacity_bytes=60).remaining_capacity(sizes) == 2
    assert ReplayIndex(1, capacity_bytes=60).remaining_capacity(sizes) == 1


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(
        ValueError, match="selection is 'ring': choose 'reservoir' or 'class_balanced'"
    ):
        ReplayIndex(3, "ring")
    with pytest.raises(ValueError, match="capacity is -1"):
        ReplayIndex(-1)
    with pytest.raises(ValueError, match="labels is None: give the class of every sample"):
        ReplayIndex(3, "class_balanced").add(0, torch.arange(3))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and samples \(3,\)"):
        ReplayIndex(3).add(0, torch.arange(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"sizes has shape \(2,\) and samples \(3,\)"):
        ReplayIndex(3).add(0, torch.arange(3), sizes=torch.arange(2))
    with pytest.raises(ValueError, match="the size of some samples is not known"):
        ReplayIndex(3, capacity_bytes=9).add(0, torch.arange(3))
    with pytest.raises(ValueError, match="takes 10 bytes and 9 may be held"):
        ReplayIndex(3, capacity_bytes=9).add(0, torch.arange(1), sizes=torch.tensor([10]))
    with pytest.raises(ValueError, match="capacity_bytes is -2"):
        ReplayIndex(3, capacity_bytes=-2)
    with pytest.raises(ValueError, match="offer samples with classes and sizes"):
        ReplayIndex(3, "class_balanced").add_range(0, 9)
