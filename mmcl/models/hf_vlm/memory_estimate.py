"""Memory estimate of a generative VLM with a strategy, for batches that are not run.

The language model's own forward pass runs on fake tensors, which have shapes and no numbers, and
the tensors that autograd would store for the backward pass are summed: so adapters, dropout and
frozen parts count as they are. No GPU and no weights are needed: a model of 7 billion weights that
was built on torch's meta device takes seconds. Estimates leave out what no formula gives: the
context of CUDA, fragmentation, and workspaces of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mmcl.core import NO_PROMPTS, Prompts, Strategy
from mmcl.core.master_weights import compute_dtype
from mmcl.core.model import BASE_LAYER_NAMES

_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a quantized weight; 4bit has a byte for 64 weights and 4 bytes for 256 of these."""
_LOGIT_BYTES = 12
"""Of a score in the loss: float32 log-probability and gradient, and the score with its gradient."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of one device in bytes, at the peak of a step and of generation.

    Attributes:
        weights: all weights, adapters and buffers, of the strategy too.
        gradients: of the trainable weights.
        optimizer: state of the optimizer.
        activations: tensors stored for the backward pass, and the largest gradients in it.
        scores: of the token positions in the loss, with their gradients.
        kv_cache: keys and values of a generated batch, at its longest.
        prefill: activations of a layer while the questions are read.
        merging: the largest layer that is merged, while its adapter is added.
        merged_weights: original weights of merged layers, which a GPU's generation keeps in the
            memory of the host.
        trainable: number of trainable weights.
        shards: devices that share weights, gradients and optimizer state of a training step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scores: int
    kv_cache: int
    prefill: int
    merging: int
    merged_weights: int
    trainable: int
    shards: int = 1

    @property
    def training(self) -> int:
        """Peak of a training step."""
        shared = self.weights + self.gradients + self.optimizer
        return shared // self.shards + self.activations + self.scores

    @property
    def generation(self) -> int:
        """Peak of generating a batch; the optimizer is gone then, gradients are not."""
        cache = self.kv_cache + self.prefill
        return self.weights + self.gradients + max(self.merging, cache)

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.training, self.generation)


@dataclass(frozen=True)
class Workload:
    """Batches and settings whose memory is estimated, on one device.

    Attributes:
        batch_size: samples of a forward pass (``data.micro_batch_size``).
        tokens: of a sample, image and prompt tokens included.
        scored_tokens: tokens of a sample that are in the loss.
        eval_batch_size: samples that are generated at once; None = ``batch_size``.
        max_new_tokens: of an answer.
        gradient_checkpointing: None = as the model is set.
        quantization: of a model that is to be quantized; None = the weights as they are.
        autocast: dtype of autocast, for example ``torch.bfloat16`` of precision "bf16-mixed".
        optimizer_numbers: numbers that the optimizer stores for a trainable weight, 2 for AdamW.
        shards: devices that share weights, gradients and optimizer state in training (FSDP); 1 for
            DDP.
    """

    batch_size: int
    tokens: int
    scored_tokens: int = 32
    eval_batch_size: int | None = None
    max_new_tokens: int = 64
    gradient_checkpointing: bool | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    autocast: torch.dtype | None = None
    optimizer_numbers: int = 2
    shards: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        names = ("batch_size", "tokens", "eval_batch_size", "shards")
        for name in names:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}: give 1 or more")


def estimate_memory(
    model: Any, strategy: Strategy, workload: Workload, prompts: Prompts = NO_PROMPTS
) -> MemoryEstimate:
    """Estimate the memory of training and generation on one device.

    Of the vision tower only the weights count: where it is frozen its activations are gone before
    the peak. The last block counts at all positions, also where only the scored ones are computed.

    Args:
        model: ``ImageTextToText`` on any device, also the meta device; it is not changed.
        strategy: attached to the model, in the task to estimate: adapters of later tasks add to it.
        workload: sizes of batches, and settings.
        prompts: ``strategy.prompts`` of any batch, if it has expert gates or prompt tokens.

    Raises:
        ValueError: if the vision tower is trained.
    """
    if not model.is_frozen("image"):
        raise ValueError(
            "the vision tower is trained, and the estimate counts the activations of the language "
            "model and the projector only: freeze 'image', or measure a step on the device"
        )
    parameters = _unique([*model.parameters(), *strategy.parameters()])
    buffers = _unique([*model.buffers(), *strategy.buffers()])
    trainable = [p for p in parameters if p.requires_grad]
    gradients, quantization = _bytes(trainable), workload.quantization
    config, item = model.lm.config.get_text_config(), _item_size(model)
    samples, tokens = workload.eval_batch_size or workload.batch_size, workload.tokens
    scored = workload.batch_size * workload.scored_tokens
    merged = [] if quantization else _merged_weights(model, strategy)
    return MemoryEstimate(
        weights=_bytes([*parameters, *buffers]) - _saved_by_quantization(model, quantization),
        gradients=gradients,
        optimizer=workload.optimizer_numbers * gradients,
        activations=_activations(model, workload, prompts),
        scores=_LOGIT_BYTES * scored * int(config.vocab_size),
        kv_cache=samples * (tokens + workload.max_new_tokens) * _cache_bytes(config, item),
        prefill=samples * tokens * _layer_width(config) * item,
        merging=max((_merging_bytes(weight) for weight in merged), default=0),
        merged_weights=_bytes(merged),
        trainable=sum(p.numel() for p in trainable),
        shards=workload.shards,
    )


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors that autograd stores while ``run`` computes.

    Each storage counts once, and those of ``known`` (weights) do not count.
    """
    kept: list[Tensor] = list(known)
    seen = {_storage(tensor) for tensor in kept}
    total = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal total
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            kept.append(tensor)  # alive, so that no other storage has its number
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return total


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _activations(model: Any, workload: Workload, prompts: Prompts) -> int:
    """Return the bytes of activations at the peak of a step, right before or in its backward."""
    config, item = model.lm.config.get_text_config(), _item_size(model)
    samples, tokens = workload.batch_size, workload.tokens
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    is_on = workload.gradient_checkpointing
    if is_on is None:
        is_on = any(layer.gradient_checkpointing for layer in layers)
    with _plain_train_mode(model, layers):
        stored = _language_bytes(model, (samples, tokens), prompts, workload.autocast)
    if is_on:
        blocks = len(model.blocks())
        stored = blocks * samples * tokens * config.hidden_size * item + stored // blocks
    projector = model.lm.model.get_submodule(model.architecture.projector)
    if any(p.requires_grad for p in projector.parameters()):
        linears = [m for m in projector.modules() if hasattr(m, "in_features")]
        widths = sum(m.in_features + m.out_features for m in linears)
        stored += samples * min(tokens, _image_tokens(model)) * widths * item
    return int(stored + samples * tokens * _layer_width(config) * item)


