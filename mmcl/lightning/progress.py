"""One progress line a task, redrawn at most ten times a second."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN = 0.1


class ProgressLine:
    """Shows how far a task is. Does nothing where nobody looks.

    Args:
        title: what is learned.
        steps: in all.
        is_shown: False on other ranks than 0 and where output is no terminal.
    """

    def __init__(self, title: str, steps: int, is_shown: bool) -> None:
        self._next = 0.0
        self._bar: Progress | None = None
        self._line: TaskID | None = None
        if is_shown and Console(stderr=True).is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._line = self._bar.add_task(title, total=steps, loss="")
            self._bar.start()

    def wants(self) -> bool:
        """Tell whether it is time to draw again."""
        return self._bar is not None and time.monotonic() >= self._next

    def show(self, step: int, loss: float) -> None:
        """Draw."""
        if self._bar is not None and self._line is not None:
            self._next = time.monotonic() + _SECONDS_BETWEEN
            self._bar.update(self._line, completed=step, loss=f"loss {loss:.3f}", refresh=True)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
