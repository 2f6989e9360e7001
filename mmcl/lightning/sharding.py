"""Weights shared out over devices while a task is learned, and whole again at its end (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from mmcl.core.blocks import blocks_of

_STEP = "training_step"
_Marks = dict[nn.Module, tuple[type[nn.Module], set[str], dict[str, set[Any]]]]


class Shards:
    """The weights of a module in training, of which every device holds a share, until ``gather``.

    The blocks of the model are gathered one after another as they are computed. All else that
    learns, the strategy's parameters among it, is whole inside of ``training_step``; what is frozen
    outside of the blocks stays whole. Gradients are means over the devices.

    Args:
        module: with ``model``, ``strategy`` and ``training_step``; its optimiser is not built yet.
        mesh: the devices, see ``devices_of``.
        mark: of the frozen weights, which cannot be hashed while they are shared out.

    Raises:
        ValueError: if something learns whose gradient cannot be shared out.
    """

    def __init__(self, module: Any, mesh: DeviceMesh, mark: str = "") -> None:
        _expect_shareable(module)
        self.module, self.mark = module, mark
        blocks = blocks_of(module.model)
        whole = _stay_whole(module, blocks)
        self._marks: _Marks = {part: _marks(part) for part in module.modules()}
        owned = list(_owned(module))
        # A penalty reads weights after the forward pass: then blocks stay gathered until backward.
        frees = not module.strategy.uses("penalty")
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=frees, ignored_params=whole)
        fully_shard(module, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(module, _STEP)
        self._added = {p: set(vars(p)) - names for p, (_, names, _) in self._marks.items()}
        self._owned = [entry for entry in owned if entry[0]._parameters[entry[1]] is not entry[2]]
        for _, _, parameter in self._owned:
            # The same object takes the whole weight again: others may hold it as well.
            parameter.data = parameter.data.new_empty(0)
        self._is_filtered = True
        # torch writes on the hook, which a method does not allow.
        module.register_state_dict_post_hook(lambda *given: self._leave_shares(given[1]))

    @torch.no_grad()
    def gather(self) -> None:
        """Make the module what it was, with the weights of now, whole on every device."""
        for part in self._marks:
            if isinstance(part, FSDPModule):
                part.reshard()
        whole: dict[int, Tensor] = {}
        for part, name, parameter in self._owned:
            share = part._parameters[name]
            if id(parameter) not in whole and isinstance(share, DTensor):
                whole[id(parameter)] = parameter.data = share.full_tensor().detach()
                parameter.grad = None
            part._parameters[name] = parameter
        for part, (kind, _, hooks) in self._marks.items():
            part.__class__ = kind
            # torch has no way back of its own, and keeps a list of what it once shared out.
            _composable_state._module_state_mapping.pop(part, None)
            for name in self._added[part]:
                vars(part).pop(name, None)
            for name, before in hooks.items():
                for key in set(vars(part)[name]) - before:
                    del vars(part)[name][key]

    def state(self) -> dict[str, Any]:
        """Return the whole state dict; shared weights are given as shares."""
        with self._unfiltered():
            state: dict[str, Any] = self.module.state_dict()
        return state

    def beside(self) -> dict[str, Any]:
        """Return the part of the state that is the same on every device, on the CPU."""
        return {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in self.state().items()
            if not isinstance(value, DTensor)
        }

    @contextmanager
    def _unfiltered(self) -> Iterator[None]:
        self._is_filtered = False
        try:
            yield
        finally:
            self._is_filtered = True

    def _leave_shares(self, state: dict[str, Any]) -> None:
        """Leave in a state dict what a sharded checkpoint holds: the shares of what learns."""
        if self._is_filtered:
            frozen = self.module.frozen
            for name in [n for n, v in state.items() if not isinstance(v, DTensor) or n in frozen]:
                del state[name]


def devices_of(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh to share weights over, of the two-dimensional one that Lightning makes.

    The second dimension, ``tensor_parallel_size``, is the number of devices that share one copy of
    the weights, and the first one, ``data_parallel_size``, the number of copies. Where one of the
    two is 1 the other is the devices that share the only copy.
    """
    copies, sharing = mesh["data_parallel"], mesh["tensor_parallel"]
    if copies.size() > 1 and sharing.size() > 1:
        return mesh
    return copies if sharing.size() == 1 else sharing


def _expect_shareable(module: Any) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.ndim == 0:
            raise ValueError(
                f"'{name}' is a single number that learns, which cannot be shared out over "
                "devices: freeze it (train_scale: false), or use strategy ddp"
            )
        if parameter.requires_grad and parameter._backward_hooks:
            raise ValueError(
                f"{type(module.strategy).__name__} edits the gradient of '{name}' whole as it "
                "comes, and a share of it is all that a device has: use strategy ddp, or take "
                "OLoRA instead"
            )


def _stay_whole(module: Any, blocks: list[nn.Module]) -> set[Parameter]:
    """Return the frozen parameters that are outside of blocks, single numbers, or quantised."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {
        parameter
        for parameter in module.parameters()
        if not parameter.requires_grad
        if id(parameter) not in inside or not parameter.is_floating_point() or not parameter.ndim
    }


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, Parameter]]:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield part, name, parameter


def _marks(part: nn.Module) -> tuple[type[nn.Module], set[str], dict[str, set[Any]]]:
    hooks = {
        name: set(held)
        for name, held in vars(part).items()
        if "hooks" in name and isinstance(held, dict)
    }
    return type(part), set(vars(part)), hooks
