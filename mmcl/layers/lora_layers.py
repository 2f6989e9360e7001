"""LoRA layers: a frozen linear layer with adapters added one by one, or with routed experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.layers.original_weights import OriginalWeights
from mmcl.ops.lora_linear import expert_linear, low_rank_linear, routed_linear

Mode = Literal["none", "one", "sum", "fused", "gates"]
_MODES = ("none", "one", "sum", "fused", "gates")


class LoRAAdapter(nn.Module):
    """LoRA adapter of one task or expert: B (d_out, r) times A (r, d_in), zero when new."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

    @property
    def is_trainable(self) -> bool:
        """Whether A or B is trainable."""
        return self.lora_A.requires_grad or self.lora_B.requires_grad


class FrozenLinear(nn.Module):
    """Frozen linear layer to which a subclass adds adapters.

    Args:
        base: maps (..., d_in) to (..., d_out), with ``in_features``, ``out_features`` and
            ``weight``, for example ``nn.Linear`` or a quantized one; it is frozen.
        scale: alpha / r.
        dropout: fraction of x that adapters do not see in training, 0 to 1.

    Raises:
        TypeError: if the base does not state its dims.
    """

    def __init__(self, base: nn.Module, scale: float, dropout: float) -> None:
        super().__init__()
        d_in, d_out = getattr(base, "in_features", None), getattr(base, "out_features", None)
        if not isinstance(d_in, int) or not isinstance(d_out, int):
            raise TypeError(
                f"{type(base).__name__} has no in_features and out_features: give a linear layer"
            )
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = d_in, d_out
        self.scale, self.dropout = scale, dropout

    @property
    def weight(self) -> Tensor:
        """Frozen weight, where other code expects one."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """Frozen bias, where other code expects one."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def add_delta(self, x: Tensor, delta: Callable[..., Tensor], *rest: Any) -> Tensor:
        """Return the output (..., d_out) of base and adapters, fused where the base is plain.

        ``delta`` is one of ``mmcl.ops.lora_linear``, called as (x, weight, bias, *rest).
        """
        dropout = self.dropout if self.training else 0.0
        if dropout == 0 and is_plain_linear(self.base):
            return delta(x, self.base.weight, self.base.bias, *rest)
        out = cast(Tensor, self.base(x))
        seen = functional.dropout(x, dropout) if dropout else x
        return out + delta(seen, None, None, *rest).to(out.dtype)


