"""``mmcl data remove``: take a task, an eval-only task or a source off a card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmcl.cli.data.data_validate import card_argument
from mmcl.cli.parser import CommandParser
from mmcl.data.convert.task_removal import ROLES, SECTIONS, RemovedTask, remove_task
from mmcl.report.formatting import sanitize, shorten

_EXAMPLES = """\
  mmcl data remove data/flowers/flowers.yaml spring
  mmcl data remove data/flowers/flowers.yaml spring --delete_shards

Shards are kept unless --delete_shards is given; then those in the card's folder that no card of
the folder lists are deleted. The numbers of all classes stay as they are.
"""
_SHOWN = 5
_RUNS = {
    "tasks": "a run that has trained on it is refused with the card as it is now: start another "
    "one (--run_name)",
    "eval_only": "a finished run keeps its column of it, one that resumes has none any more",
    "sources": "no task mixes it in, so finished runs are as before",
}
"""What a removal means to runs that were started with the card."""


def main(argv: Sequence[str]) -> int:
    """Take a task, an eval-only task or a source off a card."""
    parser = CommandParser(
        prog="mmcl data remove",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("card", type=card_argument, metavar="CARD",
        help="card of the stream: a .yaml file, its folder, or a stream's name")  # fmt: skip
    add("task", metavar="TASK", help="name of the task, eval-only task or source")
    add("--section", choices=SECTIONS, help="where it is, if two have this name")
    add("--delete_shards", action="store_true", help="delete its shards that no card lists")
    given = parser.parse_args(argv)
    removed = remove_task(given.card, given.task, given.section, delete_shards=given.delete_shards)
    for line in _lines(given, removed):
        print(line)
    print(given.card)
    return 0


def _lines(given: argparse.Namespace, removed: RemovedTask) -> list[str]:
    lines = [f"{ROLES[removed.section]} '{sanitize(given.task)}' is no longer on the card"]
    if removed.dropped_classes:
        lines.append(f"classes that only it had are removed: {_listed(removed.dropped_classes)}")
    if removed.unused_classes:
        lines.append(
            "classes that no task has are kept, because the numbers of those after them must not "
            f"change: {_listed(removed.unused_classes)}"
        )
    if removed.unused and given.delete_shards:
        lines.append(f"{len(removed.unused):,} shards were deleted: {_listed(removed.unused)}")
    elif removed.unused:
        lines.append(
            f"{len(removed.unused):,} shards are kept, and no card of the folder lists them any "
            f"more (--delete_shards deletes them): {_listed(removed.unused)}"
        )
    for reason in dict.fromkeys(removed.kept.values()):
        shards = [shard for shard, why in removed.kept.items() if why == reason]
        lines.append(f"{_listed(shards)}: kept, {reason}")
    if removed.section == "tasks" and removed.position[1]:
        lines.append(
            f"task {removed.position[0]} was removed, so the numbers of the {removed.position[1]} "
            "tasks after it (data.task_order) are one less"
        )
    if removed.section == "sources" and removed.position[1]:
        lines.append(
            f"the numbers of the {removed.position[1]} sources after it are one less: a run that "
            "is not finished would augment their samples differently, so finish it first"
        )
    return [*lines, _RUNS[removed.section]]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(shorten(sanitize(name), 60) for name in names[:_SHOWN]) + more
