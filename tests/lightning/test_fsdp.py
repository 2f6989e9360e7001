"""Sharding and unsharding the weights restores a module."""

import types

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mmcl.core.model import fsdp_blocks, module_stacks
from mmcl.lightning import ContinualModule
from mmcl.lightning.checkpoints.checkpoint_io import (
    check_resumable,
    check_shardable,
    remove_mid_task_checkpoints,
)
from mmcl.lightning.fsdp import FSDPWrapper, fsdp_mesh
from mmcl.strategies import AGEM, EWC, Chain, Finetune
from tests.toys.toy_clip import StandIn


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/door", rank=0, world_size=1)
    names = ("data_parallel", "tensor_parallel")
    yield fsdp_mesh(init_device_mesh("cpu", (1, 1), mesh_dim_names=names))
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


def test_blocks_are_the_repeated_modules_of_trainable_stacks():
    model = TwoTowers()
    assert module_stacks(model) == [list(model.image), list(model.text)]
    model.text.requires_grad_(False)
    assert fsdp_blocks(model) == list(model.image)
    model.blocks = lambda: [model.head]
    assert fsdp_blocks(model) == [model.head]


def test_an_unsharded_module_is_the_one_it_was(mesh):
    module = ContinualModule(StandIn(), EWC())
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    before_attributes = {part: (type(part), set(vars(part))) for part in module.modules()}
    shards = FSDPWrapper(module, mesh, "mark")
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert trainable
    assert all(isinstance(parameter, DTensor) for parameter in trainable.values())
    assert set(module.state_dict()) == set(trainable) - module.frozen
    assert shards.state().keys() == shards.replicated_state().keys() | trainable.keys()
    shards.unshard()
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert {part: (type(part), set(vars(part))) for part in module.modules()} == before_attributes
    FSDPWrapper(module, mesh).unshard()


def test_a_trainable_scalar_is_refused(mesh):
    module = ContinualModule(StandIn())
    module.model.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"'model\.scale' is a trainable scalar"):
        FSDPWrapper(module, mesh)


@pytest.mark.parametrize("way", [ModelParallelStrategy(), deepspeed(2)])
def test_editing_unsharded_gradients_is_refused_by_name(way):
    check_shardable(trainer_with(way), Finetune())
    with pytest.raises(ValueError, match="AGEM needs unsharded gradients.*use ExperienceReplay"):
        check_shardable(trainer_with(way), Chain([EWC(), AGEM()]))


def test_parallelism_without_unsharded_weights_is_refused():
    with pytest.raises(ValueError, match="torch's FSDP1"):
        check_shardable(trainer_with(object.__new__(FSDPStrategy)), Finetune())
    with pytest.raises(ValueError, match="use deepspeed_stage_2"):
        check_shardable(trainer_with(deepspeed(3)), Finetune())


def test_a_sharded_checkpoint_is_refused_by_an_unsharded_run(tmp_path):
    check_resumable(trainer_with(ModelParallelStrategy()), tmp_path)
    with pytest.raises(ValueError, match="is sharded"):
        check_resumable(trainer_with(object()), tmp_path)


def test_only_the_checkpoint_that_counts_is_kept(tmp_path):
    for name in ("last_0000002.ckpt", "last_0000004.ckpt", ".last.ckpt.tmp"):
        (tmp_path / name).mkdir()
    for name in ("last.ckpt", "task_00.ckpt"):
        (tmp_path / name).touch()
    remove_mid_task_checkpoints(tmp_path, but=tmp_path / "last_0000004.ckpt")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["last_0000004.ckpt", "task_00.ckpt"]
