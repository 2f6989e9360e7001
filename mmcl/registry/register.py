"""Records of a base model and of an adapter, made from what they name.

A file of its own because loading a model to describe it is no part of reading a registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.run_files import MATRIX
from mmcl.lightning.config.run_reference import RunReference
from mmcl.registry.records import AdapterRecord, BaseRecord, Registry
from mmcl.registry.signatures import base_weights, fingerprint, signature_of
from mmcl.registry.sources import (
    build_module,
    export_base,
    find_adapter,
    model_config,
    touched_weights,
)


def describe_base(
    source: str, registry: Registry, folder: Path, *, name: str, parent: str = "", stage: Any = ""
) -> BaseRecord:
    """Return the record of a base model; its scores are those of a run's last row.

    Args:
        source: RUN@task, a folder, a file, a name, or MODEL:PRETRAINED.
        registry: where the parent is.
        folder: where a state of a run is exported to.
        name: id of the record.
        parent: id of another base, "" = none.
        stage: of its last training, "" = not stated.
    """
    text = export_base(source, registry, folder / "base")
    config = model_config(text, registry, None)
    model = build_module(config).model
    scores: dict[str, float] = {}
    stated = _portable(source)
    if text != source:
        run = RunReference.parse(source)
        tasks = run.finished_tasks(_opened(run))
        scores, stated = _row(run.folder, tasks), f"{run.folder.resolve()}@{tasks}"
    return BaseRecord(
        name, fingerprint(model), stated, config["class_path"], signature_of(model), parent,
        stage, scores,
    )  # fmt: skip


def describe_adapter(
    source: str, registry: Registry, *, name: str, old_base: str | None = None
) -> AdapterRecord:
    """Return the record of an adapter.

    Args:
        source: RUN@task or a peft folder.
        registry: where ids are looked up.
        name: id of the record.
        old_base: base of a peft folder, None = as the folder says.
    """
    adapter = find_adapter(source, registry, old_base)
    old = adapter.load_base().model
    targets: list[str] = []
    if adapter.kind != "head":
        targets = touched_weights(adapter.load(), base_weights(old))
    rank = int(adapter.lora_arguments().get("rank") or 16) if adapter.kind == "lora" else 0
    scores: dict[str, float] = {}
    stated = _portable(source)
    if adapter.run is not None:
        scores = _row(adapter.run.folder, int(adapter.run.state))
        stated = f"{adapter.run.folder.resolve()}@{adapter.run.state}"
    return AdapterRecord(
        name, fingerprint(old), adapter.kind, stated, tuple(targets), rank, adapter.task, scores
    )


def _opened(run: RunReference) -> Any:
    opened = run.open()
    opened.data.prepare_data()
    return opened


def _row(folder: Path, tasks: int) -> dict[str, float]:
    """Return the measured scores of a row of a run's matrix by task."""
    file = folder / MATRIX
    if not file.is_file():
        return {}
    matrix = AccuracyMatrix.read(file)
    pairs = zip(matrix.names, matrix.values[tasks], strict=True)
    return {name: value for name, value in pairs if value is not None}


def _portable(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
