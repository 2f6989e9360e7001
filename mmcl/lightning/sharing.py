"""What a run does differently where devices share a model's weights out among them."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mmcl.core import Strategy
from mmcl.core.atomic import CannotWrite
from mmcl.lightning.checkpoint_file import all_or_none, save_whole, write_checkpoint
from mmcl.lightning.shard_folder import METADATA, expect_plain

_TEMPORARY = ".last.ckpt.tmp"
_OVERLAY = "lay configs/overlay/fsdp.yaml over the configuration"


def is_shared(trainer: pl.Trainer) -> bool:
    """Tell whether a trainer's devices share weights, gradients or the optimiser's state out."""
    return isinstance(trainer.strategy, ModelParallelStrategy | DeepSpeedStrategy)


def expect_shareable(trainer: pl.Trainer, strategy: Strategy) -> None:
    """Check that a strategy's hooks see what they need where weights are shared out.

    Raises:
        ValueError: naming what to use instead.
    """
    way = trainer.strategy
    if isinstance(way, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is 'fsdp', the older of torch's two, under which a strategy finds no "
            f"weights by name: {_OVERLAY}"
        )
    if isinstance(way, DeepSpeedStrategy) and way.zero_stage_3:
        raise ValueError(
            "DeepSpeed's stage 3 leaves no whole weights for the end of a task: use "
            f"deepspeed_stage_2, or {_OVERLAY}"
        )
    if is_shared(trainer) and strategy.uses("project"):
        parts = [part for part in strategy.modules() if isinstance(part, Strategy)]
        name = next(type(p).__name__ for p in reversed(parts) if p.uses("project"))
        raise ValueError(
            f"{name} edits whole gradients, and {type(way).__name__} gives every device a share of "
            "them: use it with strategy ddp, or take ExperienceReplay or DarkReplay instead"
        )


def expect_readable(trainer: pl.Trainer, last: Path | None) -> None:
    """Check that a trainer can go on from the checkpoint inside of a task.

    Raises:
        ValueError: if that is in shards and the trainer's devices share nothing out, or if it holds
            pickled objects.
    """
    if last is None or not last.is_dir():
        return
    if not is_shared(trainer):
        raise ValueError(
            f"{last} is in shards, and trainer.strategy is now {type(trainer.strategy).__name__}: "
            f"{_OVERLAY}, with any number of devices, one of them too"
        )
    if (last / METADATA).is_file():
        expect_plain(last)


def forget_devices(trainer: pl.Trainer, module: Any) -> None:
    """Close the groups of processes that Lightning makes anew for every Trainer.

    Those that a module's weights were first shared out over stay, for torch remembers operations on
    a mesh by its ranks and would look for these groups again.
    """
    mesh = vars(trainer.strategy).get("_device_mesh")
    for group in [] if mesh is None or mesh is module.mesh else mesh.get_all_groups():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def save_after(trainer: pl.Trainer, module: Any, path: Path) -> None:
    """Write the checkpoint of a finished task, whole under any way of using devices.

    Args:
        trainer: of the task.
        module: whose weights are whole again; Lightning would write them in shards nevertheless.
        path: of the file.

    Raises:
        CannotWrite: on every rank, if there is no room.
    """
    if not is_shared(trainer):
        save_whole(trainer, path, weights_only=True)
        return
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": version("pytorch-lightning"),
        "state_dict": module.state_dict(),
    }
    module.on_save_checkpoint(checkpoint)
    with all_or_none(trainer):
        if trainer.is_global_zero:
            write_checkpoint(path, checkpoint)


def save_inside(trainer: pl.Trainer, folder: Path, step: int) -> Path:
    """Write the checkpoint inside of a task: one file, or a folder to which each rank adds shards.

    A folder cannot take another one's place at once, so the one of every step has its own name:
    until ``run.json`` names it the last one counts.

    Args:
        trainer: of the task.
        folder: of the run's checkpoints.
        step: of the task.

    Returns:
        where it stands, the same on every rank.

    Raises:
        CannotWrite: on every rank, if there is no room.
    """
    target = folder / "last.ckpt"
    if not is_shared(trainer):
        save_whole(trainer, target, weights_only=False)
        return target
    temporary, is_first = folder / _TEMPORARY, trainer.is_global_zero
    with all_or_none(trainer):
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
    try:
        save_whole(trainer, temporary, weights_only=False)
    except CheckpointException as error:
        why = next(iter(error.failures.values()), error)
        raise CannotWrite(f"{temporary} cannot be written in shards: {why}") from error
    with all_or_none(trainer):
        if is_first and temporary.is_dir():
            target = folder / f"last_{step:07d}.ckpt"
            _remove(target)
            _flush(temporary)
        if is_first:
            temporary.replace(target)
    told: Path = trainer.strategy.broadcast(target)
    return told


def forget_inside(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints inside of a task, whole or in shards, and what is half written.

    Args:
        folder: of the run's checkpoints.
        but: the one that counts.
    """
    for left in (*folder.glob("last*.ckpt"), folder / _TEMPORARY):
        if left != but:
            _remove(left)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
