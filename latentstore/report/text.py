"""Words and numbers as a reader sees them: cleaned strings, percentages, intervals, seconds."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from latentstore.results import Figure

MISSING = "–"
_NO_ANGLE = 1e-6
"""Degrees: the arc cosine of the last double below 1 is 8.5e-7."""
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Format characters that scripts and emoji need: zero-width (non-)joiner, soft hyphen.
_HARMLESS_FORMAT = "\u200c\u200d\u00ad"


def clean(value: object) -> str:
    """Return the text with every invisible or order-changing character spelled out.

    Control characters, bidirectional overrides and lone surrogates (undecodable file names) become
    ``⟨U+202E⟩``: such a name can neither reorder the line it stands in nor break the encoding.
    """
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_plain(c) else f"⟨U+{ord(c):04X}⟩" for c in text)


def _is_plain(c: str) -> bool:
    return c in "\n\t" or c in _HARMLESS_FORMAT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn")


def one_line(value: object, limit: int) -> str:
    """Return the cleaned text on one line, cut to ``limit`` columns with an ellipsis."""
    text = " ".join(clean(value).split())
    if columns(text) <= limit:
        return text
    kept, used = [], 0
    for c in text:
        used += columns(c)
        if used >= limit:
            break
        kept.append(c)
    return "".join(kept).rstrip() + "…"


def columns(text: str) -> int:
    """Return how many columns the text takes: two for a wide letter, none for a combining mark."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def number(value: float) -> str:
    """Return four significant digits, more where fewer would read as a whole number that it is not."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if 1e-3 <= size < 1e6:
        text = f"{value:.4g}" if size < 1000 else f"{value:,.1f}"
        if "e" in text or float(text.replace(",", "")).is_integer():
            text = f"{value:,.10g}"
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def percent(value: float, *, fine: bool = False) -> str:
    """Return a fraction as ``"87.4"``; ``fine`` gives two significant digits below 0.1 % (chance)."""
    if not math.isfinite(value):
        return "not finite"
    shown = 100 * value
    text = number(float(f"{shown:.2g}")) if fine and 0 < shown < 0.1 else f"{shown:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def is_difference(figure: Figure) -> bool:
    """Return whether the figure is a gain: shown with its sign, a fraction in points."""
    first = figure.name.lower().replace("_", " ").split(" ")[0].rstrip(":")
    return first in ("gain", "difference")


def value(figure: Figure) -> str:
    """Return the figure's value with its unit: ``"87.4 %"``, ``"+2.3 points"``, ``"512"``, ``"1.2 s"``."""
    plus = "+" if is_difference(figure) and figure.value > 0 else ""
    if figure.unit == "fraction":
        unit = "points" if is_difference(figure) else "%"
        return f"{plus}{percent(figure.value, fine=not is_difference(figure))} {unit}"
    unit = {"seconds": "s", "second": "s"}.get(figure.unit, figure.unit)
    shown = angle(figure.value) if figure.unit == "°" else figure.value
    return f"{plus}{number(shown)} {clean(unit)}".rstrip()


def angle(degrees: float) -> float:
    """Return an angle, 0 where it is no more than the rounding of a cosine near 1."""
    return 0.0 if abs(degrees) < _NO_ANGLE else degrees


def interval(figure: Figure) -> str:
    """Return the figure's interval as ``"[85.1, 89.7]"``, or an empty string."""
    if figure.interval is None:
        return ""
    fine = not is_difference(figure) and 0 < figure.value < 1e-3
    low, high = (percent(v, fine=fine) if figure.unit == "fraction" else number(v) for v in figure.interval)
    return f"[{low}, {high}]"


def seconds(value: float) -> str:
    """Return seconds as ``"0.012 s"``, ``"3.4 s"`` or ``"1,234 s"``."""
    if math.isfinite(value) and value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if math.isfinite(value) and value >= 1e-3 else f"{number(value)} s"


def date(created: str) -> str:
    """Return an ISO time as ``"5 March 2026, 14:03 UTC"``; any other text as it is."""
    try:
        when = datetime.fromisoformat(created)
        if when.tzinfo is not None:
            when = when.astimezone(UTC)
    except (ValueError, OverflowError):  # a year that UTC does not reach
        return created
    zone = " UTC" if when.tzinfo is not None else ""
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}, {when:%H:%M}{zone}"


def pairs(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a mapping as rows of text, nested mappings as ``"outer › inner"``."""
    rows: list[tuple[str, str]] = []
    for key, item in data.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(item, Mapping) and item:
            rows += pairs(item, f"{name} › ")
        else:
            rows.append((name, _scalar(item, grouped="seed" not in name.lower())))
    return rows


def _scalar(item: object, *, grouped: bool) -> str:
    if item is None or item in ("", [], {}, ()):
        return MISSING
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float):
        return number(item) if grouped else str(item)
    if isinstance(item, list | tuple):
        return ", ".join(_scalar(x, grouped=grouped) for x in item)
    if isinstance(item, Mapping):
        named = (f"{key} {_scalar(x, grouped='seed' not in str(key).lower())}" for key, x in item.items())
        return f"({'; '.join(named)})"
    return str(item)
