"""The alarm for strategies that do nothing: a penalty without effect, an empty store."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmcl.core import Strategy


class Alarm:
    """Watches the penalty terms of one task.

    A term is dead if on no step it was both connected to the graph and different from zero.
    """

    def __init__(self) -> None:
        self._seen: dict[str, bool] = {}
        self._largest: dict[str, Tensor] = {}

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Look at the terms of a step; costs no wait for the device."""
        if len(terms) == 1:
            return
        for name, term in terms.items():
            if name == "task":
                continue
            self._seen[name] = self._seen.get(name, False) or term.requires_grad
            size = term.detach().abs()
            before = self._largest.get(name)
            self._largest[name] = size if before is None else before.maximum(size)

    def report(self, strategy: Strategy, task: str) -> list[str]:
        """Return one sentence for each part that did nothing over the task."""
        name = type(strategy).__name__
        dead = []
        for term, has_gradient in self._seen.items():
            if not has_gradient:
                dead.append(f"penalty '{term}' has no gradient")
            elif not float(self._largest[term]) > 0:
                dead.append(f"penalty '{term}' was 0 on every step")
        dead += [str(part) for part in strategy.idle()]
        return [f"{name} did nothing with one of its parts in task '{task}': {d}" for d in dead]
