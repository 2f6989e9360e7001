"""Command line of the build scripts in `datasets/`: options, a progress bar, the card paths.

A file of its own: the only one of this folder that prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from mmcl.streams.registry import STREAMS


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Build one stream from the command line.

    Args:
        name: key of `STREAMS`.
        argv: command-line options; None takes those of the process.
    """
    stream = STREAMS[name]
    parser = argparse.ArgumentParser(description=stream.summary)
    parser.add_argument("--out", type=Path, default=stream.folder, help="folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    if name == "emoji":
        parser.add_argument("--font", type=Path, help="colour-emoji font; found by itself")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    with Progress() as bar:
        line = bar.add_task(f"building {name}")
        try:
            stream.builder()(
                out,
                progress=lambda done, total: bar.update(line, completed=done, total=total),
                **options,
            )
        except (OSError, ValueError) as error:
            bar.stop()
            parser.exit(1, f"{error}\n")
        for card in stream.cards:
            bar.console.print(out / card)
