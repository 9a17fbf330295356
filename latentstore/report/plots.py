"""Colours, dots with intervals for each subject, and the one picture for a README.

Each is drawn once and coloured by a palette: for the page the colours are placeholders that
:mod:`latentstore.report.svg` replaces by CSS variables (so dark mode and print work), for PNG they are real.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from latentstore.errors import ResultsError
from latentstore.report import svg, text
from latentstore.results import Figure, Report

WIDTH = 330  # CSS pixels: about what a phone and a third of a desk have, so that text keeps its size
HUES = 6
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (4, 1)), (0, (1, 1)))
_ROW = 33.0
_SIZE = 12.0
_NAMES = ("ink", "muted", "rule", "ground", "control", *(f"m{i}" for i in range(1, HUES + 1)))

INK = {name: f"#0101{i:02x}" for i, name in enumerate(_NAMES)}
CSS = {INK[name]: f"var(--{name})" for name in _NAMES}
_HEX = "1b1f24 59616b dcdfe3 ffffff 767d86 1f5fbf b4540a 8a3ab9 0b7a66 b0215e 6b6a00"
PAPER = {name: f"#{code}" for name, code in zip(_NAMES, _HEX.split(), strict=True)}


@dataclass(frozen=True)
class Row:
    """One subject of a dot plot."""

    label: str
    colour: str
    figure: Figure


def dots(rows: Sequence[Row], *, key: str, label: str) -> Markup:
    """Return a dot plot of fractions, 0 to 100 %, one row a subject, as inline SVG."""
    with svg.drawing(key):
        return svg.inline(draw_dots(rows, INK), key=key, label=label, ink=CSS)


def draw_dots(rows: Sequence[Row], ink: Mapping[str, str], *, width: float = WIDTH, title: str = "") -> Any:
    """Draw the rows; ``width`` in points, of 72 an inch; a title stands above where there is one."""
    head = 30.0 if title else 0.0
    height = _ROW * len(rows) + 26 + head
    canvas = Canvas(figsize=(width / 72, height / 72), dpi=72)
    canvas.patch.set_alpha(0)
    axes = canvas.add_axes((6 / width, 24 / height, 1 - 12 / width, _ROW * len(rows) / height))
    _dots(axes, rows, ink, size=_SIZE)
    if title:
        words: dict[str, Any] = {"fontsize": 14.0, "weight": "bold", "color": ink["ink"], "parse_math": False}
        canvas.text(6 / width, 1 - 19 / height, text.one_line(title, int(width / 8)), **words)
    return canvas


def _dots(axes: Any, rows: Sequence[Row], ink: Mapping[str, str], *, size: float) -> None:
    """Draw the rows top down: name and value above, dot and interval on a line across the full width."""
    bare(axes, ink)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.42, -0.5)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"], fontsize=size - 1)
    for tick, side in zip(axes.get_xticklabels()[::4], ("left", "right"), strict=True):
        tick.set_horizontalalignment(side)
    chance = [row.figure.value for row in rows if row.figure.role == "chance"]
    words: dict[str, Any] = {"fontsize": size, "va": "center_baseline", "parse_math": False}
    for y, row in enumerate(rows):
        method = row.figure.role == "method"
        tone = ink["ink" if method else "muted"]
        axes.text(0, y - 0.2, row.label, ha="left", color=tone, **words)
        shown = f"{text.value(row.figure)} {text.interval(row.figure)}".rstrip()
        axes.text(1, y - 0.2, shown, ha="right", color=tone, **words)
        line = y + 0.24
        axes.hlines(line, 0, 1, color=ink["rule"], linewidth=1, zorder=1, clip_on=False)
        for value in chance:
            axes.vlines(
                value, line - 0.16, line + 0.16, color=ink["muted"], linewidth=1.4, zorder=2, clip_on=False
            )
        if row.figure.role != "chance":
            _dot(axes, line, row.figure, ink[row.colour], ground=ink["ground"])


def _dot(axes: Any, y: float, figure: Figure, colour: str, *, ground: str) -> None:
    """Draw a method's filled dot or a control's open one, and its interval."""
    if figure.interval is not None:
        low, high = (min(max(v, 0.0), 1.0) for v in figure.interval)
        axes.hlines(y, low, high, color=colour, linewidth=5, alpha=0.4, zorder=3, clip_on=False)
    face = colour if figure.role == "method" else ground
    axes.plot(
        [figure.value], [y], "o", color=colour, markerfacecolor=face, markersize=5.5, zorder=4, clip_on=False
    )


def bare(axes: Any, ink: Mapping[str, str]) -> None:
    """Leave a base line and quiet tick labels."""
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink["muted"])
        spine.set_linewidth(0.8)
    axes.tick_params(which="both", length=0, labelsize=_SIZE - 1, labelcolor=ink["muted"], pad=5)


def method_colours(report: Report) -> dict[str, str]:
    """Return a colour name for each method, in order of first appearance: the same in every plot."""
    methods = dict.fromkeys(f.subject for f in report.figures if f.role == "method")
    return {subject: f"m{i % HUES + 1}" for i, subject in enumerate(methods)}


def ranked(figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures with methods first, then controls, then chance."""
    order = ("method", "control", "chance", "note")
    return sorted(figures, key=lambda f: order.index(f.role))


