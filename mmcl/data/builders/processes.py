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
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")

_AHEAD = 3
"""Pieces of work that wait for each process; more would only fill memory."""


def in_processes(
    function: Callable[[Work], Result], work: Iterable[Work], workers: int
) -> Iterator[Result]:
    """Call a function for every piece of work, in several processes if there are several workers.

    Args:
        function: of a module, so that another process finds it; so are its arguments and results.
        work: pieces of some size, each a tenth of a second or more.
        workers: processes; 1 does it here.

    Returns:
        The results in the order of ``work``.

    Raises:
        RuntimeError: if a process was killed, for want of memory for example.
    """
    if workers < 2:
        yield from map(function, work)
        return
    # A forked child of a process with threads may wait forever for a lock that nobody holds.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_obey_parent)
    waiting: deque[Future[Result]] = deque()
    try:
        for piece in work:
            waiting.append(pool.submit(function, piece))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process of this command was killed, perhaps for want of memory: give the same "
            "command with fewer --workers, it goes on where it was"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _obey_parent() -> None:
    """Leave interrupts to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
