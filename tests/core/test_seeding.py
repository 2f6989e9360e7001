import torch

from mmcl.core.distributed import interleave_ranks
from mmcl.core.seeding import generator, hash_priorities, hash_seed, splitmix64


def test_mix_depends_on_every_part_and_on_their_order():
    seeds = {
        hash_seed(0, 1),
        hash_seed(1, 0),
        hash_seed(0),
        hash_seed(0, 1, 0),
        hash_seed(-1),
        hash_seed(1 << 62),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_generators_with_equal_parts_draw_equal_numbers():
    first = torch.rand(4, generator=generator(3, 1, 4))
    assert torch.equal(first, torch.rand(4, generator=generator(3, 1, 4)))


def test_hashes_are_those_of_splitmix64_on_unsigned_numbers():
    def reference(state):
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    numbers = torch.tensor([0, 1, -1, 1 << 62, -(1 << 63)])
    found = [number % 2**64 for number in splitmix64(numbers).tolist()]
    assert found == [reference(number % 2**64) for number in numbers.tolist()]


def test_seeds_and_priorities_stay_what_they_are():
    assert hash_seed(3, 1, 4) == 4362657087470360896
    assert hash_priorities(1, 2, torch.tensor([5, 7])).tolist() == [
        2943732609771001881,
        1004661255586954213,
    ]


def test_priorities_choose_every_item_equally_often():
    items, chosen = torch.arange(50), torch.zeros(50)
    for seed in range(2000):
        chosen[hash_priorities(seed, 7, items).argsort()[:10]] += 1
    # 10 of 50, 2000 draws: mean 400, variance 2000 * 0.2 * 0.8 * (1 + 1/49)
    chi_square = ((chosen - 400) ** 2 / 400).sum() / 0.8
    assert 20 < chi_square < 90  # 49 degrees of freedom: outside with probability below 1e-3
    assert chosen.sum() == 20000


def test_a_priority_does_not_depend_on_the_other_items():
    alone = hash_priorities(1, 2, torch.tensor([41]))
    assert torch.equal(alone, hash_priorities(1, 2, torch.arange(50))[41:42])
    assert (hash_priorities(1, 2, torch.arange(1000)) >= 0).all()


def test_samples_of_ranks_are_put_back_in_global_order():
    whole = torch.arange(7)
    parts = [whole[rank::3] for rank in range(3)]
    order = interleave_ranks([len(part) for part in parts])
    assert torch.equal(torch.cat(parts)[order], whole)
