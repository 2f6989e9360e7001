"""Gates of expert layers for the current forward pass, also when gradient checkpointing repeats it.

Only models fill them; ``mmcl.layers`` reads them as a plain mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor


class ExpertGates(dict[str, Tensor]):
    """Gates (B, E) of the current forward pass by the name of the experts; a deep copy is empty.

    Gates may be part of an autograd graph, and torch cannot deep-copy such tensors.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGates:
        """Return empty gates, which the copied layers share."""
        return ExpertGates()


class GateReplayContext:
    """Context function of ``torch.utils.checkpoint`` that restores the gates of the first pass.

    A checkpointed layer runs again in the backward pass, when another forward pass (a teacher's)
    may have changed the gates.

    Args:
        gates: the model's gates, which its layers read.
    """

    def __init__(self, gates: MutableMapping[str, Tensor]) -> None:
        self.gates = gates

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of the first pass and of its repetition."""
        return nullcontext(), self._restored(dict(self.gates))

    @contextmanager
    def _restored(self, gates: dict[str, Tensor]) -> Iterator[None]:
        later = dict(self.gates)
        self.gates.clear()
        self.gates.update(gates)
        try:
            yield
        finally:
            self.gates.clear()
            self.gates.update(later)