def _language_bytes(
    model: Any, shape: tuple[int, int], prompts: Prompts, autocast: torch.dtype | None
) -> int:
    """Return the bytes that the language model's forward pass of (samples, tokens) stores."""
    language = model.lm.model.get_submodule(model.architecture.language)
    size = torch.Size((*shape, model.lm.config.get_text_config().hidden_size))
    needs_grad = not model.is_frozen("projector") or bool(prompts.tokens)
    old_gates = dict(model.gates)
    with FakeTensorMode(), torch.enable_grad(), _FusedKernels():
        named = (*language.named_parameters(), *language.named_buffers())
        state = {name: _fake(t, t.shape, t.requires_grad) for name, t in named}
        inputs = torch.empty(size, dtype=compute_dtype(model.lm)).requires_grad_(needs_grad)
        model.gates.clear()
        for name, gate in prompts.gates.items():
            wanted = torch.Size((shape[0], *gate.shape[1:]))
            model.gates[name] = _fake(gate, wanted, gate.requires_grad)

        def run() -> object:
            arguments = {"inputs_embeds": inputs, "use_cache": False}
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                return functional_call(language, state, kwargs=arguments)

        try:
            return saved_bytes(run, state.values())
        finally:
            model.gates.clear()
            model.gates.update(old_gates)


