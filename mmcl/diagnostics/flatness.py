"""Flatness of a minimum: mean rise of the loss under relative Gaussian noise on the weights.

Every weight tensor w gets sigma ||w||_rms N(0, 1), as in the relative perturbations of Li et al.
2018, arXiv:1712.09913, by tensor. Pre-trained models forget less where the loss is flat: Mehta et
al. 2021, arXiv:2112.09153.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmcl.core.seeding import generator
from mmcl.diagnostics.task_loss import ProbeData, finite_or_none, mean_or_none, measure_task
from mmcl.evaluation.diagnostic_record import Diagnostic, Panel, Series
from mmcl.lightning.module import ContinualModule

SIGMAS = (1e-3, 3e-3, 1e-2)
_TEXT = (
    "Mean rise of the loss under Gaussian noise on every weight tensor, of size sigma times the "
    "tensor's root mean square, over {} seeded draws. Mean over the tasks of each state, and each "
    "task at the largest sigma."
)


@contextmanager
def add_noise(model: nn.Module, sigma: float, *seeds: int) -> Iterator[None]:
    """Add relative Gaussian noise to every weight inside the block; afterwards restore the bits.

    Each floating-point parameter w becomes w + sigma ||w||_rms N(0, 1), where ||w||_rms is the root
    of the mean square of its entries; so a tensor of zeros stays. Buffers are left alone.

    Args:
        model: changed in place.
        sigma: relative size of the noise, 0 or more.
        seeds: of the draw; the noise of a parameter depends on them and on its position.

    Raises:
        ValueError: if sigma is negative or not finite.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma is {sigma}: give a finite number of 0 or more")
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                if not parameter.is_floating_point():
                    continue
                kept.append((parameter, parameter.detach().clone()))
                wide = parameter.double()
                size = float(wide.square().mean().sqrt()) if parameter.numel() else 0.0
                noise = torch.randn(parameter.shape, generator=generator(*seeds, index))
                parameter.copy_(wide + sigma * size * noise.to(wide))
        yield
    finally:
        with torch.no_grad():
            for parameter, bits in kept:
                parameter.copy_(bits)


def loss_rise(
    model: nn.Module,
    measure: Callable[[], Sequence[float]],
    start: Sequence[float],
    *,
    sigma: float,
    draws: int,
    seed: int,
) -> list[float]:
    """Return the mean rise of losses under noise on the weights of a model.

    Args:
        model: changed in place, and restored.
        measure: returns the loss of each task with the current weights.
        start: the losses without noise.
        sigma: relative size of the noise.
        draws: of the noise, 1 or more.
        seed: of the draws.

    Returns:
        mean over draws of L(w + noise) - L(w), for each task.

    Raises:
        ValueError: if ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: give 1 or more")
    sums = [0.0] * len(start)
    for draw in range(draws):
        with add_noise(model, sigma, seed, draw):
            sums = [total + loss for total, loss in zip(sums, measure(), strict=True)]
    return [total / draws - loss for total, loss in zip(sums, start, strict=True)]


def flatness(
    load: Callable[[int], ContinualModule | None],
    probes: ProbeData,
    rows: Sequence[int],
    numbers: Sequence[int] | None = None,
    *,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 3,
    seed: int = 0,
) -> Diagnostic:
    """Measure the loss rise under weight noise of chosen states of a run.

    Adapters are merged into the weights first, so that methods are compared by the weights they
    run with.

    Args:
        load: row -> the module after so many tasks, on the device of ``probes``; None = lost.
        probes: of the run's stream.
        rows: numbers of learned tasks.
        numbers: tasks to measure in every row; None = those learned until then, all in row 0.
        sigmas: relative sizes of the noise.
        draws: of the noise, for each size.
        seed: of the draws, the same in every row.
    """
    stream = probes.data.stream
    names = [("zero-shot", *(task.name for task in stream))[row] for row in rows]
    values: dict[tuple[int, float], dict[int, float | None]] = {}
    for row, module in ((row, load(row)) for row in rows):
        if module is not None:
            own = _tasks_of(probes, row) if numbers is None else list(numbers)
            with module.strategy.merged_adapters(module.model):
                values |= _rises(module, probes, row, own, sigmas, draws, seed)
    means = [
        Series(f"sigma {s:g}", [mean_or_none([*values.get((r, s), {}).values()]) for r in rows])
        for s in sigmas
    ]
    return Diagnostic(
        "flatness",
        "Flatness",
        _TEXT.format(draws),
        "after",
        list(range(len(rows))),
        [
            Panel("loss rise, mean of tasks", means),
            Panel(f"loss rise, sigma {max(sigmas):g}", _by_task(probes, rows, values, max(sigmas))),
        ],
        x_names=names,
        notes=_notes(values, rows, sigmas, names),
        settings={"draws": str(draws), "seed": str(seed), "samples": str(probes.samples or "all")},
    )


def _tasks_of(probes: ProbeData, row: int) -> list[int]:
    """Return the tasks learned until a row, all before training; repeated ones once."""
    stream = probes.data.stream
    learned = range(row or len(stream))
    return [number for number in learned if stream.first_occurrence(number) == number]


def _rises(
    module: ContinualModule,
    probes: ProbeData,
    row: int,
    numbers: Sequence[int],
    sigmas: Sequence[float],
    draws: int,
    seed: int,
) -> dict[tuple[int, float], dict[int, float | None]]:
    """Return (row, sigma) -> task -> loss rise, None if it is not finite."""

    def measure() -> list[float]:
        return [measure_task(module, probes, row, number).loss for number in numbers]

    start, found = measure(), {}
    for sigma in sigmas:
        rises = loss_rise(module.model, measure, start, sigma=sigma, draws=draws, seed=seed)
        found[row, sigma] = dict(zip(numbers, map(finite_or_none, rises), strict=True))
    return found


def _by_task(
    probes: ProbeData,
    rows: Sequence[int],
    values: Mapping[tuple[int, float], Mapping[int, float | None]],
    sigma: float,
) -> list[Series]:
    numbers = sorted({number for own in values.values() for number in own})
    return [
        Series(probes.name(n), [values.get((row, sigma), {}).get(n) for row in rows])
        for n in numbers
    ]


def _notes(
    values: Mapping[tuple[int, float], Mapping[int, float | None]],
    rows: Sequence[int],
    sigmas: Sequence[float],
    names: Sequence[str],
) -> list[str]:
    """Name the states that are lost, and those whose loss is not finite under noise."""
    lost = [name for row, name in zip(rows, names, strict=True) if (row, sigmas[0]) not in values]
    notes = [f"The checkpoint after '{name}' is lost, so it is left out." for name in lost]
    infinite = [key for key, own in values.items() if None in own.values()]
    if infinite:
        row, sigma = infinite[0]
        notes.append(
            f"The loss is not finite in {len(infinite)} cases, first after {row} tasks at sigma "
            f"{sigma:g}: these are undefined."
        )
    return notes
