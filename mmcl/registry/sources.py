"""Bases and adapters as a command names them: ids of a registry, RUN@task, folders, model names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from mmcl.core.model import without_adapters
from mmcl.evaluation.run_files import CONFIG
from mmcl.export import FORMATS
from mmcl.export.formats import strategies_of
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.config.run_reference import RunReference
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.stages.lineage import START
from mmcl.registry.records import AdapterKind, AdapterRecord, BaseRecord, Registry
from mmcl.registry.signatures import base_weights
from mmcl.strategies.lora import LoRA

ModelConfig = Mapping[str, Any]
"""``class_path`` and ``init_args`` of a model, as in a configuration."""

_CLIP, _VLM, _TINY_LLAVA = (
    "mmcl.models.OpenCLIP", "mmcl.models.ImageTextToText", "mmcl.models.TinyLlava",
)  # fmt: skip
_KEPT = {
    _CLIP: (
        "freeze", "train_logit_scale", "logit_scope", "label_smoothing", "random_crop_scale",
        "horizontal_flip",
    ),
    _VLM: (
        "dtype", "freeze", "routing_encoder", "conv_template", "image_inputs",
        "image_aspect_ratio", "size", "max_length", "too_long", "gradient_checkpointing",
    ),
}  # fmt: skip
"""Settings of the old base's configuration that the next base is used with as well."""
_HEADS = ("RanPAC", "NCM")
_PEFT = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the base model that it was trained on.

    Attributes:
        name: as it was given.
        kind: "lora", "weight_delta" or "head".
        base: configuration of the model that it was trained on.
        folder: peft folder, None for a state of a run.
        run: state of a run, None for a folder.
        task: name of its task, "" if not known.
        settings: the run's configuration, empty for a folder.
    """

    name: str
    kind: AdapterKind
    base: ModelConfig
    folder: Path | None = None
    run: RunReference | None = None
    task: str = ""
    settings: Mapping[str, Any] | None = None

    def load(self) -> ContinualModule:
        """Load the old base with the adapter, in evaluation mode.

        Raises:
            ValueError: if it does not fit its own base.
        """
        if self.run is not None:
            return self.run.load()
        module = build_module(self.base, lora_config(adapter=str(self.folder)))
        module.eval()
        return module

    def load_base(self) -> ContinualModule:
        """Load the model that it was trained on: also of a run that started from another one."""
        start = None if self.run is None else self.run.folder / START
        return build_module(self.base, start=start if start and start.is_file() else None)

    def lora_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``LoRA`` for a new adapter of the same layers and rank."""
        if self.settings is not None:
            own = _lora_of(self.settings["model"]["strategy"])
            taken: dict[str, Any] = dict((own or {}).get("init_args") or {})
            if taken.pop("adapter", None) is None:
                return taken
        given = json.loads((self._peft_folder() / _PEFT).read_text(encoding="utf-8"))
        return {
            "rank": int(given["r"]), "alpha": float(given.get("lora_alpha", 8)),
            "target_modules": given["target_modules"],
        }  # fmt: skip

    def _peft_folder(self) -> Path:
        if self.folder is not None:
            return self.folder
        own = _lora_of((self.settings or {})["model"]["strategy"])
        return Path((own or {})["init_args"]["adapter"])


def lora_config(**arguments: Any) -> dict[str, Any]:
    """Return ``LoRA`` as a configuration names it."""
    return {"class_path": "mmcl.strategies.LoRA", "init_args": arguments}


def find_adapter(name: str, registry: Registry, old_base: str | None = None) -> Adapter:
    """Find an adapter by its id in a registry, as RUN@task, or as a peft folder.

    Args:
        name: as the command line has it.
        registry: where ids are looked up first.
        old_base: base model of a peft folder; None = as its ``adapter_config.json`` says.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if its strategy has no adapter that can be moved to another base.
    """
    record = registry.find(name)
    if isinstance(record, BaseRecord):
        raise ValueError(f"'{name}' is a base in {registry.folder}: give the id of an adapter")
    text = name if record is None else record.source
    folder = Path(text).expanduser()
    if (folder / _PEFT).is_file():
        return _folder_adapter(name, folder, registry, old_base, record)
    try:
        run = RunReference.parse(text)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no adapter {text}: give an id of {registry.folder}, RUN@task of a finished "
            f"task, or a folder with an {_PEFT}"
        ) from None
    if old_base is not None:
        raise ValueError("--from is given with a run, whose configuration names its base: leave it")
    return _run_adapter(name, run)


