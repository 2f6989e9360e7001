"""HTML rendering: templates and inline SVG plots in one self-contained file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mmcl.report.formatting import (
    clean_lines,
    duration,
    format_count,
    format_metric,
    percent,
    sanitize,
    size,
    unit,
)
from mmcl.report.plot_style import css_variables

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def render_template(template: str, values: Mapping[str, Any]) -> str:
    """Render an HTML template of this package; every value is escaped unless it is ``Markup``.

    Control characters and lone surrogates in names are replaced, so the result is always UTF-8.
    """
    # Autoescape by file name would leave ".j2" files unescaped, so it is on for all.
    environment = Environment(
        loader=FunctionLoader(lambda each: files("mmcl.report").joinpath(each).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        sanitize=sanitize,
        clean_lines=clean_lines,
        percent=percent,
        size=size,
        duration=duration,
        format_count=format_count,
    )
    environment.globals.update(format_metric=format_metric, unit=unit)
    page = environment.get_template(template).render(values)
    return page.encode("utf-8", "replace").decode("utf-8")


def inline_svg(svg: bytes, prefix: str, label: str) -> Markup:
    """Inline an SVG plot in a page: unique ids, the page's colors, its natural width at most.

    Args:
        svg: from one of the plots.
        prefix: put before every id, so that two plots on a page do not share any.
        label: text for screen readers.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet would apply to the whole page.
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _prefixed(_themed(value), key, prefix))
    width = float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3
    root.attrib.pop("height")
    root.set("style", f"max-width:{width:.0f}px;stroke-linejoin:round")
    root.set("role", "img")
    root.set("aria-label", sanitize(label))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _themed(value: str) -> str:
    for color, variable in css_variables().items():
        value = value.replace(color, f"var({variable})")
    return value.replace("'DejaVu Sans'", "inherit") if "font" in value else value


def _prefixed(value: str, key: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == _HREF and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    return _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
