"""Recycling of a head in closed form (RanPAC, NCM): solved again from features of the next base.

Its stored sums are of the old base's features and hold no features of the next one, so the training
data are read once more. A file of its own because nothing is trained by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.run_files import MATRIX
from mmcl.lightning.config.run_reference import RunReference
from mmcl.registry.learning_curve import make_run, train
from mmcl.registry.records import Registry
from mmcl.registry.recycle_plan import BASE, check_plan, write_plan
from mmcl.registry.sources import Adapter, export_base, model_config

Row = tuple[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class RecycledHead:
    """Scores of a head before and after it was solved again.

    Attributes:
        tasks: names of the tasks.
        rows: state -> score of each task, 0 to 1, None if not measured.
    """

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]


def recycle_head(
    adapter: Adapter, base: str, registry: Registry, folder: Path, *, mode: str, stream: str,
    data_dir: str, changes: Sequence[str] = (), log: Callable[[str], None] = lambda text: None,
) -> RecycledHead:  # fmt: skip
    """Solve the head of a run again on the next base, as an ordinary run in ``folder/run``.

    Raises:
        ValueError: if the mode trains, or there is no training data.
    """
    if mode != "direct":
        raise ValueError(
            f"--mode is {mode}, and {adapter.name} is a head in closed form, which no gradient "
            "trains: use --mode direct, which solves it again from features of the new base"
        )
    if not stream:
        raise ValueError(
            f"{adapter.name} is a head in closed form, whose sums are of the old base's features: "
            "give --data with the card of its training data, from which it is solved again"
        )
    plan = {"adapter": adapter.name, "base": base, "mode": mode, "stream": stream}
    check_plan(folder, plan)
    text = export_base(base, registry, folder / BASE)
    write_plan(folder, plan)
    settings = dict(cast(Mapping[str, Any], adapter.settings))
    state = cast(RunReference, adapter.run)
    model = {**settings["model"], "model": model_config(text, registry, adapter.base)}
    data = {**settings["data"], "stream": stream, "data_dir": data_dir}
    kept = ("seed_everything", "trainer", "checkpoint_every_n_steps")
    config = {name: settings[name] for name in kept if name in settings}
    for linked in (model, data):
        linked.pop("seed", None)
    run, cli = make_run({**config, "model": model, "data": data}, folder / "run", changes, log=log)
    matrix = train(run, cli)
    tasks = int(state.state)
    rows: list[Row] = []
    old = AccuracyMatrix.read(state.folder / MATRIX)
    for name, known, row in (
        ("old base and head", old, tasks), ("next base alone", matrix, 0),
        ("next base and head", matrix, matrix.tasks),
    ):  # fmt: skip
        scores = dict(zip(known.names, known.values[row], strict=True))
        rows.append((name, tuple(scores.get(task) for task in matrix.names)))
    return RecycledHead(tuple(matrix.names), tuple(rows))
