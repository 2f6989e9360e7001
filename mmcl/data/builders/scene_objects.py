"""Sixteen small drawings put together from simple forms: a house, a fish, a cup and so on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

# A form is "tone kind numbers": the tone is main, dark, light or none (a hole); the kind is oval or
# box (left upper right lower) or poly (x y x y ...), in hundredths of the drawing.
_PETALS = "; ".join(
    f"main oval {50 + 27 * math.cos(k * 1.2566) - 20:.0f} {36 + 24 * math.sin(k * 1.2566) - 18:.0f}"
    f" {50 + 27 * math.cos(k * 1.2566) + 20:.0f} {36 + 24 * math.sin(k * 1.2566) + 18:.0f}"
    for k in range(5)
)
FORMS: Mapping[str, str] = {
    "ring": "main oval 0 0 100 100; none oval 28 28 72 72",
    "moon": "main oval 0 0 100 100; none oval 38 -6 130 92",
    "arrow": "main poly 0 36 55 36 55 8 100 50 55 92 55 64 0 64",
    "hexagon": "main poly 25 4 75 4 100 50 75 96 25 96 0 50",
    "house": "main box 14 44 86 100; dark poly 0 46 50 0 100 46; light box 42 64 60 100",
    "tree": "dark box 42 60 58 100; main oval 8 0 92 70",
    "car": (
        "main box 0 45 100 78; main poly 18 46 32 18 70 18 84 46"
        "; light poly 36 42 41 26 62 26 68 42; dark oval 10 62 36 90; dark oval 64 62 90 90"
    ),
    "boat": "main poly 0 64 100 64 82 100 18 100; dark box 46 0 52 64; main poly 57 4 57 56 96 56",
    "fish": "main oval 0 18 76 82; main poly 62 50 100 18 100 82; dark oval 14 36 28 50",
    "cat": (
        "main oval 8 24 92 100; main poly 10 56 12 0 48 32; main poly 90 56 88 0 52 32"
        "; light oval 26 48 42 64; light oval 58 48 74 64; dark poly 43 72 57 72 50 80"
    ),
    "bird": (
        "dark box 36 80 41 100; dark box 48 80 53 100; main oval 8 34 74 88; main oval 52 6 90 48"
        "; main poly 0 30 30 50 14 64; dark poly 86 20 100 29 86 36; light oval 68 16 77 26"
    ),
    "snail": (
        "dark poly 0 60 10 52 26 74 100 78 100 92 8 92; dark box 2 40 6 60; dark box 12 40 16 60"
        "; main oval 28 6 92 82; light oval 42 24 76 62; main oval 51 35 67 51"
    ),
    "flower": f"dark box 46 50 54 100; {_PETALS}; light oval 37 24 63 48",
    "face": (
        "main oval 0 0 100 100; dark oval 24 26 38 42; dark oval 62 26 76 42"
        "; dark oval 22 44 78 84; main oval 20 36 80 70"
    ),
    "key": (
        "main oval 0 26 48 74; none oval 14 40 34 60; main box 44 44 100 56; main box 72 56 80 76"
        "; main box 90 56 98 72"
    ),
    "cup": (
        "main oval 52 28 100 74; none oval 64 40 88 62; main poly 4 14 74 14 64 100 14 100"
        "; light oval 8 8 70 24"
    ),
}
_DARK, _LIGHT = (45, 40, 40, 255), (250, 250, 240, 255)


def draw_object(name: str, colour: Colour, size: tuple[int, int]) -> Image.Image:
    """Draw an object.

    Args:
        name: a key of `FORMS`.
        colour: of its main parts.
        size: of the picture, which it fills.

    Returns:
        An RGBA picture, empty around the object.
    """
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    tones = {"main": (*colour, 255), "dark": _DARK, "light": _LIGHT, "none": (0, 0, 0, 0)}
    for form in FORMS[name].split(";"):
        tone, kind, *numbers = form.split()
        places = [float(number) / 100 * (size[axis % 2] - 1) for axis, number in enumerate(numbers)]
        if kind == "poly":
            draw.polygon(list(zip(places[::2], places[1::2], strict=True)), fill=tones[tone])
        elif kind == "oval":
            draw.ellipse(places, fill=tones[tone])
        else:
            draw.rectangle(places, fill=tones[tone])
    return layer
