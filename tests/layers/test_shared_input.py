"""A block as models call it, with and without groups."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmcl.layers.peft_lora import FusedLoraLinear
from mmcl.layers.shared_input import share_inputs

WIDTH = 8
ENDS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 4, bias=False)
        self.v_proj = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)


class CrossAttention(Attention):
    pass


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)

    def forward(self, x):
        return self.gate_proj(x).relu() * self.up_proj(x)


class Block(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.attention, self.mlp = attention(), Mlp()

    def forward(self, x):
        return self.mlp(x + self.attention(x))


def adapted(dropout=0.0, attention=Attention, shared=True):
    torch.manual_seed(0)
    block = Block(attention).double()
    config = LoraConfig(r=2, target_modules=ENDS, lora_dropout=dropout, init_lora_weights=False)
    config._register_custom_module({nn.Linear: FusedLoraLinear})
    inject_adapter_in_model(config, block)
    if shared:
        share_inputs(block, FusedLoraLinear)
    return block


def an_input():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def slopes(block, x):
    block.zero_grad()
    block(x).square().sum().backward()
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


@pytest.fixture
def counted(monkeypatch):
    """Number of maps in each shared product."""
    import mmcl.layers.shared_input as module

    counts, plain = [], module.low_rank_linears

    def counting(x, maps):
        counts.append(len(maps))
        return plain(x, maps)

    monkeypatch.setattr(module, "low_rank_linears", counting)
    return counts


def test_output_and_gradients_are_those_without_groups(counted):
    grouped, alone = adapted(), adapted(shared=False)
    torch.testing.assert_close(grouped(an_input()), alone(an_input()))
    torch.testing.assert_close(slopes(grouped, an_input()), slopes(alone, an_input()))
    assert counted == [3, 2] * 2


def test_q_k_and_v_of_cross_attention_have_no_group(counted):
    adapted(attention=CrossAttention)(an_input())
    assert counted == [2]


def test_dropout_in_training_is_drawn_by_each_layer(counted):
    block = adapted(dropout=0.5)
    block.train()(an_input())
    assert counted == []
    block.eval()(an_input())
    assert counted == [3, 2]


def test_a_layer_called_with_another_tensor_computes_alone():
    grouped, alone = adapted().attention, adapted(shared=False).attention
    x, other = an_input(), an_input().detach() + 1
    grouped.q_proj(x)
    torch.testing.assert_close(grouped.k_proj(other), alone.k_proj(other))
    torch.testing.assert_close(grouped.v_proj(x), alone.v_proj(x))


def test_a_tensor_that_was_changed_in_between_is_computed_again():
    grouped, alone = adapted().attention, adapted(shared=False).attention
    x = an_input().detach()
    grouped.q_proj(x)
    x.add_(1)
    torch.testing.assert_close(grouped.k_proj(x), alone.k_proj(x))


def test_a_layer_called_with_gradient_after_one_without_has_a_gradient():
    block = adapted().attention
    x = an_input()
    with torch.no_grad():
        block.q_proj(x)
    assert block.k_proj(x).requires_grad


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_merged_and_disabled_layers_are_pefts_own(state, counted):
    grouped, alone = adapted(), adapted(shared=False)
    for block in (grouped, alone):
        for layer in (block.attention.k_proj, block.mlp.gate_proj):
            layer.merge() if state == "merged" else layer.enable_adapters(False)
    torch.testing.assert_close(grouped(an_input()), alone(an_input()))
    assert counted == []


def test_weights_changed_after_a_pass_are_seen_in_the_next():
    grouped, alone = adapted(), adapted(shared=False)
    grouped(an_input())
    with torch.no_grad():
        for block in (grouped, alone):
            block.attention.v_proj.lora_B["default"].weight.add_(1)
    torch.testing.assert_close(grouped(an_input()), alone(an_input()))


def test_a_copy_in_the_middle_of_a_pass_uses_its_own_layers():
    block = adapted()
    block.attention.q_proj(an_input())
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(an_input()), adapted(shared=False)(an_input()))


def test_a_pass_leaves_no_tensor_behind():
    block = adapted()
    block(an_input())
    for layer in (block.attention.q_proj, block.mlp.gate_proj):
        assert layer.input_group._input is None
        assert layer.input_group._outputs == {}
