"""Architectures of transformers' image-text-to-text models: module names, groups and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Architecture of one ``model_type``: names of its modules and form of its image inputs.

    Attributes:
        projector: dotted name, inside ``model.model``, of the projector from image to word
            features.
        more_projectors: dotted names of further projectors, of features of inner tower layers.
        tower: dotted name of the vision tower there.
        language: dotted name of the language model there.
        image_options: options of the image processor for images that already have the model's size.
        pixel_axes: 4 or 5 where images are only normalized, to (M, 3, S, S) or (1, M, 3, S, S),
            which is done here on the images' device; 0 where the image processor has to.
        takes_features: stored projector inputs can replace images.
        is_stacked: projected images are one tensor, not a list.
        has_one_size: only the image size of the configuration is supported.
        size_step: numbers of ``vision_config``, or else of the whole configuration, whose product
            divides the image size.
        default_size: image size where the configuration has none.
        is_joint: the number of a sample's images changes how each is cut into tiles.
        has_prefix_attention: images and question attend to each other in both directions, and the
            model takes from ``token_type_ids`` where the answer begins.
    """

    projector: str = "multi_modal_projector"
    more_projectors: tuple[str, ...] = ()
    tower: str = "vision_tower"
    language: str = "language_model"
    image_options: Mapping[str, Any] = field(default_factory=dict)
    pixel_axes: int = 0
    takes_features: bool = False
    is_stacked: bool = False
    has_one_size: bool = False
    size_step: tuple[str, ...] = ()
    default_size: int = 336
    is_joint: bool = False
    has_prefix_attention: bool = False


