"""What transformers and peft load of a learned model: folders in their own layout, checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mmcl.commands.adapter import Adapter, find_adapter, write_files
from mmcl.core import Batch, Chain, Dialogue, Strategy, Turn, device_of
from mmcl.data.row import MadeRow, collate
from mmcl.layers import LowRankSlots, MoELoRALinear, installed
from mmcl.lightning.module import ContinualModule
from mmcl.models.chat_saving import names_without_layers, save_chat, with_weights

_WRAPPED = (".base_layer.", ".base.")
_TOLERANCE = 1e-3
_BY_MMCL = "run it by mmcl, from the run's own folder"


def form_of(module: ContinualModule) -> str:
    """Return the form in which a model is exported unless the user says otherwise."""
    if getattr(module.model, "clip", None) is not None:
        return "open_clip"
    return "transformers" if _adapter(module) is None else "peft"


def write_model(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the whole model, adapters merged, as a folder that ``from_pretrained`` loads.

    Returns:
        what was written, a sentence.

    Raises:
        TypeError: if the model is none of transformers.
        ValueError: if the folder exists, weights are quantised, or the model's answers depend on
            more than weights, which is all that a plain model has.
    """
    lm, batch = _lm(module), _probe(module)
    reason = _beyond_weights(module, batch)
    if reason:
        raise ValueError(
            f"{type(module.strategy).__name__} {reason}, which a plain model cannot do: {_BY_MMCL}"
        )
    with torch.no_grad(), module.strategy.folded(module.model):
        plain = with_weights(lm, _plain_names(lm.state_dict(), names_without_layers(lm)))
    _expect_alike(module, plain, batch)
    with new_folder(folder) as place:
        save_chat(plain.half() if half else plain, module.model.processor, place)
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
        reason = _beyond_weights(module, _probe(module)) or "has no adapter here"
        raise ValueError(
            f"{type(module.strategy).__name__} {reason}, so there is nothing that peft can run: "
            f"{'use --as transformers' if reason.startswith('has no') else _BY_MMCL}"
        )
    with new_folder(folder) as place:
        write_files(found, place, half=half)
    return f"{folder}: a peft adapter, {_size(folder)} bytes"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that takes its name when everything is in it.

    Raises:
        ValueError: if there is something of this name.
    """
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


def members_of(strategy: Strategy) -> list[Strategy]:
    """Return the strategies of a chain, or the one."""
    if isinstance(strategy, Chain):
        return [each for member in strategy.members for each in members_of(cast(Strategy, member))]
    return [strategy]


def _lm(module: ContinualModule) -> Any:
    lm = getattr(module.model, "lm", None)
    if lm is None:
        raise TypeError(
            f"{type(module.model).__name__} has no model of transformers to export: use --as "
            "open_clip for a CLIP"
        )
    return lm


def _adapter(module: ContinualModule) -> Adapter | None:
    """Return the adapter, None if there is none or peft could not run it."""
    if getattr(module.model, "lm", None) is None or _beyond_weights(module, _probe(module)):
        return None
    # A strategy whose layers differ between training and test has them as at test in here.
    with module.strategy.folded(module.model):
        pass
    return find_adapter(module.model, members_of(module.strategy))


def _beyond_weights(module: ContinualModule, batch: Batch) -> str:
    """Say what an answer takes besides weights; "" if nothing."""
    model = module.model
    with torch.no_grad():
        prompts = module.strategy.prompts(model, batch)
    if prompts.tokens:
        return "puts prompts of each sample into the model"
    slots = installed(model, LowRankSlots).values()
    is_gated = any(layer.mode == "gates" and layer.active for layer in slots)
    if prompts.gates or is_gated or installed(model, MoELoRALinear):
        return "routes every sample or token to experts"
    if any(member.uses("refine") for member in members_of(module.strategy)):
        return "changes what the model says"
    return ""


def _plain_names(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Return the weights under the names that they have without adapters around them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for wrap in _WRAPPED:
            name = name.replace(wrap, ".")
        if name in wanted:
            found[name] = tensor.detach()
    missing = sorted(wanted - set(found))
    missing += sorted(name for name, tensor in found.items() if not tensor.is_floating_point())
    if missing:
        raise ValueError(
            f"{len(missing)} weights are not there in plain form ({missing[0]} for one), as in a "
            "quantised model: export the adapter with --as peft, or give "
            "--model.model.base_precision bf16"
        )
    return found


def _probe(module: ContinualModule) -> Batch:
    """Make a row with a picture, a question and an answer."""
    model: Any = module.model
    turns = (Turn("human", "<image>\nWhat is this?"), Turn("assistant", "It is a picture."))
    said = Dialogue(turns, ("a picture",))
    side = model.pixels.size
    pixels = torch.arange(3 * side * side).remainder(251).view(3, side, side).to(torch.uint8)
    row = model.transform(False)(pixels, said, 0)
    made = MadeRow(row, -100, 0, 0, "probe", reference=said.reference)
    return collate([made]).to(device_of(model))


@torch.no_grad()
def _expect_alike(module: ContinualModule, plain: Any, batch: Batch) -> None:
    """Refuse to write a plain model that answers otherwise than the learned one."""
    model: Any = module.model
    learned = model.lm
    own = model(batch, module.strategy.prompts(model, batch)).logits.float()
    try:
        model.lm = plain
        apart = float((model(batch).logits.float() - own).abs().max())
    finally:
        model.lm = learned
    dtype = next(plain.parameters()).dtype
    share = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    if not apart <= share * max(1.0, float(own.abs().max())):
        raise ValueError(
            f"the plain model's scores differ by {apart:.2g} from the learned one's: "
            f"{type(module.strategy).__name__} does more than change weights; {_BY_MMCL}"
        )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
