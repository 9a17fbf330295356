"""What a person sees of a sweep: a table for each group of queries, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.render import percent, table

if TYPE_CHECKING:
    from cli.sweeping import Swept
    from latentstore.results import Curve

LEVEL = ("raw", "centred")
"""Controls without a rank: they keep every dimension."""


def draw(curves: Sequence[Curve], best: int | None, path: Path) -> None:
    """Write the plots of a sweep as one PNG: log2 ranks, methods with their interval, controls dashed."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

    from latentstore.report.plots import HUES, MARKERS, PAPER

    plots = list(dict.fromkeys(c.plot for c in curves))
    across = min(2, len(plots))
    down = -(-len(plots) // across)
    canvas = Canvas(figsize=(6.4 * across, 4.4 * down), dpi=144, layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        here = [c for c in curves if c.plot == plot]
        for i, curve in enumerate(here):
            own = curve.role == "method"
            colour = PAPER[f"m{i % HUES + 1}"]
            look: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
            look |= {"linestyle": "-", "linewidth": 2.2} if own else {"linestyle": "--", "linewidth": 1.3}
            axes.plot(curve.x, curve.y, label=curve.label, **look)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        if best is not None:
            axes.axvline(best, color=PAPER["muted"], linewidth=1, linestyle=":", label="chosen on validation")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for c in here for x in c.x})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.set_ylim(0, 1.02)
        axes.grid(color=PAPER["rule"], linewidth=0.8)
        axes.set_title(plot.partition(": ")[2], fontsize=11, loc="left", parse_math=False)
        axes.set_xlabel(here[0].x_label)
        axes.set_ylabel(f"{here[0].y_label} (%)")
        axes.legend(fontsize=8, frameon=False)
    for axes in grid[len(plots) :]:
        axes.set_visible(False)
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def said(swept: Swept) -> str:
    """Return a sweep in the terminal: a table for each group, then what was chosen and what to beware."""
    lines = [swept.report.title]
    validated = {p.rank: percent(p.map) for p in swept.points if p.split == "validation"}
    tested = [p for p in swept.points if p.split == "test"]
    for group in dict.fromkeys(p.group for p in tested):
        here = {(p.method, p.rank): p for p in tested if p.group == group}
        ranks = [rank for method, rank in here if method == swept.method]
        levels = [p for p in here.values() if p.method in LEVEL]
        whitened = list(
            dict.fromkeys(p.method for p in here.values() if p.method not in (swept.method, *LEVEL))
        )
        rows = []
        for rank in ranks:
            own = here[swept.method, rank]
            # Beyond the gallery's span whitening has no more directions to give.
            white = [
                max((p for p in here.values() if p.method == name and p.rank <= rank), key=lambda p: p.rank)
                for name in whitened
            ]
            mark = " *" if rank == swept.best else ""
            cells = [percent(own.map, own.interval), percent(own.acc), *(percent(p.map) for p in white)]
            rows.append([f"{rank}{mark}", validated.get(rank, ""), *cells])
        header = ["rank", "validation", f"{swept.method} mAP", "Acc", *whitened]
        lines += ["", f"  {group}: {levels[0].n} test queries; mAP in % [95 % interval]", table(header, rows)]
        lines.append("  " + "; ".join(f"{p.method} {percent(p.map, p.interval)}" for p in levels))
        validated = {}  # of all models together: it belongs to the first table alone
    if swept.best is not None:
        lines += ["", "  * chosen on validation"]
    notes = [f"Note: {caveat}" for caveat in swept.report.caveats]
    return "\n".join([*lines, "", *swept.report.summary, *notes])
