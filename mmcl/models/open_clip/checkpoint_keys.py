"""Loading of a checkpoint's tensors into an open_clip model, whatever prefixes their keys have.

The model's own keys decide what is a prefix: a key belongs to the longest end of it that the model
knows. Nothing is loaded in part: a key that is missing, left over or of another shape is an error
that names it and, where it can be recognized, the model that the weights are of.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mmcl.models.open_clip.checkpoint_files import NamedTensor, read_checkpoint
from mmcl.models.open_clip.transformers_keys import is_transformers_form, rename_transformers_keys

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that torch's wrappers (DDP, compile, FSDP) put anywhere into a key."""
_OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")
_MAX_POSITIONS = 1 << 20
_TIMM_POSITIONS = "visual.trunk.pos_embed"
_POSITIONS = {
    "visual.positional_embedding", _TIMM_POSITIONS, "positional_embedding",
    "text.positional_embedding",
}  # fmt: skip
_PLAIN_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer",
               "ln_final", "cls_emb")  # fmt: skip
_IMAGE_TOWER = re.compile(r"visual|vision|image|img")
_MOBILE_CLIP = re.compile(
    r"^(.*?)image_encoder\.model\.(patch_embed\.0\.rbr_conv\.0\.conv|patch_emb\.0\.block\.conv)\.weight$"
)
_KNOWN_FORMS = (
    (r"(^|\.)text_model\.encoder\.layer\.\d", "ChineseCLIPModel of transformers"),
    (r"(^|\.)text_model\.roberta\.", "AltCLIPModel of transformers"),
    (r"(^|\.)bert\.encoder\.layer\.", "Chinese-CLIP (cn_clip)"),
    (r"(^|\.)(language_model|vision_tower|multi_modal_projector|mm_projector)\.",
     "a generative model, which mmcl.models.ImageTextToText loads"),
    (r"(^|\.)(visual_encoder|text_decoder\.bert|text_encoder\.encoder)\.", "BLIP"),
    (r"\.?lora_(A|B|down|up)\b", "an adapter (LoRA): merge it into its base model and save that"),
    (r"(^|\.)text_decoder\.", "CoCa, whose architectures are named coca_..."),
    (r"^(.*\.)?blocks\.\d+\.attn\.qkv\.weight$", "a vision transformer of timm"),
    (r"(^|\.)text_model\.|(^|\.)vision_model\.", "one tower of a model of transformers"),
)  # fmt: skip


@dataclass
class _Match:
    """Tensors under the model's own names.

    Attributes:
        state: model's name -> tensor.
        leftover: tensors in the same containers that the model has no name for.
        remarks: what was chosen or left out, for a warning.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    leftover: list[NamedTensor] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def load_weights(clip: Any, path: Path, model: str) -> None:
    """Load a checkpoint file, or a folder with one, into an open_clip model.

    Position embeddings of another image size or context length are interpolated as open_clip does,
    weights of transformers are renamed, and what is chosen or left out is in one warning.

    Args:
        clip: an open_clip CLIP, CustomTextCLIP or CoCa.
        path: of a file, an index of several, or a folder; ``~`` is the home directory.
        model: name of the model, for messages.

    Raises:
        FileNotFoundError: if the path does not exist.
        RuntimeError: if it is no checkpoint or one of another architecture.
    """
    try:
        if path.suffix == ".npz":
            load_big_vision_weights(clip, str(path))
            return
        tensors = read_checkpoint(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise RuntimeError(f"{path} does not load into {model}: {error}") from error
    load_tensors(clip, tensors, path, model)


def load_tensors(clip: Any, tensors: Sequence[NamedTensor], path: Path, model: str) -> None:
    """Load named tensors into an open_clip model; see ``load_weights``.

    Raises:
        RuntimeError: if they are of another architecture.
    """
    match = _match(_renamed(clip, tensors), clip, path)
    facts = _take_facts(match)
    _add_logit_bias(clip, match)
    _resize_position_embeddings(clip, match)
    own = dict(clip.state_dict())
    for name, value in match.state.items():
        if value.shape != own[name].shape and value.numel() == own[name].numel() == 1:
            match.state[name] = value.reshape(own[name].shape)
    missing = [k for k in own if k not in match.state and not k.endswith("num_batches_tracked")]
    shapes = [k for k, value in match.state.items() if value.shape != own[k].shape]
    unexpected, outside = _split_leftover(clip, match)
    if missing or shapes or unexpected:
        reasons = [
            *_listed(missing, "{} missing"),
            *_listed([tensor.name for tensor in unexpected], "{} unexpected"),
            *_listed(
                [f"{k} {tuple(match.state[k].shape)} for {tuple(own[k].shape)}" for k in shapes],
                "{} of another shape",
            ),
        ]
        raise RuntimeError(
            f"{path} does not load into this architecture, {model}, which has {len(own)} keys: "
            f"{'; '.join(reasons)}. {_nearest_form(clip, tensors, match, facts)}"
        )
    if outside:
        match.remarks += _listed(
            [t.name for t in outside], "{} without a place in the model left out"
        )
    # Halves of the file become single precision where they are copied.
    counters = {k: value for k, value in own.items() if k.endswith("num_batches_tracked")}
    clip.load_state_dict({**counters, **match.state})
    if match.remarks:
        warnings.warn(f"{path}: {'; '.join(match.remarks)}", stacklevel=2)


def _renamed(clip: Any, tensors: Sequence[NamedTensor]) -> Sequence[NamedTensor]:
    """Return the tensors under open_clip's names if they are of transformers or MobileCLIP."""
    if is_transformers_form(tensors):
        return rename_transformers_keys(tensors)
    found = next((m for t in tensors if (m := _MOBILE_CLIP.match(t.name))), None)
    if found is None:
        return tensors
    own = {t.name.removeprefix(found[1]): t.tensor for t in tensors if t.name.startswith(found[1])}
    return [NamedTensor("", name, value) for name, value in convert_state_dict(clip, own).items()]


