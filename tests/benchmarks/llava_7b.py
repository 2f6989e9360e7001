"""A LLaVA of 7 billion random weights: memory estimated for cards, steps measured on one.

``python -m tests.benchmarks.llava_7b --memory`` prints the memory table of docs/recipes.md, without
a GPU. ``python -m tests.benchmarks.llava_7b`` measures LoRA steps on a GPU: tokens a second, the
share of the card's matrix rate, peak memory beside its estimate, two dtypes, 8-bit and 4-bit
weights. ``--shape small --device cpu`` runs the same on a few thousand weights.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import IGNORE_INDEX, Batch, Prompts, Strategy, Task, begin_task
from mmcl.core.step import step
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.loading import LoadedVLM, enable_gradient_checkpointing, save_pretrained
from mmcl.models.hf_vlm.memory_estimate import (
    MemoryEstimate,
    Workload,
    _saved_by_quantization,
    estimate_memory,
)
from mmcl.strategies import (
    CLMoE,
    HiDe,
    LoRA,
    LoRARouter,
    ModalPrompt,
    MoELoRA,
    OLoRA,
    RegLoRA,
)
from tests.models.small_vlms import llava

SHAPES = {
    "7b": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768},
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
         "max_position_embeddings": 4096},
    ),
    "small": (
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128,
         "max_position_embeddings": 512},
    ),
}  # fmt: skip
"""Vision tower and language model: those of LLaVA-1.5-7B, and of tests."""
TASKS, TEXT, ANSWER = 6, 128, 16
"""Tasks of UCIT; tokens beside the image's, with template and answer; tokens in the loss."""
CARDS = {"24 GB": 24, "80 GB": 80, "141 GB": 140}
"""Memory of a card in GiB."""
USABLE = 0.9
"""Share of it for tensors; the rest is CUDA's context and fragmentation."""
GIB = 2**30


class RandomLlava(ImageTextToText):
    """A LLaVA-1.5 of a shape with random weights, made on its device; "meta" makes none."""

    def __init__(self, shape, device, dtype, gradient_checkpointing=True):
        torch.nn.Module.__init__(self)
        made = self.load(shape, device, dtype)
        self._set_up(made, None, "vicuna_v1", 2048, "pad", None, "drop", is_native=False)
        self.freeze("image")
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.lm, self.gates)

    @staticmethod
    def load(shape, device, dtype):
        """Make model and processor."""
        kind, config, processor = llava()
        vision, text = SHAPES[shape]
        ids = {name: getattr(config.text_config, name) for name in _IDS}
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision),
            text_config=hf.LlamaConfig(**text, **ids),
            image_token_index=config.image_token_id,
            image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        )
        side = vision["image_size"]
        processor.image_processor = hf.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        processor.patch_size = vision["patch_size"]
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                lm = kind(config).eval()
            finally:
                torch.set_default_dtype(before)
        return LoadedVLM(lm, processor)


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Encoder(torch.nn.Module):
    """Stands for the routing encoder, CLIP ViT-L/14-336: its size and its weights' memory."""

    embed_dim, weights = 768, 428_000_000

    def __init__(self):
        super().__init__()
        empty = torch.empty(self.weights, device="meta")
        self.weight = torch.nn.Parameter(empty, requires_grad=False)


@dataclass(frozen=True)
class Method:
    """A method of configs/llava_7b with UCIT's arguments.

    ``kept`` is what it keeps beside adapters: "marks" of weights, or a "copy" of its adapters.
    """

    name: str
    make: Callable[[], Strategy]
    is_routed: bool = False
    experts: int = 0
    prompt_tokens: int = 0
    kept: str = ""


COMMON = {"rank": 16, "dropout": 0.05, "train_projector": True}
METHODS = (
    Method("LoRA", lambda: LoRA(**COMMON)),
    Method("O-LoRA", lambda: OLoRA(**COMMON, past_in_forward=False)),
    Method("MoELoRA", lambda: MoELoRA(**{**COMMON, "rank": 3}, num_experts=6)),
    Method("HiDe", lambda: HiDe(**COMMON), is_routed=True),
    Method(
        "CL-MoE", lambda: CLMoE(**COMMON, num_experts=6), is_routed=True, experts=6, kept="copy"
    ),
    Method("SEFE", lambda: RegLoRA(**COMMON), kept="marks"),
    Method("ModalPrompt", lambda: ModalPrompt(), is_routed=True, prompt_tokens=30),
    Method("LoRARouter", lambda: LoRARouter(**{**COMMON, "train_projector": False}), True),
)


