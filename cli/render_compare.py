"""What a comparison says in the terminal: the control first, then maps, pairs and cross residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.likeness import BY_CONSTRUCTION, SPECTRUM, cosine, span
from cli.render import printable, table
from latentstore.results import Curve, Figure, Report

HEADER = ["pair", "cos φ", "random band (95 %)", "cos φ is", "angles °", "overlap (chance)"]
SPELLED_OUT = 3
"""Pairs up to which each has its sentence below the table, too."""


def compared(report: Report) -> str:
    """Return a comparison in the terminal."""
    lines = [report.summary[0], ""]
    maps = [
        [
            printable(name),
            " × ".join(map(str, facts["shape"])),
            _number(report, "σ max / σ min", name, ".4g"),
            _number(report, "cos φ, untrained W", name, ".6f"),
        ]
        for name, facts in report.data["maps"].items()
    ]
    if maps:
        lines += [table(["W", "shape", "σ max/min", "cos φ with untrained W"], maps), ""]
    rows = [_pair_row(report, f) for f in report.find("cos φ") if f.role == "method"]
    lines += [table(HEADER, rows), ""]
    crossed = [[f.group, f.subject, f"{f.value:.3f}", str(f.n)] for f in report.find("cross residual")]
    if crossed:
        lines += [table(["held-out pairs", "", "‖TW‖/‖(O−μ)W‖", "pairs"], crossed, left=2), ""]
    sentences = report.summary[1:] if len(rows) <= SPELLED_OUT else report.summary[1:2]
    return "\n".join([*lines, *sentences, *(f"Note: {c}" for c in report.caveats)])


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write the spectra as a PNG: a line for each W, and muted the band of Gaussian matrices of its shape."""
    from matplotlib.figure import Figure as Canvas

    from latentstore.report.plots import DASHES, HUES, PAPER

    canvas = Canvas(figsize=(7.2, 4.8), dpi=144, layout="constrained")
    axes = canvas.subplots()
    shown = [c for c in curves if c.plot == SPECTRUM]
    for curve in (c for c in shown if c.role == "control"):
        look: dict[str, Any] = {"color": PAPER["control"], "linewidth": 1.2, "linestyle": "--", "zorder": 1}
        axes.plot(curve.x, curve.y, label=curve.label, **look)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=PAPER["control"], alpha=0.2, linewidth=0)
    own = [c for c in shown if c.role == "method"]
    for i, curve in enumerate(own):
        axes.plot(
            curve.x,
            curve.y,
            label=curve.label,
            color=PAPER[f"m{i % HUES + 1}"],
            linestyle=DASHES[i // HUES % len(DASHES)],
            linewidth=2.0,
        )
    axes.set_yscale("log")
    # Zero singular values have no place on this axis.
    least = min(y for c in shown for y in c.y if y > 0)
    axes.set_ylim(least / 1.5, 1.5)
    axes.set_xlim(1, max(c.x[-1] for c in shown))
    axes.grid(color=PAPER["rule"], linewidth=0.8)
    axes.set_xlabel(shown[0].x_label)
    axes.set_ylabel(shown[0].y_label)
    axes.set_title("Singular values of W", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False)
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def _number(report: Report, name: str, subject: str, form: str) -> str:
    return next((format(f.value, form) for f in report.find(name, subject=subject)), "–")


def _pair_row(report: Report, figure: Figure) -> list[str]:
    group = figure.group
    here = {(f.name, f.role): f for f in report.figures if f.group == group}
    low, high = here["cos φ", "control"].interval or (math.nan, math.nan)
    spreads = [f for (name, _), f in here.items() if name.startswith("cos φ, ")]
    std = spreads[0] if spreads else None
    spread = "" if std is None else f" ± {std.value:.1e}"
    angles = overlapping = "–"
    if ("overlap", "method") in here:
        ends = [here[f"principal angle, {what}", "note"].value for what in ("smallest", "median", "largest")]
        angles = " / ".join(f"{v:.1f}" for v in ends)
        overlapping = f"{here['overlap', 'method'].value:.3f} ({here['overlap', 'control'].value:.3f})"
    return [
        printable(group),
        f"{cosine(figure.value)}{spread}",
        span(low, high),
        "by construction" if figure.note.startswith(BY_CONSTRUCTION) else figure.note.split(" ", 1)[0],
        angles,
        overlapping,
    ]
