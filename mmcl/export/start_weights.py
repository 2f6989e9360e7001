"""Weights of a run's state as the start of another run, and the lineage of an export.

A file of its own because a run needs it without the formats of other libraries.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mmcl.data.remote.location import sha256_of
from mmcl.export.formats import (
    RUN_WITH_MMCL,
    beyond_weights,
    example_batch,
    plain_weights,
    strategies_of,
)
from mmcl.lightning.checkpoints.checkpoint_io import write_checkpoint
from mmcl.lightning.config.run_reference import RunReference
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.stages.lineage import LINEAGE, START, START_FACTS, Lineage, Start

_WAIT_SECONDS = 3600.0


def start_weights(module: ContinualModule) -> dict[str, Tensor]:
    """Return the weights of a module's model under their names without adapters, which are merged.

    Raises:
        TypeError: if the model is neither of open_clip nor of transformers.
        ValueError: if predictions depend on more than weights, such as prompts or routers.
    """
    model, names = module.model, type(module.strategy).__name__
    if getattr(model, "lm", None) is not None:
        reason = beyond_weights(module, example_batch(module))
        if reason:
            raise ValueError(f"{names} {reason}, which weights alone cannot do: {RUN_WITH_MMCL}")
        return {f"lm.{name}": tensor for name, tensor in plain_weights(module).items()}
    if getattr(model, "clip", None) is None:
        raise TypeError(
            f"{type(model).__name__} has no model of open_clip or transformers, and only their "
            "weights can be another run's start"
        )
    more = [
        type(strategy).__name__
        for strategy in strategies_of(module.strategy)
        if strategy.overrides("prompts") or strategy.overrides("transform_output")
    ]
    if more:
        raise ValueError(
            f"{', '.join(more)} predicts with more than weights (prompts or another head), which "
            f"another run cannot start from: {RUN_WITH_MMCL}, or append the tasks to its card"
        )
    return {f"clip.{name}": tensor.detach() for name, tensor in model.clip.state_dict().items()}


def prepare_start(folder: Path, text: str, *, is_first: bool) -> None:
    """Write the weights that a run starts from into its directory, once.

    Args:
        folder: run directory.
        text: the other run's state, ``RUN@3`` or ``RUN@task``.
        is_first: whether this process is rank 0, which writes; others wait.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if it has no such state, or its weights are not all that it predicts with.
    """
    facts = folder / START_FACTS
    if not is_first:
        end = time.monotonic() + _WAIT_SECONDS
        while not facts.is_file() and time.monotonic() < end:
            time.sleep(0.1)
        return
    if facts.is_file():
        return
    reference = RunReference.parse(text)
    run = reference.open(program="mmcl train")
    module = reference.load(run)
    write_checkpoint(folder / START, start_weights(module))
    lineage = reference.folder / LINEAGE
    start = Start(
        str(reference.folder.resolve()),
        reference.finished_tasks(run),
        sha256_of(folder / START),
        sha256_of(lineage) if lineage.is_file() else "",
    )
    start.write(facts)


def write_lineage(run: Path, target: Path, tasks: int) -> None:
    """Write the lineage of an export: into its folder, or beside its file.

    Args:
        run: run directory; nothing is written if it has no lineage.
        target: folder or file of the export.
        tasks: number of trained tasks of the exported state.
    """
    if not (run / LINEAGE).is_file():
        return
    is_folder = target.is_dir()
    files = sorted(target.glob("*.safetensors")) if is_folder else [target]
    digest = sha256_of(files[0]) if len(files) == 1 else ""
    found = Lineage.read(run / LINEAGE).after(tasks)
    made = replace(found, run=str(run.resolve()), weights_sha256=digest)
    made.write(target / LINEAGE if is_folder else target.with_name(f"{target.name}.{LINEAGE}"))
