"""Disk buffer: rows in memory-mapped files that rank 0 writes from temporary ones of each rank."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.atomic_write import WriteError, write_atomic
from mmcl.core.batch import Batch
from mmcl.core.distributed import all_gather_strings, rank_and_world
from mmcl.memory.distributed_fill import fill_buffer
from mmcl.memory.tensor_buffer import TensorBuffer

_POLLS, _POLL_SECONDS = 20, 0.5
"""Polls for a file: a network folder may show it some seconds after another node wrote it."""


class RowWriter:
    """Temporary file of one rank's rows, of which some will be kept.

    Args:
        file: open for writing, without a buffer.
        row_bytes: length of the rows in other files, 0 = there are none.
    """

    def __init__(self, file: io.FileIO, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._file, self._count = file, 0
        self._error: OSError | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Write rows (R, row_bytes) uint8; return (R,) int64 numbers, unique over all ranks.

        Raises:
            WriteError: if the disk is full; on several ranks not here, but by ``finish``, so that
                the others do not wait for this one.
            ValueError: if rows are longer or shorter than those before.
        """
        rank, world = rank_and_world()
        length = int(rows.shape[1])
        if self.row_bytes not in (0, length):
            raise ValueError(
                f"a row takes {length} bytes and those held take {self.row_bytes}: encode images "
                "of one size with one encoder, or start the run from scratch under another name"
            )
        self.row_bytes = length
        left = memoryview(rows.cpu().contiguous().numpy().tobytes())
        try:
            while left and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            if world == 1:
                raise write_error(Path(str(self._file.name)).parent, error) from error
            self._error = error
        numbers = (self._count + torch.arange(len(rows))) * world + rank
        self._count += len(rows)
        return numbers.to(rows.device)

    def finish(self) -> int:
        """Flush to disk, where other nodes see it; return the number of rows.

        Raises:
            OSError: if some could not be written.
        """
        if self._error is not None:
            raise self._error
        os.fsync(self._file.fileno())
        return self._count


def on_all_ranks(do: Callable[[], str], directory: Path, device: torch.device) -> list[str]:
    """Run a function on every rank; return the line that it returns on each, in order of rank.

    The directory that it writes to is for the message, the device for communication between ranks.

    Raises:
        WriteError: on all ranks, of the first one where it failed with an OSError.
    """
    try:
        own = f"done {do()}"
    except OSError as error:
        reported = write_error(directory, error) if error.strerror else error
        own = f"failed {error.errno or errno.ENOENT} {' '.join(str(reported).split())}"
    texts = all_gather_strings([own], device)
    for text in texts:
        if text.startswith("failed "):
            _, number, sentence = text.split(" ", 2)
            raise WriteError(sentence, int(number))
    return [text.removeprefix("done ") for text in texts]


def write_error(directory: Path, error: OSError) -> WriteError:
    """Return a write error that says what to do about an OSError."""
    return WriteError(
        f"stored rows cannot be written to {directory} ({error.strerror or error}): free space or "
        "give another folder, then start the run again, which resumes from its last checkpoint",
        error.errno,
    )


def wait_for_file(path: Path, size: int) -> bool:
    """Wait until a file has a size, for 10 seconds at most; return whether it has."""
    for poll in range(_POLLS):
        if path.is_file() and path.stat().st_size == size:
            return True
        if poll + 1 < _POLLS:
            time.sleep(_POLL_SECONDS)
    return False


_NAME = re.compile(r"rows_\d{3,}_[0-9a-f]{64}\.bin")
_CHUNK_BYTES = 1 << 22


