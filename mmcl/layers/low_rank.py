"""LowRankSlots: a frozen linear layer with low-rank corrections that are added one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmcl.layers.frozen import corrected, draw_uniform, learning_dtype, widths_of
from mmcl.ops.low_rank import expert_linear, low_rank_linear

Mode = Literal["none", "one", "sum", "fused", "gates"]
_MODES = ("none", "one", "sum", "fused", "gates")


class Slot(nn.Module):
    """One correction B A, zero when new.

    Args:
        A: (r, d_in).
        B: (d_out, r).
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @property
    def learns(self) -> bool:
        """Whether either side gets a gradient."""
        return self.A.requires_grad or self.B.requires_grad


class LowRankSlots(nn.Module):
    """A frozen linear layer and slots (A_i, B_i), each a low-rank correction of it.

    Which slots take part, and how, is chosen with ``activate``; nothing does until then:

    - "one": W x + scale B_t A_t x, the slot that is being trained;
    - "sum": W x + scale * sum of B_i A_i x over the chosen slots;
    - "fused": W x + scale (sum of B_i)(sum of A_i) x, cross terms included, as in HiDe-LLaVA;
    - "gates": W x + scale * sum of g_i B_i A_i x, with g a row of ``gates[name]`` for each row of
      the batch; while there is no ``gates[name]`` the layer answers as its base;
    - "none": W x.

    The choice is not part of the state: a strategy makes it in ``begin_task`` or ``prompts``.
    Frozen slots may be kept side by side in memory; so write on one with ``torch.no_grad()`` and
    ``copy_``, as ``load_state_dict`` does, never through ``.data``.

    Args:
        base: maps (..., d_in) to (..., d_out), with ``in_features``, ``out_features`` and
            ``weight``, for example ``nn.Linear`` or a quantised one; it is frozen.
        scale: alpha / r.
        dropout: share of x that the correction does not see in training, 0 to 1.
        gates: the model's own dict of gates, which it fills in place before a forward pass. It is
            no part of the state, and a deep copy of the model has copies that belong together.
        name: of this layer's entry in ``gates``; several layers may share one.

    **Remembers** ``slots.<i>.A`` (r, d_in) and ``slots.<i>.B`` (d_out, r) for every slot.
    """

    def __init__(
        self,
        base: nn.Module,
        scale: float = 2.0,
        dropout: float = 0.0,
        gates: Mapping[str, Tensor] | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = widths_of(base)
        self.scale, self.dropout = scale, dropout
        self.slots = nn.ModuleList()
        self.mode: Mode = "none"
        self.active: tuple[int, ...] = ()
        self._gates, self._name = gates, name
        self._side_by_side: tuple[list[Any], tuple[Tensor, Tensor]] | None = None
        self._unfolded: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, where other code expects one."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, where other code expects one."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def slot(self, number: int) -> Slot:
        """Return one slot."""
        return cast(Slot, self.slots[number])

    def add_slot(self, rank: int, generator: torch.Generator, trainable: bool = True) -> int:
        """Add a correction that changes nothing yet: A as peft draws it, B zero.

        Args:
            rank: r, 1 or more.
            generator: a CPU generator; the draw is the same on every device.
            trainable: False for a slot that only a checkpoint will fill.

        Returns:
            The number of the new slot; ``activate`` it to let it take part.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}: give 1 or more")
        self._refuse_while_folded("add a slot")
        A = draw_uniform(rank, self.in_features, generator)
        dtype, device = learning_dtype(self.weight), self.weight.device
        B = torch.zeros(self.out_features, rank, dtype=dtype, device=device)
        made = Slot(A.to(device, dtype), B).requires_grad_(trainable)
        self.slots.append(made.train(self.training))
        return len(self.slots) - 1

    def activate(self, mode: Mode, slots: int | Iterable[int] | None = None) -> None:
        """Choose which slots take part in the answer, and how.

        Args:
            mode: see the class.
            slots: their numbers, None = all there are now ("one" wants a number).

        Raises:
            ValueError: on an unknown mode or slot, or ranks that differ where they must not.
        """
        self._refuse_while_folded("choose slots")
        if mode not in _MODES:
            raise ValueError(f"mode is '{mode}', expected one of {', '.join(_MODES)}")
        if slots is None:
            slots = range(len(self.slots))
        chosen = (slots,) if isinstance(slots, int) else tuple(slots)
        if any(not 0 <= number < len(self.slots) for number in chosen):
            raise ValueError(
                f"slots are {list(chosen)} and there are {len(self.slots)}: add_slot comes first"
            )
        if mode == "one" and len(chosen) != 1:
            raise ValueError(f"mode 'one' was given slots {list(chosen)}: name one of them")
        ranks = {self.slot(number).A.shape[0] for number in chosen}
        if mode in ("fused", "gates") and len(ranks) > 1:
            raise ValueError(f"mode '{mode}' needs slots of one rank, got ranks {sorted(ranks)}")
        self.mode, self.active = mode, () if mode == "none" else chosen

    def freeze_slots(self, until: int) -> None:
        """Let slots 0 to ``until`` - 1 learn no more and those from ``until`` on learn."""
        for number in range(len(self.slots)):
            self.slot(number).requires_grad_(number >= until)
        self._side_by_side = None

    def forward(self, x: Tensor) -> Tensor:
        """Answer with the active slots.

        Args:
            x: (..., d_in).

        Returns:
            (..., d_out).
        """
        if self._unfolded is not None or not self.active:
            return cast(Tensor, self.base(x))
        if self.mode == "gates":
            gates = None if self._gates is None else self._gates.get(self._name)
            if gates is None:
                return cast(Tensor, self.base(x))
            if gates.shape[-1] != len(self.active):
                raise ValueError(
                    f"gates['{self._name}'] weighs {gates.shape[-1]} slots and {len(self.active)} "
                    "are active: give one weight for each active slot, in their order"
                )
            return self._corrected(x, expert_linear, *self._pair(self.active), gates, self.scale)
        learning = tuple(number for number in self.active if self.slot(number).learns)
        if self.mode == "fused" or not learning or len(learning) == len(self.active):
            return self._corrected(x, low_rank_linear, *self._pair(self.active), self.scale)
        past = self._pair(tuple(number for number in self.active if number not in learning))
        return self._corrected(x, low_rank_linear, *self._pair(learning), self.scale, past)

    def delta_weight(self, slots: Iterable[int] | None = None) -> Tensor:
        """Return what slots add to the frozen weight, scale included.

        Args:
            slots: sum of these; None = the active ones, in their mode.

        Returns:
            (d_out, d_in) in the dtype of the slots, with gradient.

        Raises:
            RuntimeError: if the active ones are weighed row by row.
        """
        if slots is None and self.mode == "gates":
            raise RuntimeError(
                "slots are weighed by gates, which differ from row to row, so no one weight does "
                "the same: activate 'sum', or name the slots"
            )
        chosen = self.active if slots is None else tuple(slots)
        if not chosen:
            return torch.zeros_like(self.weight, dtype=learning_dtype(self.weight))
        fused = slots is None and self.mode == "fused"
        A, B = _as_one([self.slot(number) for number in chosen], fused)
        return self.scale * (B @ A)

    @property
    def can_fold(self) -> bool:
        """Whether one weight can answer for base and slots: no gates, and no quantised base."""
        return self.mode != "gates" and self.weight.is_floating_point()

    def fold(self) -> None:
        """Put W + delta in place of W until ``unfold``; the layer then costs what its base does.

        Raises:
            RuntimeError: if it is folded, or cannot be.
        """
        self._refuse_while_folded("fold")
        if not self.can_fold:
            raise RuntimeError(
                "this layer cannot be folded: its slots are weighed by gates or its base is "
                "quantised; ask can_fold first"
            )
        kept = self.weight.data
        # Outside inference mode, because tensors made in it may not become weights.
        with torch.inference_mode(False), torch.no_grad():
            delta = self.delta_weight()
            wide = torch.promote_types(kept.dtype, torch.float32)
            self.weight.data = (kept.to(wide) + delta.to(wide)).to(kept.dtype)
        self._unfolded = kept

    def unfold(self) -> None:
        """Put the original weight back, the very same bits; nothing happens if it is there."""
        if self._unfolded is not None:
            self.weight.data = self._unfolded.to(self.weight.device)
            self._unfolded = None

    def extra_repr(self) -> str:
        """Say what is active."""
        return f"scale={self.scale}, mode='{self.mode}', active={list(self.active)}"

    def _corrected(self, x: Tensor, correction: Callable[..., Tensor], *rest: Any) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return corrected(self.base, x, dropout, correction, *rest)

    def _pair(self, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The pairs of some slots as one; kept, as narrow as the base, if all are frozen."""
        slots = [self.slot(number) for number in numbers]
        fused = self.mode == "fused"
        if any(slot.learns for slot in slots):
            return _as_one(slots, fused)
        # functional_call, load_state_dict and .to() each change one of these.
        marks: list[Any] = [fused, self.weight.dtype]
        for tensor in (side for slot in slots for side in (slot.A, slot.B)):
            marks += [id(tensor), tensor.data_ptr(), tensor._version]
        if self._side_by_side is None or self._side_by_side[0] != marks:
            with torch.inference_mode(False), torch.no_grad():
                A, B = _as_one(slots, fused)
                if self.weight.is_floating_point():
                    A, B = A.to(self.weight.dtype), B.to(self.weight.dtype)
            self._side_by_side = (marks, (A, B))
        return self._side_by_side[1]

    def _refuse_while_folded(self, what: str) -> None:
        if self._unfolded is not None:
            raise RuntimeError(f"cannot {what} while the layer is folded: unfold() it first")


def _as_one(slots: list[Slot], fused: bool) -> tuple[Tensor, Tensor]:
    if len(slots) == 1:
        return slots[0].A, slots[0].B
    A: list[Tensor] = [slot.A for slot in slots]
    B: list[Tensor] = [slot.B for slot in slots]
    if fused:
        return torch.stack(A).sum(0), torch.stack(B).sum(0)
    return torch.cat(A), torch.cat(B, 1)
