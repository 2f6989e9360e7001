"""``mmcl data convert``: convert your own data to shards and a card, or to a card alone."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress

from mmcl.cli.parser import CommandParser, UsageError, count_or_fraction
from mmcl.data.convert.convert import ConvertedTasks, convert, is_instructions, open_input
from mmcl.data.convert.inputs.columns import ColumnOptions
from mmcl.data.convert.record import ConvertOptions, InputData
from mmcl.data.convert.task_files import InPlace
from mmcl.evaluation.scorers import find_scorer
from mmcl.report.formatting import sanitize
from mmcl.streams.registry import CLASS_SPLIT, add_class_split

Made = TypeVar("Made")

_LISTED = 5
_EXAMPLES = """\
SOURCE is one of
  a folder   <class>/image.jpg, or train/<class>/... and test/<class>/...; or images with a text
             beside each (1.jpg and 1.txt), or listed in metadata.csv or metadata.jsonl
  a table    .csv, .tsv or .parquet (or a folder of them) with the columns path,text (captions),
             path,label (classes), path,question,answer, also with choices or A,B,C,D and hint, or
             conversations or messages; also task and split (train, val, test)
  a JSON     list or lines of {id, image, conversations: [{from, value}, ...]}, of {messages:
             [{role, content}, ...], images}, of {query, response, history, system}, of
             {question_id, image, text, answer}; or of rows with the columns of a table

Other usual names of columns are known (filepath, title, fine_label), see docs/data.md. What is not
used is listed; what looks as if it should be is refused unless you choose or ignore it.

  mmcl data convert flowers/ --out data/flowers --classes_per_task 10
  mmcl data convert cifar100/ --out data/cifar100 --class_order_seed 1993 \\
      --first_task_classes 50 --classes_per_task 10          # B50-Inc10, as in PILOT
  mmcl data convert captions.csv --images images --out data/captions --task_column year
  mmcl data convert cc3m.tsv --image_column url_path --text_column title --out data/cc3m
  mmcl data convert imagenet100/ --class_names names.txt --out data/imagenet100
  mmcl data convert llava.json --images images --out data/llava --in_place
  mmcl data convert more.json --images images --test test.json --references coco.json \\
      --scorer caption --out data/llava --name more --append

