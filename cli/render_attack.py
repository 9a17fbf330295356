"""What a person sees of attacked queries: a table, the words, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.attack_tables import points
from cli.render import counted, folded, percent

if TYPE_CHECKING:
    from cli.attack_pictures import Written
    from cli.attack_tables import Attacked, Row
    from latentstore.results import Curve


def said(attacked: Attacked) -> str:
    """Return the figures of every attack in the terminal, then the words and what to beware of."""
    report = attacked.report
    n = attacked.rows[0].n
    lines = [
        report.title,
        "",
        f"  {counted(n, 'query', 'queries')}; mAP in % [95 % interval] (points of difference to no attack)",
        _table(attacked.rows),
    ]
    return "\n".join([*lines, "", *report.summary, *(f"Note: {caveat}" for caveat in report.caveats)])


def _table(rows: Sequence[Row]) -> str:
    subjects = {r.subject: r.role for r in rows}
    lines = []
    for step in dict.fromkeys(r.step for r in rows):
        here = {r.subject: r for r in rows if r.step == step}
        cells = [step.attack.name]
        for subject, role in subjects.items():
            own = here[subject]
            shown = percent(own.map, own.interval if role == "method" else None)
            cells.append(f"{shown} ({points(own.difference, '+')})" if own.difference else shown)
        lines.append(cells)
    return folded(["", *subjects], lines)


def wrote(written: Written) -> str:
    """Return what was written, and how it becomes a store of queries."""
    folder = written.manifest.parent
    what = "originals" if written.originals else "translations and queries"
    made, of = counted(written.pictures, "attacked picture"), written.queries - len(written.lost)
    encode = f"latentstore encode {folder} --manifest {written.manifest} --store attacked.zarr"
    lines = [
        f"{folder}: {made} of {of:,} {what}, listed in {written.manifest}",
        f"  next: {encode}, with the encoder and image size of their origins' store",
    ]
    if written.lost:
        from cli.attack_pictures import listed

        lost = counted(len(written.lost), "picture was", "pictures were")
        lines.append(f"Note: {lost} left out: {listed(written.lost)}.")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write one PNG: a panel for each kind of attack, from no attack (a dotted upright) to the strongest.

    Every W has its interval as a band; controls are dashed. All panels share the scale of mAP and one legend.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    from latentstore.attacks import FAMILIES
    from latentstore.report.plots import PAPER

    plots = list(dict.fromkeys(c.plot for c in curves))
    across = min(4, len(plots))
    down = -(-len(plots) // across)
    canvas = Canvas(figsize=(3.5 * across + 0.4, 3.0 * down + 0.8), dpi=144, layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False, sharey=True).ravel()
    looks = _looks(curves)
    families = {f"Under attack: {family.label}": family for family in FAMILIES.values()}
    for axes, plot in zip(grid, plots, strict=False):
        here = [c for c in curves if c.plot == plot]
        for curve in here:
            own = curve.role == "method"
            axes.plot(curve.x, curve.y, zorder=3 if own else 2, **looks[curve.label])
            if own and curve.low is not None and curve.high is not None:
                colour = looks[curve.label]["color"]
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        family = families[plot]
        axes.axvline(family.neutral, color=PAPER["muted"], linewidth=1, linestyle=":", zorder=1)
        if not family.rises:
            axes.invert_xaxis()
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.tick_params(labelleft=True, labelsize=8)
        axes.grid(axis="y", color=PAPER["rule"], linewidth=0.8)
        axes.set_title(family.label, fontsize=10, loc="left")
        axes.set_xlabel(here[0].x_label, fontsize=9)
        axes.set_ylim(0, 1.02)
        ticks = sorted({x for c in here for x in c.x})
        if len(ticks) <= 3:  # kinds rather than amounts
            axes.set_xticks(ticks)
    for axes in grid[::across]:
        axes.set_ylabel("mAP (%)", fontsize=9)
    for axes in grid[len(plots) :]:
        axes.set_visible(False)
    keys = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    keys.append(Line2D([], [], color=PAPER["muted"], linewidth=1, linestyle=":", label="not attacked"))
    canvas.legend(
        handles=keys,
        loc="outside lower center",
        ncols=min(len(keys), 2 * across),
        fontsize=9,
        frameon=False,
    )
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def _looks(curves: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """Return each subject's colour, dash and mark: every W solid, controls dashed and thin."""
    from latentstore.report.plots import DASHES, HUES, PAPER

    out: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(c.label for c in curves if c.role == "method"))
    controls = list(dict.fromkeys(c.label for c in curves if c.role != "method"))
    for i, label in enumerate(methods):
        marker = "osD^vP"[i % 6]
        out[label] = {"color": PAPER[f"m{i % HUES + 1}"], "linewidth": 2.2, "marker": marker, "markersize": 5}
    for i, label in enumerate(controls):
        colour = PAPER[("ink", "control")[i % 2]]
        out[label] = {"color": colour, "linewidth": 1.2, "linestyle": DASHES[1 + i % (len(DASHES) - 1)]}
    return out
