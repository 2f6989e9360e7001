import copy

import torch

from mmcl.core import trainable
from mmcl.layers.bypass import adapted, bypassed
from mmcl.layers.low_rank import LowRankSlots
from mmcl.strategies.lora import LoRA
from tests.stand_in_llava import a_dialogue_batch, a_llava


def scattered(model):
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_a_model_without_its_adapters_answers_as_the_one_that_never_had_any():
    model = a_llava()
    batch = a_dialogue_batch(model)
    bare = model(batch).logits
    LoRA(rank=2).attach(model)
    scattered(model)
    with_them = model(batch).logits
    with bypassed(model):
        torch.testing.assert_close(model(batch).logits, bare)
    assert torch.equal(model(batch).logits, with_them)
    assert not torch.allclose(with_them, bare)


def test_our_own_layers_are_passed_by_as_well_and_come_back_after_an_error():
    layer = LowRankSlots(torch.nn.Linear(3, 2))
    layer.add_slot(1, torch.Generator().manual_seed(0))
    layer.activate("sum")
    model = scattered(torch.nn.Sequential(layer))
    x = torch.ones(1, 3)
    expected = model(x)
    assert list(adapted(model)) == ["0"]
    try:
        with bypassed(model):
            assert torch.equal(model(x), layer.base(x))
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(layer)


def test_a_model_without_adapters_is_left_alone():
    model = a_llava()
    before = copy.deepcopy(model.state_dict())
    with bypassed(model):
        assert adapted(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
