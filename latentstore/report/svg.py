"""A matplotlib figure as inline SVG: page fonts, page colours, ids of its own, no foreign resource."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"font:\s*(?:(?:bold|[1-9]00)\s+)?([\d.]+px)[^;]*")
_HREF = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Draw and save with text kept as text, no mathtext, and ids that depend on ``salt`` alone."""
    import warnings

    import matplotlib

    settings = {
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "text.usetex": False,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The page's own fonts draw the letters; that matplotlib's font lacks some does not matter.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def inline(figure: Any, *, key: str, label: str, ink: Mapping[str, str]) -> Markup:
    """Return the figure as an ``<svg>`` element for an HTML page.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Drawn inside :func:`drawing` at 72 dots an inch, so that one unit is one CSS pixel.
    key : str
        Unique in the page: the prefix of every id.
    label : str
        What a screen reader says.
    ink : mapping of str to str
        The colours drawn with, ``"#0101xx"``, and the CSS that replaces each.
    """
    raw = io.StringIO()
    figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = raw.getvalue()
    root = ElementTree.fromstring(text[text.index("<svg") :])  # noqa: S314 (matplotlib wrote it just now)
    _drop(root, ("metadata", "style"))
    used = set(_REFERENCE.findall(text)) | {e.get(_HREF, "")[1:] for e in root.iter()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _rewrite(element, used, key, ink)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 (serialised, so escaped)


def _drop(parent: ElementTree.Element, names: tuple[str, ...]) -> None:
    for child in list(parent):
        if child.tag.rpartition("}")[2] in names:
            parent.remove(child)
        else:
            _drop(child, names)


def _rewrite(element: ElementTree.Element, used: set[str], key: str, ink: Mapping[str, str]) -> None:
    """Make one element's attributes the page's: prefixed ids, page fonts, CSS colours."""
    name = element.attrib.pop("id", "")
    if name and name in used:
        element.set("id", f"{key}-{name}")
    if reference := element.attrib.pop(_HREF, ""):
        element.set("href", f"#{key}-{reference[1:]}")
    for attribute in ("clip-path", "style", "fill", "stroke"):
        css = element.get(attribute)
        if css is None:
            continue
        css = _REFERENCE.sub(rf"url(#{key}-\1)", _FONT.sub(r"font-size: \1", css))
        for colour, replacement in ink.items():
            css = css.replace(colour, replacement)
        element.set(attribute, css)
