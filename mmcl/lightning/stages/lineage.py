"""Lineage of a run: base weights -> stage -> task -> checkpoint, each by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcl.core.atomic_write import write_atomic
from mmcl.core.model import without_adapters
from mmcl.data.remote.location import sha256_of
from mmcl.evaluation import strict_json
from mmcl.evaluation.strict_json import Count

LINEAGE = "lineage.json"
_LIBRARIES = ("mmcl", "torch", "pytorch-lightning", "open_clip_torch", "transformers", "webdataset")
START = "start.ckpt"
"""File of a run with the weights that it starts from, if these are another run's."""
START_FACTS = "start.json"


@dataclass(frozen=True)
class Start:
    """State of another run from whose weights a run starts.

    Args:
        run: path of its directory.
        tasks: number of tasks that it had trained.
        weights_sha256: hash of the weights, adapters merged.
        lineage_sha256: hash of its lineage.json then, "" if it had none.
    """

    run: str
    tasks: Count
    weights_sha256: str
    lineage_sha256: str = ""

    @classmethod
    def read(cls, path: Path) -> Start:
        """Read start.json.

        Raises:
            ValueError: naming all errors at once, if it is none.
        """
        return strict_json.load(cls, strict_json.read(path), str(path))

    def write(self, path: Path) -> None:
        """Write start.json atomically."""
        write_atomic(path, strict_json.to_bytes(asdict(self)))


@dataclass(frozen=True)
class TaskLink:
    """Trained task of a lineage.

    Args:
        task: name.
        stage: cpt, dap or cft.
        checkpoint: file name in ``checkpoints/``.
        sha256: of that file.
        config_sha256: of the run's configuration then.
    """

    task: str
    stage: str
    checkpoint: str
    sha256: str
    config_sha256: str


@dataclass(frozen=True)
class Lineage:
    """Lineage of a run or of an export.

    Args:
        model: class and architecture.
        base_sha256: hash of all weights of the model before the run, "" if not known.
        stream: name of the stream.
        card_sha256: of its card when the run began.
        tasks: trained tasks in order.
        start: the state of another run that the base weights are, None = the configured model.
        run: path of the run that an export was made of, "" in a run directory.
        weights_sha256: hash of an export's file of weights, "" in a run directory.
        versions: library -> version.
    """

    model: str
    base_sha256: str
    stream: str
    card_sha256: str
    tasks: Sequence[TaskLink] = ()
    start: Start | None = None
    run: str = ""
    weights_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """Read lineage.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming all errors at once, if it is not a lineage.
        """
        return strict_json.load(cls, strict_json.read(path), str(path))

    def write(self, path: Path) -> None:
        """Write lineage.json atomically."""
        write_atomic(path, strict_json.to_bytes(asdict(self)))

    def after(self, tasks: int) -> Lineage:
        """Return the lineage as it was after fewer tasks."""
        return replace(self, tasks=tuple(self.tasks[:tasks]))


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of a model's own parameters and buffers, by name, without adapters."""
    digest = hashlib.sha256()
    plain = {without_adapters(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(plain.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.view(-1).view(torch.uint8).numpy().data if content.numel() else b"")
    return digest.hexdigest()


def note_lineage(folder: Any, data: Any, finished: int, module: Any = None) -> None:
    """Bring the lineage of a run to its finished tasks, on rank 0.

    Entries of tasks that were rolled back are removed; only new checkpoints are hashed. A run that
    an earlier version began has no lineage.

    Args:
        folder: ``RunDirectory`` of the run.
        data: its datamodule.
        finished: number of finished tasks.
        module: with the base weights, at the start of a run that has trained nothing yet.
    """
    if not folder.writes:
        return
    path, stream = folder.path / LINEAGE, data.stream
    if module is not None and finished == 0 and not path.exists():
        _begin(folder.path, module.model, data)
    if not path.is_file():
        return
    lineage = Lineage.read(path)
    links = list(lineage.tasks[:finished])
    config = folder.path / "config.yaml"
    config_sha256 = sha256_of(config) if config.is_file() else ""
    for task in stream.tasks[len(links) : finished]:
        file = folder.task_checkpoint(task.index + 1)
        digest = sha256_of(file) if file.is_file() else ""
        links.append(TaskLink(task.name, task.stage, file.name, digest, config_sha256))
    if links != list(lineage.tasks):
        replace(lineage, tasks=tuple(links)).write(path)


def _begin(folder: Path, model: nn.Module, data: Any) -> None:
    facts = folder / START_FACTS
    start = Start.read(facts) if facts.is_file() else None
    card = hashlib.sha256(data.card.read_bytes()).hexdigest()
    name, base = type(model).__name__, weights_sha256(model)
    made = Lineage(name, base, data.stream.name, card, start=start, versions=versions())
    made.write(folder / LINEAGE)


def load_start(model: nn.Module, path: str | None) -> str | None:
    """Load the weights that a run starts from into its model, before a strategy is attached.

    Args:
        model: as its configuration loads it.
        path: file of torch.save: name -> tensor, all of one or more members of the model; None =
            the model stays as it is.

    Returns:
        the path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing, from whose weights this run started: restore it, or start "
            "again under another --run_name"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    own = model.state_dict()
    members = {name.partition(".")[0] for name in state}
    unknown = [name for name in state if name not in own]
    shapes = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    given = {own[name].data_ptr() for name in state if name in own}
    # Tied weights are stored once.
    missing = [
        name for name, tensor in own.items()
        if name.partition(".")[0] in members and name not in state
        and tensor.data_ptr() not in given
    ]  # fmt: skip
    for names, problem in (
        (unknown, "has {}, which this model lacks"), (missing, "lacks {}"),
        (shapes, "has {} in another shape"),
    ):  # fmt: skip
        if names:
            raise ValueError(
                f"start_from: the other run's model {problem.format(names[0])} ({len(names)} such "
                "weights): configure the same model (model.model) as that run"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return path


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a run's numbers depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
