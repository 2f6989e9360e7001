"""Loading of open_clip models by name, folder or file."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import open_clip
import torch
from huggingface_hub import constants
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from mmcl.models.open_clip.checkpoint_keys import load_weights
from mmcl.models.open_clip.model_source import (
    CONFIG,
    ModelSource,
    find_model,
    find_weights,
    stated_facts,
)
from mmcl.models.open_clip.pretrained_facts import (
    create_options,
    expect_activation,
    preprocess_of,
    uses_quick_gelu,
)
from mmcl.models.open_clip.transformers_models import build_model, exportable_architecture

TINY = Path(__file__).parent.parent / "tiny_clip"
BUILT_IN = "built-in"
CLIP_VOCABULARY = 49408
"""Tokens of CLIP's own vocabulary."""


def load_clip(
    model: str,
    pretrained: str | None,
    seed: int,
    quick_gelu: bool | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Load an open_clip model and its tokenizer.

    Args:
        model: "tiny" (ships with mmcl), an open_clip architecture such as "ViT-B-16", a local
            folder of open_clip (``open_clip_config.json``) or transformers (CLIPModel,
            SiglipModel), a repository of the hub in one of these forms ("hf-hub:owner/name"), or
            a ``.json`` architecture file.
        pretrained: "built-in" (tiny only), a tag of open_clip such as "openai", a checkpoint file
            or folder, "hf-hub:owner/name", or None: the weights of the folder or repository, else
            random weights from ``seed``.
        seed: of random weights.
        quick_gelu: see ``OpenCLIP``.
        preprocess: see ``OpenCLIP``.

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if ``pretrained`` is "built-in" and the model is not "tiny", if either names
            something else than a model and weights, or ``quick_gelu`` or ``preprocess`` do not fit.
        RuntimeError: if weights cannot be loaded or downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model == "tiny":
            return _tiny(pretrained, quick_gelu, preprocess)
        if pretrained == BUILT_IN:
            raise ValueError(
                f"pretrained is '{BUILT_IN}' but model is '{model}': only 'tiny' ships with mmcl; "
                "give a tag such as 'openai' or a local checkpoint file"
            )
        return _named(model, pretrained, quick_gelu, preprocess)


def _tiny(
    pretrained: str | None, quick_gelu: bool | None, preprocess: Mapping[str, Any] | None
) -> tuple[nn.Module, Callable[..., Tensor]]:
    config = json.loads((TINY / "tiny-clip.json").read_text())
    if pretrained == BUILT_IN and (quick_gelu or preprocess):
        raise ValueError(
            f"pretrained is '{BUILT_IN}', whose weights were trained with GELU and their own "
            "preprocessing: leave quick_gelu and preprocess out"
        )
    _, options = create_options(
        "tiny", None, is_file=False, quick_gelu=quick_gelu, preprocess=preprocess
    )
    facts = merge_preprocess_dict(PreprocessCfg(), options.pop("force_preprocess_cfg", {}))
    config |= options
    clip = open_clip.model.CLIP(**{k: v for k, v in config.items() if k in _CLIP_ARGUMENTS})
    set_model_preprocess_cfg(clip, {**facts, "size": clip.visual.image_size})
    tokenizer = open_clip.tokenizer.SimpleTokenizer(
        bpe_path=str(TINY / "bpe.txt.gz"), context_length=clip.context_length
    )
    weights = str(TINY / "tiny-clip.safetensors") if pretrained == BUILT_IN else pretrained
    if weights is not None:
        load_weights(clip, Path(weights).expanduser(), "tiny")
    return clip.float(), tokenizer


_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale")


def _named(
    model: str,
    pretrained: str | None,
    quick_gelu: bool | None,
    preprocess: Mapping[str, Any] | None,
) -> tuple[nn.Module, Callable[..., Tensor]]:
    with quiet_hub_access():
        source = find_model(model)
        file = find_weights(pretrained, source)
        is_file = file is not None and source.folder is None
        quick, facts = stated_facts(file) if is_file and file is not None else (None, {})
    if facts:
        preprocess = {**facts, **(preprocess or {})}
    stated = quick if quick_gelu is None else quick_gelu
    name, options = create_options(
        source.name, pretrained, is_file=is_file, quick_gelu=stated, preprocess=preprocess
    )
    if file is not None:
        options |= {"load_weights": False, "pretrained_text": False}
    if source.is_transformers:
        with quiet_hub_access():
            clip, tokenizer = _of_transformers(source, options)
    else:
        tag = pretrained if file is None else None
        try:
            with quiet_hub_access():
                clip = open_clip.create_model(
                    name, pretrained=tag, precision="fp32", weights_only=True, **options
                )
                tokenizer = _load_tokenizer(name, **_own_vocabulary(source.folder))
        except Exception as error:  # every hub client raises errors of its own
            raise RuntimeError(_unavailable(model, pretrained, error)) from error
    expect_activation(clip, model, quick_gelu)
    if file is not None:
        load_weights(clip, file, model)
    return clip.float(), tokenizer


def _of_transformers(source: ModelSource, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the model of a folder of transformers, with the preprocessing that the user gives."""
    clip, tokenizer = build_model(cast(Path, source.folder))
    given = options.get("force_preprocess_cfg", {})
    visual: Any = clip.visual
    set_model_preprocess_cfg(clip, merge_preprocess_dict(visual.preprocess_cfg, given))
    return clip, tokenizer


def _load_tokenizer(name: str, **options: Any) -> Callable[..., Tensor]:
    """Return open_clip's tokenizer of an architecture."""
    is_named_siglip = "siglip" in name.lower() and name in open_clip.list_models()
    text = open_clip.get_model_config(name)["text_cfg"] if is_named_siglip else {}
    has_clips_vocabulary = text.get("vocab_size", CLIP_VOCABULARY) == CLIP_VOCABULARY
    if is_named_siglip and has_clips_vocabulary and not text.get("hf_tokenizer_name"):
        # open_clip takes Google's vocabularies, from the network, for every name with "siglip".
        length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        options = {**text.get("tokenizer_kwargs", {}), **options}
        tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=length, **options)
    else:
        tokenizer = open_clip.get_tokenizer(name, **options)
    return cast(Callable[..., Tensor], tokenizer)


def _own_vocabulary(folder: Path | None) -> dict[str, str]:
    """Return the vocabulary within a model folder as an argument of ``get_tokenizer``, if any."""
    if folder is None or not (file := folder / CONFIG).is_file():
        return {}
    text = json.loads(file.read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})
    name = text.get("tokenizer_kwargs", {}).get("bpe_path", "")
    # open_clip would look in the working directory.
    is_inside = Path(name).name == name and (folder / name).is_file()
    return {"bpe_path": str(folder / name)} if name and is_inside else {}


