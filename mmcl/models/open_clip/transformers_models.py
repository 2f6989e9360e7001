"""Contrastive models of transformers (CLIPModel, SiglipModel) built as models of open_clip.

Configuration, preprocessing and tokenizer are those of the folder; the weights are renamed by
``transformers_keys``. So prompts, adapters and export are those of any model of open_clip. SigLIP's
image tower is timm's vision transformer, which takes no prompt tokens, as in open_clip itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import open_clip
import timm
import torch
from huggingface_hub import hf_hub_download
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, SiglipConfig

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json")  # fmt: skip
_SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
               "special_tokens_map.json", "merges.txt", *_TOKENIZER_FILES)  # fmt: skip
_ACTIVATIONS: dict[str, dict[str, str] | None] = {
    "quick_gelu": None, "gelu": None, "gelu_pytorch_tanh": {"approximate": "tanh"},
    "gelu_new": {"approximate": "tanh"},
}  # fmt: skip
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_OTHER_TYPES = {
    "siglip2": "its image tower takes patches of any number: use a SigLIP 2 of fixed resolution, "
    "such as google/siglip2-base-patch16-224",
    "chinese_clip": "use Chinese-CLIP in transformers itself, wrapped as in docs/model.md",
    "altclip": "use open_clip's own multilingual models, such as xlm-roberta-base-ViT-B-32",
    "metaclip_2": "use open_clip's own, such as ViT-H-14-worldwide with tag metaclip2_worldwide",
    "clip_vision_model": "it has no text tower: give the whole CLIPModel",
    "clip_text_model": "it has no image tower: give the whole CLIPModel",
    "siglip_vision_model": "it has no text tower: give the whole SiglipModel",
}  # fmt: skip
_TIMM_NAMES = tuple(
    f"vit_{size}_siglip_{side}"
    for size in ("base_patch16", "base_patch32", "large_patch16", "so400m_patch14",
                 "so400m_patch16", "giantopt_patch16")
    for side in (224, 256, 384, 512)
)  # fmt: skip


@dataclass(frozen=True)
class MissingTokenizer:
    """Tokenizer of a folder without tokenizer files; images need none, a text is an error."""

    folder: str

    def __call__(self, texts: Any) -> Tensor:
        """Raise a FileNotFoundError that names the folder."""
        raise FileNotFoundError(
            f"the folder {self.folder} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, ...) "
            "and its vocabulary is not CLIP's: save the model's tokenizer there by "
            "tokenizer.save_pretrained"
        )


def model_type(folder: Path) -> str | None:
    """Return the ``model_type`` of a folder as transformers writes them; None for another folder.

    Raises:
        ValueError: if its config.json cannot be parsed.
    """
    file = folder / "config.json"
    if not file.is_file() or (folder / "open_clip_config.json").is_file():
        return None
    content = _read_json(file)
    found = content.get("model_type")
    return found if isinstance(found, str) else None


def expect_contrastive(folder: Path) -> None:
    """Check that a folder of transformers is one that ``build_model`` builds.

    Raises:
        ValueError: if it is of another type.
    """
    kind = model_type(folder)
    if kind not in ("clip", "siglip"):
        way = _OTHER_TYPES.get(
            str(kind), "a model that generates text is one for mmcl.models.ImageTextToText"
        )
        raise ValueError(
            f"the folder {folder} has a model of transformers of type {kind!r}, and OpenCLIP loads "
            f"'clip' and 'siglip': {way}"
        )


def build_model(folder: Path) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Build the model of a folder of transformers with random weights, and its tokenizer.

    Args:
        folder: with config.json of type "clip" or "siglip" and, where there are any,
            preprocessor_config.json and the tokenizer's files.

    Raises:
        ValueError: if it is another model, or open_clip cannot express its configuration.
    """
    architecture = open_clip_architecture(folder)
    is_siglip = model_type(folder) == "siglip"
    kind: Any = open_clip.model.CustomTextCLIP if is_siglip else open_clip.model.CLIP
    config = {key: value for key, value in architecture.items() if key != "custom_text"}
    if is_siglip:
        # open_clip builds timm's models by their names; the tower of other sizes replaces this one.
        small = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none"}
        config["vision_cfg"] = {**small, "image_size": architecture["vision_cfg"]["image_size"]}
    clip = kind(**config)
    if is_siglip:
        clip.visual.trunk = _siglip_tower(_config(folder).vision_config)
    set_model_preprocess_cfg(clip, preprocess_settings(folder))
    return clip, _tokenizer(folder, architecture["text_cfg"])


