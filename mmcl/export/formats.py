"""Export of trained weights: a transformers folder, a peft adapter, an open_clip folder or file."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmcl.core import Batch, Chain, Conversation, Strategy, Turn, device_of, write_atomic
from mmcl.core.master_weights import rounded_state
from mmcl.core.model import without_adapters
from mmcl.data.batches.collate import Example, collate
from mmcl.data.remote.location import sha256_of
from mmcl.layers import MoELoRALinear, MultiLoRALinear, find_layers
from mmcl.layers.target_layers import modules_in_full
from mmcl.lightning.module import ContinualModule
from mmcl.models.hf_vlm.loading import plain_model, plain_weight_names, save_pretrained
from mmcl.models.open_clip.loading import architecture_of, save_architecture
from mmcl.models.open_clip.pretrained_facts import own_preprocess
from mmcl.strategies.lora import LoRA, describe_base, peft_state

_TOLERANCE = 1e-3
_ROOT = "lm."
_WEIGHTS = ".safetensors"
CLIP_WEIGHTS = "open_clip_model.safetensors"
"""File of the weights in an exported folder of open_clip."""
RUN_WITH_MMCL = "run it with mmcl, from its run directory"


def write_clip(module: ContinualModule, target: Path, *, half: bool) -> str:
    """Write the CLIP's weights and architecture, in float16 if ``half``.

    Args:
        module: with a trained CLIP.
        target: new folder, which open_clip loads as ``local-dir:<target>``; or a file that ends in
            .safetensors, beside which the architecture is written as a .json of the same name.
        half: write float16.

    Returns:
        A report: target, bytes and sha256 of the weights.

    Raises:
        TypeError: if the model is not one of open_clip.
        ValueError: if the folder or the .json exists, or open_clip does not know the architecture.
    """
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(
            f"{type(module.model).__name__} has no open_clip model to export: use --as transformers"
        )
    dropped = [
        strategy
        for strategy in strategies_of(module.strategy)
        if strategy.overrides("prompts") or strategy.overrides("transform_output")
    ]
    if dropped:
        names = ", ".join(type(strategy).__name__ for strategy in dropped)
        warnings.warn(
            f"{names} predicts with more than the CLIP's weights (prompts or another head), which "
            "are not in this file",
            stacklevel=2,
        )
    state = {name: value.detach().contiguous() for name, value in clip.state_dict().items()}
    if half:
        state = {name: value.half() for name, value in state.items()}
    return _write_clip_files(module.model, state, target)


def _write_clip_files(model: Any, state: dict[str, Tensor], target: Path) -> str:
    name = str(getattr(model, "name", ""))
    if target.suffix != _WEIGHTS:
        with new_folder(target) as temporary:
            save_architecture(model.clip, getattr(model, "_tokenizer", None), name, temporary)
            save_file(state, temporary / CLIP_WEIGHTS)
        weights = target / CLIP_WEIGHTS
        report = f"{target}: a folder for open_clip ('local-dir:{target}')"
    else:
        weights, architecture = target, target.with_suffix(".json")
        if architecture.exists():
            raise ValueError(f"{architecture} exists: give a new name, or remove this one")
        text = json.dumps(architecture_of(name, model.clip), indent=2) + "\n"
        write_atomic(target, lambda path: save_file(state, path))
        write_atomic(architecture, text)
        report = f"{target}: weights for open_clip, with {architecture}"
        if facts := own_preprocess(model.clip):
            report += f" (which cannot hold their preprocessing: load them with preprocess={facts})"
    return f"{report}, {weights.stat().st_size} bytes, sha256 {sha256_of(weights)}"


def write_model(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the whole model, adapters merged, as a folder that ``from_pretrained`` loads.

    Returns:
        A report: folder, format and bytes.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if the folder exists, weights are quantized, or predictions depend on more than
            weights, which is all that a plain model has.
    """
    lm, batch = hf_model(module), example_batch(module)
    reason = beyond_weights(module, batch)
    if reason:
        raise ValueError(
            f"{type(module.strategy).__name__} {reason}, which a plain model cannot do: "
            f"{RUN_WITH_MMCL}"
        )
    plain = plain_model(lm, plain_weights(module))
    _expect_same_scores(module, plain, batch)
    with new_folder(folder) as temporary:
        save_pretrained(plain.half() if half else plain, module.model.processor, temporary)
    return f"{folder}: a transformers model with its processor, {folder_bytes(folder)} bytes"


