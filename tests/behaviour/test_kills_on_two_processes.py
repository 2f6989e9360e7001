"""Two processes, one or both of which are killed at any moment, resume to the same end."""

import random
from functools import partial

import pytest
import torch

from tests.behaviour.kill_runs import KILLED, arm, command, in_process, note_steps, noted
from tests.behaviour.test_full_disk import refuse
from tests.distributed.ranks import WORLD, free_port, stand_among
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow
SIZES = (20, 17, 16)
DEVICES = ["--trainer.devices=2", "--trainer.strategy=ddp"]
_SECONDS_TO_NOTICE = 60
"""In which a process must end by itself when another one is gone."""


def chain(seed, kills=5):
    """Random (moment, count, who dies), to be met one after the other by starts of one run."""
    draw = random.Random(seed)
    chosen = []
    for place in range(kills):
        who = draw.choice([(0,), (1,), (0, 1)])
        moments = [("step", draw.randint(1, 4)), ("step", draw.randint(1, 4)), ("score", 1)]
        if 0 in who:  # files are written by it alone
            moments.append((draw.choice(["write", "written"]), draw.randint(2, 5)))
        late = [("ending", 1), ("ended", 1)] if place == 2 else []
        chosen.append((*draw.choice(late or moments), who))
    return chosen


def rank_main(rank, port, words, folder, kill, before):
    """Run a command line as one of the ranks."""
    stand_among(rank, WORLD, port)
    import mmcl.cli

    mmcl.cli._SECONDS_TO_WAIT_FOR_RANK_0 = 0
    if kill is not None and rank in kill[2]:
        arm(*kill[:2])
    note_steps(folder / f"steps_{rank}")
    command(words, folder / f"output_{rank}", before=before)


def on_both(words, folder, kill=None, before=()):
    """Give a command line on two ranks; return their exit statuses.

    Args:
        words: the command line.
        folder: gets ``output_<rank>`` and ``steps_<rank>``.
        kill: (moment, count, ranks that die at it); if these are all, what is left is killed too.
        before: functions that each rank calls first.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    started = [
        in_process(rank_main, rank, port, [*words, *DEVICES], folder, kill, before, wait=False)
        for rank in range(WORLD)
    ]
    if kill is not None:
        started[kill[2][0]].join()
        if len(kill[2]) == WORLD:
            for process in started:
                process.kill()
    for process in started:
        process.join(_SECONDS_TO_NOTICE)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"rank {started.index(process)} waits for one that is gone: {kill}")
    return [process.exitcode for process in started]


def expect_same_steps(folder, alone):
    for rank in range(WORLD):
        assert noted(folder / f"steps_{rank}") == noted(alone / f"steps_{rank}")


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    """Runs of three tasks, one of which two processes were left alone with."""
    runs = SmallRuns(tmp_path_factory.mktemp("runs"), SIZES)
    words = runs.words("alone", "ExperienceReplay", checkpoint_every_n_steps=1)
    assert on_both(words, runs.folder / "seen alone") == [0, 0]
    return runs


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_five_random_points_ends_the_same(three_tasks, seed):
    runs, name = three_tasks, f"killed{seed}"
    words = runs.words(name, "ExperienceReplay", checkpoint_every_n_steps=1)
    folder = runs.folder / f"seen {name}"
    for moment, count, who in chain(seed):
        status = on_both(words, folder, (moment, count, who))
        assert KILLED in status, (moment, count, who)
        for rank in set(range(WORLD)) - set(who):
            output = (folder / f"output_{rank}").read_text()
            assert status[rank] == 1, (moment, count, who, output)
            assert "another process of this run ended or cannot be reached" in output
            assert "the same command resumes" in output
            assert "Traceback" not in output
    assert on_both(words, folder) == [0, 0]
    expect_same_steps(folder, runs.folder / "seen alone")
    assert runs.differences(name, "alone") == []


def joined(folder):
    """The samples of each step of both ranks: row i of rank r stands at place i * 2 + r."""
    first, second = (noted(folder / f"steps_{rank}") for rank in range(WORLD))
    batches = {}
    for place in first.keys() & second.keys():
        [(left, _)], [(right, _)] = first[place], second[place]
        batches[place] = [None] * (len(left) + len(right))
        batches[place][0::2], batches[place][1::2] = left, right
    return batches


@pytest.mark.parametrize("step", [3, 9])
def test_a_run_of_two_resumes_as_one_over_the_same_global_batches(tmp_path, step):
    runs = SmallRuns(tmp_path, SIZES)
    # Adam would blow up rounding wherever a gradient is next to nothing.
    options = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 0.02}
    words = runs.words("run", "ExperienceReplay", **options)
    assert KILLED in on_both(words, tmp_path / "two", ("step", step, (0, 1)))
    steps = {name: tmp_path / f"{name}.steps" for name in ("run", "alone")}
    for name in ("run", "alone"):
        before = [partial(note_steps, steps[name])]
        runs.finish(name, "ExperienceReplay", before=before, **options)
    two, one, alone = joined(tmp_path / "two"), noted(steps["run"]), noted(steps["alone"])
    assert two.keys() | one.keys() == alone.keys()
    assert len(two) == step
    for place, [(samples, _)] in alone.items():
        assert two.get(place, samples) == samples
        assert place not in one or one[place][0][0] == samples
    left, right, first = (runs.kept("run"), runs.kept("alone"), runs.kept("alone", 0))
    assert left.keys() == right.keys()
    learned = [name for name in right if name.startswith("model.")]
    assert max(float((right[name] - first[name]).abs().max()) for name in learned) > 1e-3
    for name in learned:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-6)
    assert runs.matrix("run").values == runs.matrix("alone").values


def test_a_checkpoint_that_finds_no_room_ends_both_ranks_with_a_sentence(three_tasks):
    runs, folder = three_tasks, three_tasks.folder / "seen full"
    words = runs.words("full", "ExperienceReplay", checkpoint_every_n_steps=1)
    for file in ("matrix.json", "task_00.ckpt", "ledger.json"):
        assert on_both(words, folder, before=[partial(refuse, file, 1)]) == [1, 1]
        for rank in range(WORLD):
            output = (folder / f"output_{rank}").read_text()
            assert f"/{file} cannot be written, for it is larger than a file may be" in output
            assert "the same command resumes" in output
            assert "Traceback" not in output
    assert on_both(words, folder) == [0, 0]
    assert runs.differences("full", "alone") == []
