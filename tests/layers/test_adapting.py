import pytest
import torch

from mmcl.core import trainable
from mmcl.layers import LowRankSlots, install
from mmcl.layers.adapting import frozen_linears, grow_slots
from tests.stand_in import StandIn


def slotted(seed=0, count=1):
    model = StandIn()
    install(model, frozen_linears(model, "all", False, by=model), LowRankSlots)
    return model, grow_slots(model, count, rank=2, seed=seed)["patch"]


def test_a_model_is_frozen_and_its_linears_are_named():
    model = StandIn()
    assert list(frozen_linears(model, "all", False, by=model)) == ["patch"]
    assert not trainable(model)


def test_slots_are_added_once_and_the_last_one_learns():
    model, layer = slotted(count=3)
    grow_slots(model, 3, rank=2, seed=0)
    assert len(layer.slots) == 3
    assert list(trainable(model)) == ["patch.slots.2.A", "patch.slots.2.B"]


def test_growing_step_by_step_or_at_once_is_the_same():
    model, layer = slotted()
    for count in (2, 3):
        grow_slots(model, count, rank=2, seed=0)
    for one, other in zip(layer.slots, slotted(count=3)[1].slots, strict=True):
        assert torch.equal(one.A, other.A)


def test_every_slot_and_every_seed_starts_elsewhere():
    first, second = slotted(count=2)[1].slots
    assert not torch.equal(first.A, second.A)
    assert not torch.equal(first.A, slotted(seed=1)[1].slots[0].A)


def test_old_slots_keep_no_gradient():
    model, layer = slotted()
    layer.activate("sum")
    layer(torch.ones(1, 48)).sum().backward()
    assert layer.slots[0].B.grad is not None
    grow_slots(model, 2, rank=2, seed=0)
    assert layer.slots[0].B.grad is None


def test_a_model_without_such_layers_is_refused():
    model = StandIn()
    model.linears = lambda which: {}
    with pytest.raises(ValueError, match=r"model\.linears\('mlp'\) is empty"):
        frozen_linears(model, "mlp", False, by=model)
