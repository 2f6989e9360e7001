"""Every word of the scene streams: names of what is drawn, and what questions are made of.

The tokenizer of a small language model is made from `corpus_texts`; numbers and the places of boxes
are written with the ten figures, so it should split those.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
CORNERS = PLACES[:4]
COUNTS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
)
LETTERS = ("A", "B", "C", "D")
OBJECTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "signs": ("ring", "moon", "arrow", "hexagon"),
        "street": ("house", "tree", "car", "boat"),
        "animals": ("fish", "cat", "bird", "snail"),
        "home": ("flower", "face", "key", "cup"),
    }
)
"""Task of `scenes_words` -> its new names."""
OBJECT_NAMES = tuple(name for names in OBJECTS.values() for name in names)


def plural(shape: str) -> str:
    """Write the plural of a shape: "star" to "stars", "cross" to "crosses"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def with_article(words: str) -> str:
    """Put "a" or "an" in front: "an orange star"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def count_things(count: int, one: str, many: str) -> str:
    """Write a count: "a red star", "three red stars", "no red stars"."""
    return with_article(one) if count == 1 else f"{COUNTS[count]} {many}"


def join(parts: list[str]) -> str:
    """Join phrases as one speaks: "x", "x and y", "x, y and z"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
