"""Original weights of merged layers: on the host while a device has the merged ones."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmcl.core import Task
from mmcl.layers import original_weights
from mmcl.layers.original_weights import OriginalWeights
from mmcl.models import ImageTextToText
from mmcl.strategies import OSF, LoRA, OLoRA

STRATEGIES = {
    "LoRA": lambda: LoRA(rank=2, trainable_token_indices=[3, 5]),
    "OLoRA": lambda: OLoRA(rank=2),
    "OSF": lambda: OSF(),
}


@pytest.fixture
def host(monkeypatch):
    """Make the CPU a device apart: what is kept is copied, as from a GPU; return the copies."""
    copies = []

    def to_host(tensor):
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(original_weights, "to_host", to_host)
    return copies


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def trained(name):
    """A model whose adapters, of a strategy, are not zero."""
    model, strategy = ImageTextToText("tiny-llava", dtype="bfloat16"), STRATEGIES[name]()
    strategy.attach(model)
    strategy.begin_task(model, Task(0, "answers", task_type="instruction"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_originals_leave_the_device_and_come_back_bit_for_bit(name, host):
    model, strategy = trained(name)
    before = {key: value.detach().clone() for key, value in tensors(model).items()}
    storages = {key: StorageWeakRef(v.untyped_storage()) for key, v in tensors(model).items()}
    with strategy.merged_adapters(model):
        changed = {k for k, v in tensors(model).items() if not torch.equal(v, before[k])}
        assert changed
        assert [key for key in changed if not storages[key].expired()] == []
        assert len(host) >= len(changed)
    after = tensors(model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_a_gpu_that_is_full_in_the_middle_gets_its_weights_back(host, monkeypatch):
    model, strategy = trained("OLoRA")
    before = {key: value.detach().clone() for key, value in tensors(model).items()}
    merged = []
    plain = OriginalWeights.keep

    def keep(self, layer, name):
        merged.append(name)
        if len(merged) == 3:
            raise torch.OutOfMemoryError
        plain(self, layer, name)

    monkeypatch.setattr(OriginalWeights, "keep", keep)
    with pytest.raises(torch.OutOfMemoryError), strategy.merged_adapters(model):
        pass
    after = tensors(model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_a_weight_that_two_layers_share_is_kept_once_as_it_was_first(host):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    bits, originals = first.weight.detach().clone(), OriginalWeights()
    originals.keep(first, "weight")
    first.weight.data = torch.zeros(2, 2)
    originals.keep(second, "weight")
    assert torch.equal(originals.of(second.weight), bits)
    originals.restore()
    assert torch.equal(second.weight, bits)
    assert len(host) == 1
