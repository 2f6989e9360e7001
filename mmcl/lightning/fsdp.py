"""FSDP2 sharding of a module's weights during a task, and unsharding at its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from mmcl.core.model import fsdp_blocks

_STEP = "training_step"
_Snapshots = dict[nn.Module, tuple[type[nn.Module], set[str], dict[str, set[Any]]]]


class FSDPWrapper:
    """FSDP2 wrapper that shards the weights of a module over devices, until ``unshard``.

    The blocks of the model are gathered one after another as they are computed. All other trainable
    parameters, including the strategy's, are unsharded during ``training_step``; frozen parameters
    outside of the blocks are never sharded. Gradients are means over the devices.

    Args:
        module: has ``model``, ``strategy`` and ``training_step``; its optimizer is not built yet.
        mesh: device mesh, see ``fsdp_mesh``.
        fingerprint: of the frozen weights, which cannot be hashed while they are sharded.

    Raises:
        ValueError: if a trainable parameter cannot be sharded.
    """

    def __init__(self, module: Any, mesh: DeviceMesh, fingerprint: str = "") -> None:
        _check_parameters(module)
        self.module, self.fingerprint = module, fingerprint
        blocks = fsdp_blocks(module.model)
        ignored = _unsharded_parameters(module, blocks)
        self._snapshots: _Snapshots = {m: _snapshot(m) for m in module.modules()}
        parameters = [(m, name, p) for m in module.modules() for name, p in m._parameters.items()]
        # A penalty reads weights after the forward pass: then blocks stay gathered until backward.
        reshard = not module.strategy.overrides("penalty")
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
        fully_shard(module, mesh=mesh, ignored_params=ignored)
        register_fsdp_forward_method(module, _STEP)
        self._added = {m: set(vars(m)) - names for m, (_, names, _) in self._snapshots.items()}
        # The modules whose parameter is a shard now, with its name and the parameter as it was.
        self._owners = [(m, name, p) for m, name, p in parameters if m._parameters[name] is not p]
        for _, _, parameter in self._owners:
            # The same object gets the unsharded weight later: others may refer to it.
            parameter.data = parameter.data.new_empty(0)
        self._is_filtered = True
        # torch sets an attribute of the hook, which a method does not allow.
        module.register_state_dict_post_hook(lambda *args: self._filter(args[1]))

    @torch.no_grad()
    def unshard(self) -> None:
        """Unshard the weights on every device and restore the module."""
        for module in self._snapshots:
            if isinstance(module, FSDPModule):
                module.reshard()
        unsharded: dict[int, Tensor] = {}
        for module, name, parameter in self._owners:
            shard = module._parameters[name]
            if id(parameter) not in unsharded and isinstance(shard, DTensor):
                unsharded[id(parameter)] = parameter.data = shard.full_tensor().detach()
                parameter.grad = None
            module._parameters[name] = parameter
        for module, (cls, _, hooks) in self._snapshots.items():
            module.__class__ = cls
            # torch cannot undo fully_shard, and keeps a mapping of sharded modules.
            _composable_state._module_state_mapping.pop(module, None)
            for name in self._added[module]:
                vars(module).pop(name, None)
            for name, before in hooks.items():
                for key in set(vars(module)[name]) - before:
                    del vars(module)[name][key]

    def state(self) -> dict[str, Any]:
        """Return the complete state dict, with sharded weights as DTensors."""
        self._is_filtered = False
        try:
            state: dict[str, Any] = self.module.state_dict()
        finally:
            self._is_filtered = True
        return state

    def replicated_state(self) -> dict[str, Any]:
        """Return the replicated part of the state dict, equal on all devices, on the CPU."""
        return {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in self.state().items()
            if not isinstance(value, DTensor)
        }

    def _filter(self, state: dict[str, Any]) -> None:
        """Reduce a state dict to the sharded trainable weights, the content of a checkpoint."""
        if self._is_filtered:
            frozen = self.module.frozen
            for name in [n for n, v in state.items() if not isinstance(v, DTensor) or n in frozen]:
                del state[name]


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh for FSDP from Lightning's two-dimensional device mesh.

    The second dimension, ``tensor_parallel_size``, is the number of devices over which one copy of
    the weights is sharded, and the first one, ``data_parallel_size``, the number of copies. If one
    of them is 1, the weights are sharded over the other.
    """
    replicas, shards = mesh["data_parallel"], mesh["tensor_parallel"]
    if replicas.size() > 1 and shards.size() > 1:
        return mesh
    return replicas if shards.size() == 1 else shards


def _check_parameters(module: Any) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.ndim == 0:
            raise ValueError(
                f"'{name}' is a trainable scalar, which cannot be sharded over devices: freeze it "
                "(train_logit_scale: false), or use strategy ddp"
            )
        if parameter.requires_grad and parameter._backward_hooks:
            raise ValueError(
                f"{type(module.strategy).__name__} needs the unsharded gradient of '{name}', and a "
                "device has only its shard of it: use strategy ddp, or use OLoRA instead"
            )


def _unsharded_parameters(module: Any, blocks: list[nn.Module]) -> set[Parameter]:
    """Return the frozen parameters that are outside of blocks, scalars, or quantized."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {
        parameter
        for parameter in module.parameters()
        if not parameter.requires_grad
        if id(parameter) not in inside or not parameter.is_floating_point() or not parameter.ndim
    }


def _snapshot(module: nn.Module) -> tuple[type[nn.Module], set[str], dict[str, set[Any]]]:
    hooks = {
        name: set(registered)
        for name, registered in vars(module).items()
        if "hooks" in name and isinstance(registered, dict)
    }
    return type(module), set(vars(module)), hooks
