"""Summary of a finished run: its metrics, versions, hashes, warnings and errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmcl.evaluation import AccuracyMatrix, RunSummary
from mmcl.evaluation.continual_metrics import compute_all_metrics, compute_lenient_metrics
from mmcl.evaluation.declared_metrics import compute_declared_metrics
from mmcl.evaluation.run_files import read_lenient
from mmcl.evaluation.scorers import find_scorer
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.run_dir import RunState
from mmcl.lightning.stages.lineage import versions


def summarize(
    run: ContinualRun,
    config: Mapping[str, Any],
    matrix: AccuracyMatrix,
    images: Sequence[Mapping[str, str]] = (),
) -> RunSummary:
    """Write the summary of a finished run, ``summary.json``, and ``figures/samples.json``."""
    folder, stream = run.folder, run.data.stream
    state = folder.state() or RunState(0, 0, [], run.seed)
    lenient = read_lenient(matrix, folder.path)
    scorers = sorted({task.scorer for task in stream.all_tasks if task.scorer})
    scorer_versions = {f"scorer {name}": find_scorer(name).version for name in scorers}
    metrics = compute_all_metrics(matrix)
    metrics += compute_lenient_metrics(matrix, lenient) if lenient is not None else []
    metrics += compute_declared_metrics(matrix, lenient)
    summary = RunSummary(
        name=folder.path.name,
        stream=stream.name,
        scenario=stream.scenario,
        strategy=name_of(config["model"].get("strategy")),
        model=model_name(config["model"].get("model")),
        seed=run.seed,
        metrics=tuple(metrics),
        versions={**versions(), **scorer_versions},
        hashes={"card": hashlib.sha256(run.data.card.read_bytes()).hexdigest(), **stream.hashes},
        errors=tuple(state.errors),
        warnings=(*state.warnings, *run.unmeasured),
        seconds=state.seconds,
        finished=state.finished_tasks == len(stream) and not matrix.missing(),
    )
    summary.write(folder.path / "summary.json")
    folder.write("figures/samples.json", json.dumps(list(images), indent=1) + "\n")
    return summary


def name_of(strategy: Any) -> str:
    """Return the class name of a configured strategy, or the names of a chain's members."""
    if not isinstance(strategy, Mapping):
        return "Finetune"
    name = str(strategy.get("class_path", "")).rsplit(".", 1)[-1]
    members = (strategy.get("init_args") or {}).get("strategies") or []
    return " + ".join(name_of(member) for member in members) if members else name


def model_name(model: Any) -> str:
    """Return the class name of a configured model, and its architecture."""
    if not isinstance(model, Mapping):
        return "model"
    arguments = model.get("init_args") or {}
    name = str(model.get("class_path", "")).rsplit(".", 1)[-1]
    return f"{name} {arguments.get('model', '')}".strip()
