"""Task and mid-task checkpoints, atomic on all ranks, under DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mmcl.core import Strategy
from mmcl.core.atomic_write import WriteError, sync_to_disk, write_atomic
from mmcl.core.distributed import all_gather_strings
from mmcl.core.strategy import tensor_bytes
from mmcl.lightning.checkpoints.checkpoint_checks import METADATA, METADATA_HASH, reject_pickles

KeepBest = Literal["loss", "score"]
_TEMPORARY = ".last.ckpt.tmp"
_OVERLAY = "add --config configs/overlay/fsdp.yaml"


def save_checkpoint_atomic(trainer: pl.Trainer, path: Path, *, weights_only: bool) -> None:
    """Write a trainer's checkpoint atomically as one file; all ranks call this together.

    Lightning's own writer (2.6) collects the file in memory, writes it into the system's folder for
    temporary files, where a killed run leaves it, and copies it from there to another disk. A
    checkpoint plugin of the user's trainer is kept.

    Raises:
        WriteError: on every rank, if there is no room; a previous checkpoint stays.
    """
    strategy = trainer.strategy
    with raise_on_all_ranks(trainer):
        original = strategy.checkpoint_io
        if type(original) is not TorchCheckpointIO:
            trainer.save_checkpoint(path, weights_only=weights_only)
            return
        strategy.checkpoint_io = writer = _DeferredErrorIO()
        try:
            trainer.save_checkpoint(path, weights_only=weights_only)
        finally:
            strategy.checkpoint_io = original
        if writer.failure is not None:
            raise writer.failure


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically as one file.

    Raises:
        WriteError: if there is no room.
    """

    def write(temporary: Path) -> None:
        # Through a Python file: the errors of torch's own do not name the system's error.
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)

    write_atomic(path, write, needs=tensor_bytes(checkpoint))


@contextmanager
def raise_on_all_ranks(trainer: pl.Trainer) -> Iterator[None]:
    """Context that raises on all ranks if one cannot write, so that none waits for it.

    All ranks enter and leave this together.

    Raises:
        OSError: on a rank that cannot write; WriteError with the same message on the others.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    own = [] if failure is None else [" ".join(str(failure).split())]
    messages = all_gather_strings(own, trainer.strategy.root_device)
    if failure is not None:
        raise failure
    if messages:
        raise WriteError(messages[0])


class _DeferredErrorIO(TorchCheckpointIO):
    """Checkpoint writer that records a failure instead of raising.

    Lightning enters a barrier right after writing, so raising here on rank 0 would hang the others;
    ``save_checkpoint_atomic`` raises on all ranks afterwards.
    """

    failure: WriteError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or record why it cannot be written."""
        try:
            write_checkpoint(Path(path), checkpoint)
        except WriteError as error:
            self.failure = error


def is_sharded(trainer: pl.Trainer) -> bool:
    """Return whether a trainer shards weights, gradients or the optimizer's state over devices."""
    return isinstance(trainer.strategy, ModelParallelStrategy | DeepSpeedStrategy)


def check_shardable(trainer: pl.Trainer, strategy: Strategy) -> None:
    """Check that a trainer's sharding supports the hooks of a continual-learning strategy.

    Raises:
        ValueError: naming what to use instead.
    """
    parallelism = trainer.strategy
    if isinstance(parallelism, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is 'fsdp', torch's FSDP1, which flattens the weights that a strategy "
            f"needs by name: {_OVERLAY}, which is FSDP2"
        )
    if isinstance(parallelism, DeepSpeedStrategy) and parallelism.zero_stage_3:
        raise ValueError(
            "trainer.strategy is DeepSpeed stage 3, which keeps weights sharded at the end of a "
            f"task: use deepspeed_stage_2, or {_OVERLAY}"
        )
    if is_sharded(trainer) and strategy.overrides("project_gradients"):
        parts = [part for part in strategy.modules() if isinstance(part, Strategy)]
        name = next(type(p).__name__ for p in reversed(parts) if p.overrides("project_gradients"))
        raise ValueError(
            f"{name} needs unsharded gradients, and {type(parallelism).__name__} shards them: use "
            "it with strategy ddp, or use ExperienceReplay or DarkReplay instead"
        )


def check_resumable(trainer: pl.Trainer, last: Path | None) -> None:
    """Check that a trainer can resume from a mid-task checkpoint.

    Raises:
        ValueError: if the checkpoint is sharded and the trainer is not, or if it holds pickled
            objects.
    """
    if last is None or not last.is_dir():
        return
    if not is_sharded(trainer):
        raise ValueError(
            f"{last} is sharded, and trainer.strategy is now {type(trainer.strategy).__name__}: "
            f"{_OVERLAY}, with one or more devices"
        )
    if (last / METADATA).is_file():
        reject_pickles(last)


