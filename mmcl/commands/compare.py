"""``mmcl compare <run> <run> ...``: one table and one figure over runs and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser
from mmcl.report import compare


def main(argv: Sequence[str]) -> int:
    """Compare runs of one stream: mean and deviation over seeds, as table, page and figure."""
    parser = CommandParser(prog="mmcl compare", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, or their names under runs/")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="(%(default)s)")
    given = parser.parse_args(argv)
    found = compare([run_folder(name) for name in given.runs])
    found.write(given.out)
    print(found.text())
    print(f"figure and page: {given.out}")
    return 0
