"""OSF: full fine-tuning across the weak directions of the weights, through peft's layer."""

import copy

import pytest
import torch
from torch import nn

from mmcl.core import Chain, begin_task, trainable_parameters
from mmcl.layers.peft_osf import OSFLinear
from mmcl.strategies import OSF
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    state_of,
    steps_of,
    taught,
)
from tests.toys.toy_clip import StandIn, a_task
from tests.toys.toy_llava import a_dialogue_batch, a_llava, dialogue_batches

RATE = 0.05


def layers_of(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, OSFLinear)}


def merged_weight(layer):
    return (layer.weight + layer.get_delta_weight("default")).detach()


def strong(weight, count):
    """The strongest directions of a weight, decomposed here: U (d_out, count), V (count, d_in)."""
    U, _, V = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :count], V[:count]


def leaks(model):
    """How much of each layer's gradients points into what is preserved, as a share."""
    found = []
    for layer in layers_of(model).values():
        U, V = strong(layer.weight, layer.effective_rank["default"])
        own = layer.osf_svd_params["default"]
        found.append(float((U.T @ own["U_low"].grad).norm() / own["U_low"].grad.norm()))
        found.append(float((own["V_low"].grad @ V.T).norm() / own["V_low"].grad.norm()))
    return found


def backward(model):
    model.zero_grad()
    batch = a_dialogue_batch(model)
    model.loss(model(batch), batch).backward()
    return model


def test_what_every_strategy_of_this_track_promises():
    keeps_its_promises(OSF, rate=RATE)


def test_attached_it_answers_as_before():
    model, strategy = attached(OSF)
    batch = mixed(model)
    expected = a_llava()(batch).logits.detach()
    torch.testing.assert_close(scores(model, strategy, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_answers_as_its_merged_weight():
    model, _ = taught(*attached(OSF), TASKS[:2], RATE)
    for layer in layers_of(model).values():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = nn.functional.linear(x, merged_weight(layer), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_new_task_begins_with_the_answers_of_the_last():
    model, strategy = taught(*attached(OSF), TASKS[:1], RATE)
    batch = mixed(model)
    before = scores(model, strategy, batch)
    begin_task(model, strategy, TASKS[1])
    torch.testing.assert_close(scores(model, strategy, batch), before, rtol=1e-4, atol=1e-5)


def test_what_was_strong_when_a_task_began_stays_under_gradient_descent():
    model, strategy = taught(*attached(OSF), TASKS[:1], RATE)
    begin_task(model, strategy, TASKS[1])
    before = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    steps_of(model, strategy, dialogue_batches(model, 1), rate=20.0)
    for name, layer in layers_of(model).items():
        U, V = strong(before[name], layer.effective_rank["default"])
        moved = merged_weight(layer) - before[name]
        assert float(moved.norm()) > 1e-3
        assert float((U.T @ moved).norm() / moved.norm()) < 1e-3
        assert float((moved @ V.T).norm() / moved.norm()) < 1e-3


def test_gradients_leave_what_is_preserved_alone():
    model, strategy = attached(OSF)
    assert max(leaks(backward(model))) < 1e-4
    begin_task(model, strategy, TASKS[0])
    begin_task(model, strategy, TASKS[1])
    assert max(leaks(backward(model))) < 1e-4


def test_gradients_of_a_copy_do_so_too():
    model, _ = attached(OSF)
    copied = copy.deepcopy(copy.deepcopy(model))
    del model
    assert max(leaks(backward(copied))) < 1e-4


def test_gradients_of_a_loaded_model_do_so_too():
    model, strategy = taught(*attached(OSF), TASKS[:2], RATE)
    state = state_of(model, strategy)
    fresh, other = attached(OSF)
    for task in TASKS[:2]:
        begin_task(fresh, other, task)
    fresh.load_state_dict(state["model"])
    assert max(leaks(backward(fresh))) < 1e-4
    torch.testing.assert_close(leaks(backward(fresh)), leaks(backward(model)))


def test_each_gradient_is_projected_once():
    model, strategy = attached(OSF)
    for task in TASKS:
        begin_task(model, strategy, task)
    for layer in layers_of(model).values():
        own = layer.osf_svd_params["default"]
        assert len(layer.hook_handles) == 2
        assert all(len(own[name]._backward_hooks) == 1 for name in ("U_low", "V_low"))


@pytest.mark.parametrize(
    ("preserve", "growth", "expected"),
    [
        (0.5, 0.1, [8, 8, 9]),
        (0.5, 0.5, [8, 12, 14, 15, 15]),
        (0.01, 0.0, [1, 1]),
        (0.99, 0.9, [15]),
    ],
)
def test_ever_more_is_preserved_and_something_can_always_move(preserve, growth, expected):
    strategy = OSF(preserve, growth)
    assert [strategy.preserved(16, task) for task in range(len(expected))] == expected
    many = [strategy.preserved(16, task) for task in range(200)]
    assert many == sorted(many)
    assert 1 <= many[0] <= many[-1] <= 15


def test_what_is_preserved_grows_with_the_tasks():
    model, strategy = attached(lambda: OSF(growth=0.3))
    for task in TASKS:
        begin_task(model, strategy, task)
        for layer in layers_of(model).values():
            m = min(layer.weight.shape)
            kept = strategy.preserved(m, task.index)
            assert layer.effective_rank["default"] == kept
            assert layer.osf_svd_params["default"]["U_low"].shape == (layer.out_features, m - kept)


def test_the_weights_are_state_and_not_frozen_parameters():
    model, _ = attached(OSF)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name in layers_of(model):
        assert f"{name}.base_layer.weight" not in frozen
        assert f"{name}.base_layer.weight" in model.state_dict()
        assert f"{name}._osf_U_low_init.default" in model.state_dict()
    assert all(".osf_svd_params." in name for name in trainable_parameters(model))


def test_a_half_precision_model_learns_in_float32():
    model = StandIn().bfloat16()
    strategy = OSF()
    strategy.attach(model)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    own = model.patch.osf_svd_params["default"]
    eye = own["V_low"] @ own["V_low"].T
    torch.testing.assert_close(eye, torch.eye(len(eye)), rtol=0, atol=1e-5)
    x = torch.randn(2, 48).bfloat16()
    expected = nn.functional.linear(x, model.patch.weight, model.patch.bias)
    assert torch.equal(model.patch(x), expected)
    with torch.no_grad():
        own["S_low"].add_(0.5)
    expected, moved = merged_weight(model.patch), model.patch.weight.clone()
    begin_task(model, strategy, a_task(1))
    assert model.patch.weight.dtype == torch.bfloat16
    assert not torch.equal(model.patch.weight, moved)
    torch.testing.assert_close(model.patch.weight.float(), expected, rtol=1e-2, atol=1e-3)


def test_a_second_adapter_in_the_same_place_is_refused():
    model = StandIn()
    with pytest.raises(RuntimeError, match="already is OSFLinear"):
        Chain([OSF(), OSF()]).attach(model)


def test_quantized_weights_are_refused():
    class Packed(StandIn):
        def target_linears(self, which="all"):
            del self.patch.weight
            self.patch.weight = nn.Parameter(torch.ones(16, 48).to(torch.int8), False)
            return {"patch": self.patch}

    with pytest.raises(ValueError, match="quantized"):
        OSF().attach(Packed())
