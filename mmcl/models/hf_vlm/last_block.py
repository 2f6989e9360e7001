"""The last decoder block computed only at the positions whose output is used; exact.

Keys and values of the last block are needed at all positions, everything behind them (queries,
attention, MLP) only where the head is applied. The block runs twice by its own code: once until its
keys and values are known, and once for the used positions with these keys and values as a cache. So
nothing is assumed about a family, and the first pass of a model proves it on its own batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.model import trial_pass

_MAX_SHARE = 0.5
"""Share of the positions beyond which narrowing gains nothing."""
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_NARROW_TOLERANCE = 0.05


class LastBlock:
    """Runs a decoder so that its last block computes some positions only, where that is exact.

    Args:
        decoder: model without its head, called with ``input_ids`` (B, L) and more keywords.
        block: its last decoder block; None, where its blocks are not of one type, computes all.
    """

    def __init__(self, decoder: nn.Module, block: nn.Module | None) -> None:
        # In a tuple, because this is no module and they belong to the model.
        self._modules = (decoder, block)
        self._proven: dict[tuple[str, ...], bool] = {}

    def hidden_states(
        self, inputs: Mapping[str, Any], samples: Tensor, positions: Tensor
    ) -> tuple[Tensor, Any]:
        """Return the last hidden states (S, D) of some positions, and the output of the decoder.

        Args:
            inputs: keywords of the decoder, with ``input_ids`` (B, L).
            samples: (S,) sample of each position, ascending.
            positions: (S,) 0 to L - 1.
        """
        tokens = inputs["input_ids"]
        grid, slots = _as_grid(samples, positions, len(tokens))
        if self._is_narrow(inputs, grid, samples, slots):
            out = self._narrow(inputs, grid)
            hidden = out.last_hidden_state.flatten(0, 1)
            return hidden.index_select(0, samples * grid.shape[1] + slots), out
        out = self._modules[0](**inputs)
        hidden = out.last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, samples * tokens.shape[1] + positions), out

    def _is_narrow(
        self, inputs: Mapping[str, Any], grid: Tensor, samples: Tensor, slots: Tensor
    ) -> bool:
        block, length = self._modules[1], inputs["input_ids"].shape[1]
        if (
            block is None
            or not grid.numel()
            or grid.shape[1] > _MAX_SHARE * length
            or _is_observed(block)
        ):
            return False
        key = tuple(sorted(name for name, value in inputs.items() if value is not None))
        if key not in self._proven:
            self._proven[key] = self._is_exact(inputs, grid, samples, slots)
        return self._proven[key]

    def _narrow(self, inputs: Mapping[str, Any], grid: Tensor) -> Any:
        decoder, block = self._modules
        if block is None:
            return decoder(**inputs)
        with _forward_of(block, partial(_forward_at, block, grid)):
            return decoder(**inputs)

    @torch.no_grad()
    def _is_exact(
        self, inputs: Mapping[str, Any], grid: Tensor, samples: Tensor, slots: Tensor
    ) -> bool:
        """Whether the narrow pass equals the whole one on these inputs."""
        decoder = self._modules[0]
        with trial_pass(decoder):
            whole = decoder(**_without_cache(inputs)).last_hidden_state
            wanted = whole[samples, grid[samples, slots]].double()
            try:
                found = self._narrow(_without_cache(inputs), grid).last_hidden_state
            # A family that does more behind the block fails in a way of its own.
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
                return False
        if found.shape[:2] != grid.shape:
            return False
        tolerance = _TOLERANCES.get(whole.dtype, _NARROW_TOLERANCE)
        if torch.is_autocast_enabled(whole.device.type):
            tolerance = _NARROW_TOLERANCE
        worst = (found[samples, slots].double() - wanted).abs().max()
        return bool(worst <= tolerance * wanted.abs().max())


def _as_grid(samples: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the positions of each sample (B, Q), padded with 0, and the slot (S,) of each."""
    sizes = torch.bincount(samples, minlength=count)
    starts = sizes.cumsum(0) - sizes
    slots = torch.arange(len(samples), device=samples.device) - starts[samples]
    grid = positions.new_zeros(count, int(sizes.max()) if len(samples) else 0)
    grid[samples, slots] = positions
    return grid, slots


def _is_observed(block: nn.Module) -> bool:
    """Whether something looks at the block's activations, or computes them a second time."""
    if (getattr(block, "gradient_checkpointing", False) and block.training) or (
        "forward" in vars(block)
    ):
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def _without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of a trial pass, which writes into a copy of the given cache, if any."""
    names = [name for name in ("cache", "past_key_values") if inputs.get(name) is not None]
    return {**inputs, "use_cache": False, **{name: copy.deepcopy(inputs[name]) for name in names}}


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module inside the block."""
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del block.forward


class _KeysAndValuesFound(Exception):  # noqa: N818  # control flow, not an error
    """Ends the first pass of a block."""


class _Recorder:
    """Cache that ends the pass once it has keys and values; they go to the real cache, if any."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.states: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record keys and values, and end the pass."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        self.states = (keys, values)
        raise _KeysAndValuesFound


class _Recorded:
    """Cache that returns recorded keys and values, whatever it is given."""

    def __init__(self, states: tuple[Tensor, Tensor]) -> None:
        self.states = states

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the recorded keys and values."""
        return self.states


def _forward_at(block: nn.Module, grid: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward pass of a decoder block at the positions (B, Q) of a grid: (B, Q, D)."""
    forward = type(block).forward
    name = "cache" if "cache" in kwargs else "past_key_values"
    recorder = _Recorder(kwargs.get(name))
    with suppress(_KeysAndValuesFound):
        forward(block, hidden, *args, **{**kwargs, name: recorder})
    if recorder.states is None:
        raise TypeError(f"{type(block).__name__} asks no cache for keys and values")
    kwargs = {key: _at(key, value, grid, hidden.shape[1]) for key, value in kwargs.items()}
    if kwargs.get("attention_mask") is None:
        count = recorder.states[0].shape[-2]
        index = torch.arange(count, device=grid.device)
        # With keys of earlier passes, the positions of this one are the last.
        kwargs["attention_mask"] = index <= grid[:, None, :, None] + count - hidden.shape[1]
    rows = torch.take_along_dim(hidden, grid[..., None], 1)
    return forward(block, rows, *args, **{**kwargs, name: _Recorded(recorder.states)})


def _at(name: str, value: Any, grid: Tensor, length: int) -> Any:
    """Return a keyword of a block at the positions of a grid; (..., B, Q) of (..., B, L)."""
    if isinstance(value, tuple | list):
        return type(value)(_at(name, one, grid, length) for one in value)
    if not isinstance(value, Tensor):
        return value
    if name.startswith("position_ids") and value.shape[-1] == length:
        return _rows(value[..., None], grid)[..., 0]
    if name.startswith("position_embeddings") and value.shape[-2] == length:
        return _rows(value, grid)
    if name == "attention_mask" and value.ndim == 4 and value.shape[-2] == length:
        return torch.take_along_dim(value.expand(len(grid), -1, -1, -1), grid[:, None, :, None], 2)
    return value


def _rows(value: Tensor, grid: Tensor) -> Tensor:
    """Return the rows (..., B, Q, D) of a tensor (..., B or 1, L, D)."""
    wide = value.expand(*value.shape[:-3], len(grid), *value.shape[-2:])
    return torch.take_along_dim(wide, grid.view(*(1,) * (wide.ndim - 3), *grid.shape, 1), -2)
