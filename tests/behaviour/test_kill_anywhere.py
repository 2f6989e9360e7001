"""A kill at every step and between any two files; what else may happen between two starts."""

import json
import os
import signal
import time
from functools import partial

import pytest

from tests.behaviour.kill_runs import KILLED, arm, command, in_process, note_steps, noted
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow
SIZES = (9, 8, 4)
STEPS = 10  # two epochs each; batches of later tasks are shared with remembered samples
BETWEEN = [
    ("ending", 1), ("copy", 1), ("sample", 3), ("ended", 1), ("written", 3), ("ledger", 1),
    ("state", 2), ("matrix", 1), ("score", 2), ("step", 2), ("copy", 1), ("ended", 1),
    ("ledger", 1), ("written", 5), ("matrix", 1),
]  # fmt: skip
"""Moments one after the other, from the end of the first task until the second is scored."""


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    """Runs of three tasks, one of which was left alone, and its steps."""
    runs = SmallRuns(tmp_path_factory.mktemp("runs"), SIZES)
    steps = runs.folder / "alone.steps"
    runs.finish("alone", "ExperienceReplay", before=[partial(note_steps, steps)])
    alone = noted(steps)
    assert len(alone) == STEPS
    assert all(len(seen) == 1 for seen in alone.values())
    return runs, alone


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_killed_at_any_step_sees_the_same_samples_and_weights(three_tasks, step):
    runs, alone = three_tasks
    name, steps = f"step{step}", runs.folder / f"step{step}.steps"
    before = [partial(note_steps, steps)]
    status, output = runs.start(name, "ExperienceReplay", ("step", step), before)
    assert status == KILLED, output
    runs.finish(name, "ExperienceReplay", before=before)
    assert noted(steps) == alone
    assert runs.differences(name, "alone") == []


def test_kills_between_any_two_files_lose_nothing(three_tasks):
    runs, alone = three_tasks
    before = [partial(note_steps, runs.folder / "between.steps")]
    for moment in BETWEEN:
        status, output = runs.start("between", "ExperienceReplay", moment, before)
        assert status == KILLED, (moment, output)
    runs.finish("between", "ExperienceReplay", before=before)
    assert noted(runs.folder / "between.steps") == alone
    assert runs.differences("between", "alone") == []
    assert list(runs.path("between").rglob("*.tmp")) == []


def test_a_run_with_four_workers_resumes_with_none(three_tasks):
    runs, alone = three_tasks
    before = [partial(note_steps, runs.folder / "workers.steps")]
    for step in (3, 6):
        killed = runs.start(
            "workers", "ExperienceReplay", ("step", step), before, data__num_workers=4
        )
        assert killed[0] == KILLED, killed[1]
    runs.finish("workers", "ExperienceReplay", before=before)
    assert noted(runs.folder / "workers.steps") == alone
    assert runs.differences("workers", "alone") == []


@pytest.mark.parametrize("bytes_left", [0, 100, None])
def test_half_an_index_is_built_again_between_two_starts(three_tasks, bytes_left):
    runs, _ = three_tasks
    name = f"index{bytes_left}"
    assert runs.start(name, "ExperienceReplay", ("step", 7))[0] == KILLED
    indexes = sorted(runs.card.parent.rglob("*.index*"))
    assert len(indexes) == 2 * len(SIZES)
    whole = [index.read_bytes() for index in indexes]
    for index in indexes:
        os.truncate(index, index.stat().st_size // 2 if bytes_left is None else bytes_left)
    runs.finish(name, "ExperienceReplay")
    assert runs.differences(name, "alone") == []
    assert [index.read_bytes() for index in indexes] == whole


def clock_that_jumps_back():
    """Let every reading of the wall clock be an hour earlier than the one before."""
    readings = [time.time()]

    def earlier():
        readings.append(readings[-1] - 3600)
        return readings[-1]

    time.time = earlier


def test_a_clock_that_jumps_back_changes_nothing(three_tasks):
    runs, alone = three_tasks
    before = [clock_that_jumps_back, partial(note_steps, runs.folder / "clock.steps")]
    assert runs.start("clock", "ExperienceReplay", ("step", 7), before)[0] == KILLED
    early = 10**9
    for file in [*runs.path("clock").rglob("*"), *runs.card.parent.glob("*.index*")]:
        os.utime(file, (early, early))
    runs.finish("clock", "ExperienceReplay", before=before)
    assert noted(runs.folder / "clock.steps") == alone
    assert runs.differences("clock", "alone") == []
    tasks = json.loads((runs.path("clock") / "ledger.json").read_text())["tasks"]
    assert all(0 <= task["seconds"] < 600 for task in tasks)
    assert 0 <= json.loads((runs.path("clock") / "run.json").read_text())["seconds"] < 600


def stop_at(file, step):
    """Let a run stand still at a step until a file is gone."""

    def wait():
        file.write_text(str(os.getpid()))
        while file.exists():
            time.sleep(0.02)

    arm("step", step, wait)


def started(runs, name, standing, step, **changes):
    """Start a run that stands still at a step; return its process once it stands."""
    words = runs.words(name, "ExperienceReplay", **changes)
    output = runs.folder / f"{name}.first"
    process = in_process(
        command, words, output, None, [partial(stop_at, standing, step)], wait=False
    )
    while not standing.exists():
        assert process.is_alive(), output.read_text()
        time.sleep(0.02)
    return process


def test_a_second_start_of_a_run_is_refused_while_the_first_one_goes(three_tasks):
    runs, _ = three_tasks
    standing = runs.folder / "standing"
    first = started(runs, "twice", standing, 5)
    for changes in ({}, {"model__learning_rate": 0.5}):
        status, output = runs.start("twice", "ExperienceReplay", **changes)
        assert status == 1
        assert f"{runs.path('twice')} is used by process {first.pid} on " in output
        assert "wait until that ends, or give this run another --run_name" in output
        assert "Traceback" not in output
    standing.unlink()
    first.join()
    assert first.exitcode == 0
    assert runs.differences("twice", "alone") == []


def test_a_killed_run_with_workers_left_over_holds_nothing(three_tasks):
    runs, _ = three_tasks
    standing = runs.folder / "with workers"
    first = started(runs, "orphans", standing, 5, data__num_workers=2)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    runs.finish("orphans", "ExperienceReplay")
    assert runs.differences("orphans", "alone") == []


def signalled(number, step):
    """Send this process a signal at a step."""
    arm("step", step, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("number", "expected", "sentence"),
    [
        (signal.SIGINT, 130, "interrupted: the same command resumes from the last checkpoint"),
        (signal.SIGTERM, 143, "ended by SIGTERM: the same command resumes in task 0 ('task-a') at"),
    ],
)
def test_a_signal_ends_a_run_with_its_status_and_a_sentence(
    three_tasks, number, expected, sentence
):
    runs, _ = three_tasks
    status, output = runs.start(
        number.name, "ExperienceReplay", before=[partial(signalled, number, 3)]
    )
    assert status == expected
    assert sentence in output
    assert "Traceback" not in output
    runs.finish(number.name, "ExperienceReplay")
    assert runs.differences(number.name, "alone") == []
