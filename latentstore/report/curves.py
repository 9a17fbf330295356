"""Plots of curves: which lines they hold, how each looks, and the drawing for the page and for PNG.

Curves of a plot whose name begins with "Scores" are distributions, drawn as filled steps. An axis runs in the
order in which its first curve gives x: qualities from 100 down to 10 grow harder to the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup
from matplotlib import ticker
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from latentstore.report import plots, svg, text
from latentstore.results import Curve, Figure, Report

MARKERS = "osD^vP"
ROWS = 40  # x values up to which a plot's numbers stand below it
_MARKED = 24
_HEIGHT = 250
_SIZE = 12.0
Point = tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """One curve with its look: a colour name, and a slot that gives it a marker and a dash."""

    curve: Curve
    colour: str
    slot: int


@dataclass(frozen=True)
class Plot:
    """The lines over one pair of axes; ``limits`` of y are shared by small multiples."""

    title: str
    lines: list[Line]
    limits: tuple[float, float] | None = None

    @property
    def key(self) -> list[tuple[str, str, int, str]]:
        """What a legend says: plots with equal keys can share one."""
        return [(line.curve.label, line.colour, line.slot, line.curve.role) for line in self.lines]


def plots_of(report: Report) -> list[Plot]:
    """Return the report's plots: its curves, then those that its figures' axes give."""
    curves = [*map(_angles, report.curves), *_by_strength(report), *_by_intensity(report)]
    names = dict.fromkeys(c.plot for c in curves)
    made = [_plot(name, [c for c in curves if c.plot == name], report) for name in names]
    return [p for family in families(made) for p in _multiples(family)]


def _angles(curve: Curve) -> Curve:
    return replace(curve, y=[text.angle(y) for y in curve.y]) if curve.y_label == "degrees" else curve


def families(made: Sequence[Plot]) -> list[list[Plot]]:
    """Return the plots in runs of equal keys: small multiples."""
    out: list[list[Plot]] = []
    for plot in made:
        if out and out[-1][0].key == plot.key:
            out[-1].append(plot)
        else:
            out.append([plot])
    return out


def _multiples(family: Sequence[Plot]) -> list[Plot]:
    """Give small multiples of a fraction one scale, so that a steeper fall is a larger loss."""
    first = family[0].lines[0].curve
    ys = [y for plot in family for line in plot.lines for p in _points(line.curve) for y in p[1:]]
    if len(family) < 2 or not ys or not _as_percent(first, ys):
        return list(family)
    room = 0.04 * (max(ys) - min(ys)) or 0.01
    return [replace(plot, limits=(min(ys) - room, max(ys) + room)) for plot in family]


def _plot(name: str, curves: Sequence[Curve], report: Report) -> Plot:
    """Return one plot; a line named like a method has the method's colour."""
    colours = plots.method_colours(report)
    named = {colours[c.label] for c in curves if c.label in colours}
    hues = [f"m{i}" for i in range(1, plots.HUES + 1)]
    spare = [h for h in hues if h not in named] or hues
    lines, used = [], 0
    for slot, curve in enumerate(curves):
        colour = colours.get(curve.label, "") if curve.role == "method" else "control"
        if not colour:
            colour, used = spare[used % len(spare)], used + 1
        lines.append(Line(curve, colour, slot))
    return Plot(name, lines)


def _by_strength(report: Report) -> list[Curve]:
    """Return mAP over the editing strength, a plot for each model, where the report draws none itself."""
    held = [f for f in report.find("mAP") if "strength" in f.axes and "attack" not in f.axes]
    if any("strength" in c.plot.lower() for c in report.curves):
        return []
    return _over(held, "strength", "model", "mAP over strength", "editing strength")


def _by_intensity(report: Report) -> list[Curve]:
    """Return mAP over each family's intensity, where the report has no curves of its own."""
    held = [] if report.curves else [f for f in report.find("mAP") if "attack" in f.axes]
    return _over(held, "intensity", "attack", "mAP under attack", "intensity")


def _over(figures: Sequence[Figure], axis: str, apart: str, name: str, label: str) -> list[Curve]:
    out = []
    figures = [f for f in figures if isinstance(f.axes.get(axis), float | int) and f.role != "note"]
    for group in dict.fromkeys(f.axes.get(apart) for f in figures):
        here = plots.ranked([f for f in figures if f.axes.get(apart) == group])
        for subject, role in dict.fromkeys((f.subject, f.role) for f in here):
            own = [f for f in here if (f.subject, f.role) == (subject, role)]
            if axis == "strength":
                own.sort(key=lambda f: float(f.axes[axis]))
            spans = [f.interval for f in own if f.interval is not None]
            whole = len(spans) == len(own)
            out.append(
                Curve(
                    name if group is None else f"{name}: {group}",
                    subject or role,
                    [float(f.axes[axis]) for f in own],
                    [f.value for f in own],
                    label,
                    "mAP",
                    role=role,
                    low=[s[0] for s in spans] if whole else None,
                    high=[s[1] for s in spans] if whole else None,
                )
            )
    return [c for c in out if len(c.x) > 1]


