"""One report as shown: its headlines, tables, plots, matches, settings, in the order its kind asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from markupsafe import Markup

from latentstore.report import cards, curves, plots, text
from latentstore.report.gallery import HEAT, Budget, Found, found
from latentstore.report.grids import Grid, by_attack, is_laid_out, laid_out
from latentstore.report.tables import Table, banded, by_measure, by_subject
from latentstore.results import Report

MATCHES = 100
PANELS = 9
"""Groups of queries up to which each has a dot plot; of more, those over all models and strengths alone."""
KINDS: Mapping[str, str] = {
    "demo": "Demo",
    "evaluation": "Evaluation",
    "attack": "Attacks",
    "sweep": "Sweep",
    "compare": "Comparison",
    "ablation": "Ablation",
    "theory": "Theory check",
    "solve": "Solve",
    "match": "Match",
    "benchmark": "Benchmark",
}
"""What each kind is called, in the order in which they stand on a page of several."""
_TITLES = {
    "found": "How often is the origin found?",
    "tables": "Laid out like the paper's tables",
    "attacks": "Every attack",
    "measured": "What was measured",
    "caveats": "What these figures can not say",
    "matches": "Matches",
    "curves": "Curves",
    "details": "Solver details",
    "timings": "Time taken",
    "settings": "Settings and data",
    "reproduce": "How to reproduce this",
}
_FIRST: Mapping[str, tuple[str, ...]] = {
    "match": ("matches", "curves"),
    "attack": ("curves", "attacks"),
    "sweep": ("curves",),
    "compare": ("tables", "curves"),
    "ablation": ("tables", "curves"),
}
"""The sections that come first in a kind; the others follow in the order of their titles."""


@dataclass(frozen=True)
class Group:
    """The queries of one kind: plot, table, and what a reader must know about them."""

    title: str
    chip: str
    oracle: bool
    uncontrolled: bool
    plot: Markup | None
    table: Table
    folded: bool


@dataclass(frozen=True)
class Key:
    """One entry of a plot's legend."""

    label: str
    colour: str
    slot: int
    filled: bool
    dash: str


@dataclass(frozen=True)
class CurvePlot:
    """A plot of curves and, where it is short, its numbers."""

    title: str
    plot: Markup | None
    x_label: str
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Family:
    """Plots with one legend; several are small multiples."""

    legend: list[Key]
    plots: list[CurvePlot]


@dataclass(frozen=True)
class Part:
    """One report as the template takes it; ``prefix`` begins each of its ids."""

    report: Report
    prefix: str
    kind: str
    created: str
    cards: list[cards.Card]
    meanings: list[tuple[str, str]]
    groups: list[Group]
    grids: list[Grid]
    attacks: list[Grid]
    others: list[tuple[str, Table]]
    matches: list[Found]
    matches_left_out: int
    heat: str
    curves: list[Family]
    details: list[tuple[str, Table]]
    timings: list[tuple[str, str, float]]
    settings: list[tuple[str, str]]
    data: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    sections: list[tuple[str, str]] = field(default_factory=list)


def part(report: Report, prefix: str, budget: Budget) -> Part:
    """Return a report as shown; its pictures are taken from the budget."""
    name = cards.retrieval_name(report)
    drawn = panels(report)
    retrieval = list(drawn)
    taken = [f for f in report.figures if f.role != "note"]
    groups = [
        _group(report, name, group, rows, f"{prefix}dots{i}") for i, (group, rows) in enumerate(drawn.items())
    ]
    layouts, attacked = laid_out(report), by_attack(report)
    shown = [g.table for g in groups] + [g.table for g in (*layouts, *attacked)]
    families = curves.families(curves.plots_of(report))
    matches = report.matches[:MATCHES]
    made = Part(
        report=report,
        prefix=prefix,
        kind=KINDS.get(report.kind, report.kind.capitalize()),
        created=text.date(report.created) if report.created else "",
        cards=cards.headlines(report, name, retrieval),
        meanings=cards.meanings(taken, marked=any(t.marked for t in shown)) if name else [],
        groups=groups,
        grids=layouts,
        attacks=attacked,
        others=_other_tables(report, retrieval),
        matches=[found(m, budget, large=report.kind == "match") for m in matches],
        matches_left_out=len(report.matches) - len(matches),
        heat=HEAT if any(c.heat for m in matches for c in m.candidates) else "",
        curves=[_family(family, f"{prefix}curve{i}") for i, family in enumerate(families)],
        details=_details(report),
        timings=_timings(report),
        settings=text.pairs(report.settings),
        data=text.pairs(report.data),
        machine=text.pairs(report.machine),
    )
    made.sections.extend(_sections(made))
    return made


