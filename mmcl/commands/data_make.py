"""``mmcl data make``: data of one's own become shards and a card, or a card that points at them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.data_options import with_bar
from mmcl.commands.words import CommandParser, UnknownWords
from mmcl.data.making.loose import Loose
from mmcl.data.making.open_source import is_instructions, open_source
from mmcl.data.making.options import MakeOptions
from mmcl.data.making.stream import MadeStream, make
from mmcl.metrics.scorers import find_scorer
from mmcl.report.words import clean

_NAMED = 5
_EXAMPLES = """\
SOURCE is one of
  a folder   <class>/picture.jpg, or train/<class>/... and test/<class>/...
  a table    .csv, .tsv or .parquet (or a folder of these) with the columns path,text (captions),
             path,label (classes) or path,question,answer; also task and split (train, test)
  a JSON     LLaVA-style list or lines of {id, image, conversations}

  mmcl data make flowers/ --out data/flowers --classes_per_task 10
  mmcl data make captions.csv --images pictures --out data/captions
  mmcl data make llava.json --images pictures --out data/llava --in_place

Pictures (JPEG, PNG, WebP) are copied byte for byte. Everything is read once before anything is
written, and all faults are told. A stopped command goes on where it was.
"""


def main(argv: Sequence[str]) -> int:
    """Make a stream, or more tasks of it, from a folder, a table or LLaVA-style JSON."""
    parser = CommandParser(
        prog="mmcl data make",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _describe(parser)
    given = parser.parse_args(argv)
    find_scorer(given.scorer)
    if given.card is not None and not given.append:
        raise UnknownWords("--card names a card to append to: give --append as well")
    if given.in_place and not is_instructions(given.source):
        raise UnknownWords("--in_place needs LLaVA-style JSON, folders and tables become shards")
    options = _options(given)
    made = with_bar(
        lambda progress: make(
            open_source(given.source, given.kind, given.images, given.tasks_are_folders),
            None if given.test is None else open_source(
                given.test, given.kind, given.test_images or given.images, given.tasks_are_folders
            ),
            given.out,
            options,
            append=given.append,
            card=given.card,
            loose=_loose(given),
            progress=progress,
        )
    )  # fmt: skip
    _report(made)
    return 0


def _describe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder, csv, tsv, parquet or JSON")
    add("--out", type=Path, required=True, help="folder of shards and card")
    add("--name", help="of the stream and its card (as SOURCE is called)")
    add("--task", default="", help="name of the task, where there is one (as --name)")
    add("--append", action="store_true", help="put the tasks at the end of the card in --out")
    add("--card", type=Path, help="which card, where --out has several")
    add("--kind", choices=("classify", "caption", "retrieve", "answer"),
        help="of the tasks (as the columns allow)")  # fmt: skip
    add("--images", type=Path, help="folder from which picture paths start (that of SOURCE)")
    add("--test", type=Path, help="a second source, to test on")
    add("--test_images", type=Path, help="folder of its pictures (as --images)")
    add("--test_share", type=float, default=MakeOptions.test_share,
        help="without a test part: share of the samples to test on (%(default)s)")  # fmt: skip
    add("--classes_per_task", type=int, help="cut the classes into tasks of so many")
    add("--tasks_are_folders", action="store_true",
        help="a folder holds <task>/<class>/picture.jpg")  # fmt: skip
    add("--scenario", choices=("class", "domain", "task"),
        help="class: new classes come; domain: they stay; task: told at test")  # fmt: skip
    add("--in_place", action="store_true", help="write no shards, point at the JSON and pictures")
    add("--skip_bad", action="store_true", help="leave out what cannot be used")
    add("--scorer", default=MakeOptions.scorer, help="what judges answers (%(default)s)")
    add("--licence", default="", help="of the data, for the card")
    add("--seed", type=int, default=0, help="of the held-out share (%(default)s)")
    add("--shard_samples", type=int, default=MakeOptions.shard_samples,
        help="samples of a shard (%(default)s)")  # fmt: skip
    add("--shard_mb", type=float, default=256, help="size of a shard in MiB (%(default)s)")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1),
        help="processes (%(default)s)")  # fmt: skip


def _options(given: argparse.Namespace) -> MakeOptions:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", given.source.resolve().stem).strip("-_")[:64]
    return MakeOptions(
        name=given.name or stem or "mine",
        task=given.task,
        scenario=given.scenario,
        classes_per_task=given.classes_per_task,
        test_share=given.test_share,
        seed=given.seed,
        shard_samples=given.shard_samples,
        shard_bytes=int(given.shard_mb * (1 << 20)),
        skip_bad=given.skip_bad,
        workers=given.workers,
        licence=given.licence,
        scorer=given.scorer,
    )


def _loose(given: argparse.Namespace) -> Loose | None:
    if not given.in_place:
        return None
    images = given.images or given.source.parent
    return Loose(images, given.test_images or images)


def _report(made: MadeStream) -> None:
    for entry in made.entries:
        classes = f" of {len(entry['classes'])} classes" if entry.get("classes") else ""
        print(
            f"{clean(entry['name']):16} {entry['size']:,} to learn from, "
            f"{entry['test_size']:,} to test on{classes}"
        )
    if made.twins:
        print(f"{made.twins:,} test samples have a picture that is also learned from")
    if made.faults:
        print(f"{made.faults:,} left out:")
        for fault in made.left_out[:_NAMED]:
            print(f"- {fault}")
    print(made.card)
