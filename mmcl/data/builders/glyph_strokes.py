"""Handwritten digits: skeletons, a smooth curve through each, a pen of varying width."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]

CANVAS = 128  # pixels a side while drawing; halved at the end, which smooths the edges

# The ways in which people write a digit. A way is a list of curves separated by ";", a curve a list
# of points "x,y" in hundredths of the digit's box (y downwards). Curves that meet share a point.
SKELETONS: dict[int, tuple[str, ...]] = {
    0: (
        "50,0 10,28 10,72 50,100 90,72 90,28 50,0",
        "62,2 20,20 8,65 35,100 80,85 92,35 62,2 45,6",
        "35,8 8,40 15,85 50,100 88,75 90,30 60,0 30,10 22,22",
        "50,0 2,30 2,70 50,100 98,70 98,30 50,0",
    ),
    1: (
        "50,0 50,100",
        "66,0 36,100",
        "18,30 55,0; 55,0 55,100",
        "25,22 58,0; 58,0 52,100",
        "20,25 52,0; 52,0 52,100; 15,100 88,100",
        "50,0 50,100; 22,100 78,100",
        "5,42 60,0; 60,0 56,100",
        "42,0 50,35 48,70 54,100",
    ),
    2: (
        "10,22 35,0 75,5 82,32 52,64 8,100; 8,100 92,100",
        "8,20 45,0 85,20 70,52 12,94 10,98 45,92 95,98",
        "12,25 50,2 80,22 60,60 30,88 8,90 22,74 48,88 72,100 94,90",
        "18,10 60,0 82,25 62,60 20,100; 20,100 88,92",
        "2,12 55,0 90,20 75,48 30,70 5,98; 5,98 98,100",
    ),
    3: (
        "10,12 48,0 85,20 45,46; 45,46 90,72 52,100 6,88",
        "12,3 85,3; 85,3 42,42; 42,42 90,66 60,98 8,92",
        "15,8 70,2 80,28 38,48; 38,48 85,55 85,90 40,100 8,90",
        "8,18 50,0 78,22 55,44 30,48 75,52 92,76 55,100 10,92",
        "5,4 60,0 88,22 60,45 35,47; 35,47 92,58 80,94 5,98",
    ),
    4: (
        "68,100 68,0; 68,0 5,66; 5,66 96,66",
        "30,0 8,55; 8,55 92,55; 70,20 62,100",
        "22,0 10,48 30,60 80,50; 82,5 70,100",
        "55,0 5,60; 5,60 95,60; 62,36 56,100",
        "12,4 12,50; 12,50 85,50; 82,0 82,100",
        "50,0 30,30 4,68 50,64 96,60; 66,40 62,100",
    ),
    5: (
        "86,2 22,2; 22,2 16,44; 16,44 55,36 88,62 62,97 8,92",
        "92,0 30,4; 30,4 12,46; 12,46 70,42 80,80 40,100 5,88",
        "88,4 20,4; 20,4 20,42; 20,42 78,48 84,86 30,100 12,92",
        "20,4 14,44; 14,44 60,34 90,66 55,98 10,94; 20,4 92,0",
        "80,0 35,8 24,44; 24,44 62,50 66,84 12,100",
    ),
    6: (
        "72,0 32,26 10,66 32,98 72,94 86,70 58,52 14,70",
        "45,0 18,40 12,82 48,100 84,80 68,56 22,64",
        "86,4 40,14 8,58 28,98 76,96 90,66 52,50 18,72",
        "30,0 14,60 40,100 80,88 76,58 44,54 16,76",
    ),
    7: (
        "6,4 90,4; 90,4 42,100",
        "6,4 90,4; 90,4 40,100; 26,52 80,52",
        "4,18 10,2 50,8 92,2; 92,2 60,45 46,100",
        "8,6 86,2; 86,2 60,50 52,100; 20,50 92,44",
        "4,22 8,4; 8,4 88,4; 88,4 50,55 44,100; 20,56 78,50",
        "12,0 80,0; 80,0 72,100; 40,48 100,46",
    ),
    8: (
        "50,48 14,24 50,0 86,24 50,48 8,76 50,100 92,76 50,48",
        "80,10 45,0 18,22 50,46 88,74 52,100 12,78 50,48 84,12",
        "62,46 25,30 40,2 76,10 62,46 20,70 30,98 72,92 62,46",
        "50,46 28,22 50,0 72,22 50,46; 50,46 12,74 50,100 88,74 50,46",
        "72,4 30,4 20,26 55,48 80,78 46,100 22,80 52,48 78,24 66,2",
    ),
    9: (
        "84,24 50,0 14,24 40,50 84,24; 84,24 80,62 62,100",
        "82,18 45,0 12,28 45,52 82,22; 82,10 82,100",
        "80,28 55,2 18,16 22,46 60,50 82,18; 82,18 84,80 50,100 12,90",
        "76,14 40,2 14,30 46,48 78,16; 78,16 56,100",
        "88,22 50,0 10,22 48,46 88,22; 88,22 88,70 70,98 20,98",
    ),
}


def smooth_curve(points: Points, steps: int = 8) -> Points:
    """Run a Catmull-Rom curve through the points.

    Args:
        points: (N, 2) places that the curve goes through, two or more.
        steps: places per stretch between two of the points.

    Returns:
        (steps * (N - 1) + 1, 2) places along the curve, both ends included.
    """
    before = np.vstack([2 * points[0] - points[1], points[:-2]])
    after = np.vstack([points[2:], 2 * points[-1] - points[-2]])
    start, end = points[:-1], points[1:]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (
        2 * start[:, None]
        + (end - before)[:, None] * t
        + (2 * before - 5 * start + 4 * end - after)[:, None] * t**2
        + (3 * start - before - 3 * end + after)[:, None] * t**3
    )
    return np.vstack([curve.reshape(-1, 2), points[-1:]])


def read_skeleton(text: str) -> list[Points]:
    """Read "x,y x,y; x,y ..." into curves, each (N, 2) in 0..1."""
    return [
        np.array([[float(value) / 100 for value in point.split(",")] for point in curve.split()])
        for curve in text.split(";")
    ]


def draw_strokes(digit: int, rng: Generator) -> Image.Image:
    """Write a digit by hand, once.

    The skeleton is swayed by a smooth random field (so curves that meet still meet), then slanted,
    turned and stretched, and drawn with a round pen that presses more or less along the way.

    Args:
        digit: 0 to 9.
        rng: where all choices come from.

    Returns:
        A 64 x 64 picture of mode L: ink 255 on 0.
    """
    ways = SKELETONS[digit]
    curves = read_skeleton(ways[rng.integers(len(ways))])
    wave = rng.uniform(1.5, 5.0, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
    strength = rng.uniform(0.0, 0.055, (2, 2))
    slant, turn = rng.normal(0.0, 0.18), rng.normal(0.0, 0.10)
    width = rng.uniform(0.42, 0.95)
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = turning @ np.array([[width, -slant], [0.0, 1.0]])
    pen = CANVAS * rng.uniform(0.031, 0.084)
    scale = CANVAS * 0.56

    ink = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(ink)
    for curve in curves:
        shaken = curve + rng.normal(0.0, 0.015, curve.shape)
        moved = shaken + (strength * np.sin(wave[0] * shaken[:, None, :] + wave[1])).sum(-1)
        path = smooth_curve(moved - 0.5) @ matrix.T * scale + CANVAS / 2
        radius = pen * (
            1 + rng.uniform(0, 0.25) * np.sin(np.linspace(0, rng.uniform(2, 6), len(path)))
        )
        draw.line([tuple(place) for place in path], fill=255, width=round(2 * pen))
        for (x, y), r in zip(path, radius, strict=True):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return ink.reduce(2)
