"""What a comparison says in the terminal: the control first, then maps, pairs and cross residuals."""

from __future__ import annotations

import math

from cli.comparing import BY_CONSTRUCTION
from cli.render import printable, table
from latentstore.results import Figure, Report

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


def _number(report: Report, name: str, subject: str, form: str) -> str:
    return next((format(f.value, form) for f in report.find(name, subject=subject)), "–")


def _pair_row(report: Report, figure: Figure) -> list[str]:
    group = figure.group
    here = {(f.name, f.role): f for f in report.figures if f.group == group}
    low, high = here["cos φ", "control"].interval or (math.nan, math.nan)
    std = here.get(("cos φ, standard deviation over fits", "method"))
    spread = "" if std is None else f" ± {std.value:.1g}"
    angles = overlapping = "–"
    if ("overlap", "method") in here:
        ends = [here[f"principal angle, {what}", "note"].value for what in ("smallest", "median", "largest")]
        angles = " / ".join(f"{v:.1f}" for v in ends)
        overlapping = f"{here['overlap', 'method'].value:.3f} ({here['overlap', 'control'].value:.3f})"
    return [
        printable(group),
        f"{figure.value:.8f}{spread}",
        f"{low:.8f} – {high:.8f}",
        "by construction" if figure.note.startswith(BY_CONSTRUCTION) else figure.note.split(" ", 1)[0],
        angles,
        overlapping,
    ]
