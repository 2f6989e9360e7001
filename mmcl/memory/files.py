"""RowFiles: rows of bytes that lie in files, one for each filling, named by what is in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.atomic import write_atomic
from mmcl.core.distributed import rank_and_world
from mmcl.memory.spool import Spool, agreed, appears, unwritten

_NAME = re.compile(r"rows_\d{3,}_[0-9a-f]{64}\.bin")
_PIECE_BYTES = 1 << 22


class RowFiles(nn.Module):
    """Rows of equal length in files that are mapped, not read: a row costs memory while in use.

    Files are written whole and never changed, by rank 0, from spools that every rank writes beside
    them. So all ranks must see the folder, on several nodes as well: where one does not, all of
    them raise at the end of the first task, before anything is trained on rows that are not there.
    A folder that cannot hold what is to be written (full, read-only) does the same; what was
    there stays as it was.

    Files are named by their sha256, so one that was damaged or is another run's is refused at its
    first use. ``let_go`` puts a file on a list and ``sweep`` removes those on the list; to be able
    to go on from a saved state, sweep only after a later one was saved.

    **Remembers** the name and the number of rows of each file, and the length of a row.
    **Asks of the model** nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.row_bytes = 0
        self._files: dict[int, tuple[str, int]] = {}
        self._let_go: list[str] = []
        self._mapped: dict[str, Tensor] = {}

    @property
    def groups(self) -> list[int]:
        """What there is a file for."""
        return list(self._files)

    def place(self) -> Path:
        """Return the folder.

        Raises:
            RuntimeError: if none was given.
        """
        if self.folder is None:
            raise RuntimeError(
                "place is 'disk' and there is no folder: give folder='...', or call "
                "strategy.keep_in(Path('...')) before anything is loaded; a sequence does"
            )
        return self.folder

    def expect_writable(self) -> None:
        """Make the folder and write a byte into it.

        Raises:
            CannotWrite: if that cannot be done.
            RuntimeError: if no folder was given.
        """
        path = self.place() / f".writable_{rank_and_world()[0]}_{os.getpid()}"
        write_atomic(path, b"?")
        path.unlink(missing_ok=True)

    @contextmanager
    def spool(self) -> Iterator[Spool]:
        """Open a file of this rank for rows of which some will stay; it is gone afterwards.

        Raises:
            CannotWrite: if the folder takes no file.
        """
        path = self._spool_path(rank_and_world()[0])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, so that a full disk is met when a row is written and not at the end.
            file = path.open("wb", buffering=0)
        except OSError as error:
            raise unwritten(self.place(), error) from error
        try:
            with file:
                yield Spool(file, self.row_bytes)
        finally:
            path.unlink(missing_ok=True)

    def settle(self, spool: Spool, group: int, slots: Tensor, device: torch.device) -> None:
        """Write spooled rows of all ranks into the file of a group; inside ``spool``.

        Args:
            spool: of this rank.
            group: of all these rows, a number that no row held has.
            slots: (R,) int64 as ``Spool.add`` gave them, the same on every rank; row i of the file
                is ``slots[i]``.
            device: where ranks can talk.

        Raises:
            CannotWrite: on every rank, if one cannot write, or does not see what another wrote.
        """
        self.row_bytes = spool.row_bytes
        counts = agreed(lambda: str(spool.finish()), self.place(), device)
        is_writer = len(slots) > 0 and rank_and_world()[0] == 0
        spools = [int(count) for count in counts]
        names = agreed(
            lambda: self._write(group, slots, spools) if is_writer else "", self.place(), device
        )
        # Also keeps the other ranks from removing their spools too early.
        agreed(lambda: self._expect_here(names[0], len(slots)), self.place(), device)
        self.let_go(group)
        if names[0]:
            self._files[group] = (names[0], len(slots))
            self._let_go = [old for old in self._let_go if old != names[0]]

    def let_go(self, group: int) -> None:
        """Put a group's file, if there is one, on the list of those that nobody needs."""
        if group in self._files:
            self._let_go.append(self._files.pop(group)[0])

    def sweep(self) -> None:
        """Remove the files on the list."""
        for name in self._let_go:
            self._mapped.pop(name, None)
            if rank_and_world()[0] == 0:
                (self.place() / name).unlink(missing_ok=True)
        self._let_go = []

    def take(self, groups: Tensor, slots: Tensor) -> Tensor:
        """Return rows as bytes.

        Args:
            groups: (R,) int64, whose files.
            slots: (R,) int64, the place of each row in its file.

        Returns:
            (R, row_bytes) uint8.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if it is not what was written.
        """
        rows = torch.empty(len(groups), self.row_bytes, dtype=torch.uint8)
        for group in sorted(set(groups.tolist())):
            is_there = groups == group
            rows[is_there] = self._rows_of(group)[slots[is_there]]
        return rows

    def get_extra_state(self) -> dict[str, Any]:
        """Return the names of the files."""
        files = [[group, name, rows] for group, (name, rows) in self._files.items()]
        return {"files": files, "let_go": list(self._let_go), "row_bytes": self.row_bytes}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the names of a checkpoint; a file is looked at when its rows are asked for.

        Raises:
            ValueError: if a name is not one of ours.
        """
        names = [*(name for _, name, _ in state["files"]), *state["let_go"]]
        wrong = [name for name in names if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"the checkpoint names {wrong[0]!r}, which is no file of rows")
        self._files = {int(group): (name, int(rows)) for group, name, rows in state["files"]}
        self._let_go, self._mapped = list(state["let_go"]), {}
        self.row_bytes = int(state["row_bytes"])

    def _write(self, group: int, slots: Tensor, counts: list[int]) -> str:
        world = rank_and_world()[1]
        for left in (*self.place().glob(".rows_*.tmp"), *self.place().glob(".writable_*")):
            left.unlink(missing_ok=True)  # by a process that was killed
        for left in self.place().glob(".spool_*"):
            if left not in [self._spool_path(rank) for rank in range(world)]:
                left.unlink(missing_ok=True)  # of a run on more devices
        spools = [self._mapped_spool(rank, count) for rank, count in enumerate(counts)]
        digest = hashlib.sha256()
        for piece in self._pieces(spools, slots):
            digest.update(piece)
        name = f"rows_{group:03d}_{digest.hexdigest()}.bin"

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(self._pieces(spools, slots))

        write_atomic(self.place() / name, write)
        return name

    def _mapped_spool(self, rank: int, count: int) -> Tensor:
        path = self._spool_path(rank)
        if not appears(path, count * self.row_bytes):
            raise FileNotFoundError(
                f"rank 0 does not see the {count} rows of rank {rank} in {self.place()}: give a "
                "folder that all nodes share, or choose place='memory'"
            )
        return _map(path, count, self.row_bytes)

    def _pieces(self, spools: list[Tensor], slots: Tensor) -> Iterable[bytes]:
        together = max(1, _PIECE_BYTES // self.row_bytes)
        for some in slots.split(together):  # type: ignore[no-untyped-call]
            rows = torch.empty(len(some), self.row_bytes, dtype=torch.uint8)
            for rank, spool in enumerate(spools):
                is_there = some % len(spools) == rank
                rows[is_there] = spool[some[is_there] // len(spools)]
            yield rows.numpy().tobytes()

    def _expect_here(self, name: str, rows: int) -> str:
        if name and not appears(self.place() / name, rows * self.row_bytes):
            raise FileNotFoundError(
                f"rank {rank_and_world()[0]} does not see {name}, which rank 0 wrote to "
                f"{self.place()}: give a folder that all nodes share, or choose place='memory'"
            )
        return ""

    def _spool_path(self, rank: int) -> Path:
        return self.place() / f".spool_{rank}"

    def _rows_of(self, group: int) -> Tensor:
        name, rows = self._files[group]
        if name not in self._mapped:
            path = self.place() / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"remembered rows are missing: there is no {path}; restore it, or begin the "
                    "run anew under another name"
                )
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
            stated = name.removesuffix(".bin").rpartition("_")[2]
            if digest.hexdigest() != stated or path.stat().st_size != rows * self.row_bytes:
                raise ValueError(
                    f"remembered rows were changed: {path} has the sha256 {digest.hexdigest()}, "
                    f"expected {stated}; restore it, or begin the run anew under another name"
                )
            self._mapped[name] = _map(path, rows, self.row_bytes)
        return self._mapped[name]


def _map(path: Path, rows: int, row_bytes: int) -> Tensor:
    if rows * row_bytes == 0:
        return torch.empty(0, row_bytes, dtype=torch.uint8)
    size = rows * row_bytes
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return whole.view(rows, row_bytes)
