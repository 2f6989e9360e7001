"""Facts that come with pretrained weights: the activation and the preprocessing of images.

open_clip states them for every pretrained tag, and a folder or hub repository in its
``open_clip_config.json``. Weights that run with other facts give wrong embeddings without an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import get_model_preprocess_cfg
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import QuickGELU

_QUICK = "-quickgelu"
_CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}
SETTABLE = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def create_options(
    model: str,
    pretrained: str | None,
    *,
    is_file: bool,
    quick_gelu: bool | None,
    preprocess: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any]]:
    """Return the architecture and the options with which open_clip creates a model for its weights.

    A tag's activation is that of its configuration, whether or not the name ends in "-quickgelu".
    A file does not tell how its weights were trained: it gets the activation of the name, and the
    preprocessing on which all tags of the name agree; a warning names what they do not agree on.

    Args:
        model: architecture, or "hf-hub:..." or "local-dir:..." with a configuration of its own.
        pretrained: tag, file or None.
        is_file: whether ``pretrained`` is a file.
        quick_gelu: activation that the user gives; None = that of the weights.
        preprocess: preprocessing that the user gives, see ``OpenCLIP``; None = that of the weights.

    Returns:
        The name for ``open_clip.create_model``, and its keyword arguments.

    Raises:
        ValueError: if ``quick_gelu`` contradicts the tag, or ``preprocess`` has an unknown key.
    """
    options: dict[str, Any] = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    given = _checked_preprocess(preprocess)
    if pretrained is not None and is_file:
        options["pretrained_hf"] = False  # no weights of a hub for a text tower, either
        given = {**_facts_of_file(model, pretrained, quick_gelu, preprocess), **given}
    elif pretrained is not None:
        plain = model.removesuffix(_QUICK)
        if not get_pretrained_cfg(model, pretrained) and get_pretrained_cfg(plain, pretrained):
            model = plain
        if get_pretrained_cfg(model, pretrained):
            trained_with = tag_activation(model, pretrained)
            if quick_gelu not in (None, trained_with):
                raise ValueError(
                    f"quick_gelu is {quick_gelu} and the weights '{pretrained}' of {model} were "
                    f"trained with {'QuickGELU' if trained_with else 'GELU'}: leave quick_gelu out"
                )
            options["quick_gelu"] = trained_with
    if given:
        options["force_preprocess_cfg"] = given
    return model, options


def tag_activation(model: str, tag: str) -> bool:
    """Return whether the weights of a tag of open_clip were trained with QuickGELU.

    Args:
        model: architecture that has the tag; "-quickgelu" at its end does not count.
        tag: such as "openai".
    """
    plain = model.removesuffix(_QUICK)
    architecture = open_clip.get_model_config(plain) or open_clip.get_model_config(model) or {}
    # roberta-ViT-B-32 is QuickGELU by its architecture, and its tag does not repeat it.
    is_quick = get_pretrained_cfg(model, tag).get("quick_gelu", architecture.get("quick_gelu"))
    return bool(is_quick)


def expect_activation(clip: Any, model: str, quick_gelu: bool | None) -> None:
    """Refuse an activation that the architecture does not have.

    Raises:
        ValueError: if ``quick_gelu`` is not what the built model has, for example where both towers
            are those of other libraries.
    """
    if quick_gelu is not None and uses_quick_gelu(clip) != quick_gelu:
        raise ValueError(
            f"quick_gelu is {quick_gelu} and has no effect on {model}, whose towers have an "
            "activation of their own: leave quick_gelu out"
        )


def uses_quick_gelu(clip: Any) -> bool:
    """Return whether a tower of open_clip's own has QuickGELU in place of GELU."""
    return any(isinstance(module, QuickGELU) for module in clip.modules())


