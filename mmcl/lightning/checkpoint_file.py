"""Writing a checkpoint whole or not at all, and telling all ranks which."""

from __future__ import annotations

import warnings
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
from mmcl.lightning.folder import RunState


class NotSaved(UserWarning):
    """A checkpoint in the middle of a task could not be written; the run proceeds."""


def warn_unsaved(what: str, error: CannotWrite, state: RunState | None) -> None:
    """Warn, every time, that a run proceeds without a checkpoint.

    Args:
        what: is not saved.
        error: says why.
        state: of the run as it is on the disk.
    """
    where = "anew" if state is None else state.where()
    message = f"{what} is not saved: {error}. The run proceeds; if it stopped now, it would go on"
    warnings.warn(f"{message} {where}", NotSaved, stacklevel=3)


def save_whole(trainer: pl.Trainer, path: Path, *, weights_only: bool) -> None:
    """Write a trainer's checkpoint as one file, flushed to the disk and renamed into place.

    Lightning's own way (2.6) collects the file in memory, writes it into the system's folder for
    temporary files, where a killed run leaves it, and copies it from there to another disk. All
    ranks call this together; a way of writing that somebody gave to the trainer is kept.

    Raises:
        CannotWrite: on every rank, if there is no room; the checkpoint that was there still is.
    """
    strategy = trainer.strategy
    with all_or_none(trainer):
        chosen = strategy.checkpoint_io
        if type(chosen) is not TorchCheckpointIO:
            trainer.save_checkpoint(path, weights_only=weights_only)
            return
        strategy.checkpoint_io = writer = _Writer()
        try:
            trainer.save_checkpoint(path, weights_only=weights_only)
        finally:
            strategy.checkpoint_io = chosen
        if writer.failure is not None:
            raise writer.failure


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint as one file, flushed to the disk and renamed into place.

    Raises:
        CannotWrite: if there is no room.
    """

    def write(temporary: Path) -> None:
        # Through a file of Python's own: torch's tells nothing of what the system refused.
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)

    write_atomic(path, write, needs=tensor_bytes(checkpoint))


@contextmanager
def all_or_none(trainer: pl.Trainer) -> Iterator[None]:
    """Let every rank fail where one cannot write, so that none waits for it.

    All ranks enter and leave this together.

    Raises:
        OSError: on a rank that cannot write, and CannotWrite with its sentence on the others.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    own = [] if failure is None else [" ".join(str(failure).split())]
    said = gather_texts(own, trainer.strategy.root_device)
    if failure is not None:
        raise failure
    if said:
        raise CannotWrite(said[0])


def tensor_bytes(values: Any) -> int:
    """Return the bytes of all tensors in nested mappings and sequences."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, Mapping):
        return sum(map(tensor_bytes, values.values()))
    return sum(map(tensor_bytes, values)) if isinstance(values, list | tuple) else 0


class _Writer(TorchCheckpointIO):
    """Keeps its failure, for all ranks meet at a barrier of Lightning's behind the writing."""

    failure: CannotWrite | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or note why it cannot be written."""
        try:
            write_checkpoint(Path(path), checkpoint)
        except CannotWrite as error:
            self.failure = error