def _folder_adapter(
    name: str, folder: Path, registry: Registry, old_base: str | None, record: Any
) -> Adapter:
    try:
        stated = json.loads((folder / _PEFT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / _PEFT} is not JSON ({error}): write it again") from None
    registered = None
    if isinstance(record, AdapterRecord):
        registered = registry.base_of(record)
    base = old_base or (registered and registered.source) or stated.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder} does not name the base model that it was trained on: give it with --from"
        )
    task = record.task if isinstance(record, AdapterRecord) else ""
    return Adapter(name, "lora", model_config(str(base), registry, None), folder, task=task)


def _run_adapter(name: str, run: RunReference) -> Adapter:
    opened = run.open()
    opened.data.prepare_data()
    tasks = run.finished_tasks(opened)
    if not tasks:
        raise ValueError(
            f"{name} is before training, where there is no adapter: give {run.folder}@1 or later"
        )
    settings = yaml.safe_load((run.folder / CONFIG).read_text(encoding="utf-8"))
    kind = _kind_of(name, opened.make_module())
    task = opened.data.stream[tasks - 1].name
    base = settings["model"]["model"]
    return Adapter(name, kind, base, None, replace(run, state=str(tasks)), task, settings)


def _kind_of(name: str, module: ContinualModule) -> AdapterKind:
    members = strategies_of(module.strategy)
    kinds = [type(member).__name__ for member in members]
    if any(isinstance(member, LoRA) for member in members):
        return "lora"
    if any(kind in _HEADS for kind in kinds):
        return "head"
    own = [k for m, k in zip(members, kinds, strict=True) if m.overrides("prompts")
           or m.overrides("transform_output")]  # fmt: skip
    changed = {without_adapters(n) for n, _ in module.model.named_parameters()} - module._base_names
    if own or changed:
        raise ValueError(
            f"{name} was trained with {', '.join(own or kinds)}, whose state is neither a LoRA "
            "adapter, nor weights of the base, nor a head in closed form: it cannot be moved to "
            "another base; train it again there"
        )
    return "weight_delta"


def model_config(text: str, registry: Registry, like: ModelConfig | None) -> dict[str, Any]:
    """Return the configuration of a base model.

    Args:
        text: id of a registry, a folder, a file of weights of the architecture of ``like``, or a
            name: "tiny-llava", "owner/name", or MODEL:PRETRAINED such as "tiny:built-in". A state
            of a run is exported first, see ``export_base``.
        registry: where ids are looked up first.
        like: configuration of the old base, whose other settings are kept; None = defaults.

    Raises:
        ValueError: if the text is the id of an adapter, or of another type of model than ``like``.
    """
    record = _base_record(text, registry)
    source = text if record is None else record.source
    stated = None if record is None else record.model
    wanted = None if like is None else _class_of(like)
    kind = _class_of({"class_path": stated}) if stated else _guess_class(source, wanted)
    if wanted is not None and kind != wanted:
        raise ValueError(
            f"{text} is a model of {kind.rpartition('.')[2]} and the adapter's base one of "
            f"{wanted.rpartition('.')[2]}: an adapter fits no model of another type"
        )
    kept = {} if like is None else _kept_settings(like, kind)
    if kind == _VLM:
        return {"class_path": kind, "init_args": {**kept, "model": _absolute(source)}}
    return {"class_path": kind, "init_args": {**kept, **_clip_source(source, like)}}


def export_base(text: str, registry: Registry, folder: Path) -> str:
    """Return a base model's text, after a state of a run that it names was exported to a folder."""
    record = _base_record(text, registry)
    source = text if record is None else record.source
    try:
        run = RunReference.parse(source)
    except FileNotFoundError:
        return text
    if not folder.exists():
        export_model(run.load(), folder)
    return str(folder)


