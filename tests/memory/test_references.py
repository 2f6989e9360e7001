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
    for seed in range(2000):
        references = References(5, seed=seed)
        references.offer(0, torch.arange(10))
        references.offer(1, torch.arange(10))
        counts.update(held(references))
    expected, spread = 2000 * 5 / 20, (2000 * 0.25 * 0.75) ** 0.5
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
    for policy in ("reservoir", "balanced"):
        original = References(9, policy, seed=4)
        original.offer(0, torch.arange(25), torch.arange(25) % 3)
        original.offer(1, torch.arange(25), torch.arange(25) % 3)
        fresh = References(9, policy, seed=4)
        fresh.load_state_dict(through_a_file(original.state_dict()))
        assert held(fresh) == held(original)
        for references in (original, fresh):
            references.offer(2, torch.arange(40), torch.arange(40) % 4)
        assert held(fresh) == held(original)


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="policy is 'ring': choose 'reservoir' or 'balanced'"):
        References(3, "ring")
    with pytest.raises(ValueError, match="capacity is -1"):
        References(-1)
    with pytest.raises(ValueError, match="labels is None: give the class of every sample"):
        References(3, "balanced").offer(0, torch.arange(3))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and samples \(3,\)"):
        References(3).offer(0, torch.arange(3), torch.arange(2))
