import torch

from mmcl.core.distributed import global_order
from mmcl.core.randomness import generator, mix, ranks_of


def test_mix_depends_on_every_part_and_on_their_order():
    seeds = {mix(0, 1), mix(1, 0), mix(0), mix(0, 1, 0), mix(-1), mix(1 << 62)}
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_generators_with_equal_parts_draw_equal_numbers():
    first = torch.rand(4, generator=generator(3, 1, 4))
    assert torch.equal(first, torch.rand(4, generator=generator(3, 1, 4)))


def test_ranks_choose_every_item_equally_often():
    items, chosen = torch.arange(50), torch.zeros(50)
    for seed in range(2000):
        chosen[ranks_of(seed, 7, items).argsort()[:10]] += 1
    # 10 of 50, 2000 draws: mean 400, variance 2000 * 0.2 * 0.8 * (1 + 1/49)
    chi_square = ((chosen - 400) ** 2 / 400).sum() / 0.8
    assert 20 < chi_square < 90  # 49 degrees of freedom: outside with probability below 1e-3
    assert chosen.sum() == 20000


def test_a_rank_does_not_depend_on_what_else_is_asked():
    alone = ranks_of(1, 2, torch.tensor([41]))
    assert torch.equal(alone, ranks_of(1, 2, torch.arange(50))[41:42])
    assert (ranks_of(1, 2, torch.arange(1000)) >= 0).all()


def test_rows_of_ranks_are_put_back_in_global_order():
    whole = torch.arange(7)
    parts = [whole[rank::3] for rank in range(3)]
    order = global_order([len(part) for part in parts])
    assert torch.equal(torch.cat(parts)[order], whole)