def export_model(module: ContinualModule, folder: Path) -> None:
    """Write the whole model of a module, adapters merged, as a folder that its class loads."""
    form = "open_clip" if hasattr(module.model, "clip") else "transformers"
    FORMATS[form](module, folder, half=False)


def build_module(
    model: ModelConfig, strategy: Mapping[str, Any] | None = None, start: Path | None = None
) -> ContinualModule:
    """Build a module from the configurations of its model and strategy, None = fine-tuning.

    ``start`` is a file with the weights that a run started from, see ``start_weights``.
    """
    chosen = strategy or {"class_path": "mmcl.strategies.Finetune"}
    module: dict[str, Any] = {"model": dict(model), "strategy": dict(chosen)}
    if start is not None:
        module["start_weights"] = str(start.resolve())
    config = {"model": module}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return ContinualCLI(["--config", str(file)], program="mmcl").make_module()


def touched_weights(tuned: ContinualModule, old: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the base's weights that an adapter changes, sorted.

    Args:
        tuned: the old base with the adapter.
        old: weights of the old base.
    """
    inner = getattr(tuned.model, "lm", None)
    if inner is None:
        now = base_weights(tuned.model)
        return [name for name in old if name in now and not torch.equal(now[name], old[name])]
    adapted = [
        f"{name}.weight" for name, layer in inner.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    ]  # fmt: skip
    own = {without_adapters(name): value for name, value in inner.state_dict().items()}
    beside = [name for name in old if name in own and not torch.equal(own[name], old[name])]
    return sorted({*adapted, *beside})


def _base_record(text: str, registry: Registry) -> BaseRecord | None:
    record = registry.find(text)
    if isinstance(record, AdapterRecord):
        raise ValueError(f"'{text}' is an adapter in {registry.folder}: give the id of a base")
    return record


def _lora_of(strategy: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the LoRA member of a strategy's configuration."""
    if str(strategy["class_path"]).rpartition(".")[2] == "LoRA":
        return strategy
    members = (strategy.get("init_args") or {}).get("strategies") or []
    return next((found for found in map(_lora_of, members) if found), None)


def _class_of(model: ModelConfig) -> str:
    name = str(model["class_path"]).rpartition(".")[2]
    return _CLIP if name == "OpenCLIP" else _VLM


def _guess_class(source: str, wanted: str | None) -> str:
    path = Path(source).expanduser()
    if (path / "open_clip_config.json").is_file() or path.suffix in (".safetensors", ".pt"):
        return _CLIP
    if (path / "config.json").is_file():
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        return _CLIP if kind in ("clip", "siglip", "siglip2") else _VLM
    if source == "tiny-llava":
        return _VLM
    is_pair = ":" in source and not source.startswith(("hf-hub:", "local-dir:"))
    return _CLIP if is_pair or source.startswith("hf-hub:") else wanted or _VLM


def _clip_source(source: str, like: ModelConfig | None) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_file():
        if like is None and path.with_suffix(".json").is_file():
            return {
                "model": _absolute(str(path.with_suffix(".json"))),
                "pretrained": _absolute(source),
            }
        own = {} if like is None else like.get("init_args") or {}
        return {"model": own.get("model", "tiny"), "pretrained": _absolute(source)}
    if path.is_dir() or source.startswith("hf-hub:"):
        return {"model": _absolute(source), "pretrained": None}
    model, _, tag = source.partition(":")
    return {"model": model, "pretrained": tag or None}


def _kept_settings(like: ModelConfig, kind: str) -> dict[str, Any]:
    own = dict(like.get("init_args") or {})
    kept = {name: own[name] for name in _KEPT[kind] if name in own}
    is_tiny = str(like["class_path"]).endswith("TinyLlava") or own.get("model") == "tiny-llava"
    if kind == _VLM and is_tiny and kept.get("image_inputs") is None:
        kept["image_aspect_ratio"] = kept.get("image_aspect_ratio") or "pad"
    return kept


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
