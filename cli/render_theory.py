"""What a theory check says in the terminal: a table for each statement, then the slips and what to beware."""

from __future__ import annotations

from cli import theory_lemma
from cli.render import printable, table
from cli.theory import MISSED, OTHER, OWN, UNSEEN
from latentstore.results import Figure, Report

RESIDUALS = {OWN: "own fitted", UNSEEN: "held out", OTHER: "second model"}


def checked(report: Report) -> str:
    """Return a theory check in the terminal."""
    parts = [_identity(report), _gaps(report), _theorems(report), _slips(report), _vaes(report)]
    lines = [line for part in parts for line in part]
    return "\n".join([*lines, *report.summary, "", *(f"Note: {c}" for c in report.caveats)])


def _groups(report: Report, name: str) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in report.find(name):
        found.setdefault(figure.group, []).append(figure)
    return found


def _identity(report: Report) -> list[str]:
    lines = ["Lemma 1, one step: ‖(ẑ₀ − z₀) − √(1−ᾱ)/√ᾱ (ε − ε_θ)‖ over the right side", ""]
    header = ["", theory_lemma.FACTOR, theory_lemma.NOISE, "deviation", "ẑ₀ clipped", "ε_θ misread"]
    for case, groups in _cases(report, theory_lemma.DEVIATION).items():
        rows = []
        for at, figures in groups.items():
            group = figures[0].group
            about = {f.name: f.value for f in report.figures if f.group == group and f.role == "note"}
            worst = max(f.value for f in figures if f.role == "method")
            rows.append(
                [
                    at,
                    f"{about[theory_lemma.FACTOR]:.3g}",
                    f"{about[theory_lemma.NOISE]:.2f}",
                    f"{worst:.0e}",
                    *(f"{f.value:.2g}" for f in figures if f.role == "control"),
                ]
            )
        lines += [f"  {printable(case)}", table(header, rows), ""]
    return [*lines, "  clipped, misread: where it is to fail", ""]


def _gaps(report: Report) -> list[str]:
    lines = ["Lemma 1 beside sampling: how far a translation ends from ẑ₀, which the lemma takes it for", ""]
    for case, groups in _cases(report, theory_lemma.GAP).items():
        rows = [
            [at if i == 0 else "", f.subject, f"{f.value:.3f}"]
            for at, figures in groups.items()
            for i, f in enumerate(figures)
        ]
        lines += [f"  {printable(case)}", table(["", "", "in ‖ẑ₀ − z₀‖"], rows, left=2)]
        lines += [f"  {f.name} = {f.value:.3g}" for f in report.find(theory_lemma.ROUND_TRIP, group=case)]
        lines.append("")
    return lines


def _cases(report: Report, name: str) -> dict[str, dict[str, list[Figure]]]:
    """Return the figures of a name by case, and within it by noise level or strength."""
    found: dict[str, dict[str, list[Figure]]] = {}
    for group, figures in _groups(report, name).items():
        case, _, at = group.rpartition(": ")
        found.setdefault(case, {})[at] = figures
    return found


def _theorems(report: Report) -> list[str]:
    lines = ["Theorems 1 and 2: ‖TW‖/‖(O−μ)W‖, what a translation moves of what origins vary through W", ""]
    for group in _groups(report, OWN):
        here = [f for f in report.figures if f.group == group]
        value = {(f.subject, f.name): f.value for f in here}
        subjects = dict.fromkeys(f.subject for f in here if f.name in RESIDUALS)
        rows = [[s, *(_short(value.get((s, name))) for name in RESIDUALS)] for s in subjects]
        lines += [f"  {printable(group)}", table(["W", *RESIDUALS.values()], rows)]
        steps = [f"{f.value:.2g} ({f.subject})" for f in here if f.name == MISSED]
        if steps:
            lines.append(f"  Last step of Theorem 2, {MISSED}: {', '.join(steps)}")
        lines.append("")
    return lines


def _slips(report: Report) -> list[str]:
    found = [f for f in report.figures if f.subject == "as found"]
    printed = {(f.group, f.name): f.value for f in report.figures if f.subject == "as printed"}
    rows = [[f.group, f.name, f"{printed[f.group, f.name]:g}", f"{f.value:.3g}"] for f in found]
    return ["Slips of the print", table(["", "", "printed", "found"], rows, left=2), ""]


def _vaes(report: Report) -> list[str]:
    figures = [f for f in report.figures if f.group == "Table 4"]
    if not figures:
        return []
    rows = [[f.name, printable(f.subject), f"{f.value:.3f}"] for f in figures]
    return ["Table 4, two autoencoders", table(["", "", "cosine"], rows, left=2), ""]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
