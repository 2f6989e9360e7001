"""A step of instruction tuning: mmcl's sequence beside transformers' Trainer with peft.

Run ``python -m tests.benchmarks.llava_step``. All loops take turns in one process; ratios are
medians over blocks of processor time, so that a busy machine slows all of them alike.
"""

import argparse
import copy
import tempfile
import time

import torch

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, begin_task
from mmcl.core.step import step
from mmcl.models.hf_vlm.decoding.generation import candidate_log_probs
from mmcl.strategies import LoRA, MoELoRA
from tests.benchmarks.captions import Losses
from tests.benchmarks.interleaved_loops import Relay
from tests.benchmarks.llava_problem import (
    RATE,
    TASKS,
    Rival,
    bytes_kept,
    dialogues,
    native,
    small_llava,
)
from tests.benchmarks.training_loops import Sequence, continual

RANK, EXPERTS = 18, 6
VOCABULARIES = {4096: 0.70, 32000: 0.36}


def optimizer(parameters):
    """AdamW as both loops have it."""
    return torch.optim.AdamW(
        list(parameters), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )


def ratio(timings, name, other):
    """Return the median over blocks of one loop's time by another's, and the quartiles."""
    found = timings[name].cpu / timings[other].cpu
    low, middle, high = torch.quantile(found, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def training(vocabulary, wanted, blocks, folder):
    """Print the ratios of training steps at one vocabulary."""
    base = small_llava(folder, vocabulary)
    batches = dialogues(base, vocabulary)
    rival = Rival(base, batches, list(base.target_linears()), RANK, folder)
    losses = Losses()
    arms = {"trainer": rival}
    for name, strategy in {
        "lora": LoRA(rank=RANK),
        "moe": MoELoRA(rank=RANK // EXPERTS, num_experts=EXPERTS),
    }.items():
        module = continual(copy.deepcopy(base), strategy, optimizer)
        looking = [losses] if name == "lora" else []
        arms[name] = Sequence(module, TASKS, batches[:2], f"{folder}/{name}", looking)
    rival.start_from(arms["lora"].module.model)
    losses.seen.clear()
    timings = Relay(batches, block=4, blocks=blocks).run(arms)
    steps = min(len(rival.losses), len(losses.seen))
    apart = (torch.stack(rival.losses[:steps]) - torch.stack(losses.seen[:steps])).abs()
    print(f"vocabulary {vocabulary}")
    print(f"  mmcl LoRA / Trainer + peft: {ratio(timings, 'lora', 'trainer')}, wanted {wanted}")
    print(f"  mmcl MoELoRA / mmcl LoRA: {ratio(timings, 'moe', 'lora')}, wanted 1.10")
    first, worst = float(apart[0]), float(apart.max())
    print(f"  first loss differs by {first:.1e}, any of {steps} by {worst:.1e}")
    strategy = LoRA(rank=RANK)
    mine = copy.deepcopy(base)
    strategy.attach(mine)
    begin_task(mine, strategy, TASKS[0])
    own = bytes_kept(lambda: step(mine, strategy, batches[0]).loss)
    theirs = bytes_kept(lambda: rival.peft(**native(base, batches[0])).loss)
    print(f"  bytes kept for the backward pass, ours / theirs: {own / theirs:.3f}")


def alternating(first, second, rounds):
    """Return the median ratio of two functions' times, called in turn."""
    spans = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for work in (first, second):
            work()
            marks.append(time.perf_counter())
        spans.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return float(torch.tensor(spans[1:]).median())


def anew(batch, rows, words):
    """Return a batch for each candidate, with the question before it in every row."""
    made = []
    for word in words:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.cat([row, word]) for row in rows], True)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for place, row in enumerate(rows):
            labels[place, len(row) : len(row) + len(word)] = word
        mask = torch.arange(tokens.shape[1]) < torch.tensor(
            [[len(row) + len(word)] for row in rows]
        )
        made.append(
            Batch(batch.images, labels, batch.task_ids, input_ids=tokens, attention_mask=mask)
        )
    return made


def answering(vocabulary, rounds, folder):
    """Print the ratios of ways to answer."""
    model = small_llava(folder, vocabulary)
    strategy = LoRA(rank=RANK)
    strategy.attach(model)
    begin_task(model, strategy, TASKS[0])
    model.eval()
    batch = dialogues(model, vocabulary, 1)[0]
    batch = batch.join(batch)  # 32 rows

    def answer():
        return model.generate(batch, max_new_tokens=8)

    def merged():
        with strategy.merged_adapters(model):
            answer()

    with torch.no_grad():
        print(f"answers, 32 rows, vocabulary {vocabulary}")
        print(f"  unmerged / merged adapters: {alternating(answer, merged, rounds):.2f}")
        rows, pictures = model._questions(batch), model.image_inputs.forward_kwargs(model.lm, batch)
        draw = torch.Generator().manual_seed(1)
        words = [torch.randint(10, vocabulary, (2,), generator=draw) for _ in range(8)]
        given = (model, rows, pictures, NO_PROMPTS, words)
        again = alternating(
            lambda: [model(read) for read in anew(batch, rows, words)],
            lambda: candidate_log_probs(*given),
            rounds,
        )
        print(f"  8 candidates, read anew / prefix read once: {again:.2f}")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15, help="timed turns (%(default)s)")
    parser.add_argument(
        "--vocabulary", type=int, choices=VOCABULARIES, help="one of the two; default: both"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary, wanted in VOCABULARIES.items():
            if given.vocabulary not in (None, vocabulary):
                continue
            training(vocabulary, wanted, given.blocks, folder)
        answering(4096, max(3, given.blocks // 3), folder)


if __name__ == "__main__":
    main()
