"""Map over worker processes, with results in the order of the work."""

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
ParallelMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""``map``, or a map over processes."""

_AHEAD = 3
"""Pieces of work queued per process; more would only fill memory."""


class WorkerPool:
    """Worker processes, started when first needed; use with ``with``.

    Args:
        num_workers: how many; 1 does all work in this process.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    @property
    def map(self) -> ParallelMap:
        """``map`` with one worker, else `parallel_map`."""
        return map if self.num_workers < 2 else self.parallel_map

    def parallel_map(
        self, function: Callable[[Work], Result], work: Iterable[Work]
    ) -> Iterator[Result]:
        """Call a function for every piece of work, in the worker processes.

        Args:
            function: defined at module level; it, its arguments and results can be pickled.
            work: pieces that take a tenth of a second or more; consumed lazily.

        Returns:
            The results in the order of ``work``.

        Raises:
            RuntimeError: if a process was killed, for example because memory ran out.
        """
        pool = self._started()
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in work:
                waiting.append(pool.submit(function, piece))
                if len(waiting) >= _AHEAD * self.num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process of this command was killed, perhaps because memory ran out: run the "
                "same command with fewer --num_workers, it resumes"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A child forked from a process with threads may wait forever for a lock of one of them.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.num_workers, mp_context=context, initializer=_obey_parent
            )
        return self._pool


def _obey_parent() -> None:
    """Leave interrupts to the parent process, and exit when it exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
