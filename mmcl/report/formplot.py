"""The picture of answers that are right in another form than was asked for."""

from __future__ import annotations

from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.report.canvas import (
    ACCENT,
    INK,
    MUTED,
    SERIES,
    Format,
    canvas,
    label_bars,
    name_ticks,
    render,
    tidy,
    write_text,
)
from mmcl.report.words import percent, shorten

_LABELS = ("in the form asked for", "in another form")


def form_bars(
    strict: AccuracyMatrix, lenient: AccuracyMatrix, after: int, format: Format = "svg"
) -> bytes:
    """Draw the score of every learned task, and behind it what is right in another form.

    Args:
        strict: the scores.
        lenient: of the same shape, scores in any form.
        after: number of learned tasks, 1 or more.
        format: svg or png.
    """
    figure, axes = canvas(5.8, 1.35 + 0.3 * after)
    places = range(after)
    asked = [strict.get(after, place) or 0.0 for place in places]
    known = [lenient.get(after, place) for place in places]
    free = [a if k is None else max(a, k) for a, k in zip(asked, known, strict=True)]
    own = axes.barh(places, [100 * value for value in asked], color=ACCENT, height=0.62)
    rest = [100 * (k - a) for a, k in zip(asked, free, strict=True)]
    bars = axes.barh(
        places, rest, left=[100 * a for a in asked], color=SERIES[4], alpha=0.6, height=0.62
    )
    texts = [
        percent(a) if k is None else f"{percent(a)} of {percent(k)}"
        for a, k in zip(asked, known, strict=True)
    ]
    label_bars(axes, bars, texts)
    name_ticks(axes.yaxis, places, [shorten(name, 20) for name in strict.names[:after]])
    axes.set_ylim(after - 0.5, -0.5)
    tidy(axes, "x")
    axes.set_xlim(0, 124)
    name_ticks(axes.xaxis, range(0, 101, 20), ["0", "20", "40", "60", "80", "100 %"])
    legend = axes.legend(
        (own, bars), _LABELS, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2,
        frameon=False, fontsize=8.5, handlelength=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
        write_text(text, text.get_text(), color=INK)
    axes.set_xlabel("after the last task", color=MUTED)
    return render(figure, "form", format)
