"""Answers a second: mmcl's generation with merged adapters beside transformers' ``generate``.

Run ``python -m tests.benchmarks.llava_answers``. The ways to answer take turns on one thread; shown
are medians of ratios by processor time within a turn. The rival is ``generate`` of a model with
peft's own LoRA layers, unmerged; all of them give the same tokens, which is checked.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import replace

import torch

from mmcl.core import begin_task
from mmcl.strategies import LoRA
from tests.benchmarks.llava_problem import TASKS, Rival, dialogues, native, small_llava

RANK, SAMPLES, TOKENS, WANTED = 18, 32, 8, 1.6


def ratios(arms, rounds):
    """Return arm -> quartiles of the first arm's processor time by its own."""
    spans = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, work in arms.items():
            start = time.process_time()
            work()
            spans[name].append(time.process_time() - start)
    first = torch.tensor(spans[next(iter(arms))][1:])
    marks = torch.tensor([0.25, 0.5, 0.75])
    return {
        n: torch.quantile(first / torch.tensor(s[1:]), marks).tolist() for n, s in spans.items()
    }


def trained(base):
    """A copy with LoRA whose B is not zero, and its strategy."""
    model, strategy = copy.deepcopy(base), LoRA(rank=RANK)
    strategy.attach(model)
    begin_task(model, strategy, TASKS[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model.eval(), strategy


def question_tokens(model, batch):
    """Tokens and mask of the questions, padded on the left as ``generate`` takes them."""
    from mmcl.models.hf_vlm.decoding.generation import left_pad

    tokens, mask = left_pad(model._questions(batch), model.pad_token_id)
    return {"input_ids": tokens, "attention_mask": mask.long()}


def measure(vocabulary, rounds, repeated, folder):
    """Print the ratios; with ``repeated`` every image has two different questions."""
    base = small_llava(folder, vocabulary)
    one, other = dialogues(base, vocabulary, 2)
    batch = one.join(replace(other, images=one.images) if repeated else other)
    model, strategy = trained(base)
    rival = Rival(base, [batch], list(base.target_linears()), RANK, folder)
    rival.start_from(model)
    theirs = rival.peft.eval()
    given = {**native(base, batch), **question_tokens(base, batch)}
    given.pop("labels")
    given.pop("vision_feature_layer", None)
    longest = given["input_ids"].shape[1]
    ends = base.lm.get_output_embeddings().weight.shape[0]  # never generated
    model.end_token_ids = [ends]
    answers = {}

    def generate():
        with torch.no_grad():
            found = theirs.generate(
                **given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends,
                pad_token_id=base.pad_token_id,
            )[:, longest:]  # fmt: skip
        answers["theirs"] = [model.chat_tokenizer.decode(answer) for answer in found]

    def unmerged():
        model.image_cache.clear()  # the turn before answered questions of the same images
        answers["ours, unmerged"] = model.generate(batch, max_new_tokens=TOKENS)

    def merged():
        model.image_cache.clear()
        with strategy.merged_adapters(model):
            answers["ours"] = model.generate(batch, max_new_tokens=TOKENS)

    arms = {"generate, peft": generate, "mmcl, unmerged": unmerged, "mmcl, merged": merged}
    found = ratios(arms, rounds)
    same = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    what = "two questions an image" if repeated else "one question an image"
    print(f"{SAMPLES} samples, {TOKENS} tokens, vocabulary {vocabulary}, {what}")
    for name, (low, middle, high) in list(found.items())[1:]:
        print(f"  {name}: {middle:.2f} ({low:.2f} to {high:.2f}) times the answers of the rival")
    print(f"  wanted of merged adapters: {WANTED}; equal answers: {same} of {len(batch)}")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="%(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for repeated in (False, True):
            measure(given.vocabulary, given.rounds, repeated, folder)


if __name__ == "__main__":
    main()