def open_clip_architecture(folder: Path) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` of a folder of transformers.

    Raises:
        ValueError: if it is no CLIP or SigLIP, or open_clip cannot express its configuration.
    """
    config = _config(folder)
    vision, text = config.vision_config, config.text_config
    if vision.num_channels != 3:
        _refuse(folder, f"num_channels {vision.num_channels}", "3")
    text_config = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        **_transformer(text, folder),
        "heads": text.num_attention_heads,
    }
    if config.model_type == "siglip":
        return _siglip_architecture(folder, config, text_config)
    if (vision.hidden_act == "quick_gelu") != (text.hidden_act == "quick_gelu"):
        _refuse(folder, f"hidden_act {vision.hidden_act} and {text.hidden_act}", "one of both")
    eos = text.eos_token_id
    # transformers pools where the end token is first; 2 is an old mistake that it reads as argmax.
    if eos not in (2, text.vocab_size - 1):
        if not isinstance(eos, int) or not 0 <= eos < text.vocab_size:
            _refuse(folder, f"eos_token_id {eos}", f"a token of its {text.vocab_size}")
        text_config |= {"pool_type": "eos", "eos_id": eos}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **_transformer(vision, folder),
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": text_config,
    }


def _siglip_architecture(folder: Path, config: Any, text_config: dict[str, Any]) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if not getattr(vision, "vision_use_head", True):
        _refuse(folder, "vision_use_head false", "true")
    if text.projection_size != vision.hidden_size:
        _refuse(folder, f"projection_size {text.projection_size}", f"{vision.hidden_size}")
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": _timm_name(vision),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **text_config, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"
        },
    }  # fmt: skip


def exportable_architecture(folder: Path) -> dict[str, Any]:
    """Return the architecture by which open_clip builds the model of a folder, and its tokenizer.

    Raises:
        ValueError: if the image tower is a SigLIP that open_clip has no name for.
    """
    architecture = open_clip_architecture(folder)
    if architecture["vision_cfg"].get("timm_model_name", "") is None:
        raise ValueError(
            "open_clip builds SigLIP's image tower by a name of timm, and none has the sizes and "
            f"the activation in {folder}/config.json, so it could not load an export: start from "
            "open_clip's own form, such as hf-hub:timm/ViT-B-16-SigLIP"
        )
    if isinstance(_tokenizer(folder, architecture["text_cfg"]), HFTokenizer):
        architecture["text_cfg"]["hf_tokenizer_name"] = str(folder)
    return architecture


def preprocess_settings(folder: Path) -> dict[str, Any]:
    """Return open_clip's ``preprocess_cfg`` of a folder's image processor.

    Rescaling by another factor than 1/255 is expressed by mean and standard deviation.

    Raises:
        ValueError: if open_clip's preprocessing cannot do what the processor does.
    """
    config = _config(folder)
    side, is_siglip = config.vision_config.image_size, config.model_type == "siglip"
    own = _processor(folder)
    mean = [0.5] * 3 if is_siglip else list(open_clip.OPENAI_DATASET_MEAN)
    std = [0.5] * 3 if is_siglip else list(open_clip.OPENAI_DATASET_STD)
    mean, std = own.get("image_mean", mean), own.get("image_std", std)
    if not own.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    factor = own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) else 1.0
    size = own.get("size", {"height": side, "width": side} if is_siglip else side)
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    crop = own.get("crop_size", side)
    crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    expected = tuple(side) if isinstance(side, list | tuple) else (side, side)
    if not own.get("do_resize", True):
        _refuse(folder, "do_resize false", "true")
    if "shortest_edge" in size:
        resized, mode = (size["shortest_edge"],) * 2, "shortest"
        if not own.get("do_center_crop", not is_siglip) or tuple(crop) != resized:
            _refuse(folder, f"size {size} with crop {crop}", "a center crop of that size")
    else:
        resized, mode = (size.get("height"), size.get("width")), "squash"
        if own.get("do_center_crop", False) and tuple(crop) != resized:
            _refuse(folder, f"size {size} with crop {crop}", "a crop of that size, or none")
    if resized != expected:
        _refuse(folder, f"images of {resized}", f"{expected}, the size of the model")
    resample = own.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        _refuse(folder, f"resample {resample}", "2 (bilinear) or 3 (bicubic)")
    return {
        "size": side,
        "mode": "RGB",
        "mean": tuple(value / (255 * factor) for value in mean),
        "std": tuple(value / (255 * factor) for value in std),
        "interpolation": _INTERPOLATIONS[resample],
        "resize_mode": mode,
        "fill_color": 0,
    }


def download(name: str) -> Path:
    """Return the folder of a repository of transformers in the hub's cache, downloaded if needed.

    Args:
        name: "owner/name" on the hub.

    Raises:
        OSError: if the hub cannot be reached or has no such repository.
    """
    config = Path(hf_hub_download(name, "config.json"))
    expect_contrastive(config.parent)
    errors: list[Exception] = []
    for file in _WEIGHT_FILES:
        try:
            found = Path(hf_hub_download(name, file))
        except OSError as error:
            errors.append(error)
            continue
        if file.endswith(".index.json"):
            for shard in sorted(set(_read_json(found).get("weight_map", {}).values())):
                hf_hub_download(name, shard)
        break
    else:
        raise errors[0]
    for file in _SIDE_FILES:
        try:
            hf_hub_download(name, file)
        except OSError:  # a repository has some of them
            continue
    return config.parent


def _config(folder: Path) -> Any:
    expect_contrastive(folder)
    config: Any = CLIPConfig if model_type(folder) == "clip" else SiglipConfig
    return config.from_pretrained(folder)


def _transformer(config: Any, folder: Path) -> dict[str, Any]:
    """Return width, layers, MLP, activation and norm of a tower as open_clip names them."""
    if config.hidden_act not in _ACTIVATIONS:
        _refuse(folder, f"hidden_act {config.hidden_act!r}", ", ".join(_ACTIVATIONS))
    options: dict[str, Any] = {}
    if (act := _ACTIVATIONS[config.hidden_act]) is not None:
        options["act_kwargs"] = act
    if config.layer_norm_eps != 1e-5:
        options["norm_kwargs"] = {"eps": config.layer_norm_eps}
    # open_clip rounds width x ratio down.
    ratio = config.intermediate_size / config.hidden_size
    exact = int(config.hidden_size * ratio) == config.intermediate_size
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": ratio if exact else (config.intermediate_size + 0.5) / config.hidden_size,
        **options,
    }


def _siglip_tower(config: Any) -> nn.Module:
    act = partial(nn.GELU, **(_ACTIVATIONS[config.hidden_act] or {}))
    tower: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="map",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
        class_token=False,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=act,
    )
    return tower


def _timm_name(config: Any) -> str | None:
    """Return timm's name of a SigLIP image tower, None if timm has none of these sizes."""
    sizes = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
    size = sizes.get(config.hidden_size)
    name = f"vit_{size}_patch{config.patch_size}_siglip_{config.image_size}"
    if name not in _TIMM_NAMES or config.hidden_act != "gelu":
        return None
    with torch.device("meta"):
        tower: Any = timm.create_model(name, num_classes=0)
    block = tower.blocks[0]
    sizes_of_name = (len(tower.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
    own = (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    return name if own == sizes_of_name else None


def _tokenizer(folder: Path, text: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return the tokenizer of a folder; CLIP's own vocabulary is open_clip's own tokenizer."""
    length, is_causal = text["context_length"], not text.get("no_causal_mask")
    plain: Any = SimpleTokenizer(context_length=length)
    found: Any = plain
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if not is_causal or text["vocab_size"] != len(plain.encoder):
            found = MissingTokenizer(str(folder))
    elif _vocabulary(folder) != plain.encoder:
        found = HFTokenizer(str(folder), context_length=length)
        wrapped = found.tokenizer
        if is_causal and wrapped.pad_token_id == wrapped.eos_token_id:
            # Padding after the end is not seen; padding that is the end token would hide the end.
            wrapped.pad_token = wrapped.convert_ids_to_tokens(0)
    return cast(Callable[..., Tensor], found)


def _vocabulary(folder: Path) -> Mapping[str, int]:
    try:
        found: Mapping[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # damaged files fail in as many ways as there are formats
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the tokenizer in {folder} does not load ({reason}): save it there again by "
            "tokenizer.save_pretrained"
        ) from error
    return found


def _processor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor, {} where the folder has none."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return _read_json(file)
    if (file := folder / "processor_config.json").is_file():
        found = _read_json(file).get("image_processor", {})
        return found if isinstance(found, dict) else {}
    return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object: copy it again")
    return content


def _refuse(folder: Path, given: str, expected: str) -> NoReturn:
    raise ValueError(
        f"the model in {folder} has {given}, which open_clip cannot express: only {expected}"
    )
