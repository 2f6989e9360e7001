import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcl.core import trainable_parameters
from mmcl.layers import MoELoRALinear, MultiLoRALinear, find_layers, inject, merged_adapters
from mmcl.layers.adapters import (
    TaskAdapters,
    adapters_disabled,
    base_layers,
    freeze_and_target,
    set_active_adapters,
)
from mmcl.models.hf_vlm.prompts_and_gates import GateReplayContext
from mmcl.strategies.lora import LoRA
from tests.toys.toy_clip import StandIn
from tests.toys.toy_llava import a_dialogue_batch, a_llava


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
    layers = inject(
        model, ["lm.0", "lm.2"], lambda base: MultiLoRALinear(base, gates=model.gates, name="e")
    )
    for number, layer in enumerate(layers.values()):
        for adapter in range(2):
            layer.add_adapter(2, seeded(2 * number + adapter))
            nn.init.normal_(layer.adapter(adapter).lora_B, generator=seeded(adapter))
        layer.set_adapters(mode)
    return model


def test_named_layers_are_replaced_and_frozen():
    model = Small()
    x = torch.randn(3, 4)
    before = model(x)
    layers = inject(model, ["lm.2"], lambda base: MultiLoRALinear(base))
    assert list(layers) == ["lm.2"]
    assert model.lm[2] is layers["lm.2"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "lm.0.weight",
        "lm.0.bias",
    ]
    assert torch.equal(model(x), before)


def test_installed_layers_are_found_by_kind():
    model = a_model()
    assert list(find_layers(model, MultiLoRALinear)) == ["lm.0", "lm.2"]
    assert find_layers(model, MoELoRALinear) == {}


def test_a_second_installation_is_refused():
    model = a_model()
    for name in ("lm.0", "lm.0.base"):
        with pytest.raises(RuntimeError, match=r"'lm\.0' already is MultiLoRALinear"):
            inject(model, [name], lambda base: MultiLoRALinear(base))


def test_an_unknown_name_is_refused_before_anything_is_replaced():
    model = Small()
    with pytest.raises(ValueError, match=r"no layer 'lm\.9': take .* lm\.0, lm\.2"):
        inject(model, ["lm.0", "lm.9"], lambda base: MultiLoRALinear(base))
    with pytest.raises(ValueError, match=r"'lm\.1' is ReLU, expected a linear layer"):
        inject(model, ["lm.0", "lm.1"], lambda base: MultiLoRALinear(base))
    assert isinstance(model.lm[0], nn.Linear)


def test_a_merged_model_answers_the_same_and_comes_back_bit_for_bit():
    model, x = a_model(), torch.randn(3, 4)
    before, answer = copy.deepcopy(model.state_dict()), model(x)
    with merged_adapters(model):
        assert not torch.equal(model.lm[0].weight, before["lm.0.base.weight"])
        torch.testing.assert_close(model(x), answer, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), answer)


def test_an_error_inside_the_block_brings_the_weights_back():
    model = a_model()
    before = model.lm[0].weight.clone()
    with pytest.raises(KeyError), merged_adapters(model):
        raise KeyError
    assert torch.equal(model.lm[0].weight, before)


def test_gated_layers_are_not_merged():
    model = a_model("gates")
    before = model.lm[0].weight.clone()
    with merged_adapters(model):
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
            contexts = GateReplayContext(model.gates)
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
            for layer in find_layers(model, MultiLoRALinear).values():
                layer.freeze_adapters(1)
                layer.set_adapters(mode, 1 if mode == "one" else None)
            wrapped = wrap(model)
            for _ in range(2):
                wrapped(torch.ones(3, 4)).square().sum().backward()
            slopes.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(slopes[0]) == 4
        torch.testing.assert_close(slopes[0], slopes[1])
    finally:
        torch.distributed.destroy_process_group()


def randomized(model):
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_a_model_with_disabled_adapters_answers_as_the_one_that_never_had_any():
    model = a_llava()
    batch = a_dialogue_batch(model)
    bare = model(batch).logits
    LoRA(rank=2).attach(model)
    randomized(model)
    with_them = model(batch).logits
    with adapters_disabled(model):
        torch.testing.assert_close(model(batch).logits, bare)
    assert torch.equal(model(batch).logits, with_them)
    assert not torch.allclose(with_them, bare)