# The look of a line


def marked(curve: Curve) -> bool:
    """Return whether the curve's points have marks: few points, no distribution, not the level of chance."""
    return len(curve.x) <= _MARKED and curve.role != "chance" and not _is_distribution(curve)


def dash(line: Line) -> Any:
    """Return the line's dash, as matplotlib takes it; chance is dashed in every plot."""
    return (0, (4, 3)) if line.curve.role == "chance" else plots.DASHES[line.slot % len(plots.DASHES)]


def _is_distribution(curve: Curve) -> bool:
    return curve.plot.startswith("Scores")


def rows(plot: Plot) -> list[tuple[str, list[str]]]:
    """Return the numbers behind a plot, one row an x, or nothing where they are many."""
    curves = [line.curve for line in plot.lines]
    xs = dict.fromkeys(x for c in curves for x in c.x if math.isfinite(x))
    if len(xs) > ROWS:
        return []
    at = [dict(zip(c.x, c.y, strict=False)) for c in curves]
    ordered = list(xs) if _falls(curves[0]) else sorted(xs)
    return [(text.number(x), [text.number(row[x]) if x in row else "" for row in at]) for x in ordered]


def _falls(curve: Curve) -> bool:
    return len(curve.x) > 1 and curve.x[0] > curve.x[-1]


# Drawing


def inline(plot: Plot, *, key: str) -> Markup | None:
    """Return the plot as inline SVG, or None when no point can be drawn."""
    label = f"{text.one_line(plot.title, 80)}: "
    label += ", ".join(text.one_line(line.curve.label, 40) for line in plot.lines)
    with svg.drawing(key):
        canvas = draw(plot, plots.INK)
        return None if canvas is None else svg.inline(canvas, key=key, label=label, ink=plots.CSS)


def draw(
    plot: Plot, ink: Mapping[str, str], *, width: float = plots.WIDTH, named: bool = False
) -> Any | None:
    """Draw the lines, or return None when no point can be drawn.

    Parameters
    ----------
    plot : Plot
    ink : mapping of str to str
        Colours by name, as :data:`latentstore.report.plots.PAPER`.
    width : float
        Points, of 72 an inch.
    named : bool
        Write the title above and the legend below: for a picture that stands alone.
    """
    first = plot.lines[0].curve
    points = [_points(line.curve, x_log=first.x_log, y_log=first.y_log) for line in plot.lines]
    xs = sorted({p[0] for curve in points for p in curve})
    ys = [y for curve in points for p in curve for y in p[1:]]
    if not xs:
        return None
    shown = text.percent if _as_percent(first, ys) else text.number
    head, foot = (24.0, 17.0 * len(plot.lines) + 12) if named else (0.0, 0.0)
    height = _HEIGHT + head + foot
    canvas = Canvas(figsize=(width / 72, height / 72), dpi=72)
    canvas.patch.set_alpha(0)
    left = 0.15 * plots.WIDTH / width
    axes = canvas.add_axes((left, (44 + foot) / height, 0.98 - left, (_HEIGHT - 44 - 28) / height))
    plots.bare(axes, ink)
    for line, curve in zip(plot.lines, points, strict=True):
        _line(axes, line, curve, ink)
    _scales(axes, first, xs, ys, shown)
    if plot.limits is not None:
        axes.set_ylim(*plot.limits)
    elif _is_distribution(first) and not first.y_log:
        axes.set_ylim(bottom=0)
    if len(xs) <= 12:
        axes.set_xticks(_thinned(axes, xs), minor=False)
    axes.grid(axis="y", color=ink["rule"], linewidth=0.8)
    words: dict[str, Any] = {"fontsize": _SIZE, "color": ink["ink"], "parse_math": False}
    unit = " (%)" if shown is text.percent else ""
    axes.set_xlabel(text.one_line(first.x_label, 42), labelpad=7, **words)
    top = height - head - 14
    canvas.text(4 / width, top / height, text.one_line(first.y_label, 40) + unit, **words)
    if named:
        title = text.one_line(plot.title, int(width / 8))
        canvas.text(4 / width, 1 - 18 / height, title, **{**words, "fontsize": 14.0, "weight": "bold"})
        _legend(canvas, plot, ink, width)
    return canvas


