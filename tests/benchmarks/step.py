"""What a step costs: mmcl's sequence beside bare Lightning and beside a plain torch loop.

    python -m tests.benchmarks.step [--rounds 3] [--steps 600]
"""

import argparse
import tempfile
import time
from dataclasses import dataclass

import torch

from tests.benchmarks.arms import Bare, Plain, Sequence, continual, largest_difference
from tests.benchmarks.problems import MODELS, batches, by_hand, strategy, tasks
from tests.benchmarks.relay import Relay


def measure(kind, method, *, blocks, block, turn):
    """Run one relay of the three loops.

    Returns:
        name -> Timing, and the largest difference between the weights they end with.
    """
    make, loss, optimizer = MODELS[kind]
    rows = batches(kind, method)
    with tempfile.TemporaryDirectory() as folder:
        module = continual(make(), strategy(method), optimizer)
        ours = Sequence(module, tasks(1000), batches(kind, method, 2, task=0), folder)
        hand = by_hand(loss, method, module.strategy)
        bare = Bare(ours.twin(), hand, optimizer)
        plain = Plain(ours.twin(), hand, optimizer)
        loops = [("sequence", ours), ("bare", bare), ("plain", plain)]
        loops = loops[turn % 3 :] + loops[: turn % 3]
        timings = Relay(rows, block=block, blocks=blocks).run(dict(loops))
        return timings, largest_difference([module.model, bare.model, plain.model])


if __name__ == "__main__":
    import sys
    torch.set_num_threads(1)
    for kind, block, blocks, methods in (("MLP", 20, 40, ("finetune","rehearsal","EWC","EWC, lists")),("tiny CLIP", 2, 20, ("finetune","rehearsal","EWC"))):
        if len(sys.argv) > 1 and sys.argv[1] != kind: continue
        for m in methods:
          for r in range(3):
            t0 = time.time()
            t, d = measure(kind, m, block=block, blocks=blocks, turn=r)
            med = {n: (float(x.wall.median()), float(x.cpu.median())) for n, x in t.items()}
            dw = (t["sequence"].wall - t["bare"].wall).median(); dc = (t["sequence"].cpu - t["bare"].cpu).median()
            rw = (t["sequence"].wall / t["bare"].wall).median(); rc = (t["sequence"].cpu / t["bare"].cpu).median()
            print(kind, m, {n: f"{w:.0f}/{c:.0f}" for n, (w, c) in med.items()}, f"diff {dw:.0f}/{dc:.0f} ratio {rw:.3f}/{rc:.3f} weights {d:.1e}  {time.time()-t0:.1f}s", flush=True)
