"""Files of the streams that mmcl builds: tables of the package, PNG samples, cards with shards."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from mmcl.data.shards.stream_writer import Progress, ShardPlan, build_stream, card_counts, card_text

Card = dict[str, Any]
"""Fields of a card; ``eval_only`` may be missing."""


def read_table(name: str) -> list[list[str]]:
    """Read a table of this package (``.tsv``), without comments and heading."""
    text = (resources.files("mmcl.streams") / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split("\t") for line in lines[1:]]


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    """Return an image as PNG; the options are Pillow's."""
    png = io.BytesIO()
    image.save(png, "PNG", **options)
    return png.getvalue()


def write_stream(
    name: str,
    folder: Path,
    cards: Sequence[tuple[Card, Sequence[ShardPlan]]],
    recipe: Mapping[str, Any],
    progress: Progress | None,
    *,
    made_by: str = "",
    samples: str = "",
) -> list[Path]:
    """Write the shards of all cards, then the cards with hashes and counts of their shards.

    Args:
        name: of the stream.
        folder: output folder of shards and cards.
        cards: each card and its shards, which cards may share.
        recipe: all that the bytes depend on, with the seed as ``seed``.
        progress: called with (samples done, samples in total).
        made_by: command in the header of the cards; empty = ``mmcl data build`` with the seed.
        samples: number of samples in the header; empty = a card's samples and shards.

    Returns:
        The paths of the cards, in their order.
    """
    files = [f"{card['name']}.yaml" for card, _ in cards]
    command = made_by or f"mmcl data build {name} --seed {recipe['seed']}"

    def texts(hashes: Mapping[str, str]) -> dict[str, str]:
        found = {}
        for file, (card, plans) in zip(files, cards, strict=True):
            counts = card_counts(plans)
            header = (
                f"Made by: {command}",
                f"License: {card['license']}",
                f"Samples: {samples or f'{sum(counts.values())} in {len(plans)} shards'}",
            )
            own = {"tasks": card["tasks"], "eval_only": card.get("eval_only", [])}
            own |= {"hashes": {shard: hashes[shard] for shard in counts}, "counts": counts}
            rest = {key: value for key, value in card.items() if key not in own}
            found[file] = card_text({**rest, **own}, header)
        return found

    plans = list({plan.name: plan for _, own in cards for plan in own}.values())
    return build_stream(folder, name, plans, files, texts, recipe=recipe, progress=progress)