Images (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF) are copied byte for byte. Everything is read
once before anything is written, and all bad samples are reported at once. The same command resumes
if it was stopped.
"""


def main(argv: Sequence[str]) -> int:
    """Convert an image folder, a table or LLaVA-style JSON to a stream, or to more tasks of one."""
    parser = CommandParser(
        prog="mmcl data convert",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(parser)
    _add_tasks(parser)
    add_options(parser)
    given = parser.parse_args(argv)
    _expect_consistent(given)
    options = _options(given)
    train, test = _inputs(given)
    images = (given.images or [given.source.parent])[0]
    test_images = (given.test_images or [images])[0]
    in_place = InPlace(images, test_images, given.answer_field, given.follow_links)
    card, converted = with_bar(
        convert, train, test, given.out, options, append=given.append, card=given.card,
        in_place=in_place if given.in_place else None, look_up=_known_names,
        allow_duplicates=given.allow_duplicates,
    )  # fmt: skip
    report(card, [converted])
    return 0


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add, add_group = parser.add_argument, parser.add_mutually_exclusive_group
    add("source", type=Path, metavar="SOURCE", help="folder, csv, tsv, parquet or JSON")
    add("--out", type=Path, required=True, help="folder of shards and card")
    add("--images", type=Path, nargs="+", metavar="FOLDER",
        help="folders from which image paths start, in this order (that of SOURCE)")  # fmt: skip
    add("--test", type=Path, help="source of the test samples")
    add("--test_images", type=Path, nargs="+", metavar="FOLDER",
        help="folders of the images of --test (as --images)")  # fmt: skip
    add("--follow_links", action="store_true",
        help="also read images to which links in these folders lead outside of them")  # fmt: skip
    levels = add_group()
    levels.add_argument("--tasks_are_folders", action="store_const", const=1, dest="task_level",
        help="SOURCE has the layout <task>/<class>/image.jpg, as --task_level 1")  # fmt: skip
    levels.add_argument("--task_level", type=int, choices=(1, 2),
        help="folders: level that names the task; 2: <class>/<task>/image.jpg")  # fmt: skip
    add("--task_column", metavar="NAME",
        help="tables: column that states the task; JSON: key of each record")  # fmt: skip
    for use in ("image", "text", "label", "split"):
        add(f"--{use}_column", metavar="NAME",
            help=f"tables: column of the {use} (by its name); JSON: key")  # fmt: skip
    add("--ignore_columns", nargs="+", default=(), metavar="NAME",
        help="columns or keys that are harmless; folders: names of files or folders")  # fmt: skip
    add("--columns", metavar="NAMES",
        help="names of the columns of a csv or txt without a header: path,label")  # fmt: skip
    add("--class_names", type=Path, metavar="FILE",
        help="names of classes in prompts: a line each, csv or JSON, see docs/data.md")  # fmt: skip
    add("--in_place", action="store_true",
        help="write no shards: the card refers to the JSON and its images")  # fmt: skip
    add("--answer_field", default="answer",
        help="JSON: key of the right answer in records with text (%(default)s)")  # fmt: skip
    add("--references", type=Path,
        help="JSON: file of all reference answers of --test, or of SOURCE without --test "
        "(COCO captions, TextVQA)")  # fmt: skip


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    default = ConvertOptions
    add = parser.add_argument
    add("--name", help="name of the stream and its card (SOURCE without its extension)")
    add("--task", default="", help="name of the task, if there is only one (as --name)")
    add("--append", action="store_true", help="append the tasks to the card in --out")
    add("--allow_duplicates", action="store_true",
        help="append a task also if all its samples are those of another task")  # fmt: skip
    add("--card", type=Path, help="card to append to, if --out has several")
    add("--task_type", choices=("classification", "captioning", "retrieval", "instruction"),
        help="type of the tasks (derived from the columns)")  # fmt: skip
    add("--test_fraction", type=float, default=default.test_fraction,
        help="without a test split: fraction of the samples to hold out (%(default)s)")  # fmt: skip
    add_class_split(parser)
    add("--task_order", nargs="+", default=(), metavar="TASK",
        help="all tasks in their order (--task_column, --task_level: by value)")  # fmt: skip
    add("--scenario", choices=("class", "domain", "task"),
        help="class: new classes per task; domain: same; task: task known at test")  # fmt: skip
    add("--scorer", default=default.scorer, help="scorer of answers (%(default)s)")
    add("--max_new_tokens", type=int, help="length of an answer (64)")
    add("--license", default="", help="license of the data, for the card")
    add("--shard_samples", type=int, default=default.shard_samples,
        help="samples per shard (%(default)s)")  # fmt: skip


def add_options(parser: argparse.ArgumentParser, max_bad_fraction: float = 0.0) -> None:
    """Add the options that every conversion has; see `shared_options`."""
    add = parser.add_argument
    add("--max_samples", type=count_or_fraction,
        help="200: at most 200 samples per file; 0.02: that fraction")  # fmt: skip
    add("--max_bad_fraction", type=float, default=max_bad_fraction,
        help="fraction of bad samples that may be left out (%(default)s)")  # fmt: skip
    add("--skip_bad", action="store_true", help="leave out bad samples, however many")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--shard_mb", type=float, default=256, help="size of a shard in MiB (%(default)s)")
    add("--num_workers", type=int, default=min(4, os.cpu_count() or 1),
        help="processes (%(default)s)")  # fmt: skip


def shared_options(given: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_options` as arguments of `ConvertOptions`."""
    return {
        "seed": given.seed,
        "max_samples": given.max_samples,
        "shard_bytes": int(given.shard_mb * (1 << 20)),
        "max_bad_fraction": 1.0 if given.skip_bad else given.max_bad_fraction,
        "num_workers": given.num_workers,
    }