def _match(tensors: Iterable[NamedTensor], clip: Any, path: Path) -> _Match:
    """Give tensors the model's names: the longest end of a key that the model has."""
    targets = _targets(clip)
    wrappers = _WRAPPERS - {part for name in targets for part in name.split(".")}
    groups: dict[str, dict[str, NamedTensor]] = defaultdict(dict)
    prefix_of: dict[int, str] = {}
    listed = list(tensors)
    for index, tensor in enumerate(listed):
        parts = [part for part in tensor.name.split(".") if part not in wrappers]
        found = _longest_end(parts, targets)
        if found is None:
            continue
        prefix, target = found
        if target in groups[prefix] and not _same(groups[prefix][target].tensor, tensor.tensor):
            raise RuntimeError(
                f"{path} holds {target} twice, as {groups[prefix][target].name} and {tensor.name}: "
                "save the weights that you mean in a file of their own"
            )
        groups[prefix][target] = tensor
        prefix_of[index] = prefix
    match = _Match()
    chosen: dict[str, NamedTensor] = {}
    for prefix in sorted(groups, key=lambda each: (-len(groups[each]), _is_average(each))):
        group = groups[prefix]
        overlap = group.keys() & chosen.keys()
        if not overlap:
            chosen |= group
            match.prefixes.append(prefix)
        elif len(group) == len(groups[match.prefixes[0]]):
            _expect_average(prefix, match, path)
    if match.prefixes and _is_average(match.prefixes[0]):
        match.remarks.append(f"these are averaged weights (EMA), {match.prefixes[0]!r}")
    match.state = {target: tensor.tensor for target, tensor in chosen.items()}
    containers = {tensor.container for tensor in chosen.values()}
    match.leftover = [
        tensor
        for index, tensor in enumerate(listed)
        if tensor.container in containers and prefix_of.get(index) not in match.prefixes
    ]
    return match


def _longest_end(parts: list[str], targets: Mapping[str, str]) -> tuple[str, str] | None:
    for start in range(len(parts)):
        target = targets.get(".".join(parts[start:]))
        if target is not None:
            is_text = not target.startswith("visual.")
            # Blocks of an image tower that is built otherwise have the names of text blocks.
            if is_text and any(_IMAGE_TOWER.match(part) for part in parts[:start]):
                return None
            return ".".join(parts[:start]), target
    return None


def _targets(clip: Any) -> dict[str, str]:
    """Return names in a checkpoint -> names in the model; text towers have two forms."""
    own = clip.state_dict()
    targets = {name: name for name in own}
    if isinstance(getattr(clip, "text", None), open_clip.transformer.TextTransformer):
        for name in own:
            plain = name.removeprefix("text.")
            if plain != name and plain.split(".")[0] in _PLAIN_TEXT:
                targets.setdefault(plain, name)
    if getattr(clip, "logit_bias", None) is None:
        targets["logit_bias"] = "logit_bias"  # of sigmoid losses; the model gets one
    for fact in _OPENAI_FACTS:
        targets.setdefault(fact, fact)
    return targets


