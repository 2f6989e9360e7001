"""Runs in processes of their own, which can be killed at a chosen moment.

Processes are forked off one that has imported everything and done nothing, so a run costs no
import, and no test inherits what another left in memory.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from mmcl import strategies

STRATEGIES = Path(strategies.__file__).parent
PRELOADED = [
    "tests.conftest",
    "tests.behaviour.kill_runs",
    "mmcl.cli.train",
    "mmcl.cli.run_commands",
    "mmcl.streams.digits",
    "mmcl.models",
    "mmcl.models.tiny_llava.build",
    *(f"mmcl.strategies.{file.stem}" for file in STRATEGIES.glob("[a-z]*.py")),
    # what a run imports late
    "attrs",
    "encodings.idna",
    "peft",
    "PIL.BmpImagePlugin",
    "PIL.JpegImagePlugin",
    "rich._emoji_codes",
    "torch.utils.serialization",
    "transformers.models.llama.modeling_llama",
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


def command(words, output=None, kill=None, before=()):
    """Run mmcl's command line in this process and leave with its status.

    Args:
        words: of the command line.
        output: file for the output.
        kill: (moment, count): die at the count-th such moment.
        before: functions that are called first.
    """
    from mmcl.cli import main, train

    torch.set_num_threads(1)
    # A process of a fork server would start a server of its own for its loader's workers.
    multiprocessing.set_start_method("fork", force=True)
    # A shell lets what it starts in the background ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The page is a function of the files that the tests compare, and takes longer than the run.
    train.write_report = lambda folder: folder / "report.html"
    if kill is not None:
        arm(*kill)
    for call in before:
        call()
    with Path(output or os.devnull).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            status = main(words)
        except BaseException:
            status = 1
            traceback.print_exc()
    os._exit(status)


def arm(moment, count, act=None):
    """Make this process kill itself when something happens for the count-th time.

    Args:
        moment: what happens.
        count: from 1.
        act: what is done instead of dying.
    """
    owner, name, before = _moments()[moment]
    own = getattr(owner, name)
    met = [0]

    def counted(*arguments, **named):
        met[0] += 1
        if met[0] != count:
            return own(*arguments, **named)
        if before is not None:
            before(own, *arguments)
        (act or _die)()
        return own(*arguments, **named)

    setattr(owner, name, counted)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _moments():
    from webdataset.writer import TarWriter

    from mmcl.evaluation import AccuracyMatrix
    from mmcl.evaluation.cost import Ledger
    from mmcl.evaluation.evaluators import Evaluator, GenerationEvaluator
    from mmcl.lightning import task_callback
    from mmcl.lightning.datamodule import ContinualDataModule
    from mmcl.lightning.run_dir import RunDirectory
    from mmcl.lightning.strategy_callback import StrategyCallback
    from mmcl.lightning.task_callback import TaskCallback

    return {
        "step": (TaskCallback, "on_train_batch_end", None),
        "write": (Path, "replace", _halve),
        "written": (Path, "replace", _rename),
        "ending": (StrategyCallback, "run_end_task", None),
        "copy": (ContinualDataModule, "save_replay_copies", None),
        "ended": (task_callback, "task_cost", None),
        "ledger": (Ledger, "write", None),
        "state": (RunDirectory, "save", None),
        "score": (Evaluator, "compute", None),
        "answers": (GenerationEvaluator, "compute", None),
        "matrix": (AccuracyMatrix, "write", None),
        "sample": (TarWriter, "write", None),
    }


def _halve(own, temporary, target):
    """Leave half of a file that is about to be renamed, as a process that dies while writing.

    Of a folder that is about to be renamed every file is complete.
    """
    if temporary.is_file():
        os.truncate(temporary, temporary.stat().st_size // 2)


def _rename(own, temporary, target):
    """Put a file in its place, to die before anything follows from it."""
    own(temporary, target)


def note_steps(file):
    """Add a line to a file for every step: its task, its number, its samples, its weights."""
    from mmcl.lightning.task_callback import TaskCallback

    batch_end = TaskCallback.on_train_batch_end

    def note(hooks, trainer, module, outputs, batch, batch_idx):
        digest = hashlib.sha256()
        for name, value in sorted(module.trainable_state_dict().items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.detach().numpy().tobytes())
        samples = torch.stack([batch.task_ids, batch.sample_ids], 1).tolist()
        line = [hooks.task.index, trainer.fit_loop.total_batch_idx, samples, digest.hexdigest()]
        with file.open("a") as notes:
            notes.write(json.dumps(line) + "\n")
        batch_end(hooks, trainer, module, outputs, batch, batch_idx)

    TaskCallback.on_train_batch_end = note


def noted(file):
    """What happened in each step, (task, number) -> all that was noted of it, no entry twice."""
    steps = {}
    for task, number, samples, digest in map(json.loads, file.read_text().splitlines()):
        seen = steps.setdefault((task, number), [])
        if (samples, digest) not in seen:
            seen.append((samples, digest))
    return steps


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