def dot_rows(report: Report, name: str, group: str, limit: int = 26) -> list[Row]:
    """Return the rows of a group's dot plot; a chance level without a group counts for every group."""
    finite = [f for f in report.find(name, group=group) if math.isfinite(f.value) and f.role != "note"]
    if finite and not any(f.role == "chance" for f in finite):
        finite += [f for f in report.find(name, group="") if f.role == "chance"]
    colours = method_colours(report)
    return [
        Row(text.one_line(f.subject or f.role, limit), colours.get(f.subject, "control"), f)
        for f in ranked(finite)
    ]


def grouped(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Return the figures by their group, in the order of the groups' first."""
    out: dict[str, list[Figure]] = {}
    for figure in figures:
        out.setdefault(figure.group, []).append(figure)
    return out


def is_oracle(group: str) -> bool:
    """Return whether the group's queries are simulated by the model that a method assumes."""
    return group.strip().lower().startswith("oracle")


def groups(report: Report, name: str) -> list[str]:
    """Return the groups that hold ``name``, real queries before simulated ones."""
    found = dict.fromkeys(f.group for f in report.figures if f.name == name and f.role != "note")
    if len(found) > 1 and all(f.role == "chance" for f in report.find(name, group="")):
        found.pop("", None)
    return sorted(found, key=is_oracle)


def summary_png(report: Report, path: Path) -> None:
    """Write one picture of mAP for every subject and group: 1400 pixels wide, on white.

    Raises
    ------
    ResultsError
        The report holds no mAP.
    """
    panels = [(group, dot_rows(report, "mAP", group, limit=26)) for group in groups(report, "mAP")]
    panels = [(group, rows) for group, rows in panels if rows]
    if not panels:
        raise ResultsError(
            f"{text.one_line(report.title, 80)!r} holds no mAP to draw; it is of kind {report.kind!r}. "
            "Take a report written by `latentstore evaluate`."
        )
    with svg.drawing("summary"):
        canvas = _summary(report, panels)
        canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def _summary(report: Report, panels: Sequence[tuple[str, list[Row]]]) -> Any:
    """Lay the panels out, up to three beside each other."""
    across = min(3, len(panels))
    lines = [panels[i : i + across] for i in range(0, len(panels), across)]
    deepest = max(len(rows) for _, rows in panels)
    width, head, gap, edge = 700.0, 56.0, 50.0, 16.0  # drawn at half size: 144 dots an inch give 1400 pixels
    step = max(23.0, (350.0 - head - gap * len(lines)) / (deepest * len(lines)))
    height = head + len(lines) * (gap + step * deepest)
    panel = (width - 2 * edge - 26 * (across - 1)) / across
    canvas = Canvas(figsize=(width / 72, height / 72), dpi=144)
    words: dict[str, Any] = {"parse_math": False, "va": "baseline", "ha": "left"}
    title = text.one_line(report.title, 70)
    canvas.text(edge / width, 1 - 25 / height, title, fontsize=15, weight="bold", color=PAPER["ink"], **words)
    key = "mAP with 95 % interval. Filled dots are methods, open dots controls, upright ticks chance."
    canvas.text(edge / width, 1 - 43 / height, key, fontsize=10, color=PAPER["muted"], **words)
    for i, line in enumerate(lines):
        for j, (group, rows) in enumerate(line):
            left = edge + j * (panel + 26)
            bottom = height - (head + i * (gap + step * deepest) + 24 + step * len(rows))
            box = (left / width, bottom / height, panel / width, step * len(rows) / height)
            axes = canvas.add_axes(box)
            _dots(axes, rows, PAPER, size=9.5 if across == 3 else 10.5)
            name = text.one_line(group or "All queries", int(panel / 7))
            words = {"fontsize": 11.5, "weight": "bold", "color": PAPER["ink"], "parse_math": False}
            axes.set_title(name, loc="left", pad=6, **words)
    return canvas
