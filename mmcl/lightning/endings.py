"""What a run says when it ends before its time: why, and from where the same command goes on."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mmcl.core.atomic import CannotWrite
from mmcl.core.distributed import rank_and_world

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOST = re.compile("gloo|nccl", re.IGNORECASE)  # of torch's own, under no class of their own


class Terminated(RuntimeError):
    """The run was asked to end by a signal."""

    exit_status = 143  # 128 + SIGTERM, as a shell would have it


@contextmanager
def told_in_a_sentence(where: Callable[[], str]) -> Iterator[None]:
    """Say what ended a run in the words of its user.

    Args:
        where: says from where the same command would go on, such as "after task 0 ('a')".

    Raises:
        CannotWrite: for a full disk.
        KeyboardInterrupt: where Lightning made an exit with status 1 of it.
        RuntimeError: where another process of the run was lost.
        Terminated: on SIGTERM, of which Lightning makes an exit with status 0.
    """
    try:
        yield
    except SIGTERMException:
        raise Terminated(f"ended by SIGTERM: the same command goes on {where()}") from None
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except OSError as error:
        sentence = _refusal(error)
        if not sentence:
            raise
        raise CannotWrite(
            f"{sentence}. Then the same command goes on {where()}", error.errno
        ) from error
    except RuntimeError as error:
        if rank_and_world()[1] == 1 or not _is_of_a_lost_process(error):
            raise
        raise RuntimeError(
            f"another process of this run ended or cannot be reached ({_first_line(error)}): see "
            f"what it said; the same command goes on {where()}"
        ) from error


def _refusal(error: OSError) -> str:
    """Say what could not be written, "" if the error is another one."""
    if isinstance(error, CannotWrite):
        return str(error)
    if error.errno not in _NO_ROOM:
        return ""
    return f"{error.filename or 'a file'} cannot be written ({error.strerror}): make room"


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
