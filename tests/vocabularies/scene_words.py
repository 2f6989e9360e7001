"""Words of the scene streams, each of which is one token of the tiny LLaVA."""

from mmcl.streams.scene_model import COLORS, COUNTS, OBJECT_NAMES, SHAPES, TEXTURES, plural

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


def scene_words():
    """Every distinct word, figure and sign; case counts, as questions begin with a capital."""
    shapes = (*SHAPES, *(plural(shape) for shape in SHAPES), *OBJECT_NAMES)
    named = (*COLORS, "black", "white", *shapes, *TEXTURES, "small", "big", *COUNTS)
    return {*named, *_OTHER_WORDS.split(), *FIGURES, *SIGNS}
