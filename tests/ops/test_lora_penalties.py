import pytest
import torch

from mmcl.ops import lora_penalties
from mmcl.ops.lora_penalties import (
    masked_mean_abs,
    mean_over_layers,
    orthogonality_loss,
    pack_bits,
    top_fraction_mask,
    unpack_bits,
)


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("measure", "power"), [("absolute", 1), ("squared", 2)])
def test_overlap_agrees_with_dot_products_written_as_loops(measure, power):
    past, now = some(4, 6), some(3, 6, seed=1)
    entries = [
        abs(sum(float(a) * float(b) for a, b in zip(old, new, strict=True))) ** power
        for old in past
        for new in now
    ]
    expected = sum(entries) / len(entries)
    assert float(orthogonality_loss(past, now, measure)) == pytest.approx(expected, rel=1e-5)


def test_orthogonal_rows_do_not_overlap():
    rows = torch.eye(4)
    assert float(orthogonality_loss(rows[:2], rows[2:])) == 0.0


def test_a_mean_does_not_grow_with_the_layer():
    past, now = some(4, 6), some(3, 6, seed=1)
    twice = orthogonality_loss(past.repeat(2, 1), now.repeat(5, 1))
    torch.testing.assert_close(twice, orthogonality_loss(past, now))


def test_only_the_new_rows_get_the_gradient():
    past, now = some(4, 6).requires_grad_(), some(3, 6, seed=1).requires_grad_()
    orthogonality_loss(past, now).backward()
    assert past.grad is None
    sign = (past.detach() @ now.detach().T).sign()
    torch.testing.assert_close(now.grad, sign.T @ past.detach() / sign.numel())


def test_autocast_rounds_no_overlap():
    past, now = some(4, 300), some(3, 300, seed=1)
    plain = orthogonality_loss(past, now)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss(past, now), plain)
    assert plain.dtype == torch.float32


def test_mean_of_layers():
    assert float(mean_over_layers(torch.tensor(value) for value in (1.0, 2.0, 6.0))) == 3.0


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
    monkeypatch.setattr(lora_penalties, "_BLOCK", block)
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
    monkeypatch.setattr(lora_penalties, "_BLOCK", 64)
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
