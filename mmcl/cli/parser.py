"""Argument parser of the small commands, which raises its errors as sentences."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class UsageError(ValueError):
    """Error in the arguments of a command; its exit status is 2."""

    exit_status = 2


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises an error instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the error with the usage line of the command.

        Raises:
            UsageError: always.
        """
        usage = " ".join(self.format_usage().split())
        raise UsageError(f"{message} ({usage})")


def refuse_renamed(name: str, renamed: Mapping[str, str]) -> None:
    """Check that a command is not called by its old name.

    Raises:
        UsageError: naming the new name.
    """
    if name in renamed:
        raise UsageError(f"the command '{name}' is called '{renamed[name]}' now")


def refuse_renamed_options(words: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Check that no option is called by its old name.

    Raises:
        UsageError: naming the new name.
    """
    for word in words:
        old = word.partition("=")[0]
        if old in renamed:
            raise UsageError(f"the option {old} is called {renamed[old]} now")


def count_or_fraction(text: str) -> int | float:
    """Parse ``max_samples``: "200" is a count, "0.02" a fraction."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def process_rank() -> int:
    """Return the rank of this process from its launcher's environment, 0 without one."""
    ranks = [os.environ[name] for name in _RANK_VARIABLES if name in os.environ]
    return int(ranks[0]) if ranks else 0
