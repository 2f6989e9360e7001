"""The parser of the small commands: what cannot be understood is raised as a sentence."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


class UnknownWords(ValueError):
    """The words of a command cannot be understood."""

    exit_status = 2


class CommandParser(argparse.ArgumentParser):
    """An argument parser that leaves it to its caller to say what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise the fault with the line that shows how the command is used.

        Raises:
            UnknownWords: always.
        """
        usage = " ".join(self.format_usage().split())
        raise UnknownWords(f"{message} ({usage})")


def process_rank() -> int:
    """Return the rank that a launcher gave this process in its environment, 0 without one."""
    found = [os.environ[name] for name in _RANKS if name in os.environ]
    return int(found[0]) if found else 0
