"""What transformers and peft load of a learned model: folders in their own layout, checked."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcl.core import Chain, Dialogue, Strategy, Turn
from mmcl.data.row import MadeRow, collate
from mmcl.layers import LowRankSlots, installed
from mmcl.lightning.module import ContinualModule
from mmcl.strategies.lora import LoRA, peft_state

_WRAPPED = (".base_layer.", ".base.")
_TOLERANCE = 1e-3


def form_of(module: ContinualModule) -> str:
    """Return the form in which a model is exported unless the user says otherwise."""
    if getattr(module.model, "clip", None) is not None:
        return "open_clip"
    if _adapter(module) is not None:
        return "peft"
    return "transformers"


def write_model(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the whole model, adapters merged, as a folder that ``from_pretrained`` loads.

    Returns:
        what was written, a sentence.

    Raises:
        TypeError: if the model is none of transformers.
        ValueError: if the folder exists, or the model's answers depend on routing, which a plain
            model has not.
    """
    lm = _lm(module)
    plain: Any = type(lm)(copy.deepcopy(lm.config))
    with torch.no_grad(), module.strategy.folded(module.model):
        state = _plain_names(lm.state_dict(), set(plain.state_dict()))
        plain.load_state_dict(state, strict=True)
    plain = plain.to(next(iter(state.values())).dtype).eval()
    _expect_alike(module, plain)
    plain.generation_config = lm.generation_config
    with _new_folder(folder) as place:
        (plain.half() if half else plain).save_pretrained(place)
        module.model.processor.save_pretrained(place)
    return f"{folder}: a transformers model with its processor, {_size(folder)} bytes"


def write_adapter(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the adapter alone, as a folder that ``PeftModel.from_pretrained`` loads.

    Returns:
        what was written, a sentence.

    Raises:
        ValueError: if the folder exists, or there is no adapter that peft could run.
    """
    _lm(module)
    found = _adapter(module)
    if found is None:
        raise ValueError(
            f"{type(module.strategy).__name__} has no adapter that peft can run (its experts are "
            "routed, or it has none): run it by mmcl, or use --as transformers where nothing is "
            "routed"
        )
    config, state = found
    if half:
        state = {name: tensor.half() for name, tensor in state.items()}
    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    with _new_folder(folder) as place:
        save_file(named, place / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (place / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return f"{folder}: a peft adapter, {_size(folder)} bytes"


def _lm(module: ContinualModule) -> Any:
    lm = getattr(module.model, "lm", None)
    if lm is None:
        raise TypeError(
            f"{type(module.model).__name__} has no model of transformers to export: use --as "
            "open_clip for a CLIP"
        )
    return lm


def _adapter(module: ContinualModule) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return an adapter's configuration and weights, None if peft could not run it."""
    for member in _members(module.strategy):
        if isinstance(member, LoRA):
            return member.peft_config(module.model), peft_state(module.model)
    layers = installed(module.model, LowRankSlots)
    modes = {(layer.mode, layer.active) for layer in layers.values()}
    if len(modes) != 1 or next(iter(modes))[0] not in ("one", "sum"):
        return None
    return _stacked(layers)


def _members(strategy: Strategy) -> list[Strategy]:
    if isinstance(strategy, Chain):
        return [each for member in strategy.members for each in _members(member)]
    return [strategy]


def _stacked(
    layers: Mapping[str, LowRankSlots],
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the active slots of every layer as one adapter of their summed rank."""
    from peft import LoraConfig

    state: dict[str, Tensor] = {}
    ranks, scales = set(), set()
    for name, layer in layers.items():
        slots = [layer.slot(number) for number in layer.active]
        if not slots:
            return None
        short = name.removeprefix("lm.")
        state[f"{short}.lora_A.weight"] = torch.cat([slot.A for slot in slots]).detach().cpu()
        state[f"{short}.lora_B.weight"] = torch.cat([slot.B for slot in slots], 1).detach().cpu()
        ranks.add(len(state[f"{short}.lora_A.weight"]))
        scales.add(float(layer.scale))
    if len(ranks) != 1 or len(scales) != 1:
        return None
    rank, scale = ranks.pop(), scales.pop()
    targets = sorted(name.removeprefix("lm.") for name in layers)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, inference_mode=True)
    # peft's scale is alpha / r, and alpha may be a fraction in its file.
    stated = {**config.to_dict(), "lora_alpha": scale * rank}
    plain: dict[str, Any] = json.loads(json.dumps(stated, default=_listed))
    return plain, {name: tensor.contiguous() for name, tensor in state.items()}


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _plain_names(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Return the weights under the names that they have without adapters around them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for wrap in _WRAPPED:
            name = name.replace(wrap, ".")
        if name in wanted:
            found[name] = tensor.detach().clone()
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(
            f"{len(missing)} weights have no plain form ({missing[0]} for one): quantised models "
            "are exported with --as peft"
        )
    return found


@torch.no_grad()
def _expect_alike(module: ContinualModule, plain: nn.Module) -> None:
    """Refuse to write a plain model that answers otherwise than the learned one."""
    model: Any = module.model
    turns = (Turn("human", "<image>\nWhat is this?"), Turn("assistant", "It is a picture."))
    side = model.pixels.size
    pixels = torch.arange(3 * side * side).remainder(251).view(3, side, side).to(torch.uint8)
    row = model.transform(False)(pixels, Dialogue(turns, ("a picture",)), 0)
    reference = Dialogue(turns, ("a picture",)).reference
    batch = collate([MadeRow(row, -100, 0, 0, "probe", reference=reference)])
    prompts = module.strategy.prompts(model, batch)
    own = module.strategy.refine(model, batch, model(batch, prompts)).logits
    tokens = model._tokens(batch)
    marks = model.pixels.marks(tokens)
    every = plain(input_ids=tokens, **model.pixels.inputs(plain, batch), **marks).logits
    rows, places = torch.nonzero(batch.labels[:, 1:] != -100, as_tuple=True)
    theirs = every[rows, places]
    apart = float((own - theirs).abs().max())
    if apart > _TOLERANCE * max(1.0, float(own.abs().max())):
        raise ValueError(
            f"the plain model's scores differ by {apart:.2g} from the learned one's: this strategy "
            "routes or prompts every sample, which a plain model cannot do; run it by mmcl"
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes its name when everything is in it."""
    if folder.exists():
        raise ValueError(f"{folder} exists: give a new folder, or remove this one")
    place = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    place.mkdir(parents=True)
    try:
        yield place
        place.rename(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