def _legend(canvas: Any, plot: Plot, ink: Mapping[str, str], width: float) -> None:
    handles = [
        Line2D([], [], label=text.one_line(line.curve.label, int(width / 8)), **_look(line, ink))
        for line in plot.lines
    ]
    made = canvas.legend(handles=handles, loc="lower left", fontsize=11, frameon=False, labelcolor=ink["ink"])
    for words in made.get_texts():
        words.set_parse_math(False)


def _points(curve: Curve, *, x_log: bool = False, y_log: bool = False) -> list[Point]:
    """Return (x, y) or (x, y, low, high) rows: finite, and positive where the axis is logarithmic."""
    columns = [curve.x, curve.y]
    if curve.low is not None and curve.high is not None:
        columns += [curve.low, curve.high]
    found = [tuple(map(float, row)) for row in zip(*columns, strict=False)]
    floor = [0.0 if x_log else -math.inf] + [0.0 if y_log else -math.inf] * (len(columns) - 1)
    return [r for r in found if all(math.isfinite(v) and v > f for v, f in zip(r, floor, strict=True))]


def _as_percent(curve: Curve, ys: Sequence[float]) -> bool:
    word = curve.y_label.lower()
    named = word.startswith(("map", "acc", "recall")) or "fraction" in word or "share" in word
    return named and not curve.y_log and min(ys) >= 0 and max(ys) <= 1


def _look(line: Line, ink: Mapping[str, str]) -> dict[str, Any]:
    method = line.curve.role == "method"
    return {
        "color": ink[line.colour],
        "linestyle": dash(line),
        "linewidth": 2.0 if method else 1.4,
        "marker": MARKERS[line.slot % len(MARKERS)] if marked(line.curve) else "",
        "markersize": 5.5,
        "markerfacecolor": ink[line.colour] if method else ink["ground"],
    }


def _line(axes: Any, line: Line, points: Sequence[Point], ink: Mapping[str, str]) -> None:
    if not points:
        return
    colour = ink[line.colour]
    x, y = [p[0] for p in points], [p[1] for p in points]
    if len(points[0]) == 4:
        low, high = [p[2] for p in points], [p[3] for p in points]
        # Bands of many controls over each other would hide the lines.
        alpha = 0.14 if line.curve.role == "method" else 0.05
        axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)
    look = _look(line, ink)
    if _is_distribution(line.curve) and len(x) > 2:
        axes.fill_between(x, y, step="mid", color=colour, alpha=0.22, linewidth=0)
        look["drawstyle"] = "steps-mid"
    axes.plot(x, y, **look)


def _scales(
    axes: Any, first: Curve, xs: Sequence[float], ys: Sequence[float], shown: Callable[[float], str]
) -> None:
    """Set both scales, their ticks and the words of the ticks."""
    for axis, log in ((axes.xaxis, first.x_log), (axes.yaxis, first.y_log)):
        values = xs if axis is axes.xaxis else ys
        low, high = min(values), max(values)
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            subs = (1.0,) if high / low > 30 else (1.0, 2.0, 5.0)
            # Within a decade hardly one of these would fall between the ends.
            narrow = high / low < 10
            axis.set_major_locator(
                ticker.MaxNLocator(5) if narrow else ticker.LogLocator(subs=subs, numticks=7)
            )
            axis.set_minor_locator(ticker.NullLocator())
        else:
            axis.set_major_locator(ticker.MaxNLocator(5))
        if low == high:  # one value: give the axis a width of its own
            limits = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
            (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(*limits)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: text.number(_round(v))))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: shown(_round(v)).removesuffix(".0")))
    if _falls(first):
        axes.xaxis.set_inverted(True)


def _round(value: float) -> float:
    """Drop the last digits: ticks at 0.30000000000000004 are ticks at 0.3."""
    return float(f"{value:.9g}")


def _thinned(axes: Any, xs: Sequence[float]) -> list[float]:
    """Return the values whose labels keep clear of each other, the rightmost one first."""
    kept: list[float] = []
    edge = math.inf
    bottom = axes.get_ylim()[0]
    placed = sorted(((float(axes.transData.transform((x, bottom))[0]), x) for x in xs), reverse=True)
    for centre, x in placed:
        half = 0.32 * _SIZE * text.columns(text.number(x)) + 3
        if centre + half <= edge:
            kept.append(x)
            edge = centre - half
    return sorted(kept)
