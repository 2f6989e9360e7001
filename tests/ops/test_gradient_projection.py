import pytest
import torch

from mmcl.ops.gradient_projection import agem_projection, dot

SHAPES = [(3, 4), (5,), (), (2, 2, 2)]


def pieces(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in SHAPES]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_the_inner_product_is_that_of_the_long_vector():
    left, right = pieces(0), pieces(1)
    torch.testing.assert_close(dot(left, right), flat(left) @ flat(right))


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_that_of_the_long_vector(seed):
    gradient, reference = pieces(seed), pieces(seed + 100)
    g, r = flat(gradient), flat(reference)
    expected = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
    edited, is_changed = agem_projection(gradient, reference)
    torch.testing.assert_close(flat(edited), expected)
    assert is_changed == bool(g @ r < 0)
    assert float(flat(edited) @ r) > -1e-12


def test_without_conflict_the_very_tensors_come_back():
    gradient = pieces(0)
    edited, is_changed = agem_projection(gradient, gradient)
    assert not is_changed
    assert all(mine is given for mine, given in zip(edited, gradient, strict=True))


def test_a_reference_of_zeros_changes_nothing():
    edited, is_changed = agem_projection(pieces(0), [torch.zeros(shape) for shape in SHAPES])
    assert not is_changed
    torch.testing.assert_close(flat(edited), flat(pieces(0)))


def test_by_hand():
    # (1, -1) against (0, 2): the second coordinate is removed.
    edited, _ = agem_projection([torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])])
    assert edited[0].tolist() == [1.0, 0.0]


def test_half_precision_is_summed_in_more():
    ones = [torch.ones(100_000, dtype=torch.bfloat16)]
    assert float(dot(ones, ones)) == 100_000


def test_missing_pieces_are_named():
    with pytest.raises(ValueError, match="left has 4 tensors and right has 3"):
        dot(pieces(0), pieces(1)[:3])
