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
    interval: str = ""
    n: str = ""
    mark: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: whose figures, with which look, and one cell a column; a band has a label alone."""

    label: str
    role: str
    colour: str = "control"
    cells: list[list[Shown]] = field(default_factory=list)
    n: str = ""


@dataclass(frozen=True)
class Table:
    """A table of figures and the notes its marks point at; ``heads`` span columns: (label, how many)."""

    columns: list[str]
    lines: list[Line]
    notes: list[tuple[str, str]]
    with_n: bool = False
    heads: list[tuple[str, int]] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Whether a figure is marked as the best of its column."""
        return any(shown.best for line in self.lines for cell in line.cells for shown in cell)


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

    def listed(self) -> list[tuple[str, str]]:
        """Return every mark with its note, in the order of their first use."""
        return [(mark, note) for note, mark in self.marks.items()]


def by_subject(figures: Sequence[Figure], report: Report) -> Table:
    """Return subjects as rows (methods, controls, chance) and names as columns."""
    notes = Notes()
    columns = list(dict.fromkeys(f.name for f in figures))
    lines = _subject_lines(figures, columns, report, notes)
    return Table(columns, lines, notes.listed(), any(line.n for line in lines))


def banded(groups: Sequence[tuple[str, Sequence[Figure]]], report: Report) -> Table:
    """Return the tables of groups that have the same names as one, a band above each group's rows."""
    notes = Notes()
    columns = list(dict.fromkeys(f.name for _, figures in groups for f in figures))
    lines = []
    for group, figures in groups:
        lines += [Line(group or "All", "band"), *_subject_lines(figures, columns, report, notes)]
    return Table(columns, lines, notes.listed(), any(line.n for line in lines))


def _subject_lines(
    figures: Sequence[Figure], columns: Sequence[str], report: Report, notes: Notes
) -> list[Line]:
    figures = plots.ranked(figures)
    colours = plots.method_colours(report)
    best = [clearly_best([f for f in figures if f.name == c]) for c in columns if c in BETTER_HIGH]
    lines = []
    by_subject: dict[tuple[str, str], list[Figure]] = {}
    for f in figures:
        by_subject.setdefault((f.subject, f.role), []).append(f)
    for (subject, role), own in by_subject.items():
        counts = {f.n for f in own}
        shared = len(counts) == 1
        cells = [
            [
                shown(f, notes, best=any(f is b for b in best), with_n=not shared)
                for f in own
                if f.name == column
            ]
            for column in columns
        ]
        n = next(iter(counts)) if shared else None
        colour = colours.get(subject, "control") if role == "method" else "control"
        lines.append(Line(subject or role, role, colour, cells, "" if n is None else text.number(n)))
    return lines


def shown(figure: Figure, notes: Notes, *, best: bool = False, with_n: bool = False) -> Shown:
    """Return a figure as it stands in a cell."""
    n = f"n = {text.number(figure.n)}" if with_n and figure.n is not None else ""
    return Shown(text.value(figure), text.interval(figure), n, notes.mark(figure.note), best)


def clearly_best(figures: Sequence[Figure]) -> Figure | None:
    """Return the highest figure where its interval lies above all others', whoever's it is."""
    finite = [f for f in figures if math.isfinite(f.value)]
    if len(finite) < 2:
        return None
    first = max(finite, key=lambda f: f.value)
    if first.interval is None:
        return None
    highest = max(f.value if f.interval is None else f.interval[1] for f in finite if f is not first)
    return first if highest < first.interval[0] else None


def by_measure(figures: Sequence[Figure]) -> Table:
    """Return measures as rows and subjects as columns: like beside like."""
    subjects = list(dict.fromkeys(f.subject for f in figures))
    notes = Notes()
    placed: dict[tuple[str, str], list[Figure]] = {}
    for f in figures:
        placed.setdefault((f.name, f.subject), []).append(f)
    lines = []
    for name in dict.fromkeys(f.name for f in figures):
        cells = [
            [shown(f, notes, with_n=True) for f in placed.get((name, subject), [])] for subject in subjects
        ]
        lines.append(Line(name, "note", "control", cells))
    return Table([s or "value" for s in subjects], lines, notes.listed())
