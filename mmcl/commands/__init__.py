"""The command line: ``mmcl <command>`` and ``python train.py <command>`` are the same."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

COMMANDS = {
    "sequence": "learn a stream of tasks (the default: --config X alone does this)",
    "check": "load everything, score a few rows of every task, reckon memory and time",
    "evaluate": "score kept checkpoints of a run on any task",
    "report": "write a run's report.html again",
    "compare": "one table and one figure over runs and seeds",
    "export": "the learned model as a checkpoint that open_clip loads itself",
    "data": "list and build the streams that mmcl can make",
    "strategies": "what exists, what it remembers, what it asks of the model",
}
LIGHTNING = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: words of the command line; None = those of the process.

    Returns:
        exit status: 0, 1 for an error (said in a sentence; its trace only with ``--debug``), 2
        for words that cannot be parsed, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    _quiet()
    name = words[0] if words and not words[0].startswith("-") else "sequence"
    try:
        return _dispatch(name, words)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:  # the command line's last resort: a sentence, not a trace
        if debug:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1


def script() -> None:
    """Run the command of this process and exit with its status."""
    sys.exit(main())


def _dispatch(name: str, words: list[str]) -> int:
    if name in LIGHTNING:
        from mmcl.lightning.cli import ContinualCLI

        ContinualCLI(words, subcommands=True)
        return 0
    if name not in COMMANDS:
        known = ", ".join([*COMMANDS, *LIGHTNING])
        print(f"error: there is no command '{name}': choose one of {known}", file=sys.stderr)
        return 2
    rest = words[1:] if words and words[0] == name else words
    command = importlib.import_module(f"mmcl.commands.{name}")
    return int(command.main(rest))


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if text and isinstance(error, ValueError | TypeError | RuntimeError | OSError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    return f"{type(error).__name__}: {text} ({where}; --debug shows the whole trace)"


def _quiet() -> None:
    # What Lightning and torch say of their own use is not about the user's run.
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*srun.*",
        ".*Checkpoint directory.*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
