"""CheckpointFile: writing a checkpoint whole or not at all, and telling all ranks which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from mmcl.core.atomic import CannotWrite, write_atomic
from mmcl.core.distributed import gather_texts


class CheckpointFile(TorchCheckpointIO):
    """Write checkpoints in their own folder, flushed to the disk and renamed into place.

    Lightning's own (2.6) collects the whole file in memory, writes it into the system's folder for
    temporary files, where a killed run leaves it, and moves it from there, on to another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CannotWrite: if there is no room for it; the checkpoint that was there still is.
            TypeError: if options of a remote storage are given.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote folders: a run's folder is a local one")

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        write_atomic(Path(path), write, needs=tensor_bytes(checkpoint))


def use_checkpoint_file(trainer: pl.Trainer) -> None:
    """Let a trainer write its checkpoints so, unless somebody chose a way for it."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFile()


def tensor_bytes(values: Any) -> int:
    """Return the bytes of all tensors in nested mappings and sequences."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, Mapping):
        return sum(map(tensor_bytes, values.values()))
    return sum(map(tensor_bytes, values)) if isinstance(values, list | tuple) else 0


@contextmanager
def all_or_none(trainer: pl.Trainer) -> Iterator[None]:
    """Let every rank fail where one cannot write, so that none waits for it.

    All ranks enter and leave this together.

    Raises:
        CannotWrite: if any rank cannot write, with its sentence.
    """
    failure: CannotWrite | None = None
    try:
        yield
    except CannotWrite as error:
        failure = error
    own = [] if failure is None else [" ".join(str(failure).split())]
    said = gather_texts(own, trainer.strategy.root_device)
    if failure is not None:
        raise failure
    if said:
        raise CannotWrite(said[0])