def _is_average(prefix: str) -> bool:
    return re.search(r"(^|[._])ema([._]|$)", prefix) is not None


def _expect_average(prefix: str, match: _Match, path: Path) -> None:
    """Check that of two whole sets of weights the second is an average, which is not loaded."""
    first = match.prefixes[0]
    if not _is_average(prefix) or _is_average(first):
        raise RuntimeError(
            f"{path} holds two sets of these weights, under {first!r} and {prefix!r}: save the one "
            "that you mean in a file of its own"
        )
    match.remarks.append(
        f"it holds averaged weights (EMA) under {prefix!r} too, and those under {first!r} are "
        "loaded: save the average in a file of its own to use it"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _take_facts(match: _Match) -> dict[str, int]:
    """Take the numbers of an OpenAI archive out of the weights."""
    found = {name: match.state.pop(name) for name in _OPENAI_FACTS if name in match.state}
    return {name: int(value) for name, value in found.items() if value.numel() == 1}


def _add_logit_bias(clip: Any, match: _Match) -> None:
    """Make model and weights agree on a logit bias, which sigmoid losses have."""
    bias = match.state.get("logit_bias")
    if bias is not None and clip.logit_bias is None:
        clip.logit_bias = nn.Parameter(torch.zeros_like(clip.logit_scale))
    elif bias is None and clip.logit_bias is not None and match.state:
        match.state["logit_bias"] = torch.zeros_like(clip.logit_bias)
        match.remarks.append("it has no logit_bias, which starts at 0")


def _resize_position_embeddings(clip: Any, match: _Match) -> None:
    """Interpolate position embeddings to the model's image size and context length."""
    own = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    before: dict[str, tuple[int, ...]] = {}
    trunk: Any = getattr(clip.visual, "trunk", None)
    extra = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
    for name in _POSITIONS & match.state.keys() & own.keys():
        value, shape = match.state[name], tuple(match.state[name].shape)
        is_image = name.startswith("visual.")
        grid, own_grid = shape[-2:], own[name][-2:]
        if shape == own[name] or len(shape) != len(own[name]) or grid[1:] != own_grid[1:]:
            continue
        if is_image and not _is_square(grid[0] - extra):
            continue
        _expect_stored(name, value)
        before[name] = shape
        # Interpolation on the CPU needs single precision.
        match.state[name] = value.float()
        if name == _TIMM_POSITIONS:
            match.state[name] = resample_abs_pos_embed(
                value.float(), list(trunk.patch_embed.grid_size), num_prefix_tokens=extra
            )
    if before.keys() - {_TIMM_POSITIONS}:
        resize_pos_embed(match.state, clip)
        resize_text_pos_embed(match.state, clip)
    match.remarks += [
        f"{name} is interpolated from {shape} to {tuple(match.state[name].shape)}"
        for name, shape in before.items()
    ]


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count


def _expect_stored(name: str, value: Tensor) -> None:
    """Refuse a tensor that claims more values than the file has."""
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RuntimeError(
            f"{name} claims the shape {tuple(value.shape)} and the file has only "
            f"{value.untyped_storage().nbytes()} bytes of it: the file is damaged"
        )


def _split_leftover(clip: Any, match: _Match) -> tuple[list[NamedTensor], list[NamedTensor]]:
    """Return tensors within the model's parts that it does not know, and tensors outside of it.

    Buffers that every model computes by itself, masks and position numbers, are neither.
    """
    stored = clip.state_dict()
    buffers = {name: value for name, value in clip.named_buffers() if name not in stored}
    parts = {name.split(".")[0] for name in (*_targets(clip), *buffers)}
    unexpected: list[NamedTensor] = []
    outside: list[NamedTensor] = []
    for tensor in match.leftover:
        names = [part for part in tensor.name.split(".") if part not in _WRAPPERS]
        if _is_computed(names, tensor.tensor, buffers):
            continue
        rest = next(
            (names[len(p) :] for p in _split_longest(match.prefixes) if names[: len(p)] == p), names
        )
        (unexpected if rest[0] in parts else outside).append(tensor)
    return unexpected, outside


def _split_longest(prefixes: Iterable[str]) -> list[list[str]]:
    return sorted((p.split(".") if p else [] for p in prefixes), key=len, reverse=True)


def _is_computed(names: list[str], value: Tensor, buffers: Mapping[str, Tensor]) -> bool:
    if names[-1] == "position_ids" and value.numel() <= _MAX_POSITIONS:
        return torch.equal(value.flatten(), torch.arange(value.numel(), dtype=value.dtype))
    own = next((b for name, b in buffers.items() if name.split(".")[-1] == names[-1]), None)
    is_alike = own is not None and own.shape == value.shape
    return is_alike and torch.equal(cast(Tensor, own), value.to(cast(Tensor, own).dtype))


def _listed(names: Collection[str], text: str) -> list[str]:
    if not names:
        return []
    first = list(names)[:5]
    more = ", ..." if len(names) > len(first) else ""
    return [f"{text.format(len(names))} ({', '.join(first)}{more})"]


def _nearest_form(
    clip: Any, tensors: Sequence[NamedTensor], match: _Match, facts: Mapping[str, int]
) -> str:
    """Return one sentence on what the weights are of, as far as their keys and shapes tell."""
    if names := architectures_of(tensors):
        stated = "".join(f", {name} {value}" for name, value in facts.items())
        return f"These weights are of {' or '.join(names[:4])}{stated}: give that as model"
    for pattern, form in _KNOWN_FORMS:
        if any(re.search(pattern, tensor.name) for tensor in tensors):
            return f"Its keys are those of {form}"
    image = {name for name in clip.state_dict() if name.startswith("visual.")}
    plain = {name.removeprefix("visual.") for name in image}
    is_plain = len(plain & {tensor.key for tensor in tensors}) > len(plain) // 2
    if match.state.keys() >= image and match.state.keys() <= image or is_plain:
        return "Its keys are those of an image tower alone: the text tower is missing"
    if not tensors:
        return "It holds no tensors"
    if len(match.state) * 2 > len(clip.state_dict()):
        return (
            "Checkpoints of a run hold only what was trained: write all weights by 'mmcl export', "
            "or check model and pretrained"
        )
    keys = ", ".join(tensor.name for tensor in tensors[:3])
    return f"Its keys ({keys}, ...) are of no form that is known: check model and pretrained"


def architectures_of(tensors: Iterable[NamedTensor]) -> list[str]:
    """Return the architectures of open_clip with the widths, layers and sizes of some weights.

    Only image towers in OpenAI's form (ViT, ResNet) and text towers of open_clip are recognized.
    """
    named = list(tensors)
    if is_transformers_form(named):
        named = rename_transformers_keys(named)
    shapes = {tensor.name: tuple(tensor.tensor.shape) for tensor in named}
    anchor = next((n for n in shapes if n.endswith("token_embedding.weight")), None)
    if anchor is None:
        return []
    root = anchor.removesuffix("token_embedding.weight")
    text = (
        *shapes[anchor],
        _count(shapes, rf"{re.escape(root)}transformer\.resblocks\.(\d+)\.ln_1\.weight"),
    )
    images = {
        name.rpartition("visual.")[2]: shape for name, shape in shapes.items() if "visual." in name
    }
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        own, is_coca = config["text_cfg"], "multimodal_cfg" in config
        text_of = (own.get("vocab_size", 49408), own.get("width", 512), own.get("layers", 12))
        if is_coca != any("text_decoder." in each for each in shapes):
            continue
        if text_of == text and _is_image_tower(config["vision_cfg"], images):
            found.append(name)
    return found


def _is_image_tower(config: Mapping[str, Any], images: Mapping[str, tuple[int, ...]]) -> bool:
    conv = images.get("conv1.weight")
    if conv is None or "timm_model_name" in config:
        return (
            conv is None
            and "timm_model_name" in config
            and any(name.startswith("trunk.") for name in images)
        )
    layers, width = config.get("layers", 12), config.get("width", 768)
    if isinstance(layers, list | tuple):
        counts = [_count(images, rf"layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4)]
        return counts == list(layers) and conv[0] * 2 == width
    patch, side = config.get("patch_size", 16), config.get("image_size", 224)
    positions = images.get("positional_embedding", (0,))[0]
    blocks = _count(images, r"transformer\.resblocks\.(\d+)\.ln_1\.weight")
    own = (width, patch, layers, (side // patch) ** 2 + 1 if isinstance(side, int) else positions)
    return own == (conv[0], conv[-1], blocks, positions)


def _count(names: Iterable[str], pattern: str) -> int:
    return len({m[1] for name in names if (m := re.fullmatch(pattern, name))})