class MultiLoRALinear(FrozenLinear):
    """A frozen linear layer and adapters (A_i, B_i), each of low rank.

    ``set_adapters`` chooses which adapters take part, and how; none does until then:

    - "one": W x + scale B_t A_t x, the adapter of the task that is trained;
    - "sum": W x + scale * sum of B_i A_i x over the chosen adapters;
    - "fused": W x + scale (sum of B_i)(sum of A_i) x, cross terms included, as in HiDe-LLaVA;
    - "gates": W x + scale * sum of g_i B_i A_i x, with g the ``gates[name]`` of each sample of the
      batch; while there is no ``gates[name]`` the layer returns the output of its base;
    - "none": W x.

    The choice is not part of the state: a strategy makes it in ``begin_task`` or ``prompts``.
    Frozen adapters may be cached as one concatenated pair; so write to one with
    ``torch.no_grad()`` and ``copy_``, as ``load_state_dict`` does, never through ``.data``.

    Args:
        base: as in ``FrozenLinear``.
        scale: alpha / r.
        dropout: fraction of x that adapters do not see in training, 0 to 1.
        gates: the model's own dict of gates, which it fills in place before a forward pass. It is
            not part of the state; a deep copy of the model and of its layers stays consistent.
        name: of this layer's entry in ``gates``; several layers may share one.

    **Remembers** ``adapters.<i>.lora_A`` (r, d_in) and ``adapters.<i>.lora_B`` (d_out, r) for every
    adapter.
    """

    def __init__(
        self,
        base: nn.Module,
        scale: float = 2.0,
        dropout: float = 0.0,
        gates: Mapping[str, Tensor] | None = None,
        name: str = "",
    ) -> None:
        super().__init__(base, scale, dropout)
        self.adapters = nn.ModuleList()
        self.mode: Mode = "none"
        self.active: tuple[int, ...] = ()
        self._gates, self._name = gates, name
        self._concatenated: tuple[list[Any], tuple[Tensor, Tensor]] | None = None
        self._unmerged: OriginalWeights | None = None

    def adapter(self, number: int) -> LoRAAdapter:
        """Return one adapter."""
        return cast(LoRAAdapter, self.adapters[number])

    def add_adapter(self, rank: int, generator: torch.Generator, trainable: bool = True) -> int:
        """Add an adapter whose output is zero: A as peft draws it, B zero.

        Args:
            rank: r, 1 or more.
            generator: a CPU generator; the draw is the same on every device.
            trainable: False for an adapter that only a checkpoint will fill.

        Returns:
            The number of the new adapter; ``set_adapters`` it to let it take part.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}: give 1 or more")
        self._expect_unmerged("add an adapter")
        A = kaiming_uniform(rank, self.in_features, generator)
        dtype, device = adapter_dtype(self.weight), self.weight.device
        B = torch.zeros(self.out_features, rank, dtype=dtype, device=device)
        adapter = LoRAAdapter(A.to(device, dtype), B).requires_grad_(trainable)
        self.adapters.append(adapter.train(self.training))
        return len(self.adapters) - 1

    def set_adapters(self, mode: Mode, adapters: int | Iterable[int] | None = None) -> None:
        """Choose which adapters take part in the output, and how.

        Args:
            mode: see the class.
            adapters: numbers of the adapters, None = all there are now ("one" needs a number).

        Raises:
            ValueError: on an unknown mode or adapter, or ranks that differ where they must not.
        """
        self._expect_unmerged("choose adapters")
        if mode not in _MODES:
            raise ValueError(f"mode is '{mode}', expected one of {', '.join(_MODES)}")
        if adapters is None:
            adapters = range(len(self.adapters))
        chosen = (adapters,) if isinstance(adapters, int) else tuple(adapters)
        if any(not 0 <= number < len(self.adapters) for number in chosen):
            raise ValueError(
                f"adapters are {list(chosen)} and there are {len(self.adapters)}: call add_adapter "
                "first"
            )
        if mode == "one" and len(chosen) != 1:
            raise ValueError(f"mode 'one' was given adapters {list(chosen)}: name one of them")
        ranks = {self.adapter(number).lora_A.shape[0] for number in chosen}
        if mode in ("fused", "gates") and len(ranks) > 1:
            raise ValueError(f"mode '{mode}' needs adapters of one rank, got ranks {sorted(ranks)}")
        self.mode, self.active = mode, () if mode == "none" else chosen

    def freeze_adapters(self, until: int) -> None:
        """Freeze adapters 0 to ``until`` - 1 and make those from ``until`` on trainable."""
        for number in range(len(self.adapters)):
            self.adapter(number).requires_grad_(number >= until)
        self._concatenated = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., d_out) of base and active adapters for x (..., d_in)."""
        if self._unmerged is not None or not self.active:
            return cast(Tensor, self.base(x))
        if self.mode == "gates":
            gates = None if self._gates is None else self._gates.get(self._name)
            if gates is None:
                return cast(Tensor, self.base(x))
            if gates.shape[-1] != len(self.active):
                raise ValueError(
                    f"gates['{self._name}'] weighs {gates.shape[-1]} adapters and "
                    f"{len(self.active)} are active: give one weight for each, in their order"
                )
            experts = self._concatenate(self.active)
            return self.add_delta(x, expert_linear, *experts, gates, self.scale)
        trainable = tuple(number for number in self.active if self.adapter(number).is_trainable)
        if self.mode == "fused" or not trainable or len(trainable) == len(self.active):
            return self.add_delta(x, low_rank_linear, *self._concatenate(self.active), self.scale)
        past = self._concatenate(tuple(number for number in self.active if number not in trainable))
        return self.add_delta(x, low_rank_linear, *self._concatenate(trainable), self.scale, past)

    def delta_weight(self, adapters: Iterable[int] | None = None) -> Tensor:
        """Return the weight delta of adapters, scale included.

        Args:
            adapters: adapters to sum; None = the active ones, in their mode.

        Returns:
            (d_out, d_in) in the dtype of the adapters, with gradient.

        Raises:
            RuntimeError: if the active ones are weighed per sample.
        """
        if adapters is None and self.mode == "gates":
            raise RuntimeError(
                "adapters are weighed by gates, which differ from sample to sample, so no single "
                "weight is equivalent: activate 'sum', or name the adapters"
            )
        chosen = self.active if adapters is None else tuple(adapters)
        if not chosen:
            return torch.zeros_like(self.weight, dtype=adapter_dtype(self.weight))
        fused = adapters is None and self.mode == "fused"
        A, B = _as_one([self.adapter(number) for number in chosen], fused)
        with torch.autocast(A.device.type, enabled=False):
            return self.scale * (B @ A)

    @property
    def can_merge(self) -> bool:
        """Whether one weight can replace base and adapters: no gates, no quantized base."""
        return self.mode != "gates" and self.weight.is_floating_point()

    def merge(self) -> None:
        """Merge: W + delta replaces W until ``unmerge``; the layer then costs what its base does.

        Raises:
            RuntimeError: if the layer is merged, or cannot be.
        """
        self._expect_unmerged("merge")
        if not self.can_merge:
            raise RuntimeError(
                "this layer cannot be merged: its adapters are weighed by gates or its base is "
                "quantized; check can_merge first"
            )
        kept, weight = OriginalWeights(), self.weight
        # Outside inference mode, because tensors made in it may not become weights.
        with torch.inference_mode(False), torch.no_grad():
            delta = self.delta_weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            merged = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
            kept.keep(self.base, "weight")
        weight.data = merged
        self._unmerged = kept

    def unmerge(self) -> None:
        """Unmerge: restore the original weight bit for bit; no effect on an unmerged layer."""
        if self._unmerged is not None:
            self._unmerged.restore()
            self._unmerged = None

    def extra_repr(self) -> str:
        """Return scale, mode and active adapters."""
        return f"scale={self.scale}, mode='{self.mode}', active={list(self.active)}"

    def _concatenate(self, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return adapters as one (A, B); cached in the dtype of the base if all are frozen."""
        adapters = [self.adapter(number) for number in numbers]
        fused = self.mode == "fused"
        if any(adapter.is_trainable for adapter in adapters):
            return _as_one(adapters, fused)
        # functional_call, load_state_dict and .to() each change one of these.
        marks: list[Any] = [fused, self.weight.dtype]
        for tensor in (side for one in adapters for side in (one.lora_A, one.lora_B)):
            marks += [id(tensor), tensor.data_ptr(), tensor._version]
        if self._concatenated is None or self._concatenated[0] != marks:
            with torch.inference_mode(False), torch.no_grad():
                A, B = _as_one(adapters, fused)
                if self.weight.is_floating_point():
                    A, B = A.to(self.weight.dtype), B.to(self.weight.dtype)
            self._concatenated = (marks, (A, B))
        return self._concatenated[1]

    def _expect_unmerged(self, what: str) -> None:
        if self._unmerged is not None:
            raise RuntimeError(f"cannot {what} while the layer is merged: unmerge() it first")


def _as_one(adapters: list[LoRAAdapter], fused: bool) -> tuple[Tensor, Tensor]:
    if len(adapters) == 1:
        return adapters[0].lora_A, adapters[0].lora_B
    A: list[Tensor] = [adapter.lora_A for adapter in adapters]
    B: list[Tensor] = [adapter.lora_B for adapter in adapters]
    if fused:
        return torch.stack(A).sum(0), torch.stack(B).sum(0)
    return torch.cat(A), torch.cat(B, 1)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is a plain ``nn.Linear``: floating weights, no hooks, its own ``forward``.

    A fused kernel skips the layer's call, which hooks and a replaced ``forward`` rely on.
    """
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and "forward" not in vars(layer)
        and layer.weight.is_floating_point()
    )


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the adapters of a weight: float32, or float64 for float64.

    Updates of a small learning rate vanish in the rounding of narrower floats.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def kaiming_uniform(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw the Kaiming-uniform start (rows, dim) of a linear map, as torch and peft do, float32.

    With a = sqrt 5 it is uniform in plus or minus 1 / sqrt(dim). Drawn on the CPU.
    """
    bound = 1 / math.sqrt(dim)
    return torch.empty(rows, dim).uniform_(-bound, bound, generator=generator)


_INIT_STD = 0.01


class MoELoRALinear(FrozenLinear):
    """W x + scale * sum_i w_i B_i A_i x with w = softmax(G x): all experts, weighed per token.

    CoIN, Chen et al. 2024, arXiv:2403.08350. A starts at N(0, 0.01^2), B at zero, the router as a
    linear layer does; so the output of a new layer is that of its base. One expert is plain LoRA.

    Args:
        base: as in ``FrozenLinear``.
        num_experts: E, 1 or more.
        rank: r of each expert.
        scale: alpha / r.
        generator: a CPU generator; the draw is the same on every device.
        dropout: fraction of x that experts and router do not see in training, 0 to 1.

    **Remembers** ``A`` (E * r, d_in), ``B`` (d_out, E * r) and ``router`` (E, d_in), expert after
    expert.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
        dropout: float = 0.0,
    ) -> None:
        if num_experts < 1 or rank < 1:
            raise ValueError(
                f"num_experts is {num_experts} and rank {rank}: give 1 or more of each"
            )
        super().__init__(base, scale, dropout)
        self.num_experts, self.rank = num_experts, rank
        dtype, device = adapter_dtype(self.weight), self.weight.device
        ranks = num_experts * rank
        A = torch.empty(ranks, self.in_features).normal_(0, _INIT_STD, generator=generator)
        router = kaiming_uniform(num_experts, self.in_features, generator)
        self.A = nn.Parameter(A.to(device, dtype))
        self.B = nn.Parameter(torch.zeros(self.out_features, ranks, dtype=dtype, device=device))
        self.router = nn.Parameter(router.to(device, dtype))

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Return A_i (r, d_in) and B_i (d_out, r) as views."""
        own = slice(number * self.rank, (number + 1) * self.rank)
        return self.A[own], self.B[:, own]

    def routing(self, x: Tensor) -> Tensor:
        """Return the router's weights (..., E) of the experts for each token of x (..., d_in)."""
        return (x @ self.router.to(x.dtype).T).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., d_out) of the base plus that of all experts, x is (..., d_in)."""
        return self.add_delta(x, routed_linear, self.A, self.B, self.router, self.scale)

    def extra_repr(self) -> str:
        """Return number and rank of the experts."""
        return f"num_experts={self.num_experts}, rank={self.rank}, scale={self.scale}"
