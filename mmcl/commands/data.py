"""``mmcl data``: list and build the streams that mmcl can make, convert data of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from mmcl.commands.words import CommandParser
from mmcl.data.builders import script
from mmcl.data.builders.llava_convert import BuiltTask, convert
from mmcl.data.builders.llava_survey import Told
from mmcl.data.builders.llava_task import LlavaTask, Options
from mmcl.data.builders.public_sets import build_set, list_sets, read_set
from mmcl.data.builders.streams import STREAMS, find_stream
from mmcl.metrics.scorers import find_scorer

Made = TypeVar("Made")

_NAMED = 5
_FORMATS = """\
TRAIN is a JSON list (or JSON lines) of {id, image, conversations: [{from: human, value}, {from:
gpt, value}]}; --test may also have {question_id, image, text, answer}. Image paths start from
--images. Texts and picture files are copied as they are. A stopped command goes on where it was.

  mmcl data convert train.json --images pictures --test test.json --name vqa --out data/mine
  mmcl data convert more.json --images pictures --name counting --out data/mine --append
"""
_LAYOUT = """\
The set must lie in --source as it is published; what is missing is listed with its address.
Nothing is downloaded. A path of a description of your own (.yaml) takes the place of the name.
"""


def main(argv: Sequence[str]) -> int:
    """List the streams that mmcl can make, build one, or convert LLaVA-style data."""
    parser = CommandParser(prog="mmcl data", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="name the streams and sets, a line each")
    build = actions.add_parser(
        "build",
        help="build one: mmcl data build digits",
        description="Build a stream. `mmcl data build NAME --help` lists the options of each.",
    )
    known = (*STREAMS, *list_sets())
    build.add_argument("stream", metavar="NAME", help=f"one of {', '.join(known)}")
    _describe_convert(actions.add_parser("convert", help="a stream from LLaVA-style JSON"))
    if argv[:1] == ["build"] and argv[1:] and not argv[1].startswith("-"):
        return _build(argv[1], argv[2:])
    given = parser.parse_args(argv)
    if given.action == "convert":
        return _convert(given)
    for name, stream in STREAMS.items():
        cards = ", ".join(Path(card).stem for card in stream.cards)
        print(f"{name:16} {stream.summary} (cards: {cards})")
    for name in list_sets():
        print(f"{name:16} {read_set(name).summary} (needs --source)")
    return 0


def _build(name: str, rest: Sequence[str]) -> int:
    if name in list_sets() or name.endswith((".yaml", ".yml")):
        return _build_set(name, rest)
    try:
        stream, _ = find_stream(name)
    except ValueError as error:
        raise ValueError(f"{error}, or of the public sets {', '.join(list_sets())}") from None
    script.main(next(key for key, value in STREAMS.items() if value is stream), rest)
    return 0


def _build_set(name: str, rest: Sequence[str]) -> int:
    described = read_set(name)
    tasks = ", ".join(task.name for task in described.tasks)
    parser = CommandParser(
        prog=f"mmcl data build {name}",
        description=f"{described.summary}. {_LAYOUT}\nGet it: {described.get}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder into which the set was downloaded"
    )
    out = Path("data") / described.name
    parser.add_argument("--out", type=Path, default=out, help="folder (%(default)s)")
    parser.add_argument("--tasks", default="", help=f"some of {tasks}; default: all")
    _add_options(parser)
    given = parser.parse_args(rest)
    chosen = [task.strip() for task in given.tasks.split(",") if task.strip()]
    card, built = _with_bar(
        lambda progress: build_set(
            described, given.source, given.out, _options(given), tasks=chosen, progress=progress
        )
    )
    _report(card, built)
    return 0


def _describe_convert(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = "Make a stream, or one more task of it.", _FORMATS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("train", type=Path, metavar="TRAIN", help="instruction file to learn from")
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--test", type=Path, help="instruction file to score on")
    parser.add_argument("--test_images", type=Path, help="folder of its pictures (as --images)")
    parser.add_argument(
        "--references", type=Path, help="file of all right answers of --test (COCO captions, VQA)"
    )
    parser.add_argument("--name", required=True, help="of the task, and of a new stream")
    parser.add_argument("--out", type=Path, required=True, help="folder of shards and card")
    parser.add_argument(
        "--append", action="store_true", help="put the task at the end of the card in --out"
    )
    parser.add_argument("--card", type=Path, help="which card, where --out has several")
    parser.add_argument("--scorer", default="exact", help="what judges answers (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer (64)")
    parser.add_argument(
        "--answer_field", default="answer", help="of --test: the right answer (%(default)s)"
    )
    parser.add_argument("--licence", default="", help="of the data, for the card")
    parser.add_argument(
        "--hold_out",
        type=float,
        default=Options.hold_out,
        help="without --test: share of the samples to test on, whole pictures (%(default)s)",
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=_number, help="200 = so many samples of each file, 0.02 = that share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument(
        "--shard_mb", type=float, default=256, help="size of a shard in MiB (%(default)s)"
    )
    parser.add_argument(
        "--max_faults",
        type=float,
        default=Options.max_faults,
        help="share of samples that may be left out as unusable (%(default)s)",
    )


def _number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _options(given: argparse.Namespace) -> Options:
    return Options(
        seed=given.seed,
        hold_out=getattr(given, "hold_out", Options.hold_out),
        limit=given.limit,
        shard_bytes=int(given.shard_mb * (1 << 20)),
        max_faults=given.max_faults,
    )


def _convert(given: argparse.Namespace) -> int:
    if not given.images.is_dir():
        raise FileNotFoundError(f"there is no folder {given.images}: correct --images")
    find_scorer(given.scorer)
    if given.card is not None and not given.append:
        raise ValueError("--card names a card to append to: give --append as well")
    task = LlavaTask(
        name=given.name,
        train=given.train,
        images=(given.images,),
        test=given.test,
        test_images=(given.test_images,) if given.test_images else (),
        references=given.references,
        answer_field=given.answer_field,
        scorer=given.scorer,
        max_new_tokens=given.max_new_tokens,
    )
    card, built = _with_bar(
        lambda progress: convert(
            task,
            given.out,
            _options(given),
            append=given.append,
            card=given.card,
            licence=given.licence,
            progress=progress,
        )
    )
    _report(card, [built])
    return 0


def _with_bar(work: Callable[[Told], Made]) -> Made:
    """Run a build while a bar shows what it is at."""
    with Progress(transient=True) as bar:
        line = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            if done % 50 == 0 or done == total:
                bar.update(line, description=what, completed=done, total=total)

        return work(show)


def _report(card: Path, built: Sequence[BuiltTask]) -> None:
    for one in built:
        entry = one.entry
        print(
            f"{entry['name']:16} {entry['size']:,} to learn from, {entry['test_size']:,} to test "
            f"on, scored by {entry['scorer']}"
        )
        if one.left_out:
            listed = card.parent / f"{entry['name']}.left_out.txt"
            print(f"{'':16} {len(one.left_out):,} left out (all in {listed}):")
            for fault in one.left_out[:_NAMED]:
                print(f"{'':16} - {fault}")
    print(card)
