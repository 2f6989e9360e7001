"""What a run does differently where devices share a model's weights out among them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from mmcl.core import Strategy

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


def whole_checkpoint(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return the checkpoint of a finished task from a module whose weights are whole again.

    Lightning would write shards; this one is loaded by any number of devices.
    """
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": module.state_dict(),
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def put_in_place(temporary: Path, step: int) -> Path:
    """Name a checkpoint inside of a task that is complete, and flush one in shards to the disk.

    A folder cannot take another one's place at once, so each step has a folder of its own, and
    ``run.json`` says which one counts.

    Args:
        temporary: ``.last.ckpt.tmp``, a file or a folder.
        step: of the task.

    Returns:
        where it stands now.
    """
    if temporary.is_file():
        return temporary.replace(temporary.with_name("last.ckpt"))
    for file in [*temporary.rglob("*"), temporary]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    target = temporary.with_name(f"last_{step:07d}.ckpt")
    _remove(target)
    return temporary.replace(target)


def forget_last(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints inside of a task, whole or in shards, and what was left half written.

    Args:
        folder: ``checkpoints/`` of a run.
        but: the one that counts.
    """
    for left in (*folder.glob("last*.ckpt"), folder / ".last.ckpt.tmp"):
        if left != but:
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
