"""From a :class:`~latentstore.results.Report` to the page: what each section shows, then the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latentstore.report import plots, text
from latentstore.report.gallery import Budget, found
from latentstore.report.tables import BETTER_HIGH, Table, by_measure, by_subject
from latentstore.results import Curve, Figure, Report

MATCHES = 100
CURVE_ROWS = 40
_KINDS = {"compare": "Comparison", "theory": "Theory check"}
_MEANINGS = {
    "mAP": "Mean average precision: 100 % when the origin of every query is ranked first.",
    "Acc": "The share of queries whose first-ranked image is the origin.",
}


@dataclass(frozen=True)
class Group:
    """The queries of one kind: plot, table, and what a reader must know about them."""

    title: str
    chip: str
    oracle: bool
    uncontrolled: bool
    plot: Markup | None
    table: Table


@dataclass(frozen=True)
class Card:
    """One headline: a large value and the lines that put it beside its controls."""

    title: str
    value: str
    interval: str
    lines: list[str]
    chip: str = ""
    oracle: bool = False


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
    """A plot of curves with its legend and, where it is short, its numbers."""

    title: str
    plot: Markup | None
    keys: list[Key]
    x_label: str
    rows: list[tuple[str, list[str]]]


def render_page(report: Report) -> str:
    """Return the whole page."""
    name = _retrieval_name(report)
    retrieval = plots.groups(report, name) if name else []
    taken = [f for f in report.figures if f.role != "note"]
    budget = Budget()
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            kind=_KINDS.get(report.kind, report.kind.capitalize()),
            created=text.date(report.created) if report.created else "",
            cards=_cards(report, name, retrieval),
            groups=[_group(report, name, g, i) for i, g in enumerate(retrieval)],
            meanings=_meanings(taken, name),
            others=_other_tables(report, retrieval),
            matches=[found(m, budget) for m in report.matches[:MATCHES]],
            matches_left_out=max(0, len(report.matches) - MATCHES),
            curves=_curve_plots(report),
            details=_details(report),
            timings=_timings(report),
            settings=text.pairs(report.settings),
            data=text.pairs(report.data),
            machine=text.pairs(report.machine),
        )
    )


def _environment() -> Environment:
    """Return Jinja2 with escaping on for every template, and every value cleaned on its way out."""
    return Environment(
        loader=PackageLoader("latentstore.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda v: v if isinstance(v, Markup) else text.clean(v),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _retrieval_name(report: Report) -> str:
    """Return the measure that says how often origins are found: mAP, or Acc where no mAP was taken."""
    names = {f.name for f in report.figures if f.role != "note"}
    return next((n for n in BETTER_HIGH if n in names), "")


def _meanings(figures: Iterable[Figure], name: str) -> list[tuple[str, str]]:
    """Return the measures and controls in the page, each in one sentence."""
    if not name:
        return []
    figures = list(figures)
    found = {f.name for f in figures}
    rows = [(n, sentence) for n, sentence in _MEANINGS.items() if n in found]
    if any(text.is_difference(f) for f in figures):
        rows.append(("Gain", "The method less the control named in the column, in percentage points."))
    if any(f.role == "control" for f in figures):
        rows.append(("Controls", _controls_sentence(f.subject for f in figures if f.role == "control")))
    if any(f.role == "chance" for f in figures):
        rows.append(("Chance", "What a random order of the collection would reach."))
    if any(f.interval for f in figures):
        rows.append(
            ("Interval", "In brackets, 95 %: how far the figure may move with other queries of this kind.")
        )
    return rows


def _controls_sentence(subjects: Iterable[str]) -> str:
    """Return what the controls are, those explained that the report holds."""
    words = {
        "raw": "as they are (raw)",
        "centred": "less their mean (centred)",
        "norm-weighted": "less their mean, each reference divided by its length under the analytic map "
        "(norm-weighted)",
        "PCA-whitened": "with each principal direction rescaled by its spread (PCA-whitened; ½ and ¼ are "
        "exponents, @8 its first 8 directions)",
        "random subspace": "projected at random (random subspace)",
    }
    names = list(subjects)
    held = [sentence for start, sentence in words.items() if any(n.startswith(start) for n in names)]
    end = f": {'; '.join(held)}." if held else "."
    return "The same latents compared by cosine without a fitted W" + end


def _group(report: Report, name: str, group: str, index: int) -> Group:
    """Return one group's plot and table."""
    figures = [f for f in report.figures if f.group == group and f.role != "note"]
    rows = plots.dot_rows(report, name, group)
    in_range = rows and all(0 <= r.figure.value <= 1 for r in rows)
    title = group or "All queries"
    label = f"{name}, {text.one_line(title, 60)}: " + "; ".join(
        f"{r.label} {text.value(r.figure)} {text.interval(r.figure)}".strip() for r in rows
    )
    return Group(
        title=title,
        chip=_chip(title),
        oracle=plots.is_oracle(group),
        uncontrolled=not any(f.role == "control" for f in figures),
        plot=plots.dots(rows, key=f"dots{index}", label=label) if in_range else None,
        table=by_subject(figures, report),
    )


def _other_tables(report: Report, retrieval: Sequence[str]) -> list[tuple[str, Table]]:
    """Return a table for each group that is not about retrieval."""
    rest = [f for f in report.figures if f.role != "note" and f.group not in retrieval]
    return [
        (group, by_subject([f for f in rest if f.group == group], report))
        for group in dict.fromkeys(f.group for f in rest)
    ]