def attached(method, shape="7b", tasks=TASKS):
    """Return a model on the meta device with a method in its last task, and its prompts."""
    model = RandomLlava(shape, "meta", torch.bfloat16)
    if method.is_routed:
        model.routing_encoder = Encoder()
    strategy = method.make()
    strategy.attach(model)
    for index in range(tasks):
        begin_task(model, strategy, Task(index, f"task {index}", task_type="instruction"))
    gates = {}
    if method.experts:
        layers = len(strategy.adapters.layers_of(model))
        gate = torch.empty(1, method.experts, device="meta", requires_grad=True)
        gates = {f"cl_moe.{index}": gate for index in range(layers)}
    tokens = {("text", 0): torch.empty(1)} if method.prompt_tokens else {}
    return model, strategy, Prompts(tokens=tokens, gates=gates)


def kept_bytes(method, model, strategy):
    """Bytes that a strategy keeps on the device after a task, beside adapters."""
    if method.kept == "copy":
        layers = strategy.adapters.layers_of(model).values()
        return sum(p.nbytes for layer in layers for p in layer.adapters.parameters())
    if method.kept == "marks":
        layers = strategy.adapters.layers_of(model).values()
        return sum(layer.weight.numel() for layer in layers) // 8
    return 0


@dataclass(frozen=True)
class Memory:
    """Memory of a method on one device, in bytes: what does not depend on the batch, and a sample.

    The estimate is linear in the samples.
    """

    one: MemoryEstimate
    kept: int

    def training(self, samples):
        """Peak of a step."""
        a_sample = self.one.activations + self.one.scores
        return self.one.training + self.kept + (samples - 1) * a_sample

    def generation(self, samples):
        """Peak of generating a batch."""
        a_sample = self.one.kv_cache + self.one.prefill
        return self.one.generation + self.kept + (samples - 1) * a_sample

    def batches(self, card):
        """Largest powers of two that fit on a card, in training and in generation."""
        room = card * GIB * USABLE
        found = []
        for peak in (self.training, self.generation):
            fitting = [size for size in (1, 2, 4, 8, 16, 32, 64) if peak(size) <= room]
            found.append(str(max(fitting, default="-")))
        return " / ".join(found)