def test_our_own_adapters_are_disabled_as_well_and_come_back_after_an_error():
    layer = MultiLoRALinear(torch.nn.Linear(3, 2))
    layer.add_adapter(1, torch.Generator().manual_seed(0))
    layer.set_adapters("sum")
    model = randomized(torch.nn.Sequential(layer))
    x = torch.ones(1, 3)
    expected = model(x)
    assert list(base_layers(model)) == ["0"]
    try:
        with adapters_disabled(model):
            assert torch.equal(model(x), layer.base(x))
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(layer)


def test_a_model_without_adapters_is_left_alone():
    model = a_llava()
    before = copy.deepcopy(model.state_dict())
    with adapters_disabled(model):
        assert base_layers(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def options(seed=0, **how):
    given = {"rank": 2, "alpha": None, "dropout": 0.0, "target_modules": "all", **how}
    return TaskAdapters(**given, train_projector=False, seed=seed)


def adapted(seed=0, count=1, **how):
    """A model after ``begin_task`` of the last of ``count`` tasks, its options and its layer."""
    model, own = StandIn(), options(seed, **how)
    own.attach(model, by=model)
    return model, own, own.begin_task(model, count - 1)["patch"]


def test_a_model_is_frozen_and_its_linears_are_named():
    model = StandIn()
    assert list(freeze_and_target(model, "all", False, by=model)) == ["patch"]
    assert not trainable_parameters(model)


def test_adapters_are_added_once_and_the_last_one_is_trainable():
    model, own, layer = adapted(count=3)
    own.begin_task(model, 2)
    assert len(layer.adapters) == 3
    assert list(trainable_parameters(model)) == [
        "patch.adapters.2.lora_A",
        "patch.adapters.2.lora_B",
    ]


def test_adding_task_by_task_or_at_once_is_the_same():
    model, own, layer = adapted()
    for task in (1, 2):
        own.begin_task(model, task)
    for one, other in zip(layer.adapters, adapted(count=3)[2].adapters, strict=True):
        assert torch.equal(one.lora_A, other.lora_A)


def test_every_adapter_and_every_seed_starts_elsewhere():
    first, second = adapted(count=2)[2].adapters
    assert not torch.equal(first.lora_A, second.lora_A)
    assert not torch.equal(first.lora_A, adapted(seed=1)[2].adapters[0].lora_A)


def test_old_adapters_keep_no_gradient():
    model, own, layer = adapted()
    layer.set_adapters("sum")
    layer(torch.ones(1, 48)).sum().backward()
    assert layer.adapters[0].lora_B.grad is not None
    own.begin_task(model, 1)
    assert layer.adapters[0].lora_B.grad is None


def test_experts_of_a_layer_are_all_trainable_and_gated_by_the_layers_own_name():
    model, own = StandIn(), options(alpha=6)
    model.gates = {}
    layer = own.attach(model, by=model, gates="moe.{index}", adapters=2)["patch"]
    assert [name.rpartition(".adapters.")[2] for name in trainable_parameters(model)] == [
        "0.lora_A",
        "0.lora_B",
        "1.lora_A",
        "1.lora_B",
    ]
    with torch.no_grad():
        for adapter in layer.adapters:
            adapter.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    set_active_adapters([layer], "gates", range(2))
    x = torch.ones(1, 48)
    model.gates["moe.0"] = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(
        layer(x),
        layer.base(x) + 2 * 3 * (x @ layer.adapters[1].lora_A.T @ layer.adapters[1].lora_B.T),
    )


def test_no_alpha_is_twice_the_rank():
    assert options(rank=3).scale == 2
    assert options(rank=4, alpha=6).scale == 1.5


def test_a_model_without_such_layers_is_refused():
    model = StandIn()
    model.target_linears = lambda which: {}
    with pytest.raises(ValueError, match=r"model\.target_linears\('mlp'\) is empty"):
        freeze_and_target(model, "mlp", False, by=model)