def destroy_process_groups(trainer: pl.Trainer, module: Any) -> None:
    """Destroy the process groups that Lightning creates for every Trainer.

    The groups of a module's first sharding stay, because torch caches operations on a mesh by its
    ranks and would look for these groups again.
    """
    mesh = vars(trainer.strategy).get("_device_mesh")
    for group in [] if mesh is None or mesh is module.mesh else mesh.get_all_groups():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


class BestWeights:
    """Weights of a task at its best validation so far; a copy in host memory and in checkpoints.

    These are the trainable parameters and the model's buffers, such as batch-norm statistics; the
    other state of a strategy, such as a memory, is that of the last step.

    Args:
        measure: "loss" (lowest) or "score" (highest); the first of equal ones is kept.
    """

    def __init__(self, measure: KeepBest) -> None:
        self.measure = measure
        self.state: dict[str, Any] = {"value": None, "step": 0, "weights": {}}

    def update(self, metrics: Mapping[str, float], module: Any, step: int) -> None:
        """Copy the weights if the metrics of a validation are better than the best."""
        value = next(v for name, v in metrics.items() if (name == "val/loss") == self.is_loss)
        best = self.state["value"]
        if best is None or (value < best if self.is_loss else value > best):
            copies = {name: t.detach().cpu().clone() for name, t in _weights(module).items()}
            self.state = {"value": value, "step": step, "weights": copies}

    @property
    def is_loss(self) -> bool:
        """Whether lower values are better."""
        return self.measure == "loss"

    @torch.no_grad()
    def restore(self, module: Any) -> None:
        """Write the best weights into the module; if there was no validation, change nothing."""
        weights = _weights(module)
        for name, copy in self.state["weights"].items():
            weights[name].copy_(copy)


def _weights(module: Any) -> dict[str, torch.Tensor]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    buffers = {f"model.{name}": b for name, b in module.model.named_buffers()}
    return {**trainable, **buffers}


def save_task_checkpoint(trainer: pl.Trainer, module: Any, path: Path) -> None:
    """Write the unsharded checkpoint of a finished task, under any parallelism.

    The module's weights are unsharded; Lightning would write them sharded nevertheless.

    Raises:
        WriteError: on every rank, if there is no room.
    """
    if not is_sharded(trainer):
        save_checkpoint_atomic(trainer, path, weights_only=True)
        return
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": version("pytorch-lightning"),
        "state_dict": module.state_dict(),
    }
    module.on_save_checkpoint(checkpoint)
    with raise_on_all_ranks(trainer):
        if trainer.is_global_zero:
            write_checkpoint(path, checkpoint)


def save_mid_task_checkpoint(
    trainer: pl.Trainer, folder: Path, step: int, name: str = "last.ckpt"
) -> Path:
    """Write a mid-task checkpoint: one file ``name``, or a folder of the shards of all ranks.

    A folder cannot replace another one atomically, so the folder of every step has its own name:
    the previous one is valid until ``run.json`` names the new one.

    Returns:
        path of the checkpoint, the same on every rank.

    Raises:
        WriteError: on every rank, if there is no room.
    """
    target = folder / name
    if not is_sharded(trainer):
        save_checkpoint_atomic(trainer, target, weights_only=False)
        return target
    temporary, is_first = folder / _TEMPORARY, trainer.is_global_zero
    with raise_on_all_ranks(trainer):
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
    try:
        save_checkpoint_atomic(trainer, temporary, weights_only=False)
    except CheckpointException as error:
        why = next(iter(error.failures.values()), error)
        raise WriteError(
            f"{temporary} cannot be written ({why}): make room, or change its permissions"
        ) from error
    with raise_on_all_ranks(trainer):
        if is_first and temporary.is_dir():
            if (temporary / METADATA).is_file():
                digest = hashlib.sha256((temporary / METADATA).read_bytes()).hexdigest()
                (temporary / METADATA_HASH).write_text(f"{digest}\n")
            target = folder / f"last_{step:07d}.ckpt"
            _remove(target)
            for path in (*temporary.rglob("*"), temporary):
                sync_to_disk(path)
        if is_first:
            temporary.replace(target)
    path_of_all: Path = trainer.strategy.broadcast(target)
    return path_of_all


def remove_mid_task_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove all mid-task checkpoints but one, unsharded or sharded, and half-written ones."""
    for path in (*folder.glob("last*.ckpt"), folder / _TEMPORARY):
        if path != but:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
