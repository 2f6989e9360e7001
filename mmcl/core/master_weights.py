"""Master weights: float32 parameters of a half-precision model, cast where they are used.

An update of a weight w by less than w / 512 rounds away in bfloat16, and fine-tuning steps are
often smaller. So what trains in full is stored in float32 and rounded in every forward pass, as in
Micikevicius et al. 2018, arXiv:1710.03740; gradients are float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = "_master_dtypes"
"""Attribute of a module: name of a master weight -> dtype in which it is used."""


def keep_master_weights(model: nn.Module) -> int:
    """Turn the trainable float16 and bfloat16 parameters of a model into float32, in place.

    They are the same parameters of the same values and names; modules round them to the old dtype
    when they compute. Parameters that are float32 already stay as they are, so it may be called
    again when others became trainable.

    Returns:
        the number of weights that were turned.
    """
    narrow = {
        id(p): (p, p.dtype)
        for p in model.parameters()
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)
    }
    for module in model.modules():
        own = {n: narrow[id(p)][1] for n, p in _parameters(module) if id(p) in narrow}
        if own:
            vars(module)[_DTYPES] = {**vars(module).get(_DTYPES, {}), **own}
    for module in model.modules() if narrow else ():
        is_done = isinstance(vars(module).get("forward"), _RoundedForward)
        if not is_done and (_masters(module) or _first_master(module)):
            vars(module)["forward"] = _RoundedForward(module, module.forward)
    for parameter, _ in narrow.values():
        parameter.data = parameter.data.float()
    return sum(parameter.numel() for parameter, _ in narrow.values())


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype in which the first floating weight of a module is used.

    It is bfloat16 if there is none, as in a quantized model.
    """
    for part in module.modules():
        for name, parameter in _parameters(part):
            if parameter.is_floating_point():
                dtype: torch.dtype = vars(part).get(_DTYPES, {}).get(name, parameter.dtype)
                return dtype
    return torch.bfloat16


def rounded_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module with master weights in the dtypes in which they are used.

    It is what an export writes: as large as the model was, and of the same predictions.
    """
    dtypes = {
        f"{prefix}.{name}" if prefix else name: dtype
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name, dtype in vars(part).get(_DTYPES, {}).items()
    }
    state: dict[str, Tensor] = module.state_dict()
    return {name: v.to(dtypes[name]) if name in dtypes else v for name, v in state.items()}


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module._parameters.items() if p is not None]


_Master = tuple[nn.Module, str, torch.dtype]
"""A module, the name of one of its own master weights, and the dtype in which it is used."""


def _masters(module: nn.Module) -> list[_Master]:
    """Return the master weights of a module and of its children, whose weights it may read."""
    return [
        (owner, name, dtype)
        for owner in (module, *module.children())
        for name, dtype in vars(owner).get(_DTYPES, {}).items()
    ]


def _first_master(module: nn.Module) -> _Master | None:
    """Return the first floating weight of a model of transformers, if it is a master weight.

    Its type is the ``dtype`` of that model, to which it casts images.
    """
    if not isinstance(getattr(type(module), "dtype", None), property):
        return None
    for part in module.modules():
        for name, parameter in _parameters(part):
            if parameter.is_floating_point():
                dtype = vars(part).get(_DTYPES, {}).get(name)
                return None if dtype is None else (part, name, dtype)
    return None


class _RoundedForward:
    """Forward pass of a module with rounded master weights; a leaf also rounds its inputs."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the forward pass, which transformers and mmcl look at."""
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass."""
        module, masters = self.module, _masters(self.module)
        if not module._modules:
            args, kwargs = _as_used(args, kwargs, masters[0][2])
        with _hidden(masters), _replaced(_first_master(module)):
            return self.forward(*args, **kwargs)


@contextmanager
def _hidden(masters: Sequence[_Master]) -> Iterator[None]:
    """Hide master weights behind rounded ones inside the block.

    A plain attribute hides the parameter of its name, which stays where torch finds it.
    """
    hidden: list[tuple[nn.Module, str]] = []
    try:
        for owner, name, dtype in masters:
            parameter = owner._parameters[name]
            if parameter is not None and name not in vars(owner):
                vars(owner)[name] = parameter.to(dtype)
                hidden.append((owner, name))
        yield
    finally:
        for owner, name in hidden:
            del vars(owner)[name]


@contextmanager
def _replaced(master: _Master | None) -> Iterator[None]:
    """Replace a master weight by the rounded one inside the block, also for ``parameters()``."""
    if master is None:
        yield
        return
    owner, name, dtype = master
    parameter = owner._parameters[name]
    owner._parameters[name] = None if parameter is None else parameter.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        owner._parameters[name] = parameter


def _as_used(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with floating tensors in a dtype, unless autocast chooses it."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value if torch.is_autocast_enabled(value.device.type) else value.to(dtype)

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
