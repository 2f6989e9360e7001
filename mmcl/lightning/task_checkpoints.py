"""Task and mid-task checkpoints under DDP, FSDP2 and DeepSpeed, and checks of these strategies."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mmcl.core import Strategy
from mmcl.core.atomic_write import WriteError, sync_to_disk
from mmcl.lightning.checkpoint_io import (
    METADATA,
    raise_on_all_ranks,
    reject_pickles,
    save_checkpoint_atomic,
    write_checkpoint,
)

_TEMPORARY = ".last.ckpt.tmp"
_OVERLAY = "add --config configs/overlay/fsdp.yaml"


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


def save_task_checkpoint(trainer: pl.Trainer, module: Any, path: Path) -> None:
    """Write the unsharded checkpoint of a finished task, under any parallelism.

    Args:
        trainer: trainer of the task.
        module: module with unsharded weights; Lightning would write them sharded nevertheless.
        path: checkpoint file.

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


def save_mid_task_checkpoint(trainer: pl.Trainer, folder: Path, step: int) -> Path:
    """Write a mid-task checkpoint: one file, or a folder of the shards of all ranks.

    A folder cannot replace another one atomically, so the folder of every step has its own name:
    the previous one is valid until ``run.json`` names the new one.

    Args:
        trainer: trainer of the task.
        folder: folder of the run's checkpoints.
        step: optimizer step of the task.

    Returns:
        path of the checkpoint, the same on every rank.

    Raises:
        WriteError: on every rank, if there is no room.
    """
    target = folder / "last.ckpt"
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
            target = folder / f"last_{step:07d}.ckpt"
            _remove(target)
            for path in (*temporary.rglob("*"), temporary):
                sync_to_disk(path)
        if is_first:
            temporary.replace(target)
    path_of_all: Path = trainer.strategy.broadcast(target)
    return path_of_all


def remove_mid_task_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove mid-task checkpoints, unsharded or sharded, and half-written ones.

    Args:
        folder: folder of the run's checkpoints.
        but: the checkpoint to keep.
    """
    for path in (*folder.glob("last*.ckpt"), folder / _TEMPORARY):
        if path != but:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
