"""MoELoRA's layer, against a loop over experts."""

import pytest
import torch
from torch import nn

from mmcl.layers import MoELoRALinear, MultiLoRALinear


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_layer(num_experts=3, rank=2, **how):
    torch.manual_seed(0)
    layer = MoELoRALinear(nn.Linear(5, 6), num_experts, rank, 1.5, seeded(), **how)
    with torch.no_grad():
        layer.B.normal_(generator=seeded(1))
        layer.A.normal_(generator=seeded(2))
    return layer


def rows():
    return torch.randn(4, 3, 5, generator=seeded(5))


def by_loop(layer, x):
    out = layer.base(x)
    weights = (x @ layer.router.T).softmax(-1)
    for number in range(layer.num_experts):
        A, B = layer.expert(number)
        out = out + layer.scale * weights[..., number : number + 1] * (x @ A.T @ B.T)
    return out


def test_every_token_has_all_experts_weighed_by_its_router():
    layer, x = a_layer(), rows()
    torch.testing.assert_close(layer(x), by_loop(layer, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.routing(x).sum(-1), torch.ones(4, 3))


def test_experts_and_router_learn_and_the_base_does_not():
    layer, other, x = a_layer(), a_layer(), rows()
    layer(x).square().sum().backward()
    by_loop(other, x).square().sum().backward()
    learned = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert sorted(learned) == ["A", "B", "router"]
    for name, slope in learned.items():
        torch.testing.assert_close(slope, getattr(other, name).grad, rtol=1e-4, atol=1e-4)


def test_a_new_layer_answers_as_its_base():
    layer = MoELoRALinear(nn.Linear(5, 6), 4, 2, 2.0, seeded())
    assert torch.equal(layer(rows()), layer.base(rows()))
    assert layer.A.any()
    assert layer.router.any()


def test_one_expert_is_lora():
    layer, x = a_layer(num_experts=1, rank=4), rows()
    lora = MultiLoRALinear(layer.base, layer.scale)
    lora.add_adapter(4, seeded())
    lora.set_adapters("one", 0)
    with torch.no_grad():
        lora.adapter(0).lora_A.copy_(layer.A)
        lora.adapter(0).lora_B.copy_(layer.B)
    torch.testing.assert_close(layer(x), lora(x))


def test_dropout_is_for_training():
    layer, x = a_layer(dropout=0.5), rows()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), by_loop(layer, x), rtol=1e-5, atol=1e-5)


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match="experts is 0 and rank 2"):
        a_layer(num_experts=0)