def architecture_of(model: str, clip: Any) -> dict[str, Any]:
    """Return the architecture of a model that ``load_clip`` loaded, as open_clip's ``model_cfg``.

    Args:
        model: what ``load_clip`` was given.
        clip: what it returned, whose activation may be another than that of the name.

    Raises:
        ValueError: if open_clip does not know it.
    """
    if model == "tiny":
        config: dict[str, Any] = json.loads((TINY / "tiny-clip.json").read_text())
        config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(TINY / "bpe.txt.gz")}
        return _with_facts(config, clip)
    with quiet_hub_access():
        source = find_model(model)
        if source.is_transformers and source.folder is not None:
            return _with_facts(exportable_architecture(source.folder), clip)
        found: dict[str, Any] | None = open_clip.get_model_config(source.name)
    if found is None:
        raise ValueError(
            f"open_clip does not know the architecture {model}: load the model with load_clip"
        )
    return _with_facts(found, clip)


def _with_facts(architecture: dict[str, Any], clip: Any) -> dict[str, Any]:
    """Add what came with the weights: another activation, a logit bias."""
    is_quick = uses_quick_gelu(clip)
    if is_quick != bool(architecture.get("quick_gelu")):
        architecture["quick_gelu"] = is_quick
    bias = getattr(clip, "logit_bias", None)
    if bias is not None:
        architecture.setdefault("init_logit_bias", float(bias.detach()))
    return architecture


def save_architecture(clip: Any, tokenizer: Any, model: str, folder: Path) -> None:
    """Write what open_clip needs beside the weights to load ``local-dir:<folder>``.

    That is ``open_clip_config.json`` and, where the architecture names them, the tokenizer's files.

    Args:
        clip: the open_clip model.
        tokenizer: its tokenizer, None for a model without.
        model: what ``load_clip`` was given.
        folder: existing folder.

    Raises:
        ValueError: if open_clip does not know the architecture.
    """
    architecture = architecture_of(model, clip)
    options = architecture.get("text_cfg", {}).get("tokenizer_kwargs", {})
    if vocabulary := options.get("bpe_path"):
        within = Path(model).expanduser() / vocabulary
        options["bpe_path"] = within.name
        shutil.copyfile(within if within.is_file() else vocabulary, folder / within.name)
    wrapped: Any = getattr(tokenizer, "tokenizer", None)  # of transformers
    if hasattr(wrapped, "save_pretrained"):
        wrapped.save_pretrained(folder)
    config = {"model_cfg": architecture, "preprocess_cfg": asdict(preprocess_of(clip))}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def quiet_hub_access() -> Iterator[None]:
    """Hub access that fails at once and without log lines if the hub cannot be reached.

    The hub's client would retry for a minute and log every try. Its cache is still used.
    """
    host = urlsplit(constants.ENDPOINT).hostname or ""
    was_offline, was_disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # open_clip warns by the name's activation, and the tag's is what the model gets.
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        logging.disable(was_disabled)


def _unavailable(model: str, pretrained: str | None, error: Exception) -> str:
    return (
        f"cannot get {model} with weights {pretrained!r} ({one_line(error)}): without a network "
        "pass a local file as pretrained=/path/to/weights.safetensors, or a local folder as model"
    )


def one_line(error: Exception) -> str:
    """Return an error's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