def memory_row(method, shape="7b"):
    """Return the row of the memory table of a method, as texts."""
    model, strategy, prompts = attached(method, shape)
    vision = SHAPES[shape][0]
    image = (vision["image_size"] // vision["patch_size"]) ** 2
    kept = kept_bytes(method, model, strategy)

    work = Workload(1, image + TEXT + method.prompt_tokens, ANSWER, max_new_tokens=128)
    one = estimate_memory(model, strategy, work, prompts)
    saved = _saved_by_quantization(model, "4bit")
    plain, sharded = Memory(one, kept), Memory(replace(one, shards=8), kept)
    quantized = Memory(replace(one, weights=one.weights - saved, merging=0), kept)
    sizes = (plain.one.weights + kept, plain.training(4), plain.generation(16))
    return [
        method.name, f"{plain.one.trainable / 1e6:.1f}", *(f"{size / GIB:.1f}" for size in sizes),
        quantized.batches(CARDS["24 GB"]), *(plain.batches(card) for card in CARDS.values()),
        sharded.batches(CARDS["24 GB"]),
    ]  # fmt: skip


COLUMNS = (
    "method", "trained, M", "weights", "step of 4", "answers of 16", "24 GB, 4bit", *CARDS,
    "8 x 24 GB, FSDP",
)  # fmt: skip


def memory_table(shape="7b", methods=METHODS):
    """Return the memory table in markdown."""
    rows = [memory_row(method, shape) for method in methods]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def random_batch(model, rows, seed=0):
    """Return ``rows`` samples of one image and random tokens, the last of them in the loss."""
    draw = torch.Generator().manual_seed(seed)
    side, words = model.image_inputs.size, model.lm.config.get_text_config().vocab_size
    image = model.lm.config.image_seq_length
    tokens = torch.randint(10, words, (rows, image + TEXT), generator=draw)
    tokens[tokens == model.image_inputs.image_token_id] = 9
    tokens[:, 1 : 1 + image] = model.image_inputs.image_token_id
    labels = tokens.clone()
    labels[:, :-ANSWER] = IGNORE_INDEX
    images = torch.randint(256, (rows, 3, side, side), generator=draw, dtype=torch.uint8)
    batch = Batch(
        images, labels, torch.zeros(rows, dtype=torch.int64), input_ids=tokens,
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
    )  # fmt: skip
    return batch.to(next(model.parameters()).device)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device, dtype, side):
    """Return the operations a second of a product of two square matrices, the best of five."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spans = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            left @ right
        synchronize(device)
        spans.append((time.perf_counter() - start) / 5)
    return 2 * side**3 / min(spans[1:])


@dataclass(frozen=True)
class Measured:
    """Measured steps: losses, seconds of the fastest half, operations and bytes of a step."""

    losses: list
    seconds: float
    operations: int
    tokens: int
    peak: int
    estimated: int


def measure(model, strategy, device, rows, steps):
    """Train LoRA for some steps on one batch."""
    strategy.attach(model)
    begin_task(model, strategy, Task(0, "task", task_type="instruction"))
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-4, fused=device == "cuda")
    batch, losses, spans = random_batch(model, rows), [], []

    def one():
        loss = step(model, strategy, batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with FlopCounterMode(display=False) as counter:
        losses.append(float(one()))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        losses.append(float(one()))
        synchronize(device)
        spans.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    fast = sorted(spans)[: max(1, len(spans) // 2)]
    work = Workload(rows, batch.input_ids.shape[1], ANSWER)
    return Measured(
        losses, sum(fast) / len(fast), counter.get_total_flops(), batch.input_ids.numel(), peak,
        estimate_memory(model, strategy, work).training,
    )  # fmt: skip


def show(name, found, rate):
    share = found.operations / found.seconds / rate
    print(
        f"{name}: {found.tokens / found.seconds:,.0f} tokens/s, {share:.2f} of the matrix rate, "
        f"peak {found.peak / GIB:.2f} GiB (estimated {found.estimated / GIB:.2f}), "
        f"loss {found.losses[0]:.4f} to {found.losses[-1]:.4f}"
    )


def measure_dtypes(given, device):
    """Measure LoRA on the same random weights in two dtypes."""
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        model = RandomLlava(given.shape, device, dtype, not given.without_checkpointing)
        rate = matrix_rate(device, dtype, 8192 if device == "cuda" else 64)
        print(f"matrix rate in {name}: {rate / 1e12:.3g} TFLOP/s")
        show(name, measure(model, LoRA(rank=16), device, given.batch_size, given.steps), rate)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
    return rate


def measure_quantized(given, rate):
    """Save random weights, load them in 8 and 4 bits, and train LoRA on them."""
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = RandomLlava(given.shape, "cuda", torch.bfloat16)
        model.lm.generation_config.eos_token_id = model.processor.tokenizer.eos_token_id
        save_pretrained(model.lm, model.processor, Path(folder))
        del model
        torch.cuda.empty_cache()
        for kind in ("8bit", "4bit"):
            start = time.perf_counter()
            model = ImageTextToText(
                folder, quantization=kind, conv_template="vicuna_v1", image_inputs="square",
                gradient_checkpointing=not given.without_checkpointing,
            )  # fmt: skip
            model.to("cuda")
            print(f"{kind} loaded in {time.perf_counter() - start:.0f} s")
            show(kind, measure(model, LoRA(rank=16), "cuda", given.batch_size, given.steps), rate)
            del model
            torch.cuda.empty_cache()


def main(argv=None):
    """Print the memory table, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="print the memory table and end")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch_size", type=int, default=4, help="samples (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (%(default)s)")
    parser.add_argument("--without_checkpointing", action="store_true")
    parser.add_argument("--folder", help="for 14 GB of random weights; default: the temporary one")
    given = parser.parse_args(argv)
    if given.memory:
        print(memory_table(given.shape))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "this measurement needs a GPU and torch finds none: run it on a machine with one, or "
            "give --shape small --device cpu to try it, or --memory for estimates"
        )
    if given.device == "cpu" and given.shape != "small":
        sys.exit("a step of 7 billion weights takes minutes on a CPU: give --shape small with it")
    card = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(f"{card}, {given.shape}, {given.batch_size} samples, torch {torch.__version__}")
    rate = measure_dtypes(given, given.device)
    if given.device == "cuda":
        measure_quantized(given, rate)
    else:
        print("8-bit and 4-bit weights need a GPU: not measured")


if __name__ == "__main__":
    main()
