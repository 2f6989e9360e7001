import io

import pytest
import torch
from torch import nn

from mmcl.memory import Snapshot


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_copy_does_not_follow_the_original():
    weight = nn.Parameter(torch.ones(3))
    snapshot = Snapshot()
    snapshot.take({"weight": weight})
    with torch.no_grad():
        weight += 1
    assert snapshot.get("weight").tolist() == [1, 1, 1]
    assert not snapshot.get("weight").requires_grad


def test_taking_again_replaces_everything():
    snapshot = Snapshot()
    snapshot.take({"a": torch.zeros(1)})
    snapshot.take({"b": torch.ones(1)})
    assert list(snapshot.tensors) == ["b"]
    assert len(snapshot) == 1
    assert not snapshot.is_empty


def test_a_cast_of_the_module_does_not_round_what_is_stored():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    holder = nn.Module()
    holder.snapshot = Snapshot()
    holder.snapshot.take({"third": third, "count": torch.tensor([2**40])})
    holder.half().double()
    assert torch.equal(holder.snapshot.get("third"), third)
    assert int(holder.snapshot.get("count")) == 2**40


def test_a_snapshot_goes_where_its_module_goes():
    holder = nn.Module()
    holder.snapshot = Snapshot()
    holder.snapshot.take({"a": torch.ones(2)})
    holder.to("meta")
    assert holder.snapshot.get("a").device.type == "meta"


def test_a_checkpoint_brings_everything_back_in_its_dtype():
    snapshot = Snapshot()
    snapshot.take({"a": torch.rand(2, 3, dtype=torch.float64), "b": torch.arange(4)})
    fresh = Snapshot()
    fresh.load_state_dict(through_a_file(snapshot.state_dict()))
    assert list(fresh.tensors) == ["a", "b"]
    for name, tensor in snapshot.tensors.items():
        assert torch.equal(fresh.get(name), tensor)
        assert fresh.get(name).dtype == tensor.dtype


def test_a_missing_name_is_named():
    with pytest.raises(KeyError, match="snapshot has no 'weight', it holds 0 other tensors"):
        Snapshot().get("weight")
