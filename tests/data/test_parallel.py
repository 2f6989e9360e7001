"""Work over processes: results in order, and a lost process is told."""

import os
import signal
from concurrent.futures import Future

import pytest

from mmcl.data.parallel import WorkerPool


def doubled(number):
    return 2 * number


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL if number == 3 else 0)
    return number


def failing(number):
    raise ValueError(f"no {number}")


def test_one_worker_is_this_process():
    with WorkerPool(1) as processes:
        assert processes.map is map


@pytest.mark.slow
def test_results_come_in_the_order_of_the_work_and_errors_arrive_as_they_are():
    with WorkerPool(2) as processes:
        assert list(processes.map(doubled, range(50))) == [2 * number for number in range(50)]
        with pytest.raises(ValueError, match="no 0"):
            list(processes.map(failing, range(9)))
        assert list(processes.map(doubled, [4])) == [8]


@pytest.mark.slow
def test_a_killed_process_ends_the_work_with_a_sentence():
    with (
        WorkerPool(2) as processes,
        pytest.raises(RuntimeError, match="was killed, perhaps .*memory.*--num_workers"),
    ):
        list(processes.map(killed, range(9)))


def test_work_is_asked_for_as_it_is_needed():
    asked = []

    def work():
        for number in range(1000):
            asked.append(number)
            yield number

    class Instant:
        def submit(self, function, piece):
            done = Future()
            done.set_result(function(piece))
            return done

        def shutdown(self, **_):
            pass

    with WorkerPool(2) as processes:
        processes._pool = Instant()
        results = processes.parallel_map(doubled, work())
        assert next(results) == 0
        assert len(asked) == 6
