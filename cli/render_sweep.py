"""What a person sees of a sweep: a table for each group of queries, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.render import counted, percent, table

if TYPE_CHECKING:
    from cli.sweeping import Point, Swept
    from latentstore.results import Curve

LEVEL = ("raw", "centred", "norm-weighted")
"""Controls without a rank: they keep every dimension."""
LADDERS = ("PCA-whitened ¼", "PCA-whitened ½", "random subspace")
"""Controls with a rank, of which every rank is measured."""
CHANCE = "chance"
_SHORT = {"PCA-whitened ¼": "PCA ¼", "PCA-whitened ½": "PCA ½", "random subspace": "random"}
_UNSEEN = "unseen in training"


def draw(curves: Sequence[Curve], best: int | None, path: Path) -> None:
    """Write the plots of a sweep as one PNG: log2 ranks, the method with its interval, controls dashed.

    All groups share the scale of mAP and one legend, which lies below them: no curve is covered. A model
    that was not trained on has open marks.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    from latentstore.report.plots import PAPER

    plots = list(dict.fromkeys(c.plot for c in curves))
    across = min(2, len(plots))
    down = -(-len(plots) // across)
    canvas = Canvas(figsize=(6.4 * across, 4.2 * down + 0.7), dpi=144, layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        here = [c for c in curves if c.plot == plot]
        unseen = plot.endswith(_UNSEEN)
        for curve in here:
            _line(axes, curve, open_marks=unseen)
        if best is not None:
            axes.axvline(best, color=PAPER["ink"], linewidth=1.3, linestyle=":", zorder=1.4)
        _scales(axes, here)
        axes.set_title(plot.partition(": ")[2], fontsize=11, loc="left", parse_math=False)
    for axes in grid[len(plots) :]:
        axes.set_visible(False)
    each = {c.label: c for c in curves}.values()
    keys = [Line2D([], [], label=curve.label, **_look(curve)) for curve in each]
    if best is not None:
        keys.append(
            Line2D([], [], color=PAPER["ink"], linewidth=1, linestyle=":", label="rank chosen on validation")
        )
    if any(plot.endswith(_UNSEEN) for plot in plots):
        own = next(c for c in curves if c.role == "method")
        look = {**_look(own), "markerfacecolor": PAPER["ground"]}
        keys.append(Line2D([], [], label=f"{own.label}, model {_UNSEEN}", **look))
    canvas.legend(handles=keys, loc="outside lower center", ncols=3 * across, fontsize=9, frameon=False)
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def _look(curve: Curve) -> dict[str, Any]:
    """Return a curve's colour, dash and mark: the same control looks the same in every sweep."""
    from latentstore.report.plots import DASHES, PAPER

    if curve.role == "method":
        return {"color": PAPER["m1"], "linewidth": 2.4, "marker": "o", "markersize": 6}
    colour, dash, marker = {
        "raw": ("ink", DASHES[2], ""),
        "centred": ("m3", DASHES[1], ""),
        "norm-weighted": ("m4", DASHES[3], ""),
        "PCA-whitened ¼": ("m2", DASHES[4], "s"),
        "PCA-whitened ½": ("m5", DASHES[4], "D"),
        "random subspace": ("m6", DASHES[2], "^"),
        CHANCE: ("control", (0, (1, 3)), ""),
    }[curve.label]
    return {"color": PAPER[colour], "linestyle": dash, "linewidth": 1.4, "marker": marker, "markersize": 4.5}


def _line(axes: Any, curve: Curve, *, open_marks: bool) -> None:
    from latentstore.report.plots import PAPER

    look = _look(curve)
    if curve.label in LEVEL or curve.label == CHANCE:
        axes.axhline(curve.y[0], zorder=1.5, **look)  # over the whole width, whatever the ranks
        return
    own = curve.role == "method"
    if own and open_marks:
        look["markerfacecolor"] = PAPER["ground"]
    axes.plot(curve.x, curve.y, zorder=3 if own else 2, **look)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)


def _scales(axes: Any, here: Sequence[Curve]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

    from latentstore.report.plots import PAPER

    axes.set_xscale("log", base=2)
    ranks = sorted({x for c in here for x in c.x})
    # A label needs room: of two ranks that lie closer the larger is named.
    named = [a for a, b in zip(ranks, [*ranks[1:], float("inf")], strict=True) if b / a > 1.3]
    axes.xaxis.set_major_locator(FixedLocator(named))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.tick_params(labelleft=True)
    axes.set_ylim(0, 1.02)
    axes.grid(color=PAPER["rule"], linewidth=0.8)
    axes.set_xlabel(here[0].x_label)
    axes.set_ylabel(f"{here[0].y_label} (%)")


def said(swept: Swept) -> str:
    """Return a sweep in the terminal: a table for each group, then what was chosen and what to beware."""
    lines = [swept.report.title]
    validated = {p.rank: percent(p.map) for p in swept.points if p.split == "validation"}
    tested = [p for p in swept.points if p.split == "test"]
    for group in dict.fromkeys(p.group for p in tested):
        here = [p for p in tested if p.group == group]
        queries = counted(here[0].n, "test query", "test queries")
        lines += ["", f"  {group}: {queries}; mAP in % [95 % interval]"]
        lines.append(_table(swept, here, validated))
        levels = [p for p in here if p.method in (*LEVEL, CHANCE)]
        lines.append("  " + "; ".join(f"{p.method} {percent(p.map, p.interval)}" for p in levels))
        validated = {}  # of all models together: it belongs to the first table alone
    lines += ["", "  PCA: PCA-whitened; random: a random subspace; each of the same rank, or all there is"]
    if swept.best is not None:
        lines.append("  * chosen on validation")
    notes = [f"Note: {caveat}" for caveat in swept.report.caveats]
    return "\n".join([*lines, "", *swept.report.summary, *notes])


def _table(swept: Swept, here: Sequence[Point], validated: dict[int, str]) -> str:
    ladders = {name: {p.rank: p for p in here if p.method == name} for name in LADDERS}
    rows = []
    for own in (p for p in here if p.method == swept.method and p.role == "method"):
        # Beyond the gallery's span whitening has no more directions to give.
        beside = [steps[max(k for k in steps if k <= own.rank)] for steps in ladders.values()]
        cells = [percent(own.map, own.interval), percent(own.acc), *(percent(p.map) for p in beside)]
        mark = " *" if own.rank == swept.best else ""
        rows.append([f"{own.rank}{mark}", validated.get(own.rank, ""), *cells])
    header = ["rank", "validation", f"{swept.method} mAP", "Acc", *(_SHORT[name] for name in LADDERS)]
    return table(header, rows)