_QWEN = Architecture(
    projector="visual.merger", tower="visual", image_options={"do_resize": False},
    size_step=("patch_size", "spatial_merge_size"), default_size=448,
)  # fmt: skip
_SMOL = Architecture(
    projector="connector", tower="vision_model", language="text_model",
    image_options={"do_resize": False, "do_image_splitting": False}, pixel_axes=5,
    takes_features=True, has_one_size=True,
)  # fmt: skip
_GEMMA = Architecture(
    image_options={"do_resize": False}, pixel_axes=4, takes_features=True, is_stacked=True,
    has_one_size=True,
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llava": Architecture(
            image_options={"do_resize": False, "do_center_crop": False}, pixel_axes=4,
            takes_features=True, has_one_size=True,
        ),
        "llava_next": Architecture(),
        "llava_onevision": Architecture(default_size=384, is_joint=True),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "qwen3_vl": replace(_QWEN, more_projectors=("visual.deepstack_merger_list",)),
        "idefics3": _SMOL,
        "smolvlm": _SMOL,
        "internvl": Architecture(
            image_options={"crop_to_patches": False, "do_resize": False}, pixel_axes=4,
            takes_features=True, is_stacked=True, has_one_size=True, default_size=448,
        ),
        "gemma3": _GEMMA,
        "paligemma": replace(_GEMMA, has_prefix_attention=True),
        "mistral3": Architecture(
            image_options={"do_resize": False}, size_step=("patch_size", "spatial_merge_size"),
        ),
        "lfm2_vl": Architecture(default_size=512),
    }
)  # fmt: skip
# Gemma 3's configuration may state a cap of word scores, which its image-text model does not apply.
_UNCAPPED = ("gemma3",)
# Pixtral: the class and the model_type of LLaVA around a tower of any resolution.
_PIXTRAL = Architecture(image_options={"do_resize": False}, size_step=("patch_size",))


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture entry for ``model.config.model_type``.

    A type without an entry gets the module names of the first entry that fits its modules.

    Raises:
        ValueError: if the model has no modules of these names.
    """
    config: Any = model.config
    inner: Any = getattr(model, "model", None)
    modules = {name for name, _ in inner.named_modules()} if inner is not None else set()
    model_type = str(config.model_type)
    if model_type in ARCHITECTURES:
        is_pixtral = getattr(config.vision_config, "model_type", "") == "pixtral"
        own = _PIXTRAL if model_type == "llava" and is_pixtral else ARCHITECTURES[model_type]
        candidates = [own]
    else:
        names = {(one.projector, one.tower, one.language) for one in ARCHITECTURES.values()}
        candidates = [Architecture(projector=p, tower=t, language=m) for p, t, m in sorted(names)]
    for found in candidates:
        if {found.projector, found.tower, found.language} <= modules:
            return found
    raise ValueError(
        f"a model of type '{model_type}' has no vision tower, projector and language model of "
        f"names that are known here: use one of type {', '.join(ARCHITECTURES)}"
    )


ModuleGroup = Literal["image", "text", "projector"]
TargetModules = Literal["all", "attention", "mlp"]
_SUFFIXES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "self_attn.out_proj"),
    "mlp": (
        "gate_proj", "up_proj", "down_proj",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ),
}  # fmt: skip


def parameters_of(lm: Any, architecture: Architecture, group: ModuleGroup) -> list[nn.Parameter]:
    """Return the parameters of one module group; every parameter belongs to exactly one group.

    Args:
        lm: model of transformers.
        architecture: architecture of its type.
        group: "image", the vision tower; "text", the language model with its head; "projector",
            everything else, such as LLaVA-OneVision's newline.

    Raises:
        ValueError: if there is no such group.
    """
    if group not in get_args(ModuleGroup):
        raise ValueError(
            f"there is no module group {group!r}: choose 'image', 'projector' or 'text'"
        )
    inner = lm.model
    projectors = (architecture.projector, *architecture.more_projectors)
    projector = {id(p) for name in projectors for p in inner.get_submodule(name).parameters()}
    image = {id(p) for p in inner.get_submodule(architecture.tower).parameters()} - projector
    language = [inner.get_submodule(architecture.language), lm.get_output_embeddings()]
    text = {id(p) for module in language for p in module.parameters()}
    if group == "projector":
        return [p for p in lm.parameters() if id(p) not in image | text]
    wanted = image if group == "image" else text
    return [p for p in lm.parameters() if id(p) in wanted]


def find_linears(model: nn.Module, prefix: str, which: TargetModules) -> dict[str, nn.Linear]:
    """Return the linear layers of a model whose full name has a prefix, by name.

    ``which``: "all", "attention" (q, k, v, o) or "mlp" (gate, up, down, or w1, w2, w3). "all" has
    those of other blocks too, such as LFM2's convolutions.

    Raises:
        ValueError: if ``which`` is another.
    """
    if which != "all" and which not in _SUFFIXES:
        raise ValueError(f"target_modules is {which!r}, expected 'all', 'attention' or 'mlp'")
    endings = () if which == "all" else tuple(f".{suffix}" for suffix in _SUFFIXES[which])
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
        if which == "all" or name.endswith(endings)
    }


def output_logits(lm: Any, hidden: Tensor) -> Tensor:
    """Return the word scores (..., V) of hidden states (..., D), as ``lm.forward`` computes them.

    Some models, such as PaliGemma 2, cap them: x becomes tanh(x / c) * c.
    """
    logits: Tensor = lm.get_output_embeddings()(hidden)
    cap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None or lm.config.model_type in _UNCAPPED:
        return logits
    capped: Tensor = torch.tanh(logits / cap) * cap
    return capped


ParameterLocation = tuple[nn.Module, str]
"""Location of a parameter: a module and the name of one of its own parameters."""


def parameter_locations(
    module: nn.Module, parameters: Iterable[nn.Parameter]
) -> list[ParameterLocation]:
    """Return the locations of some of a module's parameters, which stay valid under FSDP."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        (child, name)
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if id(parameter) in wanted
    ]


def touch_parameters(logits: Tensor, *groups: Iterable[ParameterLocation]) -> Tensor:
    """Add ``0 * p`` for every trainable parameter p, so that each gets a gradient.

    DDP waits for the gradients of all of them. A batch without images would leave out tower and
    projector, and every batch leaves out the tower's layers after the one whose features are used.
    The groups are of ``parameter_locations``.
    """
    parameters = [module._parameters[name] for group in groups for module, name in group]
    trainable = [p for p in parameters if p is not None and p.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return logits
    return logits + (torch.stack([p.flatten()[0] for p in trainable]).sum() * 0).to(logits.dtype)
