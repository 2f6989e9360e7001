import pytest
import torch

from mmcl.ops.weight_interpolation import interpolate


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def test_the_ends_are_exact():
    start, end = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])


def test_the_point_between_agrees_with_plain_numbers():
    between = interpolate({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}, 0.25)
    assert between["w"].tolist() == [1.5, 1.0]


def test_counts_and_names_of_one_side_are_left_out():
    start = {"w": torch.zeros(1), "steps": torch.tensor([3]), "gone": torch.zeros(1)}
    end = {"w": torch.ones(1), "steps": torch.tensor([5]), "fresh": torch.ones(1)}
    assert set(interpolate(start, end, 0.5)) == {"w"}


def test_a_weight_that_grew_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'head' has shape \(2,\) in start and \(3,\) in end"):
        interpolate({"head": torch.zeros(2)}, {"head": torch.zeros(3)}, 0.5)
