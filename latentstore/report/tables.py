"""Tables of figures: subjects beside their controls, measures beside each other, notes below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from latentstore.report import plots, text
from latentstore.results import Figure, Report

BETTER_HIGH = ("mAP", "Acc")


@dataclass(frozen=True)
class Shown:
    """A figure in a cell."""

    value: str
    interval: str
    n: str
    mark: str
    best: bool


@dataclass(frozen=True)
class Line:
    """A row of a table: whose figures, with which look, and one cell a column."""

    label: str
    role: str
    colour: str
    cells: list[list[Shown]]
    n: str


@dataclass(frozen=True)
class Table:
    """A table of figures and the notes its marks point at."""

    columns: list[str]
    lines: list[Line]
    notes: list[tuple[str, str]]
    with_n: bool


@dataclass
class Notes:
    """The notes below a table, each marked once with a letter."""

    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, note: str) -> str:
        """Return the mark of a note, a new one where it has none."""
        if not note:
            return ""
        i = len(self.marks)
        letter = chr(97 + i % 26) + (str(i // 26) if i >= 26 else "")
        return self.marks.setdefault(note, letter)


def by_subject(figures: Sequence[Figure], report: Report) -> Table:
    """Return subjects as rows (methods, controls, chance) and names as columns."""
    figures = plots.ranked(figures)
    columns = list(dict.fromkeys(f.name for f in figures))
    subjects = dict.fromkeys((f.subject, f.role) for f in figures)
    colours = plots.method_colours(report)
    best = {c: _best(figures, c) for c in columns}
    notes = Notes()
    lines = []
    for subject, role in subjects:
        own = [f for f in figures if (f.subject, f.role) == (subject, role)]
        counts = {f.n for f in own}
        shared = len(counts) == 1
        cells = [
            [_shown(f, notes, best=f is best[c], with_n=not shared) for f in own if f.name == c]
            for c in columns
        ]
        n = next(iter(counts)) if shared else None
        colour = colours.get(subject, "control") if role == "method" else "control"
        lines.append(Line(subject or role, role, colour, cells, "" if n is None else text.number(n)))
    return Table(columns, lines, _listed(notes), any(line.n for line in lines))


def _shown(figure: Figure, notes: Notes, *, best: bool, with_n: bool) -> Shown:
    n = f"n = {text.number(figure.n)}" if with_n and figure.n is not None else ""
    return Shown(text.value(figure), text.interval(figure), n, notes.mark(figure.note), best)


def _listed(notes: Notes) -> list[tuple[str, str]]:
    return [(mark, note) for note, mark in notes.marks.items()]


def _best(figures: Sequence[Figure], name: str) -> Figure | None:
    """Return the highest figure of a measure that is better high, whoever's it is."""
    if name not in BETTER_HIGH:
        return None
    finite = [f for f in figures if f.name == name and math.isfinite(f.value)]
    return max(finite, key=lambda f: f.value, default=None) if len(finite) > 1 else None


def by_measure(figures: Sequence[Figure]) -> Table:
    """Return measures as rows and subjects as columns: like beside like."""
    subjects = list(dict.fromkeys(f.subject for f in figures))
    notes = Notes()
    lines = []
    for name in dict.fromkeys(f.name for f in figures):
        cells = [
            [
                _shown(f, notes, best=False, with_n=True)
                for f in figures
                if (f.name, f.subject) == (name, subject)
            ]
            for subject in subjects
        ]
        lines.append(Line(name, "note", "control", cells, ""))
    return Table([s or "value" for s in subjects], lines, _listed(notes), with_n=False)
