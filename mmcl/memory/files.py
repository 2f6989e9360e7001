"""RowFiles: rows of bytes that lie in files, one for each filling, named by what is in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mmcl.core.atomic import write_atomic
from mmcl.core.distributed import gather_texts, rank_and_world

_NAME = re.compile(r"rows_\d{3,}_[0-9a-f]{64}\.bin")
_PIECE_BYTES = 1 << 22


class RowFiles(nn.Module):
    """Rows of equal length in files that are mapped, not read: a row costs memory while in use.

    Files are written whole and never changed, by rank 0; all ranks must see the folder. They are
    named by their sha256, so a file that was damaged or is another run's is refused at its first
    use. ``let_go`` puts a file on a list and ``sweep`` removes those on the list; to be able to go
    on from a saved state, sweep only after a later one was saved.

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

    @contextmanager
    def spool(self) -> Iterator[Spool]:
        """Open a file of this rank for rows of which some will stay; it is gone afterwards."""
        path = self._spool_path(rank_and_world()[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                yield Spool(self, file)
        finally:
            path.unlink(missing_ok=True)

    def settle(self, group: int, slots: Tensor, device: torch.device) -> None:
        """Write spooled rows of all ranks into the file of a group; inside ``spool``.

        Args:
            group: of all these rows, a number that no row held has.
            slots: (R,) int64 as ``Spool.add`` gave them, the same on every rank; row i of the file
                is ``slots[i]``.
            device: where ranks can talk.
        """
        own = []
        if len(slots) and rank_and_world()[0] == 0:
            own = [self._write(group, lambda: self._spooled(slots))]
        # Also keeps the other ranks from removing their spools too early.
        names = gather_texts(own, device)
        self.let_go(group)
        for name in names:
            self._files[group] = (name, len(slots))
            self._let_go = [old for old in self._let_go if old != name]

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

    def _write(self, group: int, pieces: Callable[[], Iterable[bytes]]) -> str:
        for left in self.place().glob(".rows_*.tmp"):  # by a process that was killed
            left.unlink()
        digest = hashlib.sha256()
        for piece in pieces():
            digest.update(piece)
        name = f"rows_{group:03d}_{digest.hexdigest()}.bin"

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(pieces())

        write_atomic(self.place() / name, write)
        return name

    def _spooled(self, slots: Tensor) -> Iterator[bytes]:
        world = rank_and_world()[1]
        spools = []
        for rank in range(world):
            path = self._spool_path(rank)
            count = path.stat().st_size // self.row_bytes
            spools.append(_map(path, count, self.row_bytes))
        rows = [spools[slot % world][slot // world] for slot in slots.tolist()]
        together = max(1, _PIECE_BYTES // self.row_bytes)
        for start in range(0, len(rows), together):
            yield torch.stack(rows[start : start + together]).numpy().tobytes()

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


class Spool:
    """Rows of one rank on their way into a file.

    Args:
        files: which they are for.
        file: open for writing.
    """

    def __init__(self, files: RowFiles, file: BinaryIO) -> None:
        self._files, self._file, self._count = files, file, 0

    def add(self, rows: Tensor) -> Tensor:
        """Write rows.

        Args:
            rows: (R, row_bytes) uint8.

        Returns:
            (R,) int64, a number for each row that no other rank gives away.
        """
        rank, world = rank_and_world()
        self._files.row_bytes = int(rows.shape[1])
        self._file.write(rows.cpu().contiguous().numpy().tobytes())
        self._file.flush()
        slots = (self._count + torch.arange(len(rows))) * world + rank
        self._count += len(rows)
        return slots.to(rows.device)


def _map(path: Path, rows: int, row_bytes: int) -> Tensor:
    if rows * row_bytes == 0:
        return torch.empty(0, row_bytes, dtype=torch.uint8)
    size = rows * row_bytes
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return whole.view(rows, row_bytes)
