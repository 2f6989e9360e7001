"""``mmcl merge``: the weights of several checkpoints as one exported model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcl.cli.merge_fisher import fisher_of
from mmcl.cli.merge_sweep import LoadedRun, ValueRange, number_or_range, sweep
from mmcl.cli.parser import CommandParser, UsageError
from mmcl.data.remote.location import sha256_of
from mmcl.lightning.config.run_reference import RunReference
from mmcl.lightning.module import ContinualModule
from mmcl.merging.checkpoints import (
    FROM_BASE,
    METHODS,
    LoadedWeights,
    export_file,
    load_weights,
    merge_weights,
    replace_clip_weights,
    write_merged,
)

_USED = {
    "average": ("weights",),
    "ema": ("decay",),
    "wise": ("alpha",),
    "task_arithmetic": ("scale",),
    "ties": ("density", "scale"),
    "dare": ("drop_rate", "seed", "scale"),
    "magmax": ("scale",),
    "fisher": ("data", "samples"),
}
"""Method -> its options; of all others it is an error."""
_SWEEP = ("data", "old", "new", "samples")
"""Options of a sweep, beside those of the method."""


def main(argv: Sequence[str]) -> int:
    """Merge the weights of checkpoints of runs (RUN, RUN@3, RUN@task) into one exported model."""
    given = _parser().parse_args(argv)
    arguments = _arguments(given)
    if given.out.exists():
        raise UsageError(f"{given.out} exists: give a new name, or remove this one")
    inputs: list[dict[str, Any]] = []
    modules: list[ContinualModule] = []
    weights: list[LoadedWeights] = []
    runs: list[LoadedRun] = []
    fishers: list[dict[str, Tensor]] = []
    for text in given.checkpoints:
        own, loaded, run = _load(text, inputs, given.like)
        weights.append(loaded)
        runs.append(run)
        modules = modules or [own]
        if given.method == "fisher":
            diagonal, tasks = fisher_of(own, run, text, given.data, given.samples)
            fishers.append(diagonal)
            inputs[-1]["fisher_tasks"] = tasks
    base = None
    if given.method in FROM_BASE:
        start = f"{runs[0].run.folder.path}@0"
        base = _load(given.base or start, inputs, given.like)[1]
    if given.like and not any("like" in fact for fact in inputs):
        raise UsageError("--like is used by exports, and no checkpoint is one: leave it out")
    option = next((name for name, value in arguments.items() if isinstance(value, ValueRange)), "")

    def merge(value: float | None = None) -> dict[str, Tensor]:
        chosen = arguments if value is None else {**arguments, option: value}
        extra = {"fishers": fishers} if given.method == "fisher" else {}
        return merge_weights(given.method, weights, base, chosen | extra)

    def write(merged: Mapping[str, Tensor], out: Path, value: float | None = None) -> str:
        chosen = arguments if value is None else {**arguments, option: value}
        facts = {"method": given.method, "arguments": chosen, "inputs": inputs}
        if given.method == "fisher":
            facts |= {"data": given.data, "samples": given.samples}
        return write_merged(modules[0], merged, out, facts)

    if option:
        fixed = {name: value for name, value in arguments.items() if name != option}
        facts = {"method": given.method, "arguments": fixed, "inputs": inputs}
        sweep(given, option, modules[0], runs, merge, write, facts)
    else:
        print(write(merge(), given.out))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="mmcl merge", description=main.__doc__)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="RUN, RUN@3, RUN@task or export"
    )
    parser.add_argument("out", type=Path, help="new folder; of a CLIP also a .safetensors file")
    parser.add_argument("--method", required=True, choices=METHODS, help="how to merge")
    parser.add_argument(
        "--base", metavar="CKPT", help="where task vectors start (the first run before training)"
    )
    parser.add_argument("--like", metavar="RUN", help="exports of a CLIP: a run of the same model")
    parser.add_argument("--weights", metavar="W,W", help="average: share of each (equal)")
    parser.add_argument("--decay", type=float, help="ema: share of the mean so far (0.5)")
    parser.add_argument(
        "--alpha", type=number_or_range, metavar="A",
        help="wise: 0 is the first, 1 the second (0.5); a range start:stop:step is a sweep",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=number_or_range, metavar="S",
        help="factor of the merged task vector (1); a range start:stop:step is a sweep",
    )  # fmt: skip
    parser.add_argument("--density", type=float, help="ties: fraction of entries that stay (0.2)")
    parser.add_argument("--drop_rate", type=float, help="dare: fraction of entries dropped (0.9)")
    parser.add_argument("--seed", type=int, help="dare: seed of the dropped entries (0)")
    parser.add_argument(
        "--data",
        metavar="CARD_OR_RUN",
        help="sweep: whose tasks are scored (the last run); fisher: whose are measured (own run)",
    )
    parser.add_argument(
        "--old", metavar="TASK,TASK", help="sweep: old tasks (learned by the first, and probes)"
    )
    parser.add_argument(
        "--new", metavar="TASK,TASK", help="sweep: new tasks (learned by the last alone)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="of each task, at most (all); sweep: test samples, fisher: training samples",
    )
    return parser


def _arguments(given: Namespace) -> dict[str, Any]:
    """Return the arguments of the formula; an option of another method is an error."""
    names = ("weights", "decay", "alpha", "scale", "density", "drop_rate", "seed")
    stated = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    unused = [name for name in stated if name not in _USED[given.method]]
    if given.base and given.method not in FROM_BASE:
        unused.append("base")
    if unused:
        raise UsageError(f"--{unused[0]} is not used by --method {given.method}: leave it out")
    if not any(isinstance(value, ValueRange) for value in stated.values()):
        for name in _SWEEP:
            if getattr(given, name) is not None and name not in _USED[given.method]:
                raise UsageError(
                    f"--{name} is used by a sweep, and no option is a range: leave it out, or give "
                    "a range such as --alpha 0:1:0.1"
                )
    if given.method == "fisher":
        return {}  # its diagonals are no arguments of the command line
    if given.method == "ema":
        return {"share": 1 - stated.get("decay", 0.5)}
    if given.method == "wise":
        return {"alpha": _fraction(stated.get("alpha", 0.5))}
    if "weights" in stated:
        return {"shares": _shares(stated["weights"])}
    return stated


def _fraction(alpha: float | ValueRange) -> float | ValueRange:
    values = alpha.values if isinstance(alpha, ValueRange) else [alpha]
    outside = [value for value in values if not 0 <= value <= 1]
    if outside:
        raise UsageError(f"--alpha has {outside[0]:g}: give 0 to 1")
    return alpha


def _shares(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights is '{text}': give numbers such as 0.5,0.5") from None


def _load(
    text: str, inputs: list[dict[str, Any]], like: str | None
) -> tuple[ContinualModule, LoadedWeights, LoadedRun]:
    """Load a checkpoint or an export, and append its file and sha256 to ``inputs``."""
    export = export_file(text)
    if export and like is None:
        raise UsageError(f"{text} is an export: give --like RUN, a run of the same model")
    reference = RunReference.parse(like if export and like else text)
    run = reference.open(program="mmcl merge")
    module = reference.load(run)
    tasks = reference.finished_tasks(run)
    fact: dict[str, Any] = {"checkpoint": text}
    file = export or (run.folder.task_checkpoint(tasks) if tasks else None)
    if file:
        fact |= {"path": str(file), "sha256": sha256_of(file)}
    if export:
        fact["like"] = like
        replace_clip_weights(module, export)
    inputs.append(fact)
    return module, load_weights(module, text), LoadedRun(run, tasks, bool(export))
