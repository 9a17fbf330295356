"""Headlines: a method's figure beside its best control, and what the measures mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from latentstore.report import plots, text
from latentstore.report.grids import is_laid_out
from latentstore.report.tables import BETTER_HIGH
from latentstore.results import CHOSEN, Figure, Report

_CARDS = 4
_WITHOUT = ("compare", "theory")
"""Kinds whose figures say nothing without what stands beside them: a table, never a headline."""
_MEANINGS = {
    "mAP": "Mean average precision: 100 % when the origin of every query is ranked first.",
    "Acc": "The share of queries whose first-ranked image is the origin.",
    "µAP": "Average precision of all queries' candidates in one list by score: can one threshold serve all?",
    "margin": "The origin's score less that of the best other image: below 0 it is not found.",
}
_CONTROLS = {
    "raw": "as they are (raw)",
    "centred": "less their mean (centred)",
    "norm-weighted": "less their mean, each reference divided by its length under the analytic map "
    "(norm-weighted)",
    "PCA-whitened": "with each principal direction rescaled by its spread (PCA-whitened; ½ and ¼ are "
    "exponents, @8 its first 8 directions)",
    "random subspace": "projected at random (random subspace)",
}


@dataclass(frozen=True)
class Card:
    """One headline: a large value and the lines that put it beside its controls."""

    title: str
    value: str
    interval: str
    lines: list[str]
    chip: str = ""
    oracle: bool = False


def headlines(report: Report, name: str, groups: Sequence[str]) -> list[Card]:
    """Return up to four headlines, each of them a method beside its best control."""
    if report.kind in _WITHOUT:
        return []
    if groups:
        made = (_card(report, name, group) for group in _leading(report, name, groups))
        return list(islice(filter(None, made), _CARDS))
    figures = [f for f in report.figures if f.role == "method"][:_CARDS]
    return [
        Card(f.name, text.value(f), text.interval(f), [x for x in (f.subject, f.group) if x]) for f in figures
    ]


def _leading(report: Report, name: str, groups: Sequence[str]) -> list[str]:
    """Return the groups to headline: those over all models and strengths; of attacks, the hardest."""
    by_group = plots.grouped(f for f in report.figures if f.name == name)
    apart = {g: by_group[g][0] for g in groups}
    groups = [g for g in groups if apart[g].axes.get("domain") != "upper"]
    whole = [g for g in groups if not is_laid_out(apart[g])]
    if whole:
        return whole
    last = {apart[g].axes.get("attack", g): g for g in groups if "intensity" in apart[g].axes}
    hardest = sorted(last.values(), key=lambda g: max(f.value for f in by_group[g]))[:_CARDS]
    return [g for g in groups if g in (hardest or groups)]


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
        whose += f", the highest of {len(methods)} methods by these very queries"
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
    return Card(group or "All queries", text.value(top), text.interval(top), lines, chip(group), oracle)


def chip(group: str) -> str:
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
        if (f.subject, f.group) == (top.subject, top.group) and f.role != "note" and text.is_difference(f)
    ]
    for gain in sorted(gains, key=lambda f: "control" not in f.name)[:1]:
        whole = text.interval(gain).replace(" ", "\u00a0")  # not broken over two lines
        words = f"{gain.name[0].upper()}{gain.name[1:]}: {text.value(gain)} {whole}".rstrip()
        if gain.interval is not None and gain.interval[0] <= 0 <= gain.interval[1]:
            words += ": the interval holds zero, so no difference is shown"
        lines.append(words)
    if not gains and top.value <= best.value:
        lines.append("No method is above this control")
    return lines


def retrieval_name(report: Report) -> str:
    """Return the measure that says how often origins are found: mAP, or Acc where no mAP was taken."""
    names = {f.name for f in report.figures if f.role != "note"}
    return next((n for n in BETTER_HIGH if n in names), "")


def meanings(figures: Iterable[Figure], *, marked: bool) -> list[tuple[str, str]]:
    """Return the measures and controls in the page, each in one sentence."""
    figures = list(figures)
    held = {f.name for f in figures}
    rows = [(n, sentence) for n, sentence in _MEANINGS.items() if n in held]
    if any(n.startswith("recall@") for n in held):
        rows.append(("recall@k", "The share of queries whose origin is among the first k images."))
    if any(text.is_difference(f) for f in figures):
        rows.append(("Gain", "The figure less the one that the column names, in percentage points."))
    if any(f.role == "control" for f in figures):
        rows.append(("Controls", _controls_sentence(f.subject for f in figures if f.role == "control")))
    if any(f.role == "chance" for f in figures):
        rows.append(("Chance", "What a random order of the collection would reach."))
    if any(f.interval for f in figures):
        rows.append(
            ("Interval", "In brackets, 95 %: how far the figure may move with other queries of this kind.")
        )
    if marked:
        rows.append(("Bold", "The highest of a column, where its interval lies above all others'."))
    return rows


def _controls_sentence(subjects: Iterable[str]) -> str:
    """Return what the controls are, those explained that the report holds."""
    names = list(subjects)
    held = [sentence for start, sentence in _CONTROLS.items() if any(n.startswith(start) for n in names)]
    end = f": {'; '.join(held)}." if held else "."
    return "The same latents compared by cosine without a fitted W" + end
