"""Work that is spread over processes, its results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""``map``, or a map over processes."""

_AHEAD = 3
"""Pieces of work that wait for each process; more would only fill memory."""


class Processes:
    """Processes that start when they are first needed; to be left with ``with``.

    Args:
        workers: how many; 1 does all work in this one.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    @property
    def spread(self) -> Spread:
        """``map`` with one worker, else `over`."""
        return map if self.workers < 2 else self.over

    def over(self, function: Callable[[Work], Result], work: Iterable[Work]) -> Iterator[Result]:
        """Call a function for every piece of work, in the processes.

        Args:
            function: of a module, so that another process finds it; it can be pickled, and so can
                its arguments and results.
            work: pieces that take a tenth of a second or more; asked for as they are needed.

        Returns:
            The results in the order of ``work``.

        Raises:
            RuntimeError: if a process was killed, for want of memory for example.
        """
        pool = self._started()
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in work:
                waiting.append(pool.submit(function, piece))
                if len(waiting) >= _AHEAD * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process of this command was killed, perhaps for want of memory: give the same "
                "command with fewer --workers, it goes on where it was"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A forked child of a process with threads may wait forever for a lock of nobody.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_obey_parent
            )
        return self._pool


def _obey_parent() -> None:
    """Leave interrupts to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
