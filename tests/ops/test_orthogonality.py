import pytest
import torch

from mmcl.ops.orthogonality import mean_over_layers, orthogonality_loss


def some(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("measure", "power"), [("absolute", 1), ("squared", 2)])
def test_overlap_agrees_with_dot_products_written_as_loops(measure, power):
    past, now = some(4), some(3, seed=1)
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
    past, now = some(4), some(3, seed=1)
    twice = orthogonality_loss(past.repeat(2, 1), now.repeat(5, 1))
    torch.testing.assert_close(twice, orthogonality_loss(past, now))


def test_only_the_new_rows_get_the_gradient():
    past, now = some(4).requires_grad_(), some(3, seed=1).requires_grad_()
    orthogonality_loss(past, now).backward()
    assert past.grad is None
    sign = (past.detach() @ now.detach().T).sign()
    torch.testing.assert_close(now.grad, sign.T @ past.detach() / sign.numel())


def test_autocast_rounds_nothing():
    past, now = some(4, 300), some(3, 300, seed=1)
    plain = orthogonality_loss(past, now)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss(past, now), plain)
    assert plain.dtype == torch.float32


def test_mean_of_layers():
    assert float(mean_over_layers(torch.tensor(value) for value in (1.0, 2.0, 6.0))) == 3.0
