"""What a step costs: mmcl's sequence beside bare Lightning and beside a plain torch loop.

    python -m tests.benchmarks.step [--rounds 3] [--steps 600] [--clip_steps 12]

Nothing here fails for being slow; it prints a table. Three loops train the same model on the same
batches in one process, taking turns of a few steps (``interleaved_loops.py``), on one thread,
without garbage collection, and set-up is not timed:

- sequence: ``ContinualRun`` learning the second task of a stream, with the default Trainer of the
  command, alarm on, no logger, no terminal; no checkpoint falls into the steps.
- bare: ``Trainer(barebones=True)`` with a module of two methods.
- plain: zero_grad, backward, step.

EWC in the last two is the sum over parameters that a person would write; "EWC, lists" gives them
mmcl's own penalty function, so what is left is the machinery alone. Shown is the median over turns
of paired differences or ratios, then the median and the range over rounds; targets are judged by
processor time, because wall time on a shared machine is also the neighbours'. The
weights that all three end with are compared: the largest difference stands in the last column,
for captions the largest difference of a loss.
"""

import argparse
import logging
import tempfile
import warnings
from dataclasses import dataclass

import torch

from mmcl.strategies import Finetune
from tests.benchmarks.captions import (
    Losses,
    OpenClipLoop,
    caption_batches,
    our_optimizer,
    small_clip,
)
from tests.benchmarks.interleaved_loops import Relay
from tests.benchmarks.problems import METHODS, MODELS, batches, by_hand, strategy, tasks
from tests.benchmarks.training_loops import Bare, Plain, Sequence, continual, largest_difference

ADDED_MICROSECONDS, CLIP_RATIO, CAPTION_RATIO = 60.0, 1.02, 0.90
_MLP_BLOCK, _CLIP_BLOCK = 20, 2


@dataclass
class Line:
    """One measured thing: a figure for each round, by processor time and by wall."""

    what: str
    unit: str
    target: float | None
    cpu: list
    wall: list
    steps: str
    differs: float

    def text(self):
        """Return the line of the table."""
        digits = 0 if self.unit == "us" else 3
        shown = [_spread(values, digits) for values in (self.cpu, self.wall)]
        goal = "" if self.target is None else f"<= {self.target:g}"
        middle = float(torch.tensor(self.cpu).median())
        verdict = "" if self.target is None else "yes" if middle <= self.target else "NO"
        return (
            f"{self.what:<40}{self.unit:<6}{shown[0]:<24}{shown[1]:<24}{goal:<9}{verdict:<5}"
            f"{self.steps:<22}{self.differs:.0e}"
        )


HEADER = (
    f"{'':<40}{'unit':<6}{'processor time':<24}{'wall':<24}{'target':<9}{'met':<5}"
    f"{'us a step (cpu)':<22}difference"
)


def machinery(kind, method, *, rounds, block, blocks):
    """Measure the three loops on one model and method.

    Returns:
        lines: sequence against bare, and against plain.
    """
    make, loss, optimizer = MODELS[kind]
    rows = batches(kind, method)
    timings, differs = [], 0.0
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            module = continual(make(), strategy(method), optimizer)
            ours = Sequence(module, tasks(1000), batches(kind, method, 2, task=0), folder)
            hand = by_hand(loss, method, module.strategy)
            bare, plain = (made(ours.twin(), hand, optimizer) for made in (Bare, Plain))
            loops = [("sequence", ours), ("bare", bare), ("plain", plain)]
            loops = loops[turn % 3 :] + loops[: turn % 3]
            timings.append(Relay(rows, block=block, blocks=blocks).run(dict(loops)))
            found = largest_difference([module.model, bare.model, plain.model])
            differs = max(differs, found)
    unit, target = ("us", ADDED_MICROSECONDS) if kind == "MLP" else ("ratio", CLIP_RATIO)
    what = f"{kind}, {method}: sequence"
    return [
        _line(f"{what} - bare", unit, target, timings, ("sequence", "bare"), differs),
        _line(f"{what} - plain", unit, None, timings, ("sequence", "plain"), differs),
    ]


def captions(*, rounds, block, blocks):
    """Measure fine-tuning on captions against open_clip's loop."""
    rows = caption_batches()
    timings, differs = [], 0.0
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            seen = Losses()
            module = continual(small_clip(folder), Finetune(), our_optimizer)
            ours = Sequence(module, tasks(1000), rows[:2], folder, [seen])
            theirs = OpenClipLoop(ours.twin(), rows)
            seen.seen.clear()
            loops = [("sequence", ours), ("open_clip", theirs)]
            loops = loops[turn % 2 :] + loops[: turn % 2]
            timings.append(Relay(rows, block=block, blocks=blocks).run(dict(loops)))
            apart = torch.stack(seen.seen) - torch.stack(theirs.losses)
            differs = max(differs, float(apart.abs().max()))
    names = ("sequence", "open_clip")
    return _line("captions: mmcl / open_clip", "ratio", CAPTION_RATIO, timings, names, differs)


def _line(what, unit, target, timings, names, differs):
    cpu, wall = ([_compared(unit, t, names, clock) for t in timings] for clock in ("cpu", "wall"))
    if unit == "ratio":
        what = what.replace(" - ", " / ")
    levels = [torch.stack([t[name].cpu.median() for t in timings]).median() for name in names]
    return Line(what, unit, target, cpu, wall, " vs ".join(f"{v:.0f}" for v in levels), differs)


def _compared(unit, timing, names, clock):
    ours, theirs = (getattr(timing[name], clock) for name in names)
    return float((ours - theirs if unit == "us" else ours / theirs).median())


def _spread(values, digits):
    middle = float(torch.tensor(values).median())
    low, high = min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts of each measurement")
    parser.add_argument("--steps", type=int, default=600, help="timed steps of the MLP a round")
    parser.add_argument("--clip_steps", type=int, default=12, help="timed steps of a CLIP a round")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # open_clip says that random weights are random
    torch.set_num_threads(1)
    print(HEADER)
    long = {"block": _MLP_BLOCK, "blocks": given.steps // _MLP_BLOCK}
    short = {"block": _CLIP_BLOCK, "blocks": given.clip_steps // _CLIP_BLOCK}
    for kind, turns in (("MLP", long), ("tiny CLIP", short)):
        for method in METHODS if kind == "MLP" else METHODS[:3]:
            for line in machinery(kind, method, rounds=given.rounds, **turns):
                print(line.text(), flush=True)
    print(captions(rounds=given.rounds, **short).text())


if __name__ == "__main__":
    main()