def _sections(made: Part) -> list[tuple[str, str]]:
    """Return the (id, title) of the sections that hold something, in the kind's order."""
    held = {
        "found": made.groups,
        "tables": made.grids,
        "attacks": made.attacks,
        "measured": made.others,
        "caveats": made.report.caveats,
        "matches": made.matches,
        "curves": made.curves,
        "details": made.details,
        "timings": made.timings,
        "settings": made.settings or made.data,
        "reproduce": made.report.reproduce,
    }
    order = dict.fromkeys((*_FIRST.get(made.report.kind, ()), *_TITLES))
    titles = {**_TITLES, "curves": "Robustness"} if made.report.kind == "attack" else _TITLES
    return [(name, titles[name]) for name in order if held[name]]


# Tables


def panels(report: Report, *, limit: int = 26) -> dict[str, list[plots.Row]]:
    """Return the dot plot of each group of queries: its rows, none where the group is folded or out of range.

    Upper bounds are folded; of many groups those of one model, strength or attack are, too.
    """
    name = cards.retrieval_name(report)
    groups = plots.groups(report, name) if name else []
    out = {}
    for group in groups:
        figures = report.find(name, group=group)
        apart = any(f.axes.get("domain") == "upper" for f in figures)
        apart |= len(groups) > PANELS and any(is_laid_out(f) for f in figures)
        rows = [] if apart else plots.dot_rows(report, name, group, limit=limit)
        out[group] = rows if all(0 <= r.figure.value <= 1 for r in rows) else []
    return out


def _group(report: Report, name: str, group: str, rows: Sequence[plots.Row], key: str) -> Group:
    """Return one group's plot and table; a group without a plot is folded where it has axes of its own."""
    figures = [f for f in report.figures if f.group == group and f.role != "note"]
    title = group or "All queries"
    label = f"{name}, {text.one_line(title, 60)}: " + "; ".join(
        f"{r.label} {text.value(r.figure)} {text.interval(r.figure)}".strip() for r in rows
    )
    return Group(
        title=title,
        chip=cards.chip(title),
        oracle=plots.is_oracle(group),
        uncontrolled=not any(f.role == "control" for f in figures),
        plot=plots.dots(rows, key=key, label=label) if rows else None,
        table=by_subject(figures, report),
        folded=not rows and any(f.axes for f in figures),
    )


def _other_tables(report: Report, retrieval: Sequence[str]) -> list[tuple[str, Table]]:
    """Return the groups that are not about retrieval: neighbours with the same names in one table."""
    rest = [f for f in report.figures if f.role != "note" and f.group not in retrieval]
    if retrieval:  # a chance level of no group stands in every group's table
        rest = [f for f in rest if f.role != "chance" or f.group]
    groups = [(g, [f for f in rest if f.group == g]) for g in dict.fromkeys(f.group for f in rest)]
    out = []
    for _, alike in groupby(groups, key=lambda pair: tuple(dict.fromkeys(f.name for f in pair[1]))):
        run = list(alike)
        single = len(run) == 1
        out.append((run[0][0], by_subject(run[0][1], report)) if single else ("", banded(run, report)))
    return out


def _details(report: Report) -> list[tuple[str, Table]]:
    """Return the notes of each group, measures as rows and subjects as columns: like beside like."""
    figures = [f for f in report.figures if f.role == "note"]
    return [
        (group, by_measure([f for f in figures if f.group == group]))
        for group in dict.fromkeys(f.group for f in figures)
    ]


# Plots


def _family(family: Sequence[curves.Plot], key: str) -> Family:
    legend = [
        Key(
            line.curve.label,
            line.colour,
            line.slot % len(curves.MARKERS) if curves.marked(line.curve) else -1,
            line.curve.role == "method",
            _dash(line),
        )
        for line in family[0].lines
    ]
    shown = [
        CurvePlot(
            plot.title,
            curves.inline(plot, key=f"{key}-{i}"),
            plot.lines[0].curve.x_label or "x",
            curves.rows(plot),
        )
        for i, plot in enumerate(family)
    ]
    return Family(legend, shown)


def _dash(line: curves.Line) -> str:
    pattern = curves.dash(line)
    return "none" if pattern == "-" else " ".join(str(2 * x) for x in pattern[1])


def _timings(report: Report) -> list[tuple[str, str, float]]:
    """Return each step, its seconds, and the length of its bar in percent of the longest."""
    finite = [s for s in report.timings.values() if math.isfinite(s) and s > 0]
    longest = max(finite, default=1.0)

    def size(s: float) -> float:
        return round(100 * s / longest, 2) if math.isfinite(s) and s > 0 else 0.0

    return [(name, text.seconds(s), size(s)) for name, s in report.timings.items()]