@torch.no_grad()
def plain_weights(module: ContinualModule) -> dict[str, Tensor]:
    """Return the weights of a transformers model, adapters merged.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if weights are quantized.
    """
    lm = hf_model(module)
    with module.strategy.merged_adapters(module.model):
        return _plain_state(rounded_state(lm), plain_weight_names(lm))


def _plain_state(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Return the weights under their names without adapters.

    Raises:
        ValueError: if weights are missing or not floating point.
    """
    plain = {without_adapters(name): tensor.detach() for name, tensor in state.items()}
    found = {name: tensor for name, tensor in plain.items() if name in wanted}
    missing = sorted(wanted - set(found))
    missing += sorted(name for name, tensor in found.items() if not tensor.is_floating_point())
    if missing:
        raise ValueError(
            f"{len(missing)} weights have no plain form ({missing[0]} for one), as in a quantized "
            "model: export the adapter with --as peft, or give --model.model.quantization null"
        )
    return found


@torch.no_grad()
def _expect_same_scores(module: ContinualModule, plain: Any, batch: Batch) -> None:
    """Refuse to write a plain model whose scores differ from the trained model's.

    Raises:
        ValueError: if they do.
    """
    model: Any = module.model
    trained = model.lm
    scores = model(batch, module.strategy.prompts(model, batch)).logits.float()
    try:
        model.lm = plain
        model.locate_parameters()
        difference = float((model(batch).logits.float() - scores).abs().max())
    finally:
        model.lm = trained
        model.locate_parameters()
    dtype = next(plain.parameters()).dtype
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    if not difference <= tolerance * max(1.0, float(scores.abs().max())):
        raise ValueError(
            f"the plain model's scores differ by {difference:.2g} from the trained model's: "
            f"{type(module.strategy).__name__} does more than change weights; {RUN_WITH_MMCL}"
        )


@dataclass(frozen=True)
class Adapter:
    """A peft adapter.

    Attributes:
        config: content of ``adapter_config.json``.
        state: weights, named from the transformers model on.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


def write_adapter(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the adapter alone, as a folder that ``PeftModel.from_pretrained`` loads.

    Returns:
        A report: folder, format and bytes.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if the folder exists, or there is no adapter that peft could load.
    """
    hf_model(module)
    if module.start_weights is not None:
        raise ValueError(
            "the adapter was trained on the weights of another run (start_from), which peft cannot "
            "load: use --as transformers, or export that run too and train on its folder"
        )
    adapter = exportable_adapter(module)
    if adapter is None:
        reason = beyond_weights(module, example_batch(module)) or "has no adapter here"
        raise ValueError(
            f"{type(module.strategy).__name__} {reason}, so there is nothing that peft can run: "
            f"{'use --as transformers' if reason.startswith('has no') else RUN_WITH_MMCL}"
        )
    with new_folder(folder) as temporary:
        state = {
            f"base_model.model.{name}": (tensor.half() if half else tensor).contiguous()
            for name, tensor in adapter.state.items()
        }
        save_file(state, temporary / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(adapter.config, indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return f"{folder}: a peft adapter, {folder_bytes(folder)} bytes"


def exportable_adapter(module: ContinualModule) -> Adapter | None:
    """Return the adapter of a module, None if it has none or peft could not run it.

    Raises:
        ValueError: if it has one that peft could not load.
    """
    has_lm = getattr(module.model, "lm", None) is not None
    if not has_lm or beyond_weights(module, example_batch(module)):
        return None
    # This also sets layers that differ between training and evaluation to evaluation.
    with module.strategy.merged_adapters(module.model):
        pass
    for strategy in strategies_of(module.strategy):
        if isinstance(strategy, LoRA):
            return Adapter(strategy.peft_config(module.model), peft_state(module.model))
    layers = find_layers(module.model, MultiLoRALinear)
    if not layers or any(layer.mode not in ("one", "sum", "fused") for layer in layers.values()):
        return None
    named = {name.removeprefix(_ROOT): layer for name, layer in layers.items()}
    return _stacked(module.model, named)


def _stacked(model: Any, layers: Mapping[str, MultiLoRALinear]) -> Adapter | None:
    """Return the active adapters of every layer as one adapter of their summed rank.

    None if ranks or scales differ between layers, which one peft config cannot state.
    """
    state: dict[str, Tensor] = {}
    shapes = set()
    for name, layer in layers.items():
        A, B = _stacked_factors(layer)
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        shapes.add((len(A), float(layer.scale)))
    if len(shapes) != 1:
        return None
    rank, scale = shapes.pop()
    saved = modules_in_full(model.lm)
    for name, module in saved.items():
        state |= {f"{name}.{key}": value.cpu() for key, value in rounded_state(module).items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,  # peft's scale is alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
        "modules_to_save": sorted(saved) or None,
        **describe_base(model.lm),
        "inference_mode": True,
        "task_type": None,
    }
    return Adapter(config, state)


def _stacked_factors(layer: MultiLoRALinear) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (out, R) whose product is that of the active adapters together."""
    adapters = [layer.adapter(index) for index in layer.active]
    if layer.mode == "fused":
        A = torch.stack([adapter.lora_A for adapter in adapters]).sum(0)
        B = torch.stack([adapter.lora_B for adapter in adapters]).sum(0)
    else:
        A, B = (
            torch.cat([adapter.lora_A for adapter in adapters]),
            torch.cat([adapter.lora_B for adapter in adapters], 1),
        )
    return A.detach().cpu(), B.detach().cpu()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` once everything is written.

    Raises:
        ValueError: if ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder, or remove this one")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # safetensors gives its files to their owner alone; the folder's mode is by umask.
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def strategies_of(strategy: Strategy) -> list[Strategy]:
    """Return the strategies of a chain, or the single strategy."""
    if isinstance(strategy, Chain):
        nested = [strategies_of(cast(Strategy, member)) for member in strategy.members]
        return [each for members in nested for each in members]
    return [strategy]


def hf_model(module: ContinualModule) -> Any:
    """Return the transformers model of a module.

    Raises:
        TypeError: if there is none.
    """
    lm = getattr(module.model, "lm", None)
    if lm is None:
        raise TypeError(
            f"{type(module.model).__name__} has no model of transformers to export: use --as "
            "open_clip for a CLIP"
        )
    return lm


def beyond_weights(module: ContinualModule, batch: Batch) -> str:
    """Return what a prediction needs in addition to weights, in words; "" if nothing."""
    model = module.model
    with torch.no_grad():
        prompts = module.strategy.prompts(model, batch)
    if prompts.tokens:
        return "puts prompts of each sample into the model"
    layers = find_layers(model, MultiLoRALinear).values()
    is_gated = any(layer.mode == "gates" and layer.active for layer in layers)
    if prompts.gates or is_gated or find_layers(model, MoELoRALinear):
        return "routes every sample or token to experts"
    if any(each.overrides("transform_output") for each in strategies_of(module.strategy)):
        return "changes the model's output"
    return ""


def example_batch(module: ContinualModule) -> Batch:
    """Return a batch of one sample with an image, a question and an answer."""
    model: Any = module.model
    turns = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "It is an image."))
    conversation = Conversation(turns, ("an image",))
    side = model.image_inputs.size
    pixels = torch.arange(3 * side * side).remainder(251).view(3, side, side).to(torch.uint8)
    processed = model.transform(False)(pixels, conversation, 0)
    sample = Example(processed, -100, 0, 0, "example", reference=conversation.reference)
    return collate([sample]).to(device_of(model))


def default_format(module: ContinualModule) -> str:
    """Return the format of a model's export unless the user chooses another."""
    if getattr(module.model, "clip", None) is not None:
        return "open_clip"
    try:
        is_plain = module.start_weights is not None or exportable_adapter(module) is None
        return "transformers" if is_plain else "peft"
    except ValueError:  # an adapter of a base that peft cannot load
        return "transformers"


FORMATS = {"open_clip": write_clip, "transformers": write_model, "peft": write_adapter}
"""Format -> function of the module, the target and ``half``, which returns a report."""
