import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcl.core.gates import KeptGates
from mmcl.layers import (
    LowRankSlots,
    MoELoRALinear,
    folded,
    install,
    installed,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """Two linear layers deep in a model, and the gates it owns."""

    def __init__(self):
        super().__init__()
        self.lm = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.gates = {}

    def forward(self, x):
        return self.lm(x)


def a_model(mode="sum"):
    torch.manual_seed(0)
    model = Small()
    layers = install(
        model, ["lm.0", "lm.2"], lambda base: LowRankSlots(base, gates=model.gates, name="e")
    )
    for number, layer in enumerate(layers.values()):
        for slot in range(2):
            layer.add_slot(2, seeded(2 * number + slot))
            nn.init.normal_(layer.slot(slot).B, generator=seeded(slot))
        layer.activate(mode)
    return model


def test_named_layers_are_replaced_and_frozen():
    model = Small()
    x = torch.randn(3, 4)
    before = model(x)
    layers = install(model, ["lm.2"], lambda base: LowRankSlots(base))
    assert list(layers) == ["lm.2"]
    assert model.lm[2] is layers["lm.2"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "lm.0.weight",
        "lm.0.bias",
    ]
    assert torch.equal(model(x), before)


def test_installed_layers_are_found_by_kind():
    model = a_model()
    assert list(installed(model, LowRankSlots)) == ["lm.0", "lm.2"]
    assert installed(model, MoELoRALinear) == {}


def test_a_second_installation_is_refused():
    model = a_model()
    for name in ("lm.0", "lm.0.base"):
        with pytest.raises(RuntimeError, match=r"'lm\.0' already holds LowRankSlots"):
            install(model, [name], lambda base: LowRankSlots(base))


def test_an_unknown_name_is_refused_before_anything_is_replaced():
    model = Small()
    with pytest.raises(ValueError, match=r"no layer 'lm\.9': take .* lm\.0, lm\.2"):
        install(model, ["lm.0", "lm.9"], lambda base: LowRankSlots(base))
    with pytest.raises(ValueError, match=r"'lm\.1' is ReLU, expected a linear layer"):
        install(model, ["lm.0", "lm.1"], lambda base: LowRankSlots(base))
    assert isinstance(model.lm[0], nn.Linear)


def test_a_folded_model_answers_the_same_and_comes_back_bit_for_bit():
    model, x = a_model(), torch.randn(3, 4)
    before, answer = copy.deepcopy(model.state_dict()), model(x)
    with folded(model):
        assert not torch.equal(model.lm[0].weight, before["lm.0.base.weight"])
        torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), answer)


def test_an_error_inside_the_block_brings_the_weights_back():
    model = a_model()
    before = model.lm[0].weight.clone()
    with pytest.raises(KeyError), folded(model):
        raise KeyError
    assert torch.equal(model.lm[0].weight, before)


def test_gated_layers_are_not_folded():
    model = a_model("gates")
    before = model.lm[0].weight.clone()
    with folded(model):
        assert torch.equal(model.lm[0].weight, before)


def test_a_copied_model_reads_its_own_gates():
    model, x = a_model("gates"), torch.randn(3, 4)
    plain = model(x)
    other = copy.deepcopy(model)
    other.gates["e"] = torch.ones(3, 2)
    assert torch.equal(model(x), plain)
    assert not torch.equal(other(x), plain)
    assert sorted(other.state_dict()) == sorted(model.state_dict())


def test_a_block_that_runs_again_in_the_backward_pass_sees_the_gates_it_had():
    def slopes(again):
        model = a_model("gates")
        x = torch.ones(3, 4, requires_grad=True)
        model.gates["e"] = torch.tensor([[1.0, 0.0]]).expand(3, 2)
        if again:
            contexts = KeptGates(model.gates)
            answer = checkpoint(model.lm, x, use_reentrant=False, context_fn=contexts)
        else:
            answer = model(x)
        model.gates["e"] = torch.zeros(3, 2)
        answer.sum().backward()
        assert not model.gates["e"].any()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(slopes(again=True), slopes(again=False))


@pytest.mark.parametrize("mode", ["one", "sum", "gates"])
def test_gradients_under_ddp_are_those_without(mode, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        slopes = []
        for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
            model = a_model("sum")
            model.gates["e"] = torch.tensor([[0.3, 0.7]]).expand(3, 2)
            for layer in installed(model, LowRankSlots).values():
                layer.freeze_slots(1)
                layer.activate(mode, 1 if mode == "one" else None)
            wrapped = wrap(model)
            for _ in range(2):
                wrapped(torch.ones(3, 4)).square().sum().backward()
            slopes.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(slopes[0]) == 4
        torch.testing.assert_close(slopes[0], slopes[1])
    finally:
        torch.distributed.destroy_process_group()
