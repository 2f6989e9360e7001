"""Gates of installed experts, the same in the second pass of gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor


class Gates(dict[str, Tensor]):
    """The gates of the pass that runs now; a copied model starts without any.

    In training gates may belong to a graph, and such tensors cannot be copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        """Return empty gates, which the copied layers share."""
        return Gates()


class KeptGates:
    """A ``context_fn`` of ``torch.utils.checkpoint``: layers run twice read the same gates twice.

    The second run is in the backward pass, when another forward pass (a teacher's) may have changed
    them.

    Args:
        gates: the model's dict.
    """

    def __init__(self, gates: MutableMapping[str, Tensor]) -> None:
        self.gates = gates

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of the first run and of the second."""
        return nullcontext(), self._as_now(dict(self.gates))

    @contextmanager
    def _as_now(self, kept: dict[str, Tensor]) -> Iterator[None]:
        later = dict(self.gates)
        self.gates.clear()
        self.gates.update(kept)
        try:
            yield
        finally:
            self.gates.clear()
            self.gates.update(later)
