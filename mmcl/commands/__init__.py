"""The command line: ``mmcl <command>`` and ``python train.py <command>`` are the same."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmcl.commands.words import UnknownWords, process_rank

COMMANDS = {
    "sequence": "learn a stream of tasks (the default: --config X alone does this)",
    "check": "load everything, score 8 rows of every task, reckon memory and time",
    "evaluate": "score kept checkpoints of a run on any task",
    "score": "score kept answers again without the model, or those of a LLaVA-style repository",
    "report": "write a run's report.html again",
    "export": "the learned model for open_clip, transformers or peft to load",
    "compare": "one table and one figure over runs and seeds",
    "data": "make a stream of data of your own, check it, show it; list and build known ones",
    "strategies": "what exists, what it remembers, what it asks of the model",
}
LIGHTNING = ("fit", "validate", "test", "predict")

# Said by Lightning, torch and open_clip of their own use, which is not about the user's run.
_NOISE = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*",
    ".*in eval mode at the start of training.*",
    ".*srun.*",
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*dataloader is not resumable.*",
    ".*isinstance.treespec.*",
    ".*Trying to infer the .batch_size. from an ambiguous collection.*",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"\s*.*was deprecated in v4\.\d+\.\d+ and will be removed",  # jsonargparse to Lightning
)
_SECONDS_TO_WAIT_FOR_RANK_0 = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: words of the command line; None = those of the process.

    Returns:
        exit status: 0, 1 for an error (said in a sentence; its trace only with ``--debug``), 2
        for words or a configuration that cannot be understood, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    parent = os.getppid()
    # Read when torch is loaded. Threads that spin while they wait make a step of a small model
    # several times slower as soon as another process wants the cores; sleeping costs nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _plain_warnings():
        try:
            return _dispatch(words)
        except SystemExit as end:  # --help and --print_config end so
            return _status(end.code)
        except KeyboardInterrupt:
            _tell("interrupted: the same command goes on from the last checkpoint", parent)
            return 130
        except Exception as error:  # the command line's last resort: a sentence, not a trace
            if debug:
                traceback.print_exc()
            else:
                _tell(f"error: {_sentence(error)}", parent)
            return int(getattr(error, "exit_status", 1))


def script() -> None:
    """Run the command of this process and exit with its status."""
    sys.exit(main())


def _dispatch(words: list[str]) -> int:
    name = words[0] if words and not words[0].startswith("-") else "sequence"
    if name in LIGHTNING:
        name = "lightning"
    elif not words or (words[0] in ("-h", "--help")):
        name = "overview"
    elif name in COMMANDS:
        words = words[1:] if words[0] == name else words
    else:
        known = ", ".join([*COMMANDS, *LIGHTNING])
        raise UnknownWords(f"there is no command '{name}': choose one of {known}")
    command = importlib.import_module(f"mmcl.commands.{name}")
    return int(command.main(words))


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if type(error).__name__ == "UnpicklingError":
        return (
            "a checkpoint holds more than tensors and plain values, or is broken; pickled objects "
            "are never run: give a checkpoint that mmcl wrote, or a safetensors file"
        )
    if text and isinstance(error, ValueError | TypeError | RuntimeError | OSError | ImportError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    return f"{type(error).__name__}: {text} ({where}; --debug shows the whole trace)"


def _status(code: Any) -> int:
    return code if isinstance(code, int) else int(code is not None)


def _tell(sentence: str, parent: int) -> None:
    """Say what ended the command.

    Rank 0 starts the other ranks and is their parent. When both meet the same fault rank 0 says it
    and ends, so another rank speaks only if rank 0 is still there later: the fault is its own.
    """
    rank = process_rank()
    if rank:
        time.sleep(_SECONDS_TO_WAIT_FOR_RANK_0)
        if os.getppid() != parent:
            return
        sentence = f"rank {rank}: {sentence}"
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show each warning as one line, on rank 0 alone, and none that libraries say of themselves."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if process_rank() == 0:
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        warnings.showwarning = show
        # open_clip tells the root logger how it builds a model.
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
