"""Export of the whole model as a transformers folder, compared with the trained model first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mmcl.core import Batch, Chain, Conversation, Strategy, Turn, device_of
from mmcl.core.model import without_adapters
from mmcl.data.batches.collate import Example, collate
from mmcl.layers import MoELoRALinear, MultiLoRALinear, find_layers
from mmcl.lightning.module import ContinualModule
from mmcl.models.hf_vlm.saving import plain_model, plain_weight_names, save_pretrained

_TOLERANCE = 1e-3
RUN_WITH_MMCL = "run it with mmcl, from its run directory"


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
    with torch.no_grad(), module.strategy.merged_adapters(module.model):
        plain = plain_model(lm, _plain_state(lm.state_dict(), plain_weight_names(lm)))
    _expect_same_scores(module, plain, batch)
    with new_folder(folder) as temporary:
        save_pretrained(plain.half() if half else plain, module.model.processor, temporary)
    return f"{folder}: a transformers model with its processor, {folder_bytes(folder)} bytes"


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
    turns = (Turn("human", "<image>\nWhat is this?"), Turn("assistant", "It is an image."))
    conversation = Conversation(turns, ("an image",))
    side = model.image_inputs.size
    pixels = torch.arange(3 * side * side).remainder(251).view(3, side, side).to(torch.uint8)
    processed = model.transform(False)(pixels, conversation, 0)
    sample = Example(processed, -100, 0, 0, "example", reference=conversation.reference)
    return collate([sample]).to(device_of(model))


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
        difference = float((model(batch).logits.float() - scores).abs().max())
    finally:
        model.lm = trained
    dtype = next(plain.parameters()).dtype
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    if not difference <= tolerance * max(1.0, float(scores.abs().max())):
        raise ValueError(
            f"the plain model's scores differ by {difference:.2g} from the trained model's: "
            f"{type(module.strategy).__name__} does more than change weights; {RUN_WITH_MMCL}"
        )
