"""What low-rank layers cost: the fused ones beside peft's and beside a loop over experts.

    python -m tests.benchmarks.lora_layers [--rounds 3] [--turns 8]

A step (forward, backward of a small language model whose linear layers are all adapted, 16 rows of
104 tokens) and one layer of it, on one thread. The arms take turns, each round starts with another
one; shown is the median over turns of the ratio of two arms in the same turn, by processor time,
then the range over rounds. Nothing here fails for being slow.
"""

import argparse
import statistics
import time
import warnings

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmcl.layers import MoELoRALinear, MultiLoRALinear, inject
from mmcl.strategies import LoRA

WIDTH, INNER, LAYERS, ROWS, TOKENS = 256, 688, 6, 16, 104
RANK, EXPERTS, EACH = 18, 6, 3
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMPARED = [
    ("fused LoRA r=18 / peft", "fused", "peft", None),
    ("slots LoRA r=18 / peft", "slots", "peft", None),
    ("MoELoRA 6 x 3 / fused LoRA r=18", "experts", "fused", 1.10),
    ("MoELoRA 6 x 3, loop / fused LoRA r=18", "loop", "fused", None),
    ("5 old slots + 1 new, r=3 / fused LoRA r=18", "sum", "fused", None),
    ("6 slots gated by row, r=3 / fused LoRA r=18", "gated", "fused", None),
    ("no adapter at all / fused LoRA r=18", "bare", "fused", None),
]


class Speaker(nn.Module):
    """A small language model with the two members that LoRA asks for."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.gates = lm, {}

    def target_linears(self, which="all"):
        """Return the layers to adapt."""
        named = self.named_modules()
        return {n: m for n, m in named if isinstance(m, nn.Linear) and n.endswith(ENDS)}

    def freeze(self, *parts):
        """Freeze everything."""
        self.requires_grad_(False)

    def forward(self, x):
        """Run the blocks on embedded tokens."""
        return self.lm(inputs_embeds=x).last_hidden_state


class OneLayer(nn.Module):
    """A layer where a language model would be."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)

    def forward(self, inputs_embeds):
        """Answer as transformers' models do."""
        answer = type("Answer", (), {})()
        answer.last_hidden_state = self.up_proj(inputs_embeds)
        return answer


class Loop(nn.Module):
    """MoELoRA as a person writes it from the equation."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        make = nn.Linear
        self.downs = nn.ModuleList(make(base.in_features, EACH, False) for _ in range(EXPERTS))
        self.ups = nn.ModuleList(make(EACH, base.out_features, False) for _ in range(EXPERTS))
        self.router = make(base.in_features, EXPERTS, False)

    def forward(self, x):
        """Add expert after expert."""
        out, weights = self.base(x), self.router(x).softmax(-1)
        for number, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            out = out + 2.0 * weights[..., number, None] * up(down(x))
        return out


def whole_model():
    """Return six Llama blocks without a head."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).model


def with_slots(model, slots, rank, mode):
    """Install slots of which the last learns."""
    layers = inject(
        model,
        model.target_linears(),
        lambda base: MultiLoRALinear(base, gates=model.gates, name="e"),
    )
    for layer in layers.values():
        for number in range(slots):
            layer.add_adapter(rank, torch.Generator().manual_seed(number))
        layer.freeze_adapters(slots - 1)
        layer.set_adapters(mode)
    model.gates["e"] = torch.full((ROWS, slots), 1 / slots)


def adapted(arm, make):
    """Return a model with the layers of one arm."""
    torch.manual_seed(0)
    model = Speaker(make())
    model.freeze()
    generator = torch.Generator().manual_seed(0)
    if arm in ("fused", "peft"):
        LoRA(rank=RANK).attach(model)
    if arm == "peft":
        from peft.tuners.lora import Linear

        for module in model.modules():
            if isinstance(module, Linear):
                module.__class__ = Linear
    if arm == "experts":
        inject(
            model,
            model.target_linears(),
            lambda base: MoELoRALinear(base, EXPERTS, EACH, 2.0, generator),
        )
    if arm == "loop":
        inject(model, model.target_linears(), Loop)
    if arm == "slots":
        with_slots(model, 1, RANK, "one")
    if arm in ("sum", "gated"):
        with_slots(model, EXPERTS, EACH, "sum" if arm == "sum" else "gates")
    return model


def seconds(model, x):
    """Return the processor time of a step."""
    start = time.process_time()
    model(x).square().mean().backward()
    return time.process_time() - start


def measure(make, *, rounds, turns, repeats):
    """Let all arms take turns.

    Returns:
        arm -> for each round a list of seconds, one for each turn.
    """
    arms = sorted({arm for _, *pair, _ in COMPARED for arm in pair})
    x = torch.randn(ROWS, TOKENS, WIDTH).requires_grad_()
    times = {arm: [] for arm in arms}
    for turn in range(rounds):
        models = {arm: adapted(arm, make) for arm in arms[turn % len(arms) :] + arms}
        for model in models.values():
            seconds(model, x)
        for arm in arms:
            times[arm].append([])
        for _ in range(turns):
            for arm, model in models.items():
                times[arm][-1].append(sum(seconds(model, x) for _ in range(repeats)))
    return times


def report(what, times):
    """Print a line for each comparison."""
    print(f"\n{what}")
    for name, arm, other, target in COMPARED:
        ratios = [
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(times[arm], times[other], strict=True)
        ]
        middle = statistics.median(ratios)
        goal = "" if target is None else f"  <= {target:g}: {'yes' if middle <= target else 'NO'}"
        print(f"  {name:<46}{middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}){goal}")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh models")
    parser.add_argument("--turns", type=int, default=8, help="turns of every arm in a round")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    often = {"rounds": given.rounds, "turns": given.turns}
    report(f"one layer, {WIDTH} to {INNER}", measure(OneLayer, **often, repeats=3))
    report(f"a model of {LAYERS} blocks", measure(whole_model, **often, repeats=1))


if __name__ == "__main__":
    main()
