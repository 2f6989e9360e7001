"""Against the naive expression, in double precision."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmcl.ops.lora_linear import (
    LoRAWeights,
    expert_linear,
    low_rank_linear,
    low_rank_linears,
    routed_linear,
)

ROWS, TOKENS, WIDTH, OUT, EXPERTS, RANK = 3, 4, 5, 6, 2, 3
SCALE = 1.7


def draw(*shape, seed=0, dtype=torch.float64, learns=True):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_(learns)


def parts(ranks=EXPERTS * RANK, dtype=torch.float64):
    """x, W, b, A, B."""
    return (
        draw(ROWS, TOKENS, WIDTH, seed=1, dtype=dtype),
        draw(OUT, WIDTH, seed=2, dtype=dtype, learns=False),
        draw(OUT, seed=3, dtype=dtype, learns=False),
        draw(ranks, WIDTH, seed=4, dtype=dtype),
        draw(OUT, ranks, seed=5, dtype=dtype),
    )


def slices():
    return [slice(e * RANK, (e + 1) * RANK) for e in range(EXPERTS)]


def naive_low_rank(x, weight, bias, A, B, scale):
    return x @ weight.T + bias + scale * ((x @ A.T) @ B.T)


def naive_experts(x, weight, bias, A, B, gates, scale):
    out = x @ weight.T + bias
    for expert, own in enumerate(slices()):
        gate = gates[..., expert]
        while gate.dim() < x.dim():
            gate = gate[..., None]
        out = out + scale * gate * (x @ A[own].T @ B[:, own].T)
    return out


def naive_routed(x, weight, bias, A, B, G, scale):
    return naive_experts(x, weight, bias, A, B, (x @ G.T).softmax(-1), scale)


def case(name, dtype=torch.float64):
    """Function, naive expression and the operands of one of the forms."""
    x, weight, bias, A, B = parts(dtype=dtype)
    by_row = draw(ROWS, EXPERTS, seed=6, dtype=dtype)
    by_token = draw(ROWS, TOKENS, EXPERTS, seed=7, dtype=dtype)
    router = draw(EXPERTS, WIDTH, seed=8, dtype=dtype)
    return {
        "low_rank": (low_rank_linear, naive_low_rank, (x, weight, bias, A, B, SCALE)),
        "by_row": (expert_linear, naive_experts, (x, weight, bias, A, B, by_row, SCALE)),
        "by_token": (expert_linear, naive_experts, (x, weight, bias, A, B, by_token, SCALE)),
        "routed": (routed_linear, naive_routed, (x, weight, bias, A, B, router, SCALE)),
    }[name]


FORMS = ["low_rank", "by_row", "by_token", "routed"]


def answer_and_slopes(function, operands):
    """Output, and the gradient of its weighted sum for every trainable operand."""
    answer = function(*operands)
    wanted = [o for o in operands if isinstance(o, torch.Tensor) and o.requires_grad]
    weights = draw(*answer.shape, seed=9, learns=False).to(answer.dtype)
    return answer, torch.autograd.grad((answer * weights).sum(), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_answer_and_gradients_are_those_of_the_naive_expression(form):
    ours, naive, operands = case(form)
    torch.testing.assert_close(
        answer_and_slopes(ours, operands), answer_and_slopes(naive, operands)
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_written_gradient_is_the_numerical_one(form):
    ours, _, operands = case(form)
    assert torch.autograd.gradcheck(ours, operands)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_weight_the_correction_is_left(form):
    ours, naive, (x, weight, bias, *rest) = case(form)
    torch.testing.assert_close(
        ours(x, None, None, *rest), naive(x, weight, bias, *rest) - (x @ weight.T + bias)
    )
    assert torch.autograd.gradcheck(ours, (x, None, None, *rest))


@pytest.mark.parametrize("form", FORMS)
def test_a_trainable_weight_gets_its_gradient(form):
    ours, naive, (x, weight, bias, *rest) = case(form)
    operands = (x, weight.requires_grad_(), bias.requires_grad_(), *rest)
    torch.testing.assert_close(
        answer_and_slopes(ours, operands), answer_and_slopes(naive, operands)
    )


@pytest.mark.parametrize("form", FORMS)
def test_vectors_without_a_batch_and_strided_views_give_the_same(form):
    ours, naive, (x, *rest) = case(form)
    if form != "by_token":
        alone = (x[:, 0], *rest)
        torch.testing.assert_close(ours(*alone), naive(*alone))
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), *rest)
    torch.testing.assert_close(ours(*strided), naive(*strided))


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_gives_an_empty_output(form):
    ours, _, (x, weight, bias, A, B, *rest) = case(form)
    rest = [r[:0] if form.startswith("by") and isinstance(r, torch.Tensor) else r for r in rest]
    assert ours(x[:0], weight, bias, A, B, *rest).shape == (0, TOKENS, OUT)


@pytest.mark.parametrize("form", FORMS)
def test_float32_adapters_of_a_half_precision_model_get_float32_gradients(form):
    ours, naive, operands = case(form, torch.float32)
    half = [o.detach().bfloat16() if place < 3 else o for place, o in enumerate(operands)]
    half[0].requires_grad_()
    answer, slopes = answer_and_slopes(ours, half)
    assert answer.dtype == torch.bfloat16
    assert [slope.dtype for slope in slopes] == [
        torch.bfloat16,
        *[torch.float32] * (len(slopes) - 1),
    ]
    exact, exact_slopes = answer_and_slopes(naive, operands)
    for got, want in zip([answer, *slopes], [exact, *exact_slopes], strict=True):
        assert float((got - want).detach().norm() / want.detach().norm()) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_autocast_answers_in_its_own_dtype_and_gives_gradients_in_that_of_the_weights(form):
    ours, naive, operands = case(form, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        answer = ours(*operands)
    assert answer.dtype == torch.bfloat16
    answer.float().square().sum().backward()
    _, naive, again = case(form, torch.float32)
    naive(*again).square().sum().backward()
    for mine, theirs in zip(operands, again, strict=True):
        if isinstance(mine, torch.Tensor) and mine.requires_grad:
            assert mine.grad.dtype == torch.float32
            assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(form):
    ours, _, operands = case(form)

    def again(*given):
        return checkpoint(ours, *given, use_reentrant=False)

    plain, kept = answer_and_slopes(again, operands), answer_and_slopes(ours, operands)
    torch.testing.assert_close(plain, kept, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_only_trainable_operands_get_a_gradient(form):
    ours, _, operands = case(form)
    for place in (0, 3, 4, 5):
        if isinstance(operands[place], torch.Tensor):
            given = [o.detach() if isinstance(o, torch.Tensor) else o for o in operands]
            given[place].requires_grad_()
            ours(*given).sum().backward()
            assert given[place].grad is not None


def test_kept_for_the_way_back_are_the_input_and_its_thin_image():
    x, weight, bias, A, B = parts()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        low_rank_linear(x, weight, bias, A, B, SCALE)
    known = {t.untyped_storage().data_ptr() for t in (x, weight, A, B)}
    fresh = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in fresh] == [(ROWS * TOKENS, EXPERTS * RANK)]


def test_a_frozen_pair_takes_part_and_gets_no_gradient():
    x, weight, bias, A, B = parts()
    old = (draw(2, WIDTH, seed=10), draw(OUT, 2, seed=11))

    def ours(x, A, B):
        return low_rank_linear(x, weight, bias, A, B, SCALE, frozen=old)

    def naive(x, A, B):
        frozen = x @ old[0].detach().T @ old[1].detach().T
        return naive_low_rank(x, weight, bias, A, B, SCALE) + SCALE * frozen

    torch.testing.assert_close(
        answer_and_slopes(ours, (x, A, B)), answer_and_slopes(naive, (x, A, B))
    )
    assert torch.autograd.gradcheck(ours, (x, A, B))
    ours(x, A, B).sum().backward()
    assert old[0].grad is None
    assert old[1].grad is None


def test_one_expert_is_plain_low_rank_however_it_is_routed():
    x, weight, bias, A, B = parts()
    plain = low_rank_linear(x, weight, bias, A, B, SCALE)
    router = draw(1, WIDTH, seed=8)
    torch.testing.assert_close(routed_linear(x, weight, bias, A, B, router, SCALE), plain)
    open_gate = torch.ones(ROWS, 1, dtype=torch.float64)
    torch.testing.assert_close(expert_linear(x, weight, bias, A, B, open_gate, SCALE), plain)


def test_routing_is_that_of_functional_softmax_also_for_large_logits():
    x, weight, bias, A, B = parts()
    router = draw(EXPERTS, WIDTH, seed=8) * 1e3
    assert bool(routed_linear(x, weight, bias, A, B, router, SCALE).isfinite().all())
    gates = functional.softmax(x @ router.T, -1)
    torch.testing.assert_close(
        routed_linear(x, weight, bias, A, B, router, SCALE),
        expert_linear(x, weight, bias, A, B, gates, SCALE),
    )


def test_a_gradient_of_the_gradient_is_refused():
    x, weight, bias, A, B = parts()
    (slope,) = torch.autograd.grad(
        low_rank_linear(x, weight, bias, A, B, SCALE).square().sum(), [A], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_gates_for_another_number_of_samples_are_refused():
    x, weight, bias, A, B = parts()
    with pytest.raises(ValueError, match=r"gates have shape \(2, 2\) and x \(3, 4, 5\)"):
        expert_linear(x, weight, bias, A, B, torch.ones(2, 2), SCALE)


def test_gates_for_other_experts_are_refused():
    x, weight, bias, A, B = parts()
    with pytest.raises(ValueError, match="gates weigh 4 experts and A has 6 ranks"):
        expert_linear(x, weight, bias, A, B, torch.ones(ROWS, 4), SCALE)


def test_the_answer_is_that_of_pefts_layer():
    lora = pytest.importorskip("peft.tuners.lora")
    from peft import LoraConfig

    base = nn.Linear(WIDTH, OUT)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK)
    theirs = lora.Linear(base, "default", config=config, r=RANK, lora_alpha=2 * RANK)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    nn.init.normal_(B, generator=torch.Generator().manual_seed(1))
    x = draw(ROWS, TOKENS, WIDTH, dtype=torch.float32)
    mine = answer_and_slopes(
        lambda x, A, B: low_rank_linear(x, base.weight.detach(), base.bias.detach(), A, B, 2.0),
        (x, A, B),
    )
    given = answer_and_slopes(lambda x, A, B: theirs(x), (x, A, B))
    torch.testing.assert_close(mine, given, rtol=1e-5, atol=1e-6)


def several(dtype=torch.float64, ranks=(3, 1, 4), widths=(6, 2, 5)):
    """x, and for each of three maps W, b, A, B and its scale."""
    x = draw(ROWS, TOKENS, WIDTH, seed=1, dtype=dtype)
    maps = []
    for place, (rank, width) in enumerate(zip(ranks, widths, strict=True)):
        weight = draw(width, WIDTH, seed=10 + place, dtype=dtype, learns=False)
        bias = draw(width, seed=20 + place, dtype=dtype, learns=False) if place != 1 else None
        A = draw(rank, WIDTH, seed=30 + place, dtype=dtype)
        B = draw(width, rank, seed=40 + place, dtype=dtype)
        maps.append(LoRAWeights(weight, bias, A, B, 0.5 + place))
    return x, maps


def one_by_one(x, maps):
    return [low_rank_linear(x, m.weight, m.bias, m.A, m.B, m.scale) for m in maps]


def flat_sum(outputs, but=()):
    """Weighted sum of the outputs, some of them left out."""
    return sum(
        (out * draw(*out.shape, seed=50 + place, learns=False).to(out.dtype)).sum()
        for place, out in enumerate(outputs)
        if place not in but
    )


@pytest.mark.parametrize("but", [(), (0,), (1, 2)])
def test_maps_of_one_input_are_those_of_each_alone(but):
    x, maps = several()
    together, alone = low_rank_linears(x, maps), one_by_one(x, maps)
    torch.testing.assert_close(together, tuple(alone))
    wanted = [x, *(side for m in maps for side in (m.A, m.B))]
    found, expected = (
        torch.autograd.grad(flat_sum(outputs, but), wanted, allow_unused=True)
        for outputs in (together, alone)
    )
    torch.testing.assert_close(found, expected)
    assert [g is None for g in found[1:]] == [place in but for place in range(3) for _ in "AB"]


def test_the_gradient_of_maps_of_one_input_is_the_numerical_one():
    x, maps = several()
    sides = [side for m in maps for side in (m.A, m.B)]

    def outputs(x, *sides):
        return low_rank_linears(
            x,
            [replace(m, A=A, B=B) for m, A, B in zip(maps, sides[::2], sides[1::2], strict=True)],
        )

    assert torch.autograd.gradcheck(outputs, (x, *sides))


def test_maps_of_one_input_give_frozen_adapters_no_gradient():
    x, maps = several()
    maps[1] = replace(maps[1], A=maps[1].A.detach(), B=maps[1].B.detach())
    flat_sum(low_rank_linears(x, maps)).backward()
    x_alone, maps_alone = several()
    flat_sum(one_by_one(x_alone, maps_alone)).backward()
    torch.testing.assert_close(x.grad, x_alone.grad)
    for place in (0, 2):
        torch.testing.assert_close(maps[place].A.grad, maps_alone[place].A.grad)
    assert maps[1].A.grad is None


def test_maps_of_one_input_are_computed_in_autocast_and_keep_one_input():
    x, maps = several(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        together, alone = low_rank_linears(x, maps), one_by_one(x, maps)
    assert {out.dtype for out in together} == {torch.bfloat16}
    torch.testing.assert_close(together, tuple(alone), rtol=2e-2, atol=5e-2)
    kept = [t for t in together[0].grad_fn.saved_tensors if t.shape == (ROWS * TOKENS, WIDTH)]
    assert [t.dtype for t in kept] == [torch.bfloat16]
    flat_sum(together).backward()
    assert {m.A.grad.dtype for m in maps} == {torch.float32}


def test_maps_of_one_input_take_an_empty_batch():
    x, maps = several()
    assert [tuple(out.shape) for out in low_rank_linears(x[:0], maps)] == [
        (0, TOKENS, m.weight.shape[0]) for m in maps
    ]
