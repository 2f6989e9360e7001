"""What a run comes to: summary.json, from its folder, its configuration and its matrix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmcl.core import TaskStream
from mmcl.lightning.folder import RunState
from mmcl.lightning.sequence import SequenceRun
from mmcl.metrics import AccuracyMatrix, RunSummary
from mmcl.metrics.figures import all_figures
from mmcl.metrics.leniency import lenient_figures, read_lenient
from mmcl.metrics.scorers import find_scorer

_LIBRARIES = ("mmcl", "torch", "pytorch-lightning", "open_clip_torch", "transformers", "webdataset")


def summarize(
    run: SequenceRun,
    config: Mapping[str, Any],
    matrix: AccuracyMatrix,
    pictures: Sequence[Mapping[str, str]] = (),
) -> RunSummary:
    """Write ``summary.json`` and ``figures/samples.json`` of a run.

    Args:
        run: with its folder and data.
        config: plain values.
        matrix: of the run.
        pictures: test samples shown in the report.
    """
    folder, stream = run.folder, run.data.stream
    state = folder.state() or RunState(0, 0, [], run.seed)
    lenient = read_lenient(matrix, folder.path)
    figures = all_figures(matrix)
    figures += lenient_figures(matrix, lenient) if lenient is not None else []
    summary = RunSummary(
        name=folder.path.name,
        stream=stream.name,
        scenario=stream.scenario,
        strategy=name_of(config["model"].get("strategy")),
        model=model_name(config["model"].get("model")),
        seed=run.seed,
        figures=tuple(figures),
        versions={**_versions(), **_scorers(stream)},
        hashes={"card": hashlib.sha256(run.data.card.read_bytes()).hexdigest(), **stream.hashes},
        faults=tuple(state.faults),
        warnings=tuple(state.warnings),
        seconds=state.seconds,
        finished=state.done == len(stream) and not matrix.missing(),
    )
    summary.write(folder.path / "summary.json")
    folder.write("figures/samples.json", json.dumps(list(pictures), indent=1) + "\n")
    return summary


def name_of(strategy: Any) -> str:
    """Return the class name of a configured strategy, a chain as its members."""
    if not isinstance(strategy, Mapping):
        return "Finetune"
    name = str(strategy.get("class_path", "")).rsplit(".", 1)[-1]
    members = (strategy.get("init_args") or {}).get("strategies") or []
    return " + ".join(name_of(member) for member in members) if members else name


def model_name(model: Any) -> str:
    """Return the class name of a configured model and the architecture it was given."""
    if not isinstance(model, Mapping):
        return "model"
    arguments = model.get("init_args") or {}
    name = str(model.get("class_path", "")).rsplit(".", 1)[-1]
    return f"{name} {arguments.get('model', '')}".strip()


def _scorers(stream: TaskStream) -> dict[str, str]:
    """Return the versions of the rules that judged answers."""
    names = sorted({task.scorer for task in stream.columns if task.scorer})
    return {f"scorer {name}": find_scorer(name).version for name in names}


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
