import pytest
import torch

from mmcl.ops import sparse_mask
from mmcl.ops.sparse_mask import masked_mean_abs, pack_bits, top_fraction_mask, unpack_bits


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(A, B, marks):
    """The mean as one entry at a time, through autograd."""
    sizes = [
        (B[row] * A[:, column]).sum().abs()
        for row in range(B.shape[0])
        for column in range(A.shape[1])
        if marks[row, column]
    ]
    return torch.stack(sizes).mean()


def test_the_largest_entries_are_marked_whatever_their_sign():
    product = torch.tensor([[1.0, -9.0, 2.0], [8.0, 0.0, -3.0]])
    assert top_fraction_mask(product, 0.5).tolist() == [[False, True, False], [True, False, True]]


def test_of_equal_entries_the_first_are_marked():
    assert top_fraction_mask(torch.ones(2, 3), 0.5).tolist() == [[True] * 3, [False] * 3]


def test_zeros_are_never_marked():
    assert not top_fraction_mask(torch.zeros(3, 3), 1.0).any()
    assert int(top_fraction_mask(torch.eye(4), 0.5).sum()) == 4


def test_a_share_below_one_entry_marks_nothing():
    assert not top_fraction_mask(torch.ones(2, 2), 0.1).any()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 24])
def test_bits_come_back_and_need_an_eighth_of_the_bytes(width):
    marks = some(5, width) > 0
    packed = pack_bits(marks)
    assert packed.shape == (5, -(-width // 8))
    assert torch.equal(unpack_bits(packed, width), marks)


@pytest.mark.parametrize("block", [1, 20, 1 << 22])
def test_the_mean_and_its_gradient_are_those_of_single_entries(block, monkeypatch):
    monkeypatch.setattr(sparse_mask, "_BLOCK", block)
    A, B, marks = some(3, 11).requires_grad_(), some(7, 3, seed=1).requires_grad_(), some(7, 11) > 1
    expected = by_hand(A, B, marks)
    value = masked_mean_abs(A, B, pack_bits(marks))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * value, (A, B)), torch.autograd.grad(3 * expected, (A, B))
    )


def test_nothing_marked_is_zero_and_pulls_nothing():
    A, B = some(3, 11).requires_grad_(), some(7, 3).requires_grad_()
    value = masked_mean_abs(A, B, pack_bits(torch.zeros(7, 11, dtype=torch.bool)))
    slopes = torch.autograd.grad(value, (A, B))
    assert float(value.detach()) == 0.0
    assert not any(slope.any() for slope in slopes)


def test_a_new_pair_is_pulled_nowhere():
    A, B = some(3, 11).requires_grad_(), torch.zeros(7, 3, requires_grad=True)
    slopes = torch.autograd.grad(masked_mean_abs(A, B, pack_bits(some(7, 11) > 0)), (A, B))
    assert not any(slope.any() for slope in slopes)


def test_autocast_rounds_nothing():
    A, B, marks = some(3, 300), some(7, 3, seed=1), pack_bits(some(7, 300) > 0)
    plain = masked_mean_abs(A, B, marks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_mean_abs(A, B, marks), plain)


def test_never_more_than_a_block_of_the_product_is_made(monkeypatch):
    monkeypatch.setattr(sparse_mask, "_BLOCK", 64)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                seen.append(out.numel())
            return out

    A, B, marks = some(2, 16), some(40, 2), pack_bits(some(40, 16) > 0)
    with Watch():
        masked_mean_abs(A, B, marks)
    assert max(seen) < 40 * 16 / 4
