"""Spool: rows of one rank on their way into a file, and how ranks agree that it was written."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmcl.core.atomic import CannotWrite
from mmcl.core.distributed import gather_texts, rank_and_world

_LOOKS, _SECONDS_BETWEEN = 20, 0.5
"""A folder on a network may show a file some seconds after another node wrote it."""


class Spool:
    """Rows of one rank, of which some will stay.

    Args:
        file: open for writing, without a buffer.
        row_bytes: of the rows in other files, 0 = there are none.
    """

    def __init__(self, file: io.FileIO, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._file, self._count = file, 0
        self._fault: OSError | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Write rows.

        Args:
            rows: (R, row_bytes) uint8.

        Returns:
            (R,) int64, a number for each row that no other rank gives away.

        Raises:
            CannotWrite: if the disk is full; on several ranks not here, but by ``finish``, so that
                the others do not wait for this one.
            ValueError: if rows are longer or shorter than those before.
        """
        rank, world = rank_and_world()
        width = int(rows.shape[1])
        if self.row_bytes not in (0, width):
            raise ValueError(
                f"a row takes {width} bytes and those held take {self.row_bytes}: encode pictures "
                "of one size with one encoder, or begin the run anew under another name"
            )
        self.row_bytes = width
        left = memoryview(rows.cpu().contiguous().numpy().tobytes())
        try:
            while left and self._fault is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            if world == 1:
                raise unwritten(Path(str(self._file.name)).parent, error) from error
            self._fault = error
        slots = (self._count + torch.arange(len(rows))) * world + rank
        self._count += len(rows)
        return slots.to(rows.device)

    def finish(self) -> int:
        """Bring what was written to the disk, where other nodes see it; return the rows.

        Raises:
            OSError: if some could not be written.
        """
        if self._fault is not None:
            raise self._fault
        os.fsync(self._file.fileno())
        return self._count


def agreed(do: Callable[[], str], folder: Path, device: torch.device) -> list[str]:
    """Do something on every rank; where one fails, fail on all of them.

    Args:
        do: returns one line; what it raises of the system (OSError) is told to all.
        folder: that it writes to, for the sentence.
        device: where ranks can talk.

    Returns:
        what each rank said, rank after rank.

    Raises:
        CannotWrite: of the first rank that failed.
    """
    try:
        own = f"done {do()}"
    except OSError as error:
        told = unwritten(folder, error) if error.strerror else error
        own = f"failed {error.errno or errno.ENOENT} {' '.join(str(told).split())}"
    said = gather_texts([own], device)
    for text in said:
        if text.startswith("failed "):
            _, number, sentence = text.split(" ", 2)
            raise CannotWrite(sentence, int(number))
    return [text.removeprefix("done ") for text in said]


def unwritten(folder: Path, error: OSError) -> CannotWrite:
    """Return an error that says what to do about one that the system raised."""
    return CannotWrite(
        f"remembered rows cannot be written to {folder} ({error.strerror or error}): make room or "
        "give another folder, then start the run again, which goes on from its last checkpoint",
        error.errno,
    )


def appears(path: Path, size: int) -> bool:
    """Wait a little until a file has a size; return whether it has."""
    for look in range(_LOOKS):
        if path.is_file() and path.stat().st_size == size:
            return True
        if look + 1 < _LOOKS:
            time.sleep(_SECONDS_BETWEEN)
    return False
