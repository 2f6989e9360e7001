"""Table of the streams that mmcl can build, of their builders, and the command that runs one.

A builder is imported only when it is used, so listing the streams is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.progress import Progress

Builder = Callable[..., Any]
"""``build(folder, seed=0, progress=None)``: writes shards and cards, returns the card path(s)."""


@dataclass(frozen=True)
class Stream:
    """Entry of the table of streams.

    Args:
        module: dotted name of the builder's module.
        function: name of the builder in it.
        summary: one line.
        folder: default output folder, relative to the working directory.
        cards: file names of the cards; the first is the default for the stream's name.
    """

    module: str
    function: str
    summary: str
    folder: Path
    cards: tuple[str, ...]

    def builder(self) -> Builder:
        """Return the builder, imported now.

        Raises:
            ValueError: if a package that it needs is not installed.
        """
        try:
            function: Builder = getattr(import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            if (error.name or "mmcl").partition(".")[0] == "mmcl":
                raise
            raise ValueError(
                f"building this stream needs the package {error.name!r}, which is not installed: "
                'pip install "mmcl[streams]"'
            ) from None
        return function


STREAMS: Mapping[str, Stream] = MappingProxyType({
    "digits": Stream(
        "mmcl.streams.digits", "build",
        "1,797 real handwritten digits, two new classes in each of five tasks",
        Path("data/digits"), ("digits.yaml",)),
    "digits_domains": Stream(
        "mmcl.streams.digits", "build_domains",
        "the same ten digits in five looks: clean, inverted, noisy, rotated, striped",
        Path("data/digits_domains"), ("digits_domains.yaml",)),
    "emoji": Stream(
        "mmcl.streams.emoji", "build",
        "192 emoji from a font of this machine, by group, by year and by language of the name",
        Path("data/emoji"), ("emoji_groups.yaml", "emoji_years.yaml", "emoji_languages.yaml")),
    "glyphs": Stream(
        "mmcl.streams.glyphs", "build",
        "drawn shapes and characters, on which the built-in tiny CLIP was trained",
        Path("data/glyphs"), ("glyphs.yaml",)),
    "life": Stream(
        "mmcl.streams.life", "build",
        "stages of a model's life: emoji by year, captions of scans, classes; with probes",
        Path("data/life"), ("life.yaml",)),
    "scenes": Stream(
        "mmcl.streams.scenes", "build",
        "questions on drawn scenes: eight skills, five looks of one skill, sixteen new words",
        Path("data/scenes"), ("scenes.yaml", "scenes_looks.yaml", "scenes_words.yaml")),
    "scenes_pretraining": Stream(
        "mmcl.streams.scene_pretraining", "build",
        "captions and dialogues on drawn scenes, to pre-train a tiny LLaVA before `scenes`",
        Path("data/scenes_pretraining"), ("scenes_captions.yaml", "scenes_instructions.yaml")),
})  # fmt: skip


def find_stream(name: str) -> tuple[Stream, str]:
    """Find a stream by its name, or by the name of one of its cards.

    Args:
        name: for example ``emoji`` or ``emoji_years``.

    Returns:
        The stream, and the file name of the card.

    Raises:
        ValueError: if there is no such name, listing the known ones.
    """
    if name in STREAMS:
        return STREAMS[name], STREAMS[name].cards[0]
    cards = {
        Path(card).stem: (stream, card) for stream in STREAMS.values() for card in stream.cards
    }
    if name in cards:
        return cards[name]
    known = ", ".join(dict.fromkeys((*STREAMS, *cards)))
    raise ValueError(f"no stream {name!r} can be built: choose one of {known}")


def card_path(stream: str, root: Path) -> Path:
    """Return the path of a stream's card, which may not exist yet.

    Args:
        stream: name of a stream that mmcl can build, or the path of a card or of its folder.
        root: folder of the built streams.

    Raises:
        ValueError: if a folder holds no card or several, or there is no stream of this name.
    """
    given = Path(stream).expanduser()
    if given.is_dir():
        cards = sorted(given.glob("*.yaml"))
        if len(cards) != 1:
            raise ValueError(
                f"{given} holds {len(cards)} cards: give the path of one of them as data.stream"
            )
        return cards[0]
    if given.suffix in (".yaml", ".yml"):
        return given
    known, card = find_stream(stream)
    return root / known.folder.name / card


CLASS_SPLIT = ("classes_per_task", "first_task_classes", "class_order_seed")
"""Options that split classes into tasks when a stream is made."""


def add_class_split(parser: argparse.ArgumentParser) -> None:
    """Add the options that split classes into tasks, all None by default."""
    parser.add_argument("--classes_per_task", type=int, metavar="N",
        help="split the classes into tasks of this many (B0-Inc10: 10)")  # fmt: skip
    parser.add_argument("--first_task_classes", type=int, metavar="N",
        help="classes of the first task (B50-Inc10: 50; as --classes_per_task)")  # fmt: skip
    parser.add_argument("--class_order_seed", type=int, metavar="SEED",
        help="seed of the class order; iCaRL, PyCIL and PILOT: 1993 (natural order)")  # fmt: skip


def build_from_command_line(name: str, argv: Sequence[str] | None = None) -> None:
    """Build one stream from the command line.

    Args:
        name: key of `STREAMS`.
        argv: command-line options; None takes those of the process.
    """
    stream = STREAMS[name]
    program = None if argv is None else f"mmcl data build {name}"
    parser = argparse.ArgumentParser(program, description=stream.summary)
    parser.add_argument("--out", type=Path, default=stream.folder, help="folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    if name in ("emoji", "life"):
        parser.add_argument("--font", type=Path, help="color-emoji font; found by itself")
    if name == "digits":
        add_class_split(parser)
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    # The folder of a stream's name is what `data.stream: digits` reads, whatever was built there.
    if out == stream.folder and any(options.get(key) is not None for key in CLASS_SPLIT):
        parser.error(f"{out} is the folder of data.stream {name} as it is: give another --out")
    options = {key: value for key, value in options.items() if value is not None}
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
