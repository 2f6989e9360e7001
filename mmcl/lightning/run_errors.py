"""Errors that end a run, as sentences that say where it resumes and what needs less memory."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mmcl.core.atomic_write import OUT_OF_SPACE, WriteError
from mmcl.core.distributed import rank_and_world
from mmcl.lightning.datamodule import ContinualDataModule

# What torch's allocators, cuBLAS and the system say; only CUDA's allocator has its own error.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: |CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory", re.I
)


class Terminated(RuntimeError):
    """Error of a run that a signal ended."""

    exit_status = 143  # 128 + SIGTERM, as in a shell


@contextmanager
def translate_errors(
    where: Callable[[], str], advise: Callable[[], str] = lambda: "--data.micro_batch_size"
) -> Iterator[None]:
    """Context that translates what ended a run into a message with the place where it resumes.

    Args:
        where: returns that place.
        advise: returns the options that need less memory.

    Raises:
        WriteError: for a full disk.
        KeyboardInterrupt: for Lightning's exit with status 1 after one.
        RuntimeError: if another process of the run was lost, or memory is exhausted.
        Terminated: for SIGTERM, after which Lightning exits with status 0.
    """
    try:
        yield
    except SIGTERMException:
        raise Terminated(f"ended by SIGTERM: the same command resumes {where()}") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        translated = _translated(error, where, advise)
        if translated is None:
            raise
        raise translated from error


def _translated(
    error: OSError | RuntimeError | MemoryError,
    where: Callable[[], str],
    advise: Callable[[], str],
) -> OSError | RuntimeError | None:
    """Return the error with the place where the run resumes, None if it says nothing about it."""
    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return RuntimeError(
            f"out of memory ({reason}). These need less and leave the global batch as it is: "
            f"{advise()}. The same command with one of them resumes {where()}"
        )
    if isinstance(error, OSError):
        message = _write_error(error)
        full = f"{message}. Then the same command resumes {where()}"
        return WriteError(full, error.errno) if message else None
    # torch raises most errors of its backends as plain RuntimeError.
    is_lost = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.I)
    if rank_and_world()[1] == 1 or not is_lost:
        return None
    reason = str(error).strip().partition("\n")[0]
    return RuntimeError(
        f"another process of this run ended or cannot be reached ({reason}): see its output; the "
        f"same command resumes {where()}"
    )


def _write_error(error: OSError) -> str:
    """Return the message for a file that could not be written, "" for another error."""
    if isinstance(error, WriteError):
        return str(error)
    if error.errno not in (*OUT_OF_SPACE, errno.EROFS):
        return ""
    return f"{error.filename or 'a file'} cannot be written ({error.strerror}): make room"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of a device or of the host is exhausted."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


def memory_advice(data: ContinualDataModule) -> str:
    """Return the options that need less memory than a run has now, and may change on resume.

    Args:
        data: datamodule of the run, at the Trainer that ran out of memory.
    """
    trainer = data.trainer
    if trainer is None:
        return "--data.micro_batch_size, --trainer.precision bf16-mixed"
    if trainer.state.fn != "fit" and data.eval_batch_size > 1:
        return f"--data.eval_batch_size {data.eval_batch_size // 2}"
    options = []
    parts, world = trainer.accumulate_grad_batches, trainer.world_size
    largest = -(-data.global_batch_size // (parts * world))
    if largest > 1 and parts > 1 and data.micro_batch_size is None:
        options.append(f"--trainer.accumulate_grad_batches {2 * parts}")
    elif largest > 1:
        options.append(f"--data.micro_batch_size {largest // 2}")
    model: Any = trainer.lightning_module.model
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not is_on and "gradient_checkpointing" in inspect.signature(type(model)).parameters:
        options.append("--model.model.gradient_checkpointing true")
    if "mixed" not in str(trainer.precision):
        options.append("--trainer.precision bf16-mixed")
    return ", ".join(options) or "more devices (--trainer.devices)"
