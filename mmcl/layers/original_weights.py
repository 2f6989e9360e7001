"""Original weights that merged ones replace for a while: kept in host memory, restored exactly."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class OriginalWeights:
    """Original weights of layers while merged ones replace them: a GPU's are kept on the host.

    A model of 7 billion weights would otherwise need the memory of its adapted layers twice while
    it generates. Subtracting a merged delta would need no copy, and would round.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[nn.Module, str, Tensor]] = {}

    def keep(self, layer: nn.Module, name: str) -> None:
        """Keep the bits of a weight of a layer, whose ``data`` is then replaced.

        It must be replaced by another tensor, not written to: on the CPU it is itself kept. A
        weight that two layers share is kept once, as it was first.

        Args:
            layer: that has the weight.
            name: of the parameter or buffer in the layer.
        """
        weight = cast(Tensor, getattr(layer, name))
        if id(weight) not in self._kept:
            self._kept[id(weight)] = (layer, name, to_host(weight.data))

    def of(self, weight: Tensor) -> Tensor:
        """Return the kept bits of a weight, on the host."""
        return self._kept[id(weight)][2]

    def restore(self) -> None:
        """Restore every weight on the device where it is now; nothing is kept then."""
        while self._kept:
            _, (layer, name, bits) = self._kept.popitem()
            weight = cast(Tensor, getattr(layer, name))
            weight.data = bits.to(weight.device)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory: itself if it is there, or has no numbers."""
    return tensor if tensor.is_meta else tensor.cpu()
