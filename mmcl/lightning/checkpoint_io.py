"""Checkpoint writing that is atomic on all ranks, and a check of sharded checkpoints for pickles.

torch.distributed.checkpoint reads the file ``.metadata`` and every single value, such as a learning
rate, by plain pickle, which runs whatever is in it; only tensors are read with ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mmcl.core.atomic_write import WriteError, write_atomic
from mmcl.core.distributed import all_gather_strings
from mmcl.core.strategy import tensor_bytes
from mmcl.lightning.run_dir import FROM_THE_BEGINNING, RunState


class CheckpointWarning(UserWarning):
    """Warning that a mid-task checkpoint could not be written; the run continues."""


def warn_not_saved(what: str, error: WriteError, state: RunState | None) -> None:
    """Warn, every time, that a run continues without a checkpoint.

    Args:
        what: what is not saved.
        error: why.
        state: state of the run as it is on the disk.
    """
    where = FROM_THE_BEGINNING if state is None else state.resume_point()
    message = f"{what} is not saved: {error}. The run continues; if it stopped now, it would resume"
    warnings.warn(f"{message} {where}", CheckpointWarning, stacklevel=3)


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


METADATA = ".metadata"
"""File that every sharded checkpoint has."""

_PATH_TYPES = frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_ALLOWED = {
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
            "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": _PATH_TYPES,
    "pathlib._local": _PATH_TYPES,
}  # fmt: skip
"""Types in the metadata of a sharded checkpoint, by module; all of them only hold values."""


def reject_pickles(folder: Path) -> None:
    """Check that a sharded checkpoint holds only tensors and plain values, and no other pickles.

    Raises:
        ValueError: if it holds anything else, or is broken.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        _check_values(folder, metadata)
    # Hostile bytes fail in as many ways as pickle has opcodes.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} cannot be read ({type(error).__name__}: {reason}): it is broken or holds "
            "pickled objects, which are never run; restore it, or remove the run directory"
        ) from None


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_values(folder: Path, metadata: Metadata) -> None:
    """Load every value that is not a tensor as torch will, but without its pickled objects."""
    for index, location in metadata.storage_data.items():
        name = location.relative_path
        if Path(name).name != name or getattr(location, "transform_descriptors", None):
            raise ValueError(f"a value is stored in {name!r}")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / name).open("rb") as file:
                file.seek(location.offset)
                torch.load(io.BytesIO(file.read(location.length)), weights_only=True)
