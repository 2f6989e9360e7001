"""Command line: ``mmcl``, ``python -m mmcl`` and ``python train.py``, each with ``<command>``."""

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
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from typing import Any

from mmcl.cli.parser import UsageError, process_rank, refuse_renamed

COMMANDS = {
    "train": "train on a stream of tasks, or resume (default command)",
    "check": "dry run: verify the data, estimate time and memory",
    "evaluate": "evaluate any task checkpoint of a run on any task",
    "rescore": "rescore stored predictions without the model, also of LLaVA-style repositories",
    "report": "write a run's report.html again",
    "export": "export the trained model for open_clip, transformers or peft",
    "merge": "merge the weights of checkpoints into one exported model",
    "compare": "compare runs and seeds in one table and one plot",
    "gate": "compare a run with gates: limits of scores and metrics, for a CI",
    "accept": "accept the task at which a broken gate stopped a run",
    "rollback": "set a run back to an earlier task",
    "lineage": "print where a run or an export comes from",
    "diagnose": "flatness, linear probes and recovery over the states of a run",
    "connect": "loss and score on the line between two checkpoints",
    "similarity": "similarity of layers and attention heads of two checkpoints",
    "registry": "register base models and their adapters, list and show them",
    "upgrade": "check whether an adapter fits the next base model",
    "recycle": "move an adapter to the next base model: as it is, as start, as teacher",
    "data": "convert, validate, preview, list or build streams",
    "strategies": "list the strategies, or show the arguments of one",
}
RENAMED = {"sequence": "train", "score": "rescore"}
_ENTRY_POINTS = {
    "help": ("train", "show_help"),
    "lightning": ("train", "run_lightning"),
    "evaluate": ("run_commands", "evaluate"),
    "report": ("run_commands", "report"),
    "compare": ("run_commands", "compare_runs"),
    "export": ("run_commands", "export"),
    "gate": ("run_state", "gate"),
    "accept": ("run_state", "accept_task"),
    "rollback": ("run_state", "rollback"),
    "lineage": ("run_state", "lineage"),
    "connect": ("diagnose", "connect_checkpoints"),
    "similarity": ("diagnose", "compare_checkpoints"),
    "registry": ("registry", "registry"),
    "upgrade": ("registry", "upgrade"),
    "recycle": ("registry", "recycle"),
}
"""Command: module and function, where they are not its own name and ``main``."""
LIGHTNING = {
    "fit": "Lightning's own, on one task (data.task_index): train",
    "validate": "evaluate the selected task's validation part, or its test split if it has none",
    "test": "evaluate every task until the selected one, and the eval-only tasks",
    "predict": "print a prediction for every test sample of the selected task",
}

# Warnings of Lightning, torch and open_clip about their own use, not about the user's run.
_IGNORED_WARNINGS = (
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
    r"\s*.*was deprecated in v4\.\d+\.\d+ and will be removed",  # from jsonargparse for Lightning
)
_SECONDS_TO_WAIT_FOR_RANK_0 = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the command line.

    Args:
        argv: arguments of the command line; None = those of the process.

    Returns:
        exit status: 0, 1 for an error (printed as a sentence, with its trace only for ``--debug``),
        2 for invalid arguments or an invalid configuration, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    parent = os.getppid()
    # Read when torch is loaded. Threads that spin while they wait slow a step of a small model down
    # several times when another process needs the cores; threads that sleep do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _plain_warnings():
        try:
            return _dispatch(arguments)
        except SystemExit as error:  # --help and --print_config exit like this
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except KeyboardInterrupt:
            _print_error("interrupted: the same command resumes from the last checkpoint", parent)
            return 130
        except Exception as error:  # every error becomes a sentence instead of a trace
            if debug:
                traceback.print_exc()
            else:
                _print_error(f"error: {_sentence(error)}", parent)
            return int(getattr(error, "exit_status", 1))


def script() -> None:
    """Run the command line of this process and exit with its status."""
    add_working_directory()
    sys.exit(main())


class _ModuleFinder(FileFinder):
    """Finder of the files and packages of a folder; a subfolder without __init__.py is none.

    Libraries take any folder named as an optional package, such as datasets/ or wandb/, for the
    package.
    """

    def find_spec(self, fullname: str, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a file or package, None for a plain folder."""
        spec = super().find_spec(fullname, target)
        return None if spec is None or spec.loader is None else spec


def add_working_directory() -> None:
    """Let a ``class_path`` be in a file or package of the working directory.

    The directory is appended to the path, so it hides no installed package. A console script has it
    not on the path; PYTHONSAFEPATH keeps it off.
    """
    folder = os.getcwd()
    if getattr(sys.flags, "safe_path", False) or {"", folder} & set(sys.path):
        return
    sys.path.append(folder)
    kinds = ((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES))
    sys.path_importer_cache[folder] = _ModuleFinder(folder, *kinds)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    if name in LIGHTNING:
        name = "lightning"
    elif not arguments or (arguments[0] in ("-h", "--help")):
        name = "help"
    elif name in COMMANDS:
        arguments = arguments[1:] if arguments[0] == name else arguments
    else:
        refuse_renamed(name, RENAMED)
        known = ", ".join([*COMMANDS, *LIGHTNING])
        raise UsageError(f"there is no command '{name}': choose one of {known}")
    module, function = _ENTRY_POINTS.get(name, (name, "main"))
    command = importlib.import_module(f"mmcl.cli.{module}")
    return int(getattr(command, function)(arguments))


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    if type(error).__name__ == "UnpicklingError":
        return (
            "a checkpoint is broken or holds pickled objects, which are never run: give a "
            "checkpoint that mmcl wrote, or a safetensors file"
        )
    if text and isinstance(error, ValueError | TypeError | RuntimeError | OSError | ImportError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    return f"{type(error).__name__}: {text} ({where}; --debug shows the whole trace)"


def _print_error(sentence: str, parent: int) -> None:
    """Print the error that ended the command.

    Rank 0 is the parent process of the other ranks. If all ranks have the same error, rank 0 prints
    it and ends, so another rank prints only if rank 0 still runs later: the error is its own.
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
    """Print each warning as one line, on rank 0 only, without those of libraries."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if process_rank() == 0:
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        for message in _IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        warnings.showwarning = show
        # open_clip logs to the root logger while it builds a model.
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