def preprocess_of(clip: Any) -> Any:
    """Return open_clip's ``PreprocessCfg`` of a model, checked.

    Returns:
        With ``size`` the side of a square image in pixels or (height, width), and ``mean`` and
        ``std`` three numbers each, of levels from 0 to 1.

    Raises:
        ValueError: if a value is none that open_clip knows.
    """
    found = merge_preprocess_dict(PreprocessCfg(), get_model_preprocess_cfg(clip))
    _expect_known(found)
    size = found["size"]
    sides = tuple(size) if isinstance(size, list | tuple) else (size,)
    found["size"] = int(sides[0]) if len(set(sides)) == 1 else tuple(map(int, sides))
    found |= {name: _three(name, found[name]) for name in ("mean", "std")}
    return PreprocessCfg(**found)


def own_preprocess(clip: Any) -> dict[str, Any]:
    """Return the preprocessing of a model as far as it differs from open_clip's default."""
    own, plain = asdict(preprocess_of(clip)), asdict(PreprocessCfg())
    return {
        name: list(own[name]) if isinstance(own[name], tuple) else own[name]
        for name in SETTABLE
        if own[name] != plain[name]
    }


def description(clip: Any) -> str:
    """Return size, activation and preprocessing as a text, for the fingerprint.

    Only what differs from open_clip's defaults is named, so that the fingerprint of a model without
    such facts stays what it was. Mean and standard deviation are tensors of the fingerprint.
    """
    facts: dict[str, Any] = {"quick_gelu": True} if uses_quick_gelu(clip) else {}
    facts |= {k: v for k, v in own_preprocess(clip).items() if k not in ("mean", "std")}
    size = preprocess_of(clip).size
    return " ".join([f"{size}", *(f"{name}={value}" for name, value in facts.items())])


def _facts_of_file(
    name: str, file: str, quick_gelu: bool | None, preprocess: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the preprocessing on which all tags of an architecture agree; warn of the rest."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    architecture = open_clip.get_model_config(name) or {}
    differing = []
    is_quick = bool(architecture.get("quick_gelu"))
    if quick_gelu is None and any(tag_activation(name, tag) != is_quick for tag in tags):
        differing.append(f"quick_gelu (now {str(is_quick).lower()})")
    known = [merge_preprocess_dict(PreprocessCfg(), get_pretrained_cfg(name, tag)) for tag in tags]
    agreed = {}
    for fact in SETTABLE if known else ():
        values = {_hashable(each[fact]) for each in known}
        if len(values) == 1:
            agreed[fact] = known[0][fact]
        elif preprocess is None:
            differing.append(f"preprocess.{fact} (now {getattr(PreprocessCfg(), fact)})")
    if differing:
        warnings.warn(
            f"{Path(file).name} does not tell how its weights were trained, and weights of {name} "
            f"differ in {', '.join(differing)}: give quick_gelu (or a name with {_QUICK}) and "
            f"preprocess as they need them, or the tag that they are ({', '.join(tags[:3])}, ...)",
            stacklevel=6,
        )
    return agreed


def _checked_preprocess(given: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = [name for name in given or () if name not in SETTABLE]
    if unknown:
        raise ValueError(
            f"preprocess has {', '.join(map(repr, unknown))}, expected {', '.join(SETTABLE)}: the "
            "size is that of the architecture"
        )
    found = dict(given or {})
    _expect_known(found)
    return found | {name: _three(name, found[name]) for name in ("mean", "std") if name in found}


def _expect_known(preprocess: Mapping[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if name in preprocess and preprocess[name] not in choices:
            raise ValueError(
                f"preprocess has {name} {preprocess[name]!r}: choose {', '.join(choices)}"
            )
    level = preprocess.get("fill_color", 0)
    if not isinstance(level, int) or not 0 <= level <= 255:
        raise ValueError(f"preprocess has fill_color {level!r}: give a level from 0 to 255")


def _three(name: str, values: Any) -> tuple[float, ...]:
    """Return three numbers; one number is for all three channels, as in open_clip."""
    numbers = tuple(values) if isinstance(values, list | tuple) else (values,) * 3
    is_number = all(isinstance(number, int | float) for number in numbers)
    if not is_number or len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
        positive = " positive" if name == "std" else ""
        raise ValueError(f"preprocess has {name} {values!r}: give three{positive} numbers")
    return tuple(map(float, numbers))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
