"""Task and mid-task checkpoints, atomic on all ranks, under DDP, FSDP2 and DeepSpeed.

torch.distributed.checkpoint reads the file ``.metadata`` and every single value, such as a learning
rate, by plain pickle, which runs whatever is in it; only tensors are read with ``weights_only``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mmcl.core import Strategy
from mmcl.core.atomic_write import WriteError, sync_to_disk, write_atomic
from mmcl.core.distributed import all_gather_strings
from mmcl.core.strategy import tensor_bytes

METADATA = ".metadata"
"""File that every sharded checkpoint has."""
_METADATA_HASH = ".metadata.sha256"
KeepBest = Literal["loss", "score"]
_TEMPORARY = ".last.ckpt.tmp"
_OVERLAY = "add --config configs/overlay/fsdp.yaml"
_PATH_TYPES = frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_ALLOWED = {
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset({
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": _PATH_TYPES,
    "pathlib._local": _PATH_TYPES,
}  # fmt: skip
"""Types in the metadata of a sharded checkpoint, by module; all of them only hold values."""


class LostCheckpoint(OSError):
    """Error of a checkpoint that is missing or damaged.

    Args:
        path: path of the checkpoint.
        problem: what is wrong, as the words after its name.

    Attributes:
        reason: what is wrong, for a sentence that ends with what is done about it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        self.reason = f"{path} {problem}"
        super().__init__(f"{self.reason}: restore it, or choose another state (--after_task)")


def check_whole(path: Path) -> None:
    """Check that a checkpoint exists and is undamaged: a file, or a folder of shards.

    ``torch.save`` stores a CRC-32 of every record, which ``torch.load`` does not compare. Comparing
    takes about 0.6 s per GB.

    Raises:
        LostCheckpoint: if it is missing or damaged.
        OSError: if it cannot be read for another reason, such as its permissions.
    """
    if path.is_dir():
        problem = _folder_damage(path)
    elif path.is_file():
        with path.open("rb") as file:
            problem = _damage(file) or _directory_damage(path)
    else:
        raise LostCheckpoint(path, "is missing")
    if problem:
        raise LostCheckpoint(path, f"is damaged ({problem})")


def _damage(file: IO[bytes]) -> str:
    """Return how a file of ``torch.save`` is damaged, "" if it is whole."""
    try:
        with zipfile.ZipFile(file) as zipped:
            # Records of torch.save are stored; compressed ones could expand without end.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist()):
                return "torch.save did not write it"
            record = zipped.testzip()
    except Exception as error:  # damaged bytes can raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        return f"{type(error).__name__}: {error}"
    return f"the checksum of {record} is wrong" if record else ""


def _directory_damage(path: Path) -> str:
    """Return what torch finds wrong with a file's directory of records, which has no checksum."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    except Exception:  # pickled objects are refused where the checkpoint is loaded
        return ""
    return ""


def _folder_damage(folder: Path) -> str:
    """Return how a sharded checkpoint is damaged, "" if it is whole or ``reject_pickles`` is due.

    Every stored value of torch.distributed.checkpoint is a file of ``torch.save`` within a file.
    """
    parts = [(path, 0, path.stat().st_size) for path in sorted(folder.rglob("*.pt"))]
    if (folder / METADATA).is_file():
        content, noted = (folder / METADATA).read_bytes(), folder / _METADATA_HASH
        if noted.is_file() and noted.read_text().strip() != hashlib.sha256(content).hexdigest():
            return f"the checksum of {METADATA} is wrong"
        try:
            stored = _RestrictedUnpickler(io.BytesIO(content)).load().storage_data.values()
            parts += [(folder / each.relative_path, each.offset, each.length) for each in stored]
        except Exception:
            return ""
    elif any(folder.glob("*.distcp")):
        return f"{METADATA} is missing"
    for path, offset, length in parts:
        if not path.resolve().is_relative_to(folder.resolve()):
            return ""
        if not path.is_file():
            return f"{path.name} is missing"
        with path.open("rb") as file:
            file.seek(offset)
            problem = _damage(io.BytesIO(file.read(length)))
        if problem:
            return f"{path.name}: {problem}"
    return ""


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
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.2 pickles an enum's member
            return lambda enum, member: enum[member]
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


def save_mid_task_checkpoint(trainer: pl.Trainer, folder: Path, step: int) -> Path:
    """Write a mid-task checkpoint: one file, or a folder of the shards of all ranks.

    A folder cannot replace another one atomically, so the folder of every step has its own name:
    the previous one is valid until ``run.json`` names the new one.

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
            if (temporary / METADATA).is_file():
                digest = hashlib.sha256((temporary / METADATA).read_bytes()).hexdigest()
                (temporary / _METADATA_HASH).write_text(f"{digest}\n")
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
