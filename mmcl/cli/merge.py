"""``mmcl merge``: the weights of several checkpoints as one exported model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.data.remote.location import sha256_of
from mmcl.lightning.config.run_reference import RunReference
from mmcl.lightning.module import ContinualModule
from mmcl.merging.checkpoints import (
    FROM_BASE,
    METHODS,
    LoadedWeights,
    load_weights,
    merge_weights,
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
}
"""Method -> its options; of all others it is an error."""


def main(argv: Sequence[str]) -> int:
    """Merge the weights of checkpoints of runs (RUN, RUN@3, RUN@task) into one exported model."""
    given = _parser().parse_args(argv)
    arguments = _arguments(given)
    if given.out.exists():
        raise UsageError(f"{given.out} exists: give a new name, or remove this one")
    inputs: list[dict[str, str]] = []
    module, first = _load(given.checkpoints[0], inputs)
    loaded = [first, *(_load(text, inputs)[1] for text in given.checkpoints[1:])]
    base = None
    if given.method in FROM_BASE:
        start = f"{RunReference.parse(given.checkpoints[0]).folder}@0"
        base = _load(given.base or start, inputs)[1]
    merged = merge_weights(given.method, loaded, base, arguments)
    facts = {"method": given.method, "arguments": arguments, "inputs": inputs}
    print(write_merged(module, merged, given.out, facts))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="mmcl merge", description=main.__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="RUN, RUN@3 or RUN@task")
    parser.add_argument("out", type=Path, help="new folder; of a CLIP also a .safetensors file")
    parser.add_argument("--method", required=True, choices=METHODS, help="how to merge")
    parser.add_argument(
        "--base", metavar="CKPT", help="where task vectors start (the first run before training)"
    )
    parser.add_argument("--weights", metavar="W,W", help="average: share of each (equal)")
    parser.add_argument("--decay", type=float, help="ema: share of the mean so far (0.5)")
    parser.add_argument("--alpha", type=float, help="wise: 0 is the first, 1 the second (0.5)")
    parser.add_argument("--scale", type=float, help="factor of the merged task vector (1)")
    parser.add_argument("--density", type=float, help="ties: fraction of entries that stay (0.2)")
    parser.add_argument("--drop_rate", type=float, help="dare: fraction of entries dropped (0.9)")
    parser.add_argument("--seed", type=int, help="dare: seed of the dropped entries (0)")
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
    if given.method == "ema":
        return {"share": 1 - stated.get("decay", 0.5)}
    if given.method == "wise":
        return {"alpha": stated.get("alpha", 0.5)}
    if "weights" in stated:
        return {"shares": _shares(stated["weights"])}
    return stated


def _shares(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights is '{text}': give numbers such as 0.5,0.5") from None


def _load(text: str, inputs: list[dict[str, str]]) -> tuple[ContinualModule, LoadedWeights]:
    """Load a checkpoint, and append its file and sha256 to ``inputs``."""
    reference = RunReference.parse(text)
    run = reference.open(program="mmcl merge")
    module = reference.load(run)
    tasks = reference.finished_tasks(run)
    fact = {"checkpoint": text}
    if tasks:
        file = run.folder.task_checkpoint(tasks)
        fact |= {"path": str(file), "sha256": sha256_of(file)}
    inputs.append(fact)
    return module, load_weights(module, text)
