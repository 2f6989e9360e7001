"""Similarity of representations: CKA per layer and of attention heads, between two checkpoints.

Kornblith et al. 2019, arXiv:1905.00414, on the same probe samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core import Batch, forward
from mmcl.core.model import module_stacks, without_adapters
from mmcl.core.padding import real_tokens
from mmcl.diagnostics.task_loss import ProbeData
from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.diagnostic_record import Diagnostic, Panel, Series
from mmcl.lightning.module import ContinualModule
from mmcl.ops.similarity import attention_similarity, linear_cka

_CKA = "unbiased linear CKA over the probe samples"
_MAX_FEATURES = 2**20


@dataclass(frozen=True)
class Layer:
    """Block of a tower: the tower, its number there from 0, and the module's name."""

    tower: str
    number: int
    name: str


@dataclass
class LayerRecord:
    """What the blocks of a model computed in a forward pass.

    Attributes:
        features: layer -> (rows, D) float32 of each sample, image or text, mean over its tokens.
        attention: layer -> (rows, H, L, S) weights, and (rows, L) real queries or None.
        skipped: layers whose output is no tensor of one row for each sample.
    """

    features: dict[Layer, list[Tensor]] = field(default_factory=dict)
    attention: dict[Layer, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    skipped: dict[Layer, None] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> dict[Layer, nn.Module]:
    """Return the blocks of every tower of a model: stacks of blocks of one type.

    Towers are named as ``model.parts()`` names them; a model without has one tower, "model".
    """
    names = {id(module): name for name, module in model.named_modules()}
    own_parts: Any = getattr(model, "parts", None)
    parts = own_parts() if callable(own_parts) else {}
    owner = {id(p): part for part, parameters in parts.items() for p in parameters}
    found: dict[Layer, nn.Module] = {}
    counts: dict[str, int] = {}
    for stack in module_stacks(model):
        for block in stack:
            owners = [owner[id(p)] for p in block.parameters() if id(p) in owner]
            if parts and not owners:  # of a frozen encoder beside the model
                continue
            tower = owners[0] if owners else "model"
            number = counts[tower] = counts.get(tower, -1) + 1
            found[Layer(tower, number, without_adapters(names[id(block)]))] = block
    return found


class _Recorder:
    """Hooks that fill a ``LayerRecord`` while a model runs."""

    def __init__(self, model: nn.Module, record: LayerRecord, with_attention: bool) -> None:
        self.model, self.record, self.with_attention = model, record, with_attention
        self.blocks = find_blocks(model)
        self.token_ids: Tensor | None = None
        self.batch: Batch | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks inside the block."""
        handles = [
            module.register_forward_pre_hook(self._see_tokens)
            for module in self.model.modules()
            if isinstance(module, nn.Embedding)
        ]
        for layer, block in self.blocks.items():
            handles.append(block.register_forward_hook(self._see_block(layer)))
            for module in block.modules() if self.with_attention else ():
                if isinstance(module, nn.MultiheadAttention):
                    see = self._see_multihead(layer)
                    handles.append(module.register_forward_hook(see, with_kwargs=True))
                elif type(module).__name__.endswith("Attention"):
                    handles.append(module.register_forward_hook(self._see_weights(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_tokens(self, module: nn.Module, given: Any) -> None:
        ids = given[0] if given else None
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        # Numbers of positions, the same for all texts, have one row.
        if self.token_ids is None or len(ids) >= len(self.token_ids):
            self.token_ids = ids

    def _is_real(self, tower: str, shape: Sequence[int]) -> Tensor | None:
        """Return (rows, L) False on padding, None if there is none or it is not known."""
        batch, mask = self.batch, None
        if tower != "image" and batch is not None and batch.is_generative:
            mask = batch.attention_mask
            if mask is not None and mask.shape[1] < shape[1]:  # prompts stand in front
                mask = nn.functional.pad(mask, (shape[1] - mask.shape[1], 0), value=True)
        elif tower == "text" and self.token_ids is not None and hasattr(self.model, "pad_id"):
            pad_id: Any = self.model.pad_id
            mask = real_tokens(self.token_ids, pad_id)
        return mask if mask is not None and tuple(mask.shape) == tuple(shape[:2]) else None

    def _see_block(self, layer: Layer) -> Any:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
                self.record.skipped[layer] = None
                return
            if hidden.ndim == 4:  # of a convolution: every place is a feature
                pooled = hidden.float().flatten(1)
            else:
                mask = self._is_real(layer.tower, hidden.shape)
                pooled = _mean_over_tokens(hidden.float(), mask)
            if pooled.shape[1] > _MAX_FEATURES:
                self.record.skipped[layer] = None
                return
            self.record.features.setdefault(layer, []).append(pooled.cpu())

        return see

    def _see_multihead(self, layer: Layer) -> Any:
        def see(module: nn.Module, given: Any, named: dict[str, Any], output: Any) -> None:
            wanted = {**named, "need_weights": True, "average_attn_weights": False}
            # `forward`, because a call would run this hook again.
            self._keep(layer, module.forward(*given, **wanted)[1])

        return see

    def _see_weights(self, layer: Layer) -> Any:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
                self._keep(layer, output[1])

        return see

    def _keep(self, layer: Layer, weights: Tensor) -> None:
        if weights.ndim == 4:
            mask = self._is_real(layer.tower, (len(weights), weights.shape[2]))
            self.record.attention.setdefault(layer, []).append((weights.detach(), mask))


def _mean_over_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden).unsqueeze(2)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


@torch.no_grad()
def record_layers(
    module: ContinualModule, batch: Batch, *, with_attention: bool = True
) -> LayerRecord:
    """Run a batch through a module and record what every block of its model computes.

    Attention weights are those of open_clip's ``nn.MultiheadAttention``, computed a second time,
    and of transformers' models whose attention is "eager".

    Args:
        module: in evaluation mode, with the classes set.
        batch: on its device.
        with_attention: record attention weights too.
    """
    record = LayerRecord()
    recorder = _Recorder(module.model, record, with_attention)
    recorder.batch = batch
    with recorder.attached():
        output = forward(module.model, module.strategy, batch)
    # Embeddings of class texts are computed once for all batches.
    has_texts = batch.input_ids is not None or any(la.tower == "text" for la in record.features)
    for tower, embedding in (("image", output.image), ("text", output.text)):
        if embedding is not None and embedding.ndim == 2 and (has_texts or tower == "image"):
            end = Layer(tower, -1, f"{tower} embedding")
            record.features.setdefault(end, []).append(embedding.float().cpu())
    return record


def use_eager_attention(model: Any) -> str:
    """Let a model of transformers return its attention weights; return why it cannot, or ""."""
    lm = getattr(model, "lm", None)
    if lm is None or not hasattr(lm, "set_attn_implementation"):
        return ""
    try:
        lm.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        return " ".join(str(error).split())
    return ""


def compare_representations(
    names: tuple[str, str],
    modules: tuple[ContinualModule, ContinualModule],
    probes: ProbeData,
    numbers: Sequence[int],
    *,
    with_attention: bool = True,
) -> tuple[Diagnostic, dict[Layer, list[float]]]:
    """Compare two checkpoints layer by layer on the same probe samples.

    Args:
        names: of the checkpoints.
        modules: in evaluation mode, on the device of ``probes``; models of transformers are set to
            "eager" attention.
        probes: of the stream, ``samples`` of each task.
        numbers: tasks and eval-only tasks that give the probe samples.
        with_attention: compare attention maps too.

    Returns:
        the record, and layer -> mean cosine similarity of the attention maps of each head.

    Raises:
        ValueError: if the models have no layer in common.
    """
    reasons = [use_eager_attention(module.model) for module in modules] if with_attention else []
    notes = [f"Attention weights are not available: {reason}." for reason in reasons if reason]
    compared = _Comparison()
    for batches in _paired_batches(modules, probes, numbers):
        with probes.precision():
            first, second = (
                record_layers(module, batch, with_attention=with_attention)
                for module, batch in zip(modules, batches, strict=True)
            )
        compared.add(first, second)
    values = compared.cka()
    if not values:
        raise ValueError(
            f"{names[0]} and {names[1]} have no layer in common: give checkpoints of one "
            "architecture"
        )
    heads = {layer: torch.cat(parts).mean(0).tolist() for layer, parts in compared.heads.items()}
    notes += compared.notes(values if with_attention else ())
    return _diagnostic(names, values, heads, [*notes, *_errors(probes)]), heads


class _Comparison:
    """Features of both checkpoints, and the similarity of their attention maps, over batches."""

    def __init__(self) -> None:
        self.first: dict[Layer, list[Tensor]] = {}
        self.second: dict[Layer, list[Tensor]] = {}
        self.heads: dict[Layer, list[Tensor]] = {}
        self.skipped: dict[Layer, None] = {}

    def add(self, first: LayerRecord, second: LayerRecord) -> None:
        """Add the records of the same batch."""
        for kept, record in ((self.first, first), (self.second, second)):
            self.skipped |= record.skipped
            for layer, parts in record.features.items():
                kept.setdefault(layer, []).extend(parts)
        for layer, maps in first.attention.items():
            for (one, mask), (other, _) in zip(maps, second.attention.get(layer, ()), strict=False):
                if one.shape == other.shape:
                    cosine = attention_similarity(one.float(), other.float(), mask)
                    self.heads.setdefault(layer, []).append(cosine.cpu())

    def cka(self) -> dict[Layer, tuple[float | None, str]]:
        """Return the CKA of every layer of both, or None and the reason."""
        return {
            layer: _cka(torch.cat(parts), torch.cat(self.second[layer]))
            for layer, parts in self.first.items()
            if layer in self.second
        }

    def notes(self, with_attention: Iterable[Layer]) -> list[str]:
        """Return what was left out; attention weights are expected of these layers."""
        only = len(self.first.keys() ^ self.second.keys())
        notes = [f"Layers of one of them only are left out: {only}."] if only else []
        if self.skipped:
            notes.append(
                f"Layers without a row for each sample are left out: {len(self.skipped)}, "
                f"{next(iter(self.skipped)).name} for one."
            )
        wanted = [layer for layer in with_attention if layer.number >= 0]
        missing = sorted({layer.tower for layer in wanted if layer not in self.heads})
        if missing:
            notes.append(f"Attention weights are not available in: {', '.join(missing)}.")
        return notes


def _paired_batches(
    modules: tuple[ContinualModule, ContinualModule], probes: ProbeData, numbers: Sequence[int]
) -> Iterator[list[Batch]]:
    """Yield the same probe samples for both models, each with its own transform."""
    row = len(probes.data.stream)
    for number in numbers:
        spec = probes.spec(row, number)
        for module in modules:
            if spec.names and hasattr(module.model, "set_classes"):
                module.model.set_classes(spec.prompt_names or spec.names, spec.task.templates)
        loaders = [probes.batches(module.model, number) for module in modules]
        for pair in zip(*loaders, strict=True):
            if all(map(len, pair)):
                yield [batch if spec.knows_task else _without_task(batch) for batch in pair]


def _without_task(batch: Batch) -> Batch:
    return replace(batch, task_ids=torch.full_like(batch.task_ids, -1))


def _cka(x: Tensor, y: Tensor) -> tuple[float | None, str]:
    """Return the CKA of two sets of features, or None and the reason."""
    try:
        return float(linear_cka(x, y, unbiased=True)), ""
    except ValueError as error:
        return None, str(error)


def _errors(probes: ProbeData) -> list[str]:
    count = len(probes.errors)
    return [f"{count} samples could not be read, {next(iter(probes.errors))}."] if count else []


def _diagnostic(
    names: tuple[str, str],
    values: Mapping[Layer, tuple[float | None, str]],
    heads: Mapping[Layer, Sequence[float]],
    notes: Sequence[str],
) -> Diagnostic:
    towers = list(dict.fromkeys(layer.tower for layer in values if layer.number >= 0))
    depth = max([layer.number + 1 for layer in values], default=0)

    def curve(tower: str, of: Mapping[tuple[str, int], float | None]) -> list[float | None]:
        return [of.get((tower, number)) for number in range(depth)]

    cka = {(layer.tower, layer.number): value for layer, (value, _) in values.items()}
    panels = [Panel("linear CKA", [Series(tower, curve(tower, cka)) for tower in towers])]
    if heads:
        means = {(la.tower, la.number): sum(own) / len(own) for la, own in heads.items()}
        least = {(la.tower, la.number): min(own) for la, own in heads.items()}
        series = [
            Series(f"{tower}, {word}", curve(tower, of))
            for tower in towers
            for word, of in (("mean of heads", means), ("lowest head", least))
            if any(key[0] == tower for key in of)
        ]
        panels.append(Panel("cosine of attention maps", series))
    metrics = [
        MetricValue(f"CKA of the {layer.name}", value, _CKA, reason or None)
        for layer, (value, reason) in values.items()
        if layer.number < 0
    ]
    metrics += [
        MetricValue(f"CKA of {layer.tower} layer {layer.number}", None, _CKA, reason)
        for layer, (value, reason) in values.items()
        if value is None and layer.number >= 0
    ]
    return Diagnostic(
        f"similarity_{names[0]}_{names[1]}",
        f"Similarity of {names[0]} and {names[1]}",
        "Linear CKA (Kornblith et al. 2019, with the unbiased estimator of HSIC) of the output of "
        "every block, mean over its tokens, and mean cosine similarity of the attention maps of "
        "its heads, between two checkpoints on the same probe samples. 1 = equal up to rotation "
        "and scale.",
        "layer",
        list(range(depth)),
        panels,
        metrics=metrics,
        notes=notes,
        settings={"first": names[0], "second": names[1]},
    )