def _expect_consistent(given: argparse.Namespace) -> None:
    find_scorer(given.scorer)
    if given.card is not None and not given.append:
        raise UsageError("--card names a card to append to: give --append as well")
    if given.allow_duplicates and not given.append:
        raise UsageError("--allow_duplicates is for --append: leave it out, or give --append")
    if given.in_place and not all(map(is_instructions, filter(None, (given.source, given.test)))):
        raise UsageError("--in_place needs LLaVA-style JSON, folders and tables become shards")
    if given.in_place and max(len(given.images or ()), len(given.test_images or ())) > 1:
        raise UsageError("--in_place uses one folder of images: give one with --images")
    if given.in_place and given.references is not None:
        raise UsageError("--in_place cannot add --references to a JSON: leave out one of them")


def _options(given: argparse.Namespace) -> ConvertOptions:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", given.source.resolve().stem).strip("-_")[:64]
    own = (
        *CLASS_SPLIT, "task", "scenario", "test_fraction", "shard_samples", "license", "scorer",
        "max_new_tokens", "class_names",
    )  # fmt: skip
    return ConvertOptions(
        name=given.name or stem or "mine",
        task_order=tuple(given.task_order),
        **{name: getattr(given, name) for name in own},
        **shared_options(given),
    )


def _inputs(given: argparse.Namespace) -> tuple[InputData, InputData | None]:
    """Open SOURCE, and --test or None."""
    names = ("image_column", "text_column", "label_column", "split_column")
    columns = ColumnOptions(
        **{name: getattr(given, name) for name in names},
        ignore_columns=tuple(given.ignore_columns),
        columns=tuple(name.strip() for name in (given.columns or "").split(",") if name.strip()),
        follow_links=given.follow_links,
    )
    opened = partial(
        open_input, task_type=given.task_type, task_column=given.task_column,
        task_level=given.task_level, answer_field=given.answer_field, options=columns,
        in_place=given.in_place,
    )  # fmt: skip
    if given.test is None:
        return opened(given.source, images=given.images, references=given.references), None
    train, images = opened(given.source, images=given.images), given.test_images or given.images
    return train, opened(given.test, images=images, references=given.references)


def _known_names(classes: Sequence[str]) -> dict[str, str]:
    """Return the names of the WordNet ids among classes."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in classes):
        return {}
    from mmcl.models.open_clip.wordnet_names import wordnet_names  # takes seconds to import

    return wordnet_names(classes)


def with_bar(work: Callable[..., Made], *arguments: Any, **options: Any) -> Made:
    """Run a conversion, which takes these arguments and ``progress``, with a progress bar."""
    with Progress(transient=True) as bar:
        line = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            if done % 50 == 0 or done == total:
                bar.update(line, description=what, completed=done, total=total)

        return work(*arguments, progress=show, **options)


def report(card: Path, converted: Sequence[ConvertedTasks]) -> None:
    """Print what was converted, what was left out, and the path of the card."""
    for one in converted:
        for entry in one.entries:
            classes = f", {len(entry['classes'])} classes" if entry.get("classes") else ""
            scorer = f", scored by {entry['scorer']}" if "scorer" in entry else ""
            print(
                f"{sanitize(entry['name']):16} {entry['size']:,} training and "
                f"{entry['test_size']:,} test samples{classes}{scorer}"
            )
        for note in one.notes:
            print(sanitize(note))
        if one.num_leaked:
            print(f"{one.num_leaked:,} test samples have an image that is also a training image")
        if one.num_bad:
            first = f"the first {len(one.left_out):,} are " * (one.num_bad > len(one.left_out))
            print(f"{one.num_bad:,} bad samples left out ({first}listed in {one.left_out_file}):")
            for bad in one.left_out[:_LISTED]:
                print(f"- {bad}")
    print(card)
