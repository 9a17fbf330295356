"""One report as shown: its headlines, tables, plots, matches, settings, in the order its kind asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from markupsafe import Markup

from latentstore.report import cards, curves, plots, text
from latentstore.report.gallery import HEAT, Budget, Found, found
from latentstore.report.grids import Grid, by_attack, is_laid_out, laid_out
from latentstore.report.tables import Table, banded, by_measure, by_subject
from latentstore.results import Figure, Report

MATCHES = 100
PANELS = 9
"""Groups of queries that have a dot plot; of more, the first of those over all models and strengths."""
_DOTS = 40
"""Subjects up to which a dot plot can be read; of more, the table tells."""
_CURVES = 60
"""Plots of curves in one report."""
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
    """Plots with one legend; several are small multiples. Plots without room are not among them."""

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
    curves_left_out: int
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
    by_group = plots.grouped(taken)
    groups = [
        _group(by_group[group], group, rows, report, f"{prefix}dots{i}", budget, late=i >= PANELS)
        for i, (group, rows) in enumerate(drawn.items())
    ]
    layouts, attacked = laid_out(report), by_attack(report)
    shown = [g.table for g in groups] + [g.table for g in (*layouts, *attacked)]
    lines = curves.plots_of(report)
    families, left_out = _families(lines[:_CURVES], prefix, budget)
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
        curves=families,
        curves_left_out=left_out + max(0, len(lines) - _CURVES),
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
        "curves": made.curves or made.curves_left_out,
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
    """Return the dot plot of each group of queries: its rows, none where the group has no plot.

    Upper bounds have none, nor have many subjects, nor values out of range; of many groups those of one
    model, strength or attack have none, and of the others the first alone have one.
    """
    name = cards.retrieval_name(report)
    groups = plots.groups(report, name) if name else []
    by_group = plots.grouped(f for f in report.figures if f.name == name)
    out: dict[str, list[plots.Row]] = {}
    drawn = 0
    for group in groups:
        figures = by_group[group]
        apart = any(f.axes.get("domain") == "upper" for f in figures)
        apart |= len(groups) > PANELS and (drawn >= PANELS or any(is_laid_out(f) for f in figures))
        rows = [] if apart or len(figures) > _DOTS else plots.dot_rows(report, name, group, limit=limit)
        out[group] = rows if len(rows) <= _DOTS and all(0 <= r.figure.value <= 1 for r in rows) else []
        drawn += bool(out[group])
    return out


def _group(
    figures: Sequence[Figure],
    group: str,
    rows: Sequence[plots.Row],
    report: Report,
    key: str,
    budget: Budget,
    *,
    late: bool,
) -> Group:
    """Return one group's plot and table; one without a plot is folded where it is late or has axes."""
    title, name = group or "All queries", rows[0].figure.name if rows else ""
    label = f"{name}, {text.one_line(title, 60)}: " + "; ".join(
        f"{r.label} {text.value(r.figure)} {text.interval(r.figure)}".strip() for r in rows
    )
    return Group(
        title=title,
        chip=cards.chip(title),
        oracle=plots.is_oracle(group),
        uncontrolled=not any(f.role == "control" for f in figures),
        plot=budget.draw(lambda: plots.dots(rows, key=key, label=label)) if rows else None,
        table=by_subject(figures, report),
        folded=not rows and (late or any(f.axes for f in figures)),
    )


def _other_tables(report: Report, retrieval: Sequence[str]) -> list[tuple[str, Table]]:
    """Return the groups that are not about retrieval: neighbours with the same names in one table."""
    held = set(retrieval)
    rest = [f for f in report.figures if f.role != "note" and f.group not in held]
    if retrieval:  # a chance level of no group stands in every group's table
        rest = [f for f in rest if f.role != "chance" or f.group]
    groups = list(plots.grouped(rest).items())
    out = []
    for _, alike in groupby(groups, key=lambda pair: tuple(dict.fromkeys(f.name for f in pair[1]))):
        run = list(alike)
        single = len(run) == 1
        out.append((run[0][0], by_subject(run[0][1], report)) if single else ("", banded(run, report)))
    return out


def _details(report: Report) -> list[tuple[str, Table]]:
    """Return the notes of each group, measures as rows and subjects as columns: like beside like."""
    notes = plots.grouped(f for f in report.figures if f.role == "note")
    return [(group, by_measure(figures)) for group, figures in notes.items()]


# Plots


def _families(lines: Sequence[curves.Plot], prefix: str, budget: Budget) -> tuple[list[Family], int]:
    """Return the plots that there is room for, in families, and how many there is none for."""
    made = [_family(family, f"{prefix}curve{i}", budget) for i, family in enumerate(curves.families(lines))]
    shown = [family for family in made if family.plots]
    return shown, len(lines) - sum(len(family.plots) for family in shown)


def _family(family: Sequence[curves.Plot], key: str, budget: Budget) -> Family:
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
    shown = []
    for i, plot in enumerate(family):
        drawn = budget.draw(partial(curves.inline, plot, key=f"{key}-{i}"))
        if budget.plots > 0:
            rows = curves.rows(plot) if budget.numbers else []
            shown.append(CurvePlot(plot.title, drawn, plot.lines[0].curve.x_label or "x", rows))
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
