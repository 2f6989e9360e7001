"""What ``model`` and ``pretrained`` of OpenCLIP name: architectures, folders, files, the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import open_clip
from huggingface_hub import hf_hub_download
from open_clip.pretrained import download_pretrained_from_hf

from mmcl.models.open_clip.checkpoint_files import WEIGHT_SUFFIXES, read_checkpoint, weights_file
from mmcl.models.open_clip.checkpoint_keys import architectures_of
from mmcl.models.open_clip.pretrained_facts import CONFIG, tag_owner
from mmcl.models.open_clip.transformers_models import download, expect_contrastive, model_type

_HUB, _LOCAL = "hf-hub:", "local-dir:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WAYS = (
    f"give a folder with {CONFIG} or of transformers' CLIPModel or SiglipModel, an architecture "
    "such as 'ViT-B-16', or 'hf-hub:owner/name'"
)


@dataclass(frozen=True)
class ModelSource:
    """Where an architecture comes from.

    Attributes:
        name: open_clip's name, such as "ViT-B-16", "local-dir:/folder" or "hf-hub:owner/name".
        folder: local folder of the model, also of one in the hub's cache; None for a name.
        is_transformers: whether the folder is as transformers writes it.
    """

    name: str
    folder: Path | None = None
    is_transformers: bool = False


def find_model(model: str) -> ModelSource:
    """Find what ``model`` names.

    Raises:
        FileNotFoundError: if a folder or file does not exist.
        ValueError: if it names something else than a model, or an unknown architecture.
        RuntimeError: if the hub has no such repository, or cannot be reached.
    """
    if "://" in model:
        raise ValueError(f"model is the address {model}: download it, or {_WAYS}")
    if model.startswith(_HUB):
        return _hub_model(model.removeprefix(_HUB))
    path = Path(model.removeprefix(_LOCAL)).expanduser()
    if path.is_dir():
        return _local_model(path)
    if model.startswith(_LOCAL):
        raise FileNotFoundError(f"there is no folder {path}: {_WAYS}")
    if path.suffix == ".json":
        return ModelSource(_add_architecture(path))
    if path.is_file():
        raise ValueError(_weights_as_model(path))
    return _by_name(model)


def _by_name(model: str) -> ModelSource:
    # OpenAI's own names have a slash.
    if (known := model.replace("/", "-")) in open_clip.list_models():
        return ModelSource(known)
    if _is_path(model):
        raise FileNotFoundError(f"there is no folder or file {model}: {_WAYS}")
    if _HUB_NAME.fullmatch(model):
        return _hub_model(model)
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"open_clip has no architecture {model!r}: {_nearest(model)}{_WAYS}")
    return ModelSource(model)


def find_weights(pretrained: str | None, source: ModelSource) -> Path | None:
    """Return the file of the weights to load; None for random weights or a tag.

    Without ``pretrained``, a model's own folder has them.

    Raises:
        FileNotFoundError: if a file or folder does not exist, or a model's folder has no weights.
        ValueError: if a tag is unknown, or is of another model than the folder.
        RuntimeError: if the hub has no such repository, or cannot be reached.
    """
    if pretrained is None:
        if source.name.startswith(_HUB) and not source.is_transformers:
            return _hub_weights(source.name.removeprefix(_HUB))
        return None if source.folder is None else weights_file(source.folder)
    if "://" in pretrained:
        raise ValueError(f"pretrained is the address {pretrained}: download it and give the file")
    if pretrained.startswith(_HUB):
        return _hub_weights(pretrained.removeprefix(_HUB))
    is_tag = source.folder is None and tag_owner(source.name, pretrained)
    path = Path(pretrained.removeprefix(_LOCAL)).expanduser()
    if is_tag and not pretrained.startswith(_LOCAL):
        return None
    if path.is_dir():
        return weights_file(path)
    if path.exists():
        return path
    if path.suffix in WEIGHT_SUFFIXES or _is_path(pretrained) or pretrained.startswith(_LOCAL):
        raise FileNotFoundError(
            f"there is no checkpoint {path}: give a .pt or .safetensors file of this architecture, "
            "or a folder with one"
        )
    if _HUB_NAME.fullmatch(pretrained):
        return _hub_weights(pretrained)
    raise ValueError(_unknown_tag(pretrained, source))


def _local_model(path: Path) -> ModelSource:
    if (path / CONFIG).is_file():
        return ModelSource(f"{_LOCAL}{path}", path)
    if model_type(path) is not None:
        expect_contrastive(path)
        return ModelSource(f"{_LOCAL}{path}", path, is_transformers=True)
    raise FileNotFoundError(
        f"the folder {path} has neither {CONFIG} nor config.json of transformers: if it holds "
        "weights alone, give it as pretrained and their architecture, such as 'ViT-B-16', as model"
    )


def _hub_model(name: str) -> ModelSource:
    with _hub_errors(name):
        try:
            config = Path(hf_hub_download(name, CONFIG))
        except OSError:
            return ModelSource(f"{_HUB}{name}", download(name), is_transformers=True)
    return ModelSource(f"{_HUB}{name}", config.parent)


def _hub_weights(name: str) -> Path:
    with _hub_errors(name):
        try:
            return Path(download_pretrained_from_hf(name))
        except OSError:
            return weights_file(download(name))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn every error of the hub's client into one sentence."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"cannot get {name} from the hub's cache or the hub ({reason}), and there is no such "
            f"folder here: without a network pass a local folder as model, or a local file as "
            "pretrained=/path/to/weights.safetensors"
        ) from error


def _add_architecture(path: Path) -> str:
    """Make an architecture file known to open_clip and return its name."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no architecture file {path}: give an open_clip .json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the architecture file {path} is no JSON: {error}") from error
    known = content if isinstance(content, dict) else {}
    if "model_cfg" in known or "model_type" in known:
        raise ValueError(
            f"{path} is the configuration of a model folder: give the folder {path.parent} as model"
        )
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in known]
    if missing:
        raise ValueError(
            f"the architecture file {path} has no {', '.join(missing)}: give one as open_clip has "
            "them in open_clip/model_configs"
        )
    open_clip.add_model_config(str(path))
    return path.stem


def _weights_as_model(path: Path) -> str:
    names: list[str] = []
    if path.suffix in WEIGHT_SUFFIXES and path.suffix != ".npz":
        names = architectures_of(read_checkpoint(path))
    model = " or ".join(f"'{name}'" for name in names[:4]) or "such as 'ViT-B-16'"
    return (
        f"model is the file {path}: give it as pretrained, and the architecture of its weights "
        f"({model}) as model"
    )


def _is_path(text: str) -> bool:
    is_windows = "\\" in text or re.match(r"[A-Za-z]:[\\/]", text) is not None
    return (
        is_windows or text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1
    )


def _nearest(name: str, known: Sequence[str] | None = None) -> str:
    near = get_close_matches(name, open_clip.list_models() if known is None else known, n=2)
    return f"did you mean {' or '.join(map(repr, near))}? Else " if near else ""


def _unknown_tag(tag: str, source: ModelSource) -> str:
    if source.folder is not None:
        return (
            f"pretrained is {tag!r} and the model is the folder {source.folder}, which has no "
            "tags: leave pretrained out for the folder's own weights, or give a file"
        )
    tags = open_clip.list_pretrained_tags_by_model(source.name)
    known = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
    return (
        f"{source.name} has no weights {tag!r}: {_nearest(tag, tags)}{known}; or give a local file "
        "or folder, or 'hf-hub:owner/name'"
    )