class MmapStore(nn.Module):
    """Rows of equal length in memory-mapped files: a row takes memory only while in use.

    Rank 0 writes files whole, from temporary files that every rank writes next to them, and never
    changes them. So all ranks must see the folder, on several nodes as well: if one does not, all
    of them raise at the end of the first task, before anything is trained on missing rows. A folder
    that is full or read-only raises too; existing files stay as they are.

    Files are named by their sha256, so one that was damaged or is another run's is refused at its
    first use. ``mark_unused`` marks a file as unused and ``delete_unused`` deletes those; to be
    able to resume from a checkpoint, call the latter only after a later one was saved.

    **Remembers** the name and the number of rows of each file, and the length of a row.
    **Asks of the model** nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory: Path | None = None
        self.row_bytes = 0
        self._files: dict[int, tuple[str, int]] = {}
        self._unused: list[str] = []
        self._mapped: dict[str, Tensor] = {}

    @property
    def groups(self) -> list[int]:
        """Groups (tasks) that have a file."""
        return list(self._files)

    def missing_files(self) -> list[Path]:
        """Return the files of stored rows that are missing or have another size."""
        if self.directory is None:
            return []
        sizes = {
            self.directory / name: rows * self.row_bytes for name, rows in self._files.values()
        }
        return [p for p, size in sizes.items() if not p.is_file() or p.stat().st_size != size]

    def expect_directory(self) -> Path:
        """Return the folder of the files; raise a RuntimeError if none was given."""
        if self.directory is None:
            raise RuntimeError(
                "storage is 'disk' and there is no folder: give storage_dir='...', or call "
                "strategy.set_memory_dir(Path('...')) before anything is loaded; a run does"
            )
        return self.directory

    def expect_writable(self) -> None:
        """Check that the folder is writable: make it and write a byte, else raise a WriteError."""
        path = self.expect_directory() / f".writable_{rank_and_world()[0]}_{os.getpid()}"
        write_atomic(path, b"?")
        path.unlink(missing_ok=True)

    @contextmanager
    def spool(self) -> Iterator[RowWriter]:
        """Open this rank's temporary file of rows, of which some will be kept; deleted afterwards.

        Raises:
            WriteError: if the folder takes no file.
        """
        path = self._spool_path(rank_and_world()[0])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, so that a full disk is met when a row is written and not at the end.
            file = path.open("wb", buffering=0)
        except OSError as error:
            raise write_error(self.expect_directory(), error) from error
        try:
            with file:
                yield RowWriter(file, self.row_bytes)
        finally:
            path.unlink(missing_ok=True)

    def commit(self, spool: RowWriter, group: int, numbers: Tensor, device: torch.device) -> None:
        """Write rows of all ranks' temporary files into the file of a group; inside ``spool``.

        Args:
            spool: of this rank.
            group: of all these rows, a number that no stored row has.
            numbers: (R,) int64 as ``RowWriter.add`` returned them, the same on every rank; row i of
                the file is ``numbers[i]``.
            device: for communication between ranks.

        Raises:
            WriteError: on every rank, if one cannot write, or does not see the file of another.
        """
        self.row_bytes = spool.row_bytes
        directory = self.expect_directory()
        counts = [int(n) for n in on_all_ranks(lambda: str(spool.finish()), directory, device)]
        is_writer = len(numbers) > 0 and rank_and_world()[0] == 0
        names = on_all_ranks(
            lambda: self._write(group, numbers, counts) if is_writer else "", directory, device
        )
        # Also keeps the other ranks from removing their spools too early.
        on_all_ranks(lambda: self._expect_here(names[0], len(numbers)), directory, device)
        self.mark_unused(group)
        if names[0]:
            self._files[group] = (names[0], len(numbers))
            self._unused = [old for old in self._unused if old != names[0]]

    def mark_unused(self, group: int) -> None:
        """Mark a group's file, if there is one, as unused."""
        if group in self._files:
            self._unused.append(self._files.pop(group)[0])

    def delete_unused(self) -> None:
        """Delete the unused files."""
        for name in self._unused:
            self._mapped.pop(name, None)
            if rank_and_world()[0] == 0:
                (self.expect_directory() / name).unlink(missing_ok=True)
        self._unused = []

    def get(self, groups: Tensor, file_rows: Tensor) -> Tensor:
        """Return rows as bytes (R, row_bytes) uint8, by (R,) group and index in the group's file.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if its content was changed.
        """
        rows = torch.empty(len(groups), self.row_bytes, dtype=torch.uint8)
        for group in sorted(set(groups.tolist())):
            is_there = groups == group
            rows[is_there] = self._rows_of(group)[file_rows[is_there]]
        return rows

    def get_extra_state(self) -> dict[str, Any]:
        """Return the names of the files."""
        files = [[group, name, rows] for group, (name, rows) in self._files.items()]
        return {"files": files, "unused": list(self._unused), "row_bytes": self.row_bytes}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the file names of a checkpoint; a ValueError if one is not a row file's."""
        names = [*(name for _, name, _ in state["files"]), *state["unused"]]
        wrong = [name for name in names if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"the checkpoint names {wrong[0]!r}, which is no file of rows")
        self._files = {int(group): (name, int(rows)) for group, name, rows in state["files"]}
        self._unused, self._mapped = list(state["unused"]), {}
        self.row_bytes = int(state["row_bytes"])

    def _write(self, group: int, numbers: Tensor, counts: list[int]) -> str:
        directory, world = self.expect_directory(), rank_and_world()[1]
        of_killed = [*directory.glob(".rows_*.tmp"), *directory.glob(".writable_*")]
        own = [self._spool_path(rank) for rank in range(world)]
        of_more_devices = [path for path in directory.glob(".spool_*") if path not in own]
        for stale in (*of_killed, *of_more_devices):
            stale.unlink(missing_ok=True)
        spools = [self._mapped_spool(rank, count) for rank, count in enumerate(counts)]
        digest = hashlib.sha256()
        for chunk in self._chunks(spools, numbers):
            digest.update(chunk)
        name = f"rows_{group:03d}_{digest.hexdigest()}.bin"

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(self._chunks(spools, numbers))

        write_atomic(directory / name, write)
        return name

    def _mapped_spool(self, rank: int, count: int) -> Tensor:
        path = self._spool_path(rank)
        if not wait_for_file(path, count * self.row_bytes):
            raise FileNotFoundError(
                f"rank 0 does not see the {count} rows of rank {rank} in {self.directory}: give a "
                "folder that all nodes share, or choose storage='memory'"
            )
        return _map_rows(path, count, self.row_bytes)

    def _chunks(self, spools: list[Tensor], numbers: Tensor) -> Iterable[bytes]:
        chunk_rows = max(1, _CHUNK_BYTES // self.row_bytes)
        for chunk in numbers.split(chunk_rows):  # type: ignore[no-untyped-call]
            rows = torch.empty(len(chunk), self.row_bytes, dtype=torch.uint8)
            for rank, spool in enumerate(spools):
                is_own = chunk % len(spools) == rank
                rows[is_own] = spool[chunk[is_own] // len(spools)]
            yield rows.numpy().tobytes()

    def _expect_here(self, name: str, rows: int) -> str:
        if name and not wait_for_file(self.expect_directory() / name, rows * self.row_bytes):
            raise FileNotFoundError(
                f"rank {rank_and_world()[0]} does not see {name}, which rank 0 wrote to "
                f"{self.directory}: give a folder that all nodes share, or choose storage='memory'"
            )
        return ""

    def _spool_path(self, rank: int) -> Path:
        return self.expect_directory() / f".spool_{rank}"

    def _rows_of(self, group: int) -> Tensor:
        name, rows = self._files[group]
        if name not in self._mapped:
            path = self.expect_directory() / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"stored rows are missing: there is no {path}; restore it, or start the run "
                    "from scratch under another name"
                )
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            stated = name.removesuffix(".bin").rpartition("_")[2]
            if digest.hexdigest() != stated or path.stat().st_size != rows * self.row_bytes:
                raise ValueError(
                    f"stored rows were changed: {path} has the sha256 {digest.hexdigest()}, "
                    f"expected {stated}; restore it, or start from scratch under another run name"
                )
            self._mapped[name] = _map_rows(path, rows, self.row_bytes)
        return self._mapped[name]


def _map_rows(path: Path, rows: int, row_bytes: int) -> Tensor:
    size = rows * row_bytes
    if size == 0:
        return torch.empty(0, row_bytes, dtype=torch.uint8)
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return whole.view(rows, row_bytes)


def fill_disk_buffer(
    files: MmapStore,
    buffer: TensorBuffer,
    batches: Iterable[Batch],
    task: int,
    columns: Callable[[Batch], Mapping[str, Tensor]],
    large: Collection[str],
    device: torch.device,
) -> None:
    """Fill a buffer from one exact pass as ``fill_buffer`` does, with large columns in a new file.

    The buffer gets ``file`` and ``file_row`` instead, for ``MmapStore.get``. A file that no row
    needs is marked unused. If anything fails, the buffer is as before. Arguments are those of
    ``fill_buffer``, and ``large``: names of columns for the file, whose shapes never change.

    Raises:
        WriteError: if they cannot be written.
        ValueError: if some rank had no samples.
    """
    group = 1 + max(files.groups, default=-1)
    before = buffer.get_extra_state()
    try:
        with files.spool() as spool:

            def located(batch: Batch) -> dict[str, Tensor]:
                made = columns(batch)
                packed = [made[name].contiguous().flatten(1) for name in made if name in large]
                numbers = spool.add(torch.cat([one.view(torch.uint8) for one in packed], 1))
                plain = {name: column for name, column in made.items() if name not in large}
                return {**plain, "file": torch.full_like(numbers, group), "file_row": numbers}

            fill_buffer(buffer, batches, task, located, device)
            held = buffer.columns
            is_new = held["file"] == group
            files.commit(spool, group, held["file_row"][is_new], device)
    except BaseException:
        buffer.set_extra_state(before)
        raise
    file_rows = torch.where(is_new, is_new.cumsum(0) - 1, held["file_row"])
    buffer.set_column("file_row", file_rows)
    for group in files.groups:
        if not bool((held["file"] == group).any()):
            files.mark_unused(group)