def _details(report: Report) -> list[tuple[str, Table]]:
    """Return the notes of each group, measures as rows and subjects as columns: like beside like."""
    figures = [f for f in report.figures if f.role == "note"]
    return [
        (group, by_measure([f for f in figures if f.group == group]))
        for group in dict.fromkeys(f.group for f in figures)
    ]


# Headline cards

CHOSEN = "method chosen on validation"
"""The setting that names the method to headline; without it the highest is, and says so."""


def _cards(report: Report, name: str, groups: Sequence[str]) -> list[Card]:
    """Return up to four headlines, each of them a method beside its best control."""
    if groups:
        made = (_card(report, name, group) for group in groups)
        return [card for card in made if card is not None][:4]
    figures = [f for f in report.figures if f.role == "method"][:4]
    return [
        Card(f.name, text.value(f), text.interval(f), [x for x in (f.subject, f.group) if x]) for f in figures
    ]


def _card(report: Report, name: str, group: str) -> Card | None:
    figures = [r.figure for r in plots.dot_rows(report, name, group)]
    methods = [f for f in figures if f.role == "method"]
    if not methods:
        return None
    chosen = [f for f in methods if f.subject == report.settings.get(CHOSEN)]
    top = chosen[0] if chosen else max(methods, key=lambda f: f.value)
    whose = f"{name} of {top.subject}"
    if chosen and len(methods) > 1:
        whose += f", chosen on validation among {len(methods)} methods"
    elif len(methods) > 1:
        whose += f", the highest of {len(methods)} methods"
    lines = [whose, *_beside(report, top, [f for f in figures if f.role == "control"])]
    chance = [text.value(f) for f in figures if f.role == "chance"]
    tail = [f"chance {chance[0]}"] if chance else []
    if top.n is not None:
        tail.append(f"{text.number(top.n)} queries")
    if tail:
        line = "; ".join(tail)
        lines.append(line[0].upper() + line[1:])
    oracle = plots.is_oracle(group)
    if oracle:
        lines.append("What a method reaches at best, where its own model holds")
    return Card(group or "All queries", text.value(top), text.interval(top), lines, _chip(group), oracle)


def _chip(group: str) -> str:
    """Return what must be said beside an oracle group's name, unless the name says it."""
    return "simulated" if plots.is_oracle(group) and "simulat" not in group.lower() else ""


def _beside(report: Report, top: Figure, controls: Sequence[Figure]) -> list[str]:
    """Return the sentences that hold a method beside its best control and its measured gain."""
    if not controls:
        return ["No control was measured on these queries."]
    best = max(controls, key=lambda f: f.value)
    lines = [f"Best control: {best.subject}, {text.value(best)}"]
    gains = [
        f
        for f in report.figures
        if text.is_difference(f) and (f.subject, f.group) == (top.subject, top.group) and f.role != "note"
    ]
    for gain in gains[:1]:
        whole = text.interval(gain).replace(" ", "\u00a0")  # not broken over two lines
        words = f"{gain.name[0].upper()}{gain.name[1:]}: {text.value(gain)} {whole}".rstrip()
        if gain.interval is not None and gain.interval[0] <= 0 <= gain.interval[1]:
            words += ": the interval holds zero, so no difference is shown"
        lines.append(words)
    if not gains and top.value <= best.value:
        lines.append("No method is above this control")
    return lines


# Curves


def _curve_plots(report: Report) -> list[CurvePlot]:
    return [
        _curve_plot(name, [c for c in report.curves if c.plot == name], report, i)
        for i, name in enumerate(dict.fromkeys(c.plot for c in report.curves))
    ]


def _curve_plot(name: str, curves: Sequence[Curve], report: Report, index: int) -> CurvePlot:
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
        lines.append(plots.Line(curve, colour, slot))
    title = text.one_line(name, 80)
    label = f"{title}: {', '.join(text.one_line(c.label, 40) for c in curves)}"
    drawn = plots.curves(lines, key=f"curve{index}", label=label)
    keys = [
        Key(
            line.curve.label,
            line.colour,
            line.slot % len(plots.MARKERS) if plots.marked(line.curve) else -1,
            line.curve.role == "method",
            _dash(line),
        )
        for line in lines
    ]
    return CurvePlot(name, drawn, keys, curves[0].x_label or "x", _curve_rows(curves))


def _dash(line: plots.Line) -> str:
    pattern = plots.dash(line)
    return "none" if pattern == "-" else " ".join(str(2 * x) for x in pattern[1])


def _curve_rows(curves: Sequence[Curve]) -> list[tuple[str, list[str]]]:
    """Return the numbers behind a plot, one row an x, or nothing where they are many."""
    xs = sorted({x for c in curves for x in c.x if math.isfinite(x)})
    if len(xs) > CURVE_ROWS:
        return []
    at = [dict(zip(c.x, c.y, strict=False)) for c in curves]
    return [(text.number(x), [text.number(row[x]) if x in row else "" for row in at]) for x in xs]


def _timings(report: Report) -> list[tuple[str, str, float]]:
    """Return each step, its seconds, and the length of its bar in percent of the longest."""
    finite = [s for s in report.timings.values() if math.isfinite(s) and s > 0]
    longest = max(finite, default=1.0)

    def size(s: float) -> float:
        return round(100 * s / longest, 2) if math.isfinite(s) and s > 0 else 0.0

    return [(name, text.seconds(s), size(s)) for name, s in report.timings.items()]
