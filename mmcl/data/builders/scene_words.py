"""Every word of the scene streams: names of what is drawn, and what questions are made of.

The tokenizer of a small language model is made from `corpus_texts`. Numbers and the edges of boxes
are written with the ten figures, one after the other, so it should take figures one by one.
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
SIZES = ("small", "big")
PLATE_COLOURS = ("black", "white")  # besides those of shapes
FIGURES = tuple("0123456789")
SIGNS = tuple(",.?[]")
_OTHER_WORDS = """
    A Answer B C Can Count D Describe Did From Give How In Is Name Read Tell What Where Which
    a above all an and are as at below big bigger bottom box caption colour corner count do does
    draw equal equally everything figure figures find first form from has have here in is it large
    larger last left letter long many me middle more nothing number of on or part pattern picture
    place plate reach reaches right scene see sentence shape size somebody space take than the
    there thing things this to top we what where which with word words written yes you
"""


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


def corpus_texts() -> tuple[str, ...]:
    """List every distinct word, figure and sign of the scene streams, sorted.

    Case counts: questions begin with a capital letter, answers do not.
    """
    shapes = (*SHAPES, *(plural(shape) for shape in SHAPES), *OBJECT_NAMES)
    named = (*COLOURS, *PLATE_COLOURS, *shapes, *TEXTURES, *SIZES, *COUNTS)
    return tuple(sorted({*named, *_OTHER_WORDS.split(), *FIGURES, *SIGNS}))
