"""``mmcl fit | validate | test | predict``: Lightning's own commands on one task."""

from __future__ import annotations

from collections.abc import Sequence

from mmcl.lightning.cli import ContinualCLI


def main(argv: Sequence[str]) -> int:
    """Run one of Lightning's commands; ``predict`` prints a line for every row."""
    cli = ContinualCLI(argv, subcommands=True, program="mmcl")
    if argv[0] == "predict" and cli.trainer.is_global_zero:
        for answers in cli.trainer.predict_loop.predictions:
            print("\n".join(f"{key}\t{answer}" for key, answer in answers))
    return 0
