"""Loading of open_clip models by name, folder or file."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import open_clip
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from mmcl.models.open_clip.checkpoint_files import activation_in_file
from mmcl.models.open_clip.checkpoint_keys import load_weights
from mmcl.models.open_clip.model_source import CONFIG, find_model, find_weights
from mmcl.models.open_clip.transformers_models import build_model, exportable_architecture

TINY = Path(__file__).parent.parent / "tiny_clip"
BUILT_IN = "built-in"


def load_clip(
    model: str, pretrained: str | None, seed: int
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

    Raises:
        FileNotFoundError: if a local path does not exist.
        ValueError: if ``pretrained`` is "built-in" and the model is not "tiny", or either names
            something else than a model and weights.
        RuntimeError: if weights cannot be loaded or downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model == "tiny":
            return _tiny(pretrained)
        if pretrained == BUILT_IN:
            raise ValueError(
                f"pretrained is '{BUILT_IN}' but model is '{model}': only 'tiny' ships with mmcl; "
                "give a tag such as 'openai' or a local checkpoint file"
            )
        return _named(model, pretrained)


def _tiny(pretrained: str | None) -> tuple[nn.Module, Callable[..., Tensor]]:
    config = json.loads((TINY / "tiny-clip.json").read_text())
    clip = open_clip.model.CLIP(**{k: v for k, v in config.items() if k in _CLIP_ARGUMENTS})
    tokenizer = open_clip.tokenizer.SimpleTokenizer(
        bpe_path=str(TINY / "bpe.txt.gz"), context_length=clip.context_length
    )
    weights = str(TINY / "tiny-clip.safetensors") if pretrained == BUILT_IN else pretrained
    if weights is not None:
        load_weights(clip, Path(weights).expanduser(), "tiny")
    return clip.float(), tokenizer


_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale")


def _named(model: str, pretrained: str | None) -> tuple[nn.Module, Callable[..., Tensor]]:
    with quiet_hub_access():
        source = find_model(model)
        file = find_weights(pretrained, source)
    if source.is_transformers and source.folder is not None:
        clip, tokenizer = build_model(source.folder)
        load_weights(clip, file or source.folder, model)
        return clip.float(), tokenizer
    options: dict[str, Any] = {}
    if file is not None:
        options = {"load_weights": False, "pretrained_text": False}
        if activation_in_file(file):
            options["quick_gelu"] = True
    try:
        with quiet_hub_access():
            clip = open_clip.create_model(
                source.name,
                pretrained=None if file is not None else pretrained,
                precision="fp32",
                weights_only=True,
                **options,
            )
            tokenizer = open_clip.get_tokenizer(source.name, **_own_vocabulary(source.folder))
    except Exception as error:  # every hub client raises errors of its own
        raise RuntimeError(_unavailable(model, pretrained, error)) from error
    if file is not None:
        load_weights(clip, file, model)
    return clip.float(), tokenizer


def _own_vocabulary(folder: Path | None) -> dict[str, str]:
    """Return the vocabulary within a model folder as an argument of ``get_tokenizer``, if any."""
    if folder is None or not (file := folder / CONFIG).is_file():
        return {}
    text = json.loads(file.read_text(encoding="utf-8")).get("model_cfg", {}).get("text_cfg", {})
    name = text.get("tokenizer_kwargs", {}).get("bpe_path", "")
    # open_clip would look in the working directory.
    is_inside = Path(name).name == name and (folder / name).is_file()
    return {"bpe_path": str(folder / name)} if name and is_inside else {}


def architecture_of(model: str) -> dict[str, Any]:
    """Return the architecture of a model that ``load_clip`` loaded, as open_clip's ``model_cfg``.

    Raises:
        ValueError: if open_clip does not know it.
    """
    if model == "tiny":
        config: dict[str, Any] = json.loads((TINY / "tiny-clip.json").read_text())
        config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(TINY / "bpe.txt.gz")}
        return config
    with quiet_hub_access():
        source = find_model(model)
    if source.is_transformers and source.folder is not None:
        return exportable_architecture(source.folder)
    found: dict[str, Any] | None = open_clip.get_model_config(source.name)
    if found is None:
        raise ValueError(
            f"open_clip does not know the architecture {model}: load the model with load_clip"
        )
    return found


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
    architecture, (side, mean, std) = architecture_of(model), image_settings(clip)
    options = architecture.get("text_cfg", {}).get("tokenizer_kwargs", {})
    if vocabulary := options.get("bpe_path"):
        within = Path(model).expanduser() / vocabulary
        options["bpe_path"] = within.name
        shutil.copyfile(within if within.is_file() else vocabulary, folder / within.name)
    wrapped: Any = getattr(tokenizer, "tokenizer", None)  # of transformers
    if hasattr(wrapped, "save_pretrained"):
        wrapped.save_pretrained(folder)
    images = {"size": side, "mean": mean.tolist(), "std": std.tolist()}
    images |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": architecture, "preprocess_cfg": images}
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


def image_settings(clip: Any) -> tuple[int, Tensor, Tensor]:
    """Return the image side in pixels, and mean and standard deviation (3,) of normalization."""
    size = clip.visual.image_size
    side = int(size[0] if isinstance(size, tuple | list) else size)
    mean = getattr(clip.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(clip.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return side, torch.tensor(mean), torch.tensor(std)
