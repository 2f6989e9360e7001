"""``mmcl data convert``: LLaVA-style instruction files and pictures become a stream."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.data_options import add_options, options_of, report, with_bar
from mmcl.commands.words import CommandParser
from mmcl.data.builders.llava_convert import convert
from mmcl.data.builders.llava_task import LlavaTask, Options
from mmcl.metrics.scorers import find_scorer

_FORMATS = """\
TRAIN is a JSON list (or JSON lines) of {id, image, conversations: [{from: human, value}, {from:
gpt, value}]}; --test may also have {question_id, image, text, answer}. Image paths start from
--images. Texts and picture files are copied as they are. A stopped command goes on where it was.

  mmcl data convert train.json --images pictures --test test.json --name vqa --out data/mine
  mmcl data convert more.json --images pictures --name counting --out data/mine --append
"""


def main(argv: Sequence[str]) -> int:
    """Make a stream, or one more task of it."""
    parser = CommandParser(
        prog="mmcl data convert",
        description=main.__doc__,
        epilog=_FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _describe(parser)
    return _convert(parser.parse_args(argv))


def _describe(parser: argparse.ArgumentParser) -> None:
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
    add_options(parser)


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
    card, built = with_bar(
        lambda progress: convert(
            task,
            given.out,
            options_of(given),
            append=given.append,
            card=given.card,
            licence=given.licence,
            progress=progress,
        )
    )
    report(card, [built])
    return 0