def _fake(like: Tensor, shape: torch.Size, requires_grad: bool) -> Tensor:
    """Return a tensor without numbers; inside of ``FakeTensorMode``."""
    return torch.empty(shape, dtype=like.dtype).requires_grad_(requires_grad)


@contextmanager
def _plain_train_mode(model: nn.Module, checkpointed: Iterable[Any]) -> Iterator[None]:
    """Training mode without gradient checkpointing, in which stored tensors would be out of sight.

    Afterwards every module is as it was.
    """
    before = {module: module.training for module in model.modules()}
    was_on = {layer: layer.gradient_checkpointing for layer in checkpointed}
    try:
        model.train()
        for layer in was_on:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer, is_on in was_on.items():
            layer.gradient_checkpointing = is_on
        for module, was_training in before.items():
            module.training = was_training


class _FusedKernels(TorchFunctionMode):
    """Fused attention also where the kernel that torch would choose here is another.

    A plain one would store a score for every pair of tokens.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(each.to(torch.get_autocast_dtype("cpu")) for each in args[:3])
            return _FusedAttention.apply(*args[:3])
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True  # transformers asks whether position ids are those of one sequence each
        if func is Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return _storage(args[0])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention: output (B, H, L, D) and log-sum-exp (B, H, L) are stored."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # Kernels write (B, L, H, D), so the transpose that follows them copies nothing.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _item_size(model: Any) -> int:
    """Return the bytes of a number in the language model's activations."""
    return compute_dtype(model.lm).itemsize


def _layer_width(config: Any) -> int:
    """Return the numbers per token that a layer has at once: residual, normed, gate, up, product.

    Its backward pass has as many gradients at once.
    """
    return int(2 * config.hidden_size + 3 * config.intermediate_size)


def _cache_bytes(config: Any, item: int) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    heads = int(config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * groups * dim * item)


def _image_tokens(model: Any) -> int:
    """Return the tokens of one image, 0 if the configuration does not say."""
    return int(getattr(model.lm.config, "image_seq_length", None) or 0)


def _merged_weights(model: nn.Module, strategy: Strategy) -> list[Tensor]:
    """Return the weights that merged ones replace in generation."""
    members = [part for part in strategy.modules() if isinstance(part, Strategy)]
    if not any(part.overrides("merged_adapters") for part in members):
        return []
    layers = [layer for layer in model.modules() if getattr(layer, "can_merge", True)]
    bases = [getattr(layer, name, None) for layer in layers for name in BASE_LAYER_NAMES]
    weights = [getattr(base, "weight", None) for base in bases if isinstance(base, nn.Module)]
    return _unique(w for w in weights if isinstance(w, Tensor) and w.is_floating_point())


def _merging_bytes(weight: Tensor) -> int:
    """Return the bytes that merging into a weight takes: it again, and two copies of 32 bits."""
    return weight.numel() * (weight.element_size() + 8)


def _saved_by_quantization(model: Any, quantization: str | None) -> int:
    """Return the bytes that quantized linear layers of the language model need less."""
    if quantization is None:
        return 0
    language = model.lm.model.get_submodule(model.architecture.language)
    weights = [m.weight for m in language.modules() if isinstance(m, nn.Linear)]
    frozen = [w for w in _unique(weights) if not w.requires_grad]
    scale = _QUANTIZED_BYTES[quantization]
    return int(sum(w.numel() * (w.element_size() - scale) for w in frozen))
