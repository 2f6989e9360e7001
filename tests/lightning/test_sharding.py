"""Sharing weights out and making them whole again leaves a module as it was."""

import types

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mmcl.core.blocks import blocks_of, stacks
from mmcl.lightning import ContinualModule
from mmcl.lightning.sharding import Shards, devices_of
from mmcl.lightning.sharing import expect_readable, expect_shareable, forget_inside
from mmcl.strategies import AGEM, EWC, Chain, Finetune
from tests.stand_in import StandIn


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/door", rank=0, world_size=1)
    names = ("data_parallel", "tensor_parallel")
    yield devices_of(init_device_mesh("cpu", (1, 1), mesh_dim_names=names))
    dist.destroy_process_group()


def block(width=2):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.ModuleList([block(), block()])
        self.text = nn.Sequential(block(), block())
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def trainer_with(strategy):
    return types.SimpleNamespace(strategy=strategy)


def deepspeed(stage):
    strategy = object.__new__(DeepSpeedStrategy)  # deepspeed itself need not be there
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


def test_blocks_are_the_repeated_modules_of_stacks_that_learn():
    model = TwoTowers()
    assert stacks(model) == [list(model.image), list(model.text)]
    model.text.requires_grad_(False)
    assert blocks_of(model) == list(model.image)
    model.blocks = lambda: [model.head]
    assert blocks_of(model) == [model.head]


def test_a_module_that_is_gathered_is_the_one_it_was(mesh):
    module = ContinualModule(StandIn(), EWC())
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    facts = {part: (type(part), set(vars(part))) for part in module.modules()}
    shards = Shards(module, mesh, "mark")
    learning = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert learning
    assert all(isinstance(parameter, DTensor) for parameter in learning.values())
    assert set(module.state_dict()) == set(learning) - module.frozen
    assert shards.state().keys() == shards.beside().keys() | learning.keys()
    shards.gather()
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert {part: (type(part), set(vars(part))) for part in module.modules()} == facts
    Shards(module, mesh).gather()


def test_a_single_number_that_learns_is_refused(mesh):
    module = ContinualModule(StandIn())
    module.model.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"'model\.scale' is a single number that learns"):
        Shards(module, mesh)


@pytest.mark.parametrize("way", [ModelParallelStrategy(), deepspeed(2)])
def test_editing_whole_gradients_is_refused_by_name(way):
    expect_shareable(trainer_with(way), Finetune())
    with pytest.raises(ValueError, match="AGEM edits whole gradients.*take ExperienceReplay"):
        expect_shareable(trainer_with(way), Chain([EWC(), AGEM()]))


def test_ways_that_leave_no_weights_to_see_are_refused():
    with pytest.raises(ValueError, match="older of torch's two"):
        expect_shareable(trainer_with(object.__new__(FSDPStrategy)), Finetune())
    with pytest.raises(ValueError, match="use deepspeed_stage_2"):
        expect_shareable(trainer_with(deepspeed(3)), Finetune())


def test_shards_are_refused_where_nothing_is_shared(tmp_path):
    expect_readable(trainer_with(ModelParallelStrategy()), tmp_path)
    with pytest.raises(ValueError, match="is in shards"):
        expect_readable(trainer_with(object()), tmp_path)


def test_only_the_checkpoint_that_counts_is_kept(tmp_path):
    for name in ("last_0000002.ckpt", "last_0000004.ckpt", ".last.ckpt.tmp"):
        (tmp_path / name).mkdir()
    for name in ("last.ckpt", "task_00.ckpt"):
        (tmp_path / name).touch()
    forget_inside(tmp_path, but=tmp_path / "last_0000004.ckpt")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["last_0000004.ckpt", "task_00.ckpt"]
