"""The alarm for strategies that do nothing: a penalty without effect, an empty store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcl.core import Strategy

_STEPS_HELD = 64
"""Steps between two looks at the values: a look waits for the device."""


class Alarm:
    """Watches the penalty terms of one task, each until it was seen alive.

    A term is dead if on no step it was both connected to the graph and different from zero.
    """

    def __init__(self) -> None:
        self._alive: set[str] = set()
        self._connected: set[str] = set()
        self._held: dict[str, list[Tensor]] = {}

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Look at the terms of a step; waits for the device once in 64 steps at most."""
        if len(terms) == 1:
            return
        for name, term in terms.items():
            if name == "task" or name in self._alive:
                continue
            held = self._held.setdefault(name, [])
            if term.requires_grad:
                self._connected.add(name)
                held.append(term.detach())
            if len(held) == _STEPS_HELD:
                self._judge(name)

    def report(self, strategy: Strategy, task: str) -> list[str]:
        """Return one sentence for each part that did nothing over the task."""
        name = type(strategy).__name__
        dead = []
        for term in self._held:
            self._judge(term)
            if term not in self._alive:
                is_connected = term in self._connected
                why = "was 0 on every step" if is_connected else "has no gradient"
                dead.append(f"penalty '{term}' {why}")
        dead += [str(part) for part in strategy.idle()]
        return [f"{name} did nothing with one of its parts in task '{task}': {d}" for d in dead]

    def state(self) -> dict[str, list[str]]:
        """Return what was seen so far, for the checkpoint of a task that is not done."""
        for term in self._held:
            self._judge(term)
        seen = {"met": self._held, "connected": self._connected, "alive": self._alive}
        return {what: sorted(terms) for what, terms in seen.items()}

    def load(self, state: Mapping[str, Sequence[str]]) -> None:
        """Go on watching."""
        self._held = {term: [] for term in state["met"]}
        self._connected, self._alive = set(state["connected"]), set(state["alive"])

    def _judge(self, name: str) -> None:
        """Note whether one of the values held is not 0, and let them go."""
        held = self._held[name]
        if held and float(torch.stack(held).abs().max()) > 0:
            self._alive.add(name)
        held.clear()
