"""What it saves to put dialogues of like length into one batch, on the shapes of a LLaVA.

    python -m tests.benchmarks.length_grouping

A random LLaVA (64 picture tokens, 6 layers of width 256) learns dialogues whose number of words is
log-normal (median 60, a tenth above 200), in batches of 16. The same rows in the same loop: in
random order, and with ``group_by_length``. Blocks of steps take turns in one process, one thread.
"""

import argparse
import copy
import tempfile

import numpy as np
import torch

from mmcl.core import IGNORE_INDEX, Batch, begin_task
from mmcl.core.step import step
from mmcl.data.batches.batch_plan import EpochPlan, Mixture
from mmcl.strategies import LoRA
from tests.benchmarks.interleaved_loops import Relay
from tests.benchmarks.llava_problem import PICTURE, ROWS, TASKS, small_llava
from tests.benchmarks.llava_step import optimizer

SAMPLES, VOCABULARY, GROUP, SHORTEST, LONGEST = 2048, 4096, 32, 8, 600


def words(draw):
    """Return (SAMPLES,) words of each dialogue, the answer included."""
    made = np.exp(draw.normal(np.log(60), 0.95, SAMPLES))
    return made.clip(SHORTEST, LONGEST).astype(np.int64)


def batch_of(rows, lengths, model, draw):
    """Return rows of so many words as a batch, padded to the longest."""
    width = 1 + PICTURE + int(lengths[rows].max())
    tokens = torch.randint(10, VOCABULARY, (len(rows), width), generator=draw)
    tokens[:, 0], tokens[:, 1 : 1 + PICTURE] = 1, model.image_inputs.image_token_id
    end = 1 + PICTURE + torch.from_numpy(lengths[rows])
    place = torch.arange(width)
    mask = place < end[:, None]
    labels = tokens.masked_fill(~mask | (place < (end - 6)[:, None]), IGNORE_INDEX)
    images = torch.randint(256, (len(rows), 3, 64, 64), generator=draw, dtype=torch.uint8)
    task = torch.ones(len(rows), dtype=torch.int64)
    return Batch(images, labels, task, input_ids=tokens * mask, attention_mask=mask)


def main():
    """Print shares of padding, and the ratio of times over the same number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lengths = words(np.random.default_rng(0))
    plans = {
        name: EpochPlan(
            Mixture(SAMPLES, ROWS), seed=0, task=0, epoch=0, lengths=lengths, group=group
        )
        for name, group in (("random", 0), ("like lengths", GROUP))
    }
    with tempfile.TemporaryDirectory() as folder:
        base = small_llava(folder, VOCABULARY)
        arms, batches = {}, {}
        for name, plan in plans.items():
            laid = [plan.batch(number) for number in range(len(plan))]
            width = sum(len(rows) * (1 + PICTURE + lengths[rows].max()) for rows in laid)
            real = sum((1 + PICTURE + lengths[rows]).sum() for rows in laid)
            print(f"{name}: {100 * (1 - real / width):.1f} % of all places are padding")
            draw = torch.Generator().manual_seed(0)
            batches[name] = [batch_of(rows, lengths, base, draw) for rows in laid]
            arms[name] = Arm(copy.deepcopy(base), batches[name])
        timed = Relay([None], block=len(plans["random"]) // 8, blocks=given.blocks).run(arms)
    # Blocks of the two arms hold other rows: the whole is compared.
    ratio = float(timed["like lengths"].cpu.sum() / timed["random"].cpu.sum())
    print(f"time of an epoch, like lengths / random: {ratio:.3f}")


class Arm:
    """LoRA on one LLaVA, over batches of its own."""

    def __init__(self, model, batches):
        self.model, self.batches, self.strategy = model, batches, LoRA(rank=8)
        self.strategy.attach(model)
        begin_task(model, self.strategy, TASKS[0])

    def __call__(self, loader):
        """Take a step for whatever the loader gives."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        stepper = optimizer(learning)
        for number, _ in enumerate(loader):
            loss = step(self.model, self.strategy, self.batches[number % len(self.batches)]).loss
            stepper.zero_grad()
            loss.backward()
            stepper.step()


if __name__ == "__main__":
    main()
