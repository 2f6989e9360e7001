"""Runs in processes of their own, which can be told to die at a chosen moment.

Processes are forked off one that has imported everything and done nothing, so a run costs no
import, and no test inherits what another left in memory.
"""

import multiprocessing
import os
import shutil
import signal
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

PRELOADED = [
    "tests.lightning.killing",
    "mmcl.commands.sequence",
    "mmcl.commands.evaluate",
    "mmcl.data.builders.digits",
    "mmcl.models",
    "mmcl.models.assembled",
]
KILLED = -signal.SIGKILL
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


def in_process(work, *arguments, wait=True):
    """Call ``work(*arguments)`` in a fresh process; return its exit status.

    ``work`` is a function that can be imported. Without ``wait`` the process is returned.
    """
    process = _FORKS.Process(target=work, args=arguments)
    process.start()
    if not wait:
        return process
    process.join()
    return process.exitcode


def command(words, said=None, kill=None):
    """Run mmcl's command line in this process and leave with its status.

    Args:
        words: of the command line.
        said: file for what is printed.
        kill: (moment, count): die at the count-th such moment.
    """
    from mmcl.commands import main, sequence

    torch.set_num_threads(1)
    # A process of a fork server would start a server of its own for its loader's workers.
    multiprocessing.set_start_method("fork", force=True)
    # The page is a function of the files that the tests compare, and takes longer than the run.
    sequence.write_report = lambda folder: folder / "report.html"
    if kill is not None:
        arm(*kill)
    with Path(said or os.devnull).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            status = main(words)
        except BaseException:
            status = 1
            traceback.print_exc()
    os._exit(status)


def arm(moment, count):
    """Make this process kill itself when something happens for the count-th time."""
    from webdataset.writer import TarWriter

    from mmcl.lightning.answering import AnswerScorer
    from mmcl.lightning.cells import ColumnScorer
    from mmcl.lightning.running import TaskHooks

    places = {
        "step": (TaskHooks, "on_train_batch_end", None),
        "write": (Path, "replace", _halve),
        "ended": (TaskHooks, "_cost", None),
        "score": (ColumnScorer, "finish", None),
        "answers": (AnswerScorer, "finish", None),
        "sample": (TarWriter, "write", None),
    }
    owner, name, before = places[moment]
    own = getattr(owner, name)
    met = [0]

    def counted(*arguments, **named):
        met[0] += 1
        if met[0] == count:
            if before is not None:
                before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **named)

    setattr(owner, name, counted)


def _halve(temporary, target):
    """Leave half of a file that is about to be renamed, as a process that dies while writing."""
    os.truncate(temporary, temporary.stat().st_size // 2)


def snapshots_of(words, run, folder):
    """Run a command line and copy its run folder before every file that it puts in place.

    What a process that is killed leaves behind is what lies on the disk, so the copies are what
    kills at any moment leave. The file that is about to be put in place is half written.
    """
    own, seen = Path.replace, []

    def copied(temporary, target):
        if run in temporary.parents:
            copy = folder / f"{len(seen):03d} {target.name}"
            seen.append(copy)
            shutil.copytree(run, copy)
            half = copy / temporary.relative_to(run)
            os.truncate(half, half.stat().st_size // 2)
        return own(temporary, target)

    Path.replace = copied
    command(words)
