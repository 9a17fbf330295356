"""What a comparison says in the terminal: the control first, then maps, pairs and cross residuals."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.likeness import BY_CONSTRUCTION, PAPER_TABLE, SPECTRUM, cosine, gap
from cli.render import printable, table
from latentstore.results import Curve, Figure, Report

HEADER = ["pair", "cos φ", "1 − cos φ", "its random band", "cos φ is"]
ANGLES = ["pair", "angles °: least", "median", "largest", "overlap", "by chance"]
WAYS = (", resampled", ", jackknife", "")
"""How a group of two models is named after them: by how its ± came about."""
SPELLED_OUT = 3
"""Pairs up to which each has its sentence below the table, too."""
_NO_VALUE = "–"


def compared(report: Report) -> str:
    """Return a comparison in the terminal."""
    lines = [report.summary[0], ""]
    maps = [
        [
            printable(name),
            " × ".join(map(str, facts["shape"])),
            _number(report, "σ max / σ min", name, ".4g"),
            next((cosine(f.value) for f in report.find("cos φ, untrained W", subject=name)), _NO_VALUE),
        ]
        for name, facts in report.data["maps"].items()
    ]
    if maps:
        lines += [table(["W", "shape", "σ max/min", "cos φ with untrained W"], maps), ""]
    rows = [_pair_row(report, f) for f in report.find("cos φ") if f.role == "method"]
    lines += [table(HEADER, rows), ""]
    if models := _models(report):
        lines += [models, ""]
    if report.data["±"]:
        lines += [report.data["±"], ""]
    angles = [_angle_row(report, f.group) for f in report.find("overlap") if f.role == "method"]
    if angles:
        lines += [table(ANGLES, angles), ""]
    crossed = [[f.group, f.subject, f"{f.value:.3f}", str(f.n)] for f in report.find("cross residual")]
    if crossed:
        lines += [table(["held-out pairs", "", "‖TW‖/‖(O−μ)W‖", "pairs"], crossed, left=2), ""]
    sentences = report.summary[1:] if len(rows) <= SPELLED_OUT else report.summary[1:2]
    notes = [f"Note: {c}" for c in report.caveats if c != report.data["±"]]
    return "\n".join([*lines, *sentences, *notes])


def _models(report: Report) -> str:
    """Return models beside models, laid out as the paper's Table 1; empty where there is nothing beside."""
    names = report.data["models"]
    cells = {
        of: _cell(report, *of)
        for of in itertools.combinations_with_replacement(names, 2)
        if _group(report, *of)
    }
    if len(names) < 2 and not any(spread for _, spread in cells.values()):
        return ""
    rows = []
    for a in names:
        # A value, its ± below it, as the paper prints them.
        own = [[cells.get((a, b), ("", ""))[i] for b in names] for i in range(2)]
        rows += [[printable(a) if i == 0 else "", *line] for i, line in enumerate(own) if any(line)]
    printed = "; ".join(f"{name} {value}" for name, value in report.data[PAPER_TABLE].items())
    beside = textwrap.fill(f"{PAPER_TABLE}: {printed}", 78, initial_indent="    ", subsequent_indent="    ")
    return f"{table(['cos φ', *map(printable, names)], rows)}\n{beside}"


def _group(report: Report, a: str, b: str) -> str:
    """Return the group of figures that tells of two models; empty where none does."""
    named = [f"{a} × {b}{way}" for way in WAYS]
    if a == b:
        named = [f"{a} × its resamples", f"{a} × without a part"]
    groups = {f.group for f in report.figures}
    return next((name for name in named if name in groups), "")


def _cell(report: Report, a: str, b: str) -> tuple[str, str]:
    here = [f for f in report.figures if f.group == _group(report, a, b)]
    value = next(f.value for f in here if (f.name, f.role) == ("cos φ", "method"))
    return cosine(value), next((f"± {f.value:.1e}" for f in here if f.name.startswith("cos φ, ")), "")


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write the spectra as a PNG: a line for each W, and muted the band of Gaussian matrices of its shape."""
    from matplotlib.figure import Figure as Canvas

    from latentstore.report.plots import DASHES, HUES, PAPER

    canvas = Canvas(figsize=(7.2, 4.8), dpi=144, layout="constrained")
    axes = canvas.subplots()
    shown = [c for c in curves if c.plot == SPECTRUM]
    for curve in (c for c in shown if c.role == "control"):
        look: dict[str, Any] = {"color": PAPER["control"], "linewidth": 1.2, "linestyle": "--", "zorder": 1}
        axes.plot(curve.x, curve.y, label=f"{curve.label}: mean", marker=_marker(curve), **look)
        if curve.low is not None and curve.high is not None:
            label = f"{curve.label}: 95 % of each singular value (not the random band of cos φ)"
            shade: dict[str, Any] = {"color": PAPER["control"], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(curve.x, curve.low, curve.high, label=label, **shade)
    own = [c for c in shown if c.role == "method"]
    for i, curve in enumerate(own):
        axes.plot(
            curve.x,
            curve.y,
            label=curve.label,
            color=PAPER[f"m{i % HUES + 1}"],
            linestyle=DASHES[i // HUES % len(DASHES)],
            linewidth=2.0,
            marker=_marker(curve),
        )
    axes.set_yscale("log")
    # Zero singular values have no place on this axis.
    least = min(y for c in shown for y in c.y if y > 0)
    axes.set_ylim(least / 1.5, 1.5)
    most = max(c.x[-1] for c in shown)
    axes.set_xlim(*((1, most) if most > 1 else (0, 2)))
    axes.grid(color=PAPER["rule"], linewidth=0.8)
    axes.set_xlabel(shown[0].x_label)
    axes.set_ylabel(shown[0].y_label)
    axes.set_title("Singular values of W", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False)
    canvas.savefig(path, format="png", facecolor=PAPER["ground"], metadata={"Software": None})


def _marker(curve: Curve) -> str:
    """Return a dot for the spectrum of a map of one column, through which no line goes."""
    return "o" if len(curve.x) == 1 else ""


def _number(report: Report, name: str, subject: str, form: str) -> str:
    return next((format(f.value, form) for f in report.find(name, subject=subject)), "–")


def _pair_row(report: Report, figure: Figure) -> list[str]:
    here = {(f.name, f.role): f for f in report.figures if f.group == figure.group}
    low, high = here["cos φ", "control"].interval or (math.nan, math.nan)
    return [
        printable(_short(figure.group)),
        cosine(figure.value),
        gap(figure.value),
        f"{gap(high)} to {gap(low)}",
        "1 by construction" if figure.note.startswith(BY_CONSTRUCTION) else figure.note.split(" ", 1)[0],
    ]


def _short(group: str) -> str:
    """Return a group's name without its way, which is told below the table."""
    for way in filter(None, WAYS):
        group = group.removesuffix(way)
    return group


def _angle_row(report: Report, group: str) -> list[str]:
    here = {(f.name, f.role): f for f in report.figures if f.group == group}
    ends = [here[f"principal angle, {what}", "note"].value for what in ("smallest", "median", "largest")]
    shares = [here["overlap", role].value for role in ("method", "control")]
    return [printable(group), *(f"{v:.1f}" for v in ends), *(f"{v:.3f}" for v in shares)]
