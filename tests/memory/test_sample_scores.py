import math

import torch
from torch.nn.functional import cross_entropy

from mmcl.memory.selection import sample_entropies, sample_losses, tag_information


def test_the_loss_of_a_sample_is_its_cross_entropy():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 2, 1, 1])
    expected = [float(cross_entropy(logits[i : i + 1], targets[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(sample_losses(logits, targets), torch.tensor(expected).double())


def test_the_loss_of_an_answer_is_the_mean_over_its_words():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    targets, rows = torch.tensor([1, 8, 0, 3, 3, 5]), torch.tensor([0, 0, 1, 2, 2, 2])
    found = sample_losses(logits, targets, rows, 3)
    for row in range(3):
        own = rows == row
        expected = cross_entropy(logits[own], targets[own])
        torch.testing.assert_close(found[row], expected.double())


def test_the_entropy_of_equal_chances_is_the_logarithm_of_their_number():
    shut_out = torch.tensor([[1.0, 1.0, -math.inf, 1.0], [50.0, 0.0, 0.0, 0.0]])
    found = sample_entropies(shut_out)
    assert abs(float(found[0]) - math.log(3)) < 1e-6
    assert float(found[1]) < 1e-6
    of_words = sample_entropies(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), 1)
    assert abs(float(of_words) - math.log(8)) < 1e-6


def test_rare_tags_tell_more():
    tags = torch.tensor([[1, 2, -1], [1, 3, 4], [1, -1, -1], [1, 3, -1]])
    expected = [math.log(4), math.log(2) + math.log(4), 0.0, math.log(2)]
    torch.testing.assert_close(tag_information(tags), torch.tensor(expected).double())
    assert tag_information(torch.full((2, 3), -1)).tolist() == [0.0, 0.0]
