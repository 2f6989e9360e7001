"""Slots beside a frozen linear layer, against sums written as loops."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mmcl.layers import MultiLoRALinear

WIDTH, OUT, RANK, SCALE = 5, 6, 2, 1.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_linear(seed=0, kind=nn.Linear):
    made = kind(WIDTH, OUT)
    with torch.no_grad():
        made.weight.normal_(generator=seeded(seed))
        made.bias.normal_(generator=seeded(seed + 1))
    return made


def a_layer(adapters=3, gates=None, ranks=None, kind=nn.Linear, **how):
    """Slots with something in B, all frozen but the last."""
    layer = MultiLoRALinear(a_linear(kind=kind), SCALE, gates=gates, name="expert", **how)
    for number in range(adapters):
        layer.add_adapter((ranks or [RANK] * adapters)[number], seeded(10 + number))
        with torch.no_grad():
            layer.adapter(number).lora_B.normal_(generator=seeded(20 + number))
    layer.freeze_adapters(adapters - 1)
    return layer


def rows():
    return torch.randn(4, 3, WIDTH, generator=seeded(5))


def plain(layer, x):
    return x @ layer.weight.T + layer.bias


def correction(layer, number, x):
    adapter = layer.adapter(number)
    return SCALE * (x @ adapter.lora_A.T @ adapter.lora_B.T)


class Foreign(nn.Linear):
    """A linear layer of another kind, whose weight nobody may read past it."""


@pytest.mark.parametrize("kind", [nn.Linear, Foreign])
@pytest.mark.parametrize("chosen", [(0,), (2,), (0, 1), (0, 2), (2, 0, 1)])
def test_chosen_adapters_are_summed(chosen, kind):
    layer, x = a_layer(kind=kind), rows()
    layer.set_adapters("sum", chosen)
    want = plain(layer, x) + sum(correction(layer, number, x) for number in chosen)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer(x))


def test_adapters_of_several_ranks_are_summed():
    layer, x = a_layer(ranks=[1, 4, 2]), rows()
    layer.set_adapters("sum")
    want = plain(layer, x) + sum(correction(layer, number, x) for number in range(3))
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_one_adapter_alone_is_trained():
    layer, x = a_layer(), rows()
    layer.set_adapters("one", 2)
    torch.testing.assert_close(layer(x), plain(layer, x) + correction(layer, 2, x))


def test_fused_adapters_have_cross_terms():
    layer, x = a_layer(), rows()
    layer.set_adapters("fused", [0, 1])
    A = layer.adapter(0).lora_A + layer.adapter(1).lora_A
    B = layer.adapter(0).lora_B + layer.adapter(1).lora_B
    torch.testing.assert_close(layer(x), plain(layer, x) + SCALE * (x @ A.T @ B.T))


def test_nothing_takes_part_until_it_is_chosen():
    layer, x = a_layer(), rows()
    assert torch.equal(layer(x), layer.base(x))
    layer.set_adapters("sum")
    layer.set_adapters("none")
    assert torch.equal(layer(x), layer.base(x))


def test_a_new_adapter_changes_no_answer():
    layer, x = a_layer(), rows()
    layer.set_adapters("sum")
    before = layer(x)
    layer.set_adapters("sum", [0, 1, 2, layer.add_adapter(RANK, seeded(9))])
    torch.testing.assert_close(layer(x), before)


def test_gates_weigh_each_sample_for_itself():
    gates = {}
    layer, x = a_layer(gates=gates), rows()
    layer.set_adapters("gates")
    gates["expert"] = torch.rand(4, 3, generator=seeded())
    answer = layer(x)
    for row in range(4):
        want = plain(layer, x[row])
        for number in range(3):
            want = want + gates["expert"][row, number] * correction(layer, number, x[row])
        torch.testing.assert_close(answer[row], want, rtol=1e-5, atol=1e-5)


def test_without_gates_the_base_answers():
    layer, x = a_layer(gates={"another": torch.ones(4, 3)}), rows()
    layer.set_adapters("gates")
    assert torch.equal(layer(x), layer.base(x))


def test_gates_of_another_number_of_adapters_are_refused():
    layer = a_layer(gates={"expert": torch.ones(4, 2)})
    layer.set_adapters("gates")
    with pytest.raises(ValueError, match=r"gates\['expert'\] weighs 2 adapters and 3 are active"):
        layer(rows())


def test_gates_get_a_gradient_if_they_want_one():
    gates = {"expert": torch.ones(4, 3, requires_grad=True)}
    layer, x = a_layer(gates=gates), rows()
    layer.set_adapters("gates")
    layer(x).sum().backward()
    want = [
        [float(correction(layer, n, x[row]).detach().sum()) for n in range(3)] for row in range(4)
    ]
    torch.testing.assert_close(gates["expert"].grad, torch.tensor(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "gates", "fused"])
def test_only_adapters_that_learn_get_a_gradient(mode):
    layer = a_layer(gates={"expert": torch.ones(4, 3)})
    layer.set_adapters(mode)
    layer(rows()).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "adapters.2.lora_A",
        "adapters.2.lora_B",
    ]
    reference = a_layer()
    x = rows()
    if mode == "fused":
        A = sum(reference.adapter(n).lora_A for n in range(3))
        B = sum(reference.adapter(n).lora_B for n in range(3))
        answer = plain(reference, x) + SCALE * (x @ A.T @ B.T)
    else:
        answer = plain(reference, x) + sum(correction(reference, n, x) for n in range(3))
    answer.square().sum().backward()
    for side in ("A", "B"):
        torch.testing.assert_close(
            getattr(layer.adapter(2), f"lora_{side}").grad,
            getattr(reference.adapter(2), f"lora_{side}").grad,
            rtol=1e-4,
            atol=1e-4,
        )


def test_an_adapter_starts_as_pefts_does():
    layer = a_layer(adapters=0)
    layer.add_adapter(400, seeded())
    adapter = layer.adapter(0)
    assert not adapter.lora_B.any()
    bound = 1 / math.sqrt(WIDTH)
    assert float(adapter.lora_A.detach().abs().max()) <= bound
    reference = nn.init.kaiming_uniform_(torch.empty(400, WIDTH), math.sqrt(5), generator=seeded())
    assert torch.equal(adapter.lora_A, reference)


def test_names_are_stable_and_nothing_else_enters_a_checkpoint():
    layer = a_layer(gates={"expert": torch.ones(4, 3)})
    layer.set_adapters("sum")
    layer(rows())
    names = [f"adapters.{n}.lora_{side}" for n in range(3) for side in ("A", "B")]
    assert sorted(layer.state_dict()) == [*names, "base.bias", "base.weight"]


def test_a_checkpoint_is_loaded_over_what_was_kept_side_by_side():
    layer, x = a_layer(adapters=4), rows()
    layer.set_adapters("sum")
    layer(x)
    other = a_layer(adapters=4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.set_adapters("sum")
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_functional_call_answers_with_the_weights_it_is_given():
    layer, x = a_layer(), rows()
    layer.set_adapters("sum")
    layer(x)
    other = {"adapters.0.lora_B": torch.zeros(OUT, RANK)}
    want = plain(layer, x) + correction(layer, 1, x) + correction(layer, 2, x)
    torch.testing.assert_close(functional_call(layer, other, (x,)), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), want + correction(layer, 0, x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_was_cast_answers_in_its_new_precision():
    layer, x = a_layer(), rows()
    layer.set_adapters("sum")
    layer(x)
    layer.double()
    want = plain(layer, x.double()) + sum(correction(layer, n, x.double()) for n in range(3))
    torch.testing.assert_close(layer(x.double()), want, rtol=1e-12, atol=1e-12)


def test_what_was_kept_under_inference_mode_serves_training():
    layer, x = a_layer(adapters=4), rows()
    layer.set_adapters("sum")
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_an_unfrozen_adapter_learns_and_is_used_as_learned():
    layer, x = a_layer(), rows()
    layer.set_adapters("sum", [0, 1])
    layer(x)
    layer.freeze_adapters(0)
    layer.adapter(0).lora_B.data.zero_()  # as a fused optimiser, which raises no version
    layer.freeze_adapters(3)
    torch.testing.assert_close(
        layer(x), plain(layer, x) + correction(layer, 1, x), rtol=1e-5, atol=1e-5
    )


def test_a_copy_of_the_model_reads_its_own_gates():
    model = nn.Module()
    model.gates = {}
    model.layer = a_layer(gates=model.gates)
    model.layer.set_adapters("gates")
    other = copy.deepcopy(model)
    other.gates["expert"] = torch.ones(4, 3)
    x = rows()
    assert torch.equal(model.layer(x), model.layer.base(x))
    assert not torch.equal(other.layer(x), model.layer(x))


@pytest.mark.parametrize(("mode", "chosen"), [("sum", None), ("one", 1), ("fused", [0, 1])])
def test_folding_answers_the_same_and_gives_back_the_very_bits(mode, chosen):
    layer, x = a_layer(), rows()
    layer.set_adapters(mode, chosen)
    before, answer = layer.weight.clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(layer.base(x), answer, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer.base(x))
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), answer)


def test_folding_under_inference_mode_leaves_a_layer_that_learns():
    layer, x = a_layer(), rows()
    layer.set_adapters("sum")
    with torch.inference_mode():
        layer.merge()
        layer(x)
        layer.unmerge()
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_what_gates_weigh_cannot_be_merged():
    layer = a_layer()
    layer.set_adapters("gates")
    assert not layer.can_merge
    with pytest.raises(RuntimeError, match="cannot be merged"):
        layer.merge()
    with pytest.raises(RuntimeError, match="differ from sample to sample"):
        layer.delta_weight()


def test_a_merged_layer_is_not_rearranged():
    layer = a_layer()
    layer.set_adapters("sum")
    layer.merge()
    for change in (
        layer.merge,
        lambda: layer.set_adapters("none"),
        lambda: layer.add_adapter(1, seeded()),
    ):
        with pytest.raises(RuntimeError, match="unmerge"):
            change()


def test_the_dense_difference_is_what_the_adapters_add():
    layer, x = a_layer(), rows()
    torch.testing.assert_close(
        x @ layer.delta_weight([0, 2]).T,
        correction(layer, 0, x) + correction(layer, 2, x),
        rtol=1e-5,
        atol=1e-5,
    )
    layer.set_adapters("none")
    assert not layer.delta_weight().any()


def test_a_half_precision_base_has_wide_adapters_and_answers_in_its_own_precision():
    layer = MultiLoRALinear(a_linear().bfloat16())
    layer.add_adapter(RANK, seeded())
    layer.set_adapters("one", 0)
    answer = layer(rows().bfloat16())
    assert layer.adapter(0).lora_A.dtype == torch.float32
    assert answer.dtype == torch.bfloat16
    answer.sum().backward()
    assert layer.adapter(0).lora_B.grad.dtype == torch.float32


def test_frozen_adapters_of_a_half_precision_base_are_kept_as_narrow_as_it():
    layer = MultiLoRALinear(a_linear().bfloat16(), gates={"": torch.ones(4, 2)})
    for number in range(2):
        layer.add_adapter(RANK, seeded(number))
        nn.init.normal_(layer.adapter(number).lora_B, generator=seeded(number))
    x = rows().bfloat16()
    for mode in ("sum", "gates", "fused"):
        layer.freeze_adapters(0)
        layer.set_adapters(mode)
        trainable = layer(x)
        layer.freeze_adapters(2)
        assert torch.equal(layer(x), trainable)
    assert layer.delta_weight([0, 1]).dtype == torch.float32


def test_somebody_who_listens_to_the_base_is_heard():
    layer, heard = a_layer(), []
    layer.set_adapters("sum")
    x = rows()
    quiet = layer(x)
    handle = layer.base.register_forward_hook(lambda module, given, out: heard.append(out))
    torch.testing.assert_close(layer(x), quiet, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert len(heard) == 1


def test_dropout_hides_parts_of_the_input_from_the_correction_in_training_only():
    layer, x = a_layer(dropout=0.5), rows()
    layer.set_adapters("sum")
    full = layer.eval()(x)
    torch.testing.assert_close(
        full, plain(layer, x) + sum(correction(layer, n, x) for n in range(3)), rtol=1e-5, atol=1e-5
    )
    layer.train()
    torch.manual_seed(0)
    torch.testing.assert_close(
        torch.stack([layer(x) for _ in range(3000)]).mean(0), full, rtol=0.1, atol=1.0
    )
    assert not torch.equal(layer(x), full)


@pytest.mark.parametrize(
    ("mode", "adapters", "message"),
    [
        ("all", None, "mode is 'all', expected one of none, one, sum"),
        ("sum", [3], r"adapters are \[3\] and there are 3"),
        ("one", None, r"mode 'one' was given adapters \[0, 1, 2\]"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(mode, adapters, message):
    with pytest.raises(ValueError, match=message):
        a_layer().set_adapters(mode, adapters)


def test_ranks_must_agree_where_adapters_are_gated():
    with pytest.raises(ValueError, match=r"one rank, got ranks \[1, 2\]"):
        a_layer(ranks=[1, 2, 2]).set_adapters("gates")


def test_a_base_that_says_no_width_is_refused():
    with pytest.raises(TypeError, match="ReLU has no in_features"):
        MultiLoRALinear(nn.ReLU())
