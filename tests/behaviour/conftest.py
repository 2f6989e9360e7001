"""Fixtures of the command tests and of small runs, for the tests of behaviour."""

from tests.cli.conftest import desk, finished, learned
from tests.lightning.conftest import runs

__all__ = ["desk", "finished", "learned", "runs"]
