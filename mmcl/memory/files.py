"""RowFiles: rows of bytes that lie in files, one file a task, named by what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mmcl.core.atomic import write_atomic

_PIECE = 1 << 22


class RowFiles(nn.Module):
    """Rows of equal length in files that are mapped, not read: a row costs memory while in use.

    Files are written whole and never changed. What is remembered names them by their sha256, so a
    file that was damaged or is another run's is refused at its first use. ``let_go`` puts a file
    on a list, ``sweep`` removes those of the list: a file stays at least until the next state was
    saved, if ``sweep`` is called only after that.

    **Remembers** the name and the number of rows of each file, and the length of a row.
    **Asks of the model** nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.row_bytes = 0
        self._files: dict[int, tuple[str, int]] = {}
        self._old: list[str] = []
        self._open: dict[str, Tensor] = {}

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
                "there is no folder for remembered rows: give folder='...' to the strategy, or "
                "call strategy.keep_in(Path('...')) before anything is loaded"
            )
        return self.folder

    def write(self, group: int, write: Callable[[BinaryIO], object]) -> str:
        """Write a file and return its name; ``name`` it on all ranks to let it be used.

        Args:
            group: a number for all its rows.
            write: is given a file open for writing, and writes rows one behind the other.
        """
        digest = hashlib.sha256()
        folder = self.place()
        whole = folder / f"features_{group:03d}.whole"

        def fill(path: Path) -> None:
            with path.open("wb") as file:
                write(file)
            _read(path, digest)

        write_atomic(whole, fill)
        name = f"features_{group:03d}_{digest.hexdigest()}.bin"
        whole.replace(folder / name)
        return name

    def name(self, group: int, name: str, rows: int) -> None:
        """Say which file holds the rows of a group from now on."""
        self.let_go(group)
        self._files[group] = (name, rows)
        self._old = [old for old in self._old if old != name]

    def let_go(self, group: int) -> None:
        """Put a group's file, if there is one, on the list of those that nobody needs."""
        if group in self._files:
            self._old.append(self._files.pop(group)[0])

    def sweep(self, *, removes: bool = True) -> None:
        """Remove the files of the list.

        Args:
            removes: False on ranks that leave files to another.
        """
        for name in self._old:
            self._open.pop(name, None)
            if removes:
                (self.place() / name).unlink(missing_ok=True)
        self._old = []

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
        for group in groups.unique().tolist():
            is_there = groups == group
            rows[is_there] = self._mapped(group)[slots[is_there]]
        return rows

    def get_extra_state(self) -> dict[str, Any]:
        """Return the names of the files."""
        files = [[group, name, rows] for group, (name, rows) in self._files.items()]
        return {"files": files, "old": list(self._old), "row_bytes": self.row_bytes}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the names of a checkpoint; a file is looked at when its rows are asked for."""
        self._files = {int(group): (str(name), int(rows)) for group, name, rows in state["files"]}
        self._old = [str(name) for name in state["old"]]
        self.row_bytes = int(state["row_bytes"])
        self._open = {}

    def _mapped(self, group: int) -> Tensor:
        name, rows = self._files[group]
        if name not in self._open:
            path = self.place() / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"remembered rows are missing: there is no {path}; restore it, or begin the "
                    "run anew under another name"
                )
            digest = hashlib.sha256()
            _read(path, digest)
            stated = name.removesuffix(".bin").rpartition("_")[2]
            if digest.hexdigest() != stated:
                raise ValueError(
                    f"remembered rows were changed: {path} has the sha256 {digest.hexdigest()}, "
                    f"expected {stated}; restore it, or begin the run anew under another name"
                )
            whole = torch.from_file(
                str(path), shared=False, size=rows * self.row_bytes, dtype=torch.uint8
            )
            self._open[name] = whole.view(rows, self.row_bytes)
        return self._open[name]


def _read(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
