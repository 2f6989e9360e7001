"""Snapshot: copies of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot(nn.Module):
    """Copies of named tensors (weights of an old model, Fisher sums) that are never trained.

    The copies keep their dtype whatever the module is cast to, and go where the module goes.
    ``Snapshot()`` is empty until ``take``.

    **Remembers** every tensor taken, at its own size. **Asks of the model** nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}
        self._device = torch.device("cpu")

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored tensors by detached copies.

        Args:
            tensors: name -> tensor of any shape and dtype; the copy stays on the tensor's device.
        """
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for tensor in self._tensors.values():
            self._device = tensor.device

    def get(self, name: str) -> Tensor:
        """Return one copy.

        Raises:
            KeyError: if nothing of that name was taken.
        """
        if name not in self._tensors:
            raise KeyError(
                f"snapshot has no '{name}', it holds {len(self)} other tensors: "
                "take it before getting it"
            )
        return self._tensors[name]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All copies by name, in the order taken; the dict is new, the tensors are the store's."""
        return dict(self._tensors)

    def with_row(self, name: str, index: int, row: Tensor) -> Tensor:
        """Return the tensor of a name with one row written, grown by zeros where needed."""
        old = self._tensors.get(name)
        known = 0 if old is None else len(old)
        new = row.new_zeros(max(index + 1, known), *row.shape)
        if old is not None:
            new[:known] = old
        new[index] = row
        return new

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken yet."""
        return not self._tensors

    def __len__(self) -> int:
        """Return the number of tensors held."""
        return len(self._tensors)

    def __bool__(self) -> bool:
        """Return True: an empty snapshot is still a module; use ``is_empty``."""
        return True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tensors."""
        return {"tensors": dict(self._tensors)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the tensors of a checkpoint onto this module's device."""
        taken = {name: tensor.to(self._device) for name, tensor in state["tensors"].items()}
        self.take(taken)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Snapshot:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Only the device is taken from fn: a cast to half must not round stored weights.
        self._device = fn(torch.empty(0, device=self._device)).device
        self._tensors = {name: t.to(self._device) for name, t in self._tensors.items()}
        return self
