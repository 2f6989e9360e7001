import pytest
import torch

from mmcl.core import trainable_parameters
from mmcl.layers.task_adapters import TaskAdapters, freeze_and_target, set_active_adapters
from tests.toys.toy_clip import StandIn


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
