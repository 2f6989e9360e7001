"""Master weights in float32: small updates last, and everything else is as without them."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmcl.core.master_weights import compute_dtype, keep_master_weights, rounded_state

STEPS = 200


class Small(nn.Module):
    """Layers of every kind: a table, a norm, attention that reads its child's weight, a scale."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        hidden = self.norm(self.table(tokens) * self.scale)
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0])


def a_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Small().to(dtype)


def loss_of(model):
    tokens = torch.arange(6)[None]
    return functional.cross_entropy(model(tokens)[0].float(), torch.arange(1, 7))


def test_updates_of_a_ten_thousandth_are_not_lost():
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    lost = copy.deepcopy(layer)
    assert keep_master_weights(layer) == 16
    for one in (layer, lost):
        for _ in range(STEPS):
            with torch.no_grad():
                one.weight += 1e-4 * one.weight
    wanted = (1 + 1e-4) ** STEPS
    torch.testing.assert_close(layer.weight, torch.full((4, 4), wanted), rtol=1e-4, atol=0)
    assert torch.equal(lost.weight.float(), torch.ones(4, 4))
    # What is computed is the rounded weight.
    rounded = torch.tensor(wanted).bfloat16()
    assert torch.equal(
        layer(torch.eye(4).bfloat16()), torch.full((4, 4), rounded.item()).bfloat16()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_and_gradients_are_those_of_the_rounded_weights(dtype):
    plain, model = a_model(dtype), a_model(dtype)
    assert keep_master_weights(model) == sum(p.numel() for p in plain.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.head.weight is model.table.weight
    tokens = torch.arange(6)[None]
    assert torch.equal(model(tokens), plain(tokens))
    loss_of(model).backward()
    loss_of(plain).backward()
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert own.grad.dtype == torch.float32
        # Of a weight with two uses the gradients are added in float32.
        torch.testing.assert_close(own.grad, other.grad.float(), rtol=1e-2, atol=1e-4, msg=name)


def test_training_ends_where_a_loop_with_float32_copies_ends():
    plain, model = a_model(), a_model()
    keep_master_weights(model)
    masters = {name: p.detach().float().clone() for name, p in plain.named_parameters()}
    for _ in range(5):
        loss_of(model).backward()
        loss_of(plain).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
            for name, parameter in plain.named_parameters():
                masters[name] -= 0.1 * parameter.grad.float()
                parameter.copy_(masters[name].bfloat16())
                parameter.grad = None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, masters[name], rtol=1e-3, atol=1e-3, msg=name)


def test_what_is_frozen_or_wide_stays_and_what_trains_later_follows():
    model = a_model()
    model.attention.requires_grad_(False)
    model.norm.float()
    keep_master_weights(model)
    assert model.attention.in_proj_weight.dtype == torch.bfloat16
    assert "forward" not in vars(model.norm)
    model.attention.requires_grad_(True)
    own = sum(p.numel() for p in model.attention.parameters())
    assert keep_master_weights(model) == own
    assert keep_master_weights(model) == 0
    assert compute_dtype(model.attention) == torch.bfloat16


def test_a_copy_computes_with_its_own_weights():
    model = a_model()
    keep_master_weights(model)
    other = copy.deepcopy(model)
    before = model(torch.arange(6)[None])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(torch.arange(6)[None]).any()
    assert torch.equal(model(torch.arange(6)[None]), before)


def test_a_state_keeps_names_and_an_export_the_old_dtypes():
    plain, model = a_model(), a_model()
    keep_master_weights(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        model.scale.fill_(1 + 1e-4)
    state = rounded_state(model)
    assert {v.dtype for v in state.values()} == {torch.bfloat16}
    assert torch.equal(state["scale"], torch.ones(8).bfloat16())
    other = a_model()
    keep_master_weights(other)
    other.load_state_dict(model.state_dict())
    assert other.scale[0].item() == pytest.approx(1 + 1e-4, abs=1e-7)


def test_an_error_in_a_forward_pass_leaves_the_parameters_in_sight():
    model = a_model()
    keep_master_weights(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    assert model.scale.dtype == model.table.weight.dtype == torch.float32
    assert list(inspect.signature(model.forward).parameters) == ["tokens"]


def test_autocast_chooses_the_dtype_of_inputs():
    model, plain = a_model(), a_model()
    keep_master_weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(torch.arange(6)[None]), plain(torch.arange(6)[None]))
