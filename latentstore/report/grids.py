"""Tables laid out like the paper's: figures placed by their axes, the printed ones muted below them.

A table is made only where its figures exist. Placing needs :attr:`Figure.axes` alone; the ablations, whose
rows are losses and transformations, are placed by the names that ``latentstore ablate`` gives its runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from latentstore.report import paper, plots, text
from latentstore.report.tables import BETTER_HIGH, Line, Notes, Shown, Table, clearly_best
from latentstore.results import Figure, Report

COSTS = {"training": "h", "extraction": "s/img", "matching": "s/pair"}


@dataclass(frozen=True)
class Grid:
    """A table laid out like one of the paper's, with the sentence on the printed rows where it has any."""

    key: str
    title: str
    sentence: str
    table: Table
    first: str = "Method or control"
    oracle: bool = False


Place = tuple[str, str]
"""A column: its head (a model, ``"Seen"``) and a measure (``"mAP"``)."""
Paper = Mapping[Place, float | str]


def laid_out(report: Report) -> list[Grid]:
    """Return the tables that this report's figures fill, in the paper's order."""
    figures = [f for f in report.figures if math.isfinite(f.value)]
    makers = (_cosines, _domains, _losses, _transformations, _strengths, _models)
    made = [make(figures, report) for make in makers]
    return [grid for grid in made if grid is not None]


def by_attack(report: Report) -> list[Grid]:
    """Return a table for each family of attacks: intensities across, subjects down."""
    figures = [f for f in _measured(report.figures) if "attack" in f.axes]
    without = [f for f in figures if "intensity" not in f.axes]
    out = []
    families = dict.fromkeys(f.axes["attack"] for f in figures if "intensity" in f.axes)
    for number, family in enumerate(families):
        own = [f for f in figures if f.axes["attack"] == family and "intensity" in f.axes]

        def place(f: Figure) -> Place:
            return (_axis(f, "intensity", "none"), f.name)

        places = _places([*without, *own], lambda f: _axis(f, "intensity", "none"))
        lines, notes = _rows([*without, *own], places, place, report)
        out.append(Grid(f"attack{number}", str(family), "", _table(places, lines, notes)))
    return out


def is_laid_out(figure: Figure) -> bool:
    """Return whether the figure is one of many that differ by model, strength or attack."""
    return bool(figure.axes.keys() & {"model", "strength", "attack", "intensity"})


# Tables of queries: models, strengths and domains


def _domains(figures: Sequence[Figure], report: Report) -> Grid | None:
    """Table 3: seen models, unseen models, and what the method costs."""
    heads = {"seen": "Seen", "unseen": "Unseen", "upper": "Unseen"}
    taken = [f for f in _measured(figures) if f.axes.get("domain") in heads and not is_laid_out(f)]
    lone = [f for f in _measured(figures) if f.axes.get("domain") == "seen" and "strength" not in f.axes]
    if not any(f.axes["domain"] == "seen" for f in taken) and len({f.axes.get("model") for f in lone}) == 1:
        taken += lone  # one seen model is the mean of the seen models
    costs = [f for f in figures if COSTS.get(f.name) == f.unit and not is_laid_out(f)]
    if not taken and not costs:
        return None
    places = [
        (head, name)
        for head in ("Seen", "Unseen")
        for name in BETTER_HIGH
        if any(heads[str(f.axes["domain"])] == head and f.name == name for f in taken)
    ]
    places += [("", name) for name in COSTS if any(f.name == name for f in costs)]
    costs = _for_everyone(costs, _measured(figures))

    def place(f: Figure) -> Place:
        return ("", f.name) if f.name in COSTS else (heads[str(f.axes["domain"])], f.name)

    lines, notes = _rows([*taken, *costs], places, place, report)
    printed = {name: _printed_domains(name) for name in paper.TABLE_3}
    lines += _paper_lines(printed, places)
    return _grid("Seen and unseen models", "Table 3", _table(places, lines, notes), taken)


def _for_everyone(costs: Sequence[Figure], measured: Sequence[Figure]) -> list[Figure]:
    """Give a cost that is no one's own (extraction: the encoder's) to all whose retrieval was measured."""
    subjects = {f.subject: f.role for f in measured if f.role in ("method", "control")}
    out = []
    for f in costs:
        if f.subject in subjects or not subjects:
            out.append(f)
        else:
            note = f"{f.subject}: {f.note}".strip(": ")
            out += [replace(f, subject=name, role=role, note=note) for name, role in subjects.items()]
    return out


def _printed_domains(name: str) -> dict[Place, float | str]:
    seen, unseen = paper.TABLE_3[name]
    cells: dict[Place, float | str] = {("Seen", n): v for n, v in zip(BETTER_HIGH, seen, strict=True)}
    cells |= {("Unseen", n): v for n, v in zip(BETTER_HIGH, unseen, strict=True)}
    for cost, value in zip(COSTS, paper.TABLE_3_COST[name], strict=True):
        if value is not None:
            cells["", cost] = text.number(value)
    return cells


def _models(figures: Sequence[Figure], report: Report) -> Grid | None:
    """Table 10: models across."""
    taken = [f for f in _measured(figures) if "model" in f.axes]
    taken = [f for f in taken if not f.axes.keys() & {"strength", "attack"}]
    if len({f.axes["model"] for f in taken}) < 2:
        return None
    places, printed_at = _model_places(taken)
    lines, notes = _rows(taken, places, lambda f: (_axis(f, "model"), f.name), report)
    printed = {name: _printed_models(row, printed_at) for name, row in paper.TABLE_10.items()}
    lines += _paper_lines(printed, places)
    return _grid("Each model", "Table 10", _table(places, lines, notes), taken)


def _strengths(figures: Sequence[Figure], report: Report) -> Grid | None:
    """Table 8: editing strengths down, models across."""
    taken = [f for f in _measured(figures) if "strength" in f.axes and "attack" not in f.axes]
    strengths = sorted({f.axes["strength"] for f in taken}, key=_order)
    if len(strengths) < 2:
        return None
    places, printed_at = _model_places(taken)
    lines: list[Line] = []
    notes = Notes()
    for strength in strengths:
        here = [f for f in taken if f.axes["strength"] == strength]
        own, _ = _rows(here, places, lambda f: (_axis(f, "model"), f.name), report, notes)
        lines += [Line(f"Strength {_word(strength)}", "band"), *own]
        row = paper.TABLE_8.get(round(strength, 6)) if isinstance(strength, float | int) else None
        if row is not None:
            cells = _printed_models(row, printed_at)
            lines += _paper_lines({"Linear transformation": cells}, places)
    return _grid("Editing strengths", "Table 8", _table(places, lines, notes), taken)


def _model_places(taken: Sequence[Figure]) -> tuple[list[Place], dict[str, str]]:
    """Return the columns, seen models first, and for each head the printed model that stands there.

    Where none of our models is one of the paper's, its printed figures get two columns of their own.
    """
    ordered = sorted(taken, key=lambda f: ("model" not in f.axes, f.axes.get("domain") != "seen"))
    places = _places(ordered, lambda f: _axis(f, "model"))
    heads = dict.fromkeys(head for head, _ in places)
    printed_at = {head: paper.known_model(head) for head in heads if paper.known_model(head)}
    if not printed_at:
        printed_at = {f"paper: {m}": m for m in (paper.SEEN, paper.UNSEEN)}
        names = list(dict.fromkeys(name for _, name in places))
        places += [(head, name) for head in printed_at for name in names]
    return places, printed_at


def _printed_models(row: tuple[paper.Pair, ...], printed_at: Mapping[str, str]) -> dict[Place, float | str]:
    return {
        (head, name): value
        for head, model in printed_at.items()
        for name, value in zip(BETTER_HIGH, paper.across(row, model), strict=True)
    }


# Tables of fits: ablations and spectra

_RUN = re.compile(r"(?P<loss>[a-z]+), (?P<head>[a-z0-9 ]+) @(?P<rank>\d+)")


def _losses(figures: Sequence[Figure], report: Report) -> Grid | None:
    return _ablated(figures, report, "loss", "head", "linear", paper.TABLE_6, ("Supervision", "Table 6"))


def _transformations(figures: Sequence[Figure], report: Report) -> Grid | None:
    return _ablated(figures, report, "head", "loss", "cosface", paper.TABLE_7, ("Transformation", "Table 7"))


def _ablated(
    figures: Sequence[Figure],
    report: Report,
    varied: str,
    fixed: str,
    usual: str,
    printed: Mapping[str, tuple[paper.Pair, paper.Pair]],
    titled: tuple[str, str],
) -> Grid | None:
    """Tables 6 and 7: one part of the recipe varied, the other and the rank as usual; controls below."""
    if report.kind != "ablation":
        return None
    rank = str(report.settings.get("rank"))
    taken = []
    for f in _measured(figures):
        run = _RUN.fullmatch(f.subject)
        named = run is not None and (run[fixed], run["rank"]) == (usual, rank) and run[varied] in printed
        if _domain(f) and (named or f.role == "control"):
            taken.append(replace(f, note=""))  # notes of these tell the printed figure, which has a row here
    if len({f.subject for f in taken if f.role == "method"}) < 2:
        return None
    places = [
        (head, name)
        for head in ("Seen", "Unseen")
        for name in BETTER_HIGH
        if any((_domain(f), f.name) == (head, name) for f in taken)
    ]
    lines, notes = _rows(taken, places, lambda f: (_domain(f), f.name), report)
    rows: dict[str, Paper] = {
        name: {
            (head, measure): value
            for head, pair in zip(("Seen", "Unseen"), pairs, strict=True)
            for measure, value in zip(BETTER_HIGH, pair, strict=True)
        }
        for name, pairs in printed.items()
    }
    return _grid(*titled, _table(places, [*lines, *_paper_lines(rows, places)], notes), taken)


def _domain(f: Figure) -> str:
    """Return ``"Seen"`` or ``"Unseen"`` of an ablation's figure, or nothing."""
    named = str(f.axes.get("domain") or f.group)
    return {"seen": "Seen", "unseen": "Unseen"}.get(named.removesuffix(" models"), "")


def _cosines(figures: Sequence[Figure], report: Report) -> Grid | None:
    """Table 1: cos φ of pairs, each beside its random band."""
    pairs = [f for f in figures if f.name == "cos φ" and f.role == "method"]
    if report.kind != "compare" or not pairs:
        return None
    notes = Notes()
    lines = []
    for f in pairs:
        group = [g for g in figures if g.group == f.group]
        band = next((g.interval for g in group if g.name == f.name and g.role == "control"), None)
        spread = next((g for g in group if g.name.startswith("cos φ, ")), None)
        own = next((g for g in group if g.name == "overlap" and g.role == "method"), None)
        chance = next((g for g in group if g.name == "overlap" and g.role == "control"), None)
        cells = [
            [Shown(_cosine(f.value), mark=notes.mark(f.note))],
            [Shown(_spread(spread.value), mark=notes.mark(spread.name))] if spread else [],
            [Shown(f"{_cosine(band[0])} to {_cosine(band[1])}")] if band else [],
            [Shown(text.value(own), mark=notes.mark(own.note))] if own else [],
            [Shown(text.value(chance))] if chance else [],
        ]
        lines.append(Line(f.subject, "method", plots.method_colours(report).get(f.subject, "m1"), cells))
    columns = ["cos φ", "±", "random band, 95 %", "overlap", "overlap by chance"]
    held = [i for i in range(len(columns)) if any(line.cells[i] for line in lines)]
    printed = [
        Line(f"SD2 × {model}", "paper", cells=[[Shown(f"{value:.6f}")], [Shown(_spread(sd))], [], [], []])
        for model, value, sd in paper.TABLE_1
    ]
    if 1 not in held:
        held.insert(1, 1)  # the print has ±, ours may not
    lines = [
        Line(line.label, line.role, line.colour, [line.cells[i] for i in held]) for line in [*lines, *printed]
    ]
    table = Table([columns[i] for i in held], lines, notes.listed())
    return replace(_grid("cos φ of spectra, beside chance", "Table 1", table, pairs), first="Pair")


def _spread(value: float) -> str:
    return f"± {text.number(float(f'{value:.2g}'))}"


def _cosine(value: float) -> str:
    """Return cos φ to as many decimals as tell it from 1, at least the print's six."""
    left = 1 - value
    if left < 1e-14:  # rounding
        return "1"
    return f"{value:.{max(6, 1 - math.floor(math.log10(left)))}f}"


# What they share


def _measured(figures: Iterable[Figure]) -> list[Figure]:
    return [f for f in figures if f.name in BETTER_HIGH and f.role != "note"]


def _axis(f: Figure, name: str, without: str = "all") -> str:
    return _word(f.axes[name]) if name in f.axes else without


def _word(value: str | float) -> str:
    return text.number(value) if isinstance(value, float | int) else value


def _order(value: str | float) -> tuple[bool, float, str]:
    """Numbers in their order, then words."""
    return (False, value, "") if isinstance(value, float | int) else (True, 0.0, value)


def _places(figures: Sequence[Figure], head: Callable[[Figure], str]) -> list[Place]:
    """Return every head with the measures that are held, in order of first appearance."""
    names = [n for n in BETTER_HIGH if any(f.name == n for f in figures)]
    return [(h, name) for h in dict.fromkeys(map(head, figures)) for name in names]


def _rows(
    figures: Sequence[Figure],
    places: Sequence[Place],
    place: Callable[[Figure], Place],
    report: Report,
    notes: Notes | None = None,
) -> tuple[list[Line], Notes]:
    """Return one line a subject: methods, controls, chance, and last the upper bounds."""
    notes = Notes() if notes is None else notes
    upper = [f for f in figures if f.axes.get("domain") == "upper"]
    ordinary = [f for f in figures if f.axes.get("domain") != "upper"]
    best = [clearly_best([f for f in ordinary if place(f) == p]) for p in places if p[1] in BETTER_HIGH]
    colours = plots.method_colours(report)
    lines = []
    for bound, part in ((False, ordinary), (True, upper)):
        ranked = plots.ranked(part)
        for subject, role in dict.fromkeys((f.subject, f.role) for f in ranked):
            own = [f for f in ranked if (f.subject, f.role) == (subject, role)]
            cells = [
                [_bare(f, notes, best=any(f is b for b in best)) for f in own if place(f) == p]
                for p in places
            ]
            label = f"Upper bound: {subject}" if bound else subject or role
            colour = colours.get(subject, "control") if role == "method" else "control"
            lines.append(Line(label, "upper" if bound else role, colour, cells))
    return lines, notes


def _bare(f: Figure, notes: Notes, *, best: bool) -> Shown:
    """Return a figure without its unit, which stands in the column's head."""
    value = text.percent(f.value, fine=True) if f.unit == "fraction" else text.number(f.value)
    return Shown(value, text.interval(f), "", notes.mark(f.note), best)


def _paper_lines(printed: Mapping[str, Paper], places: Sequence[Place]) -> list[Line]:
    """Return the printed rows that have a figure in one of these columns."""
    lines = []
    for name, cells in printed.items():
        if any(p in cells for p in places):
            shown = [[_printed(cells[p])] if p in cells else [] for p in places]
            lines.append(Line(name, "paper", cells=shown))
    return lines


def _printed(value: float | str) -> Shown:
    return Shown(value if isinstance(value, str) else text.percent(value))


def _table(places: Sequence[Place], lines: list[Line], notes: Notes) -> Table:
    columns = [f"{name}, {COSTS[name]}" if name in COSTS else f"{name}, %" for _, name in places]
    heads: list[tuple[str, int]] = []
    for head, _ in places:
        if heads and heads[-1][0] == head:
            heads[-1] = (head, heads[-1][1] + 1)
        else:
            heads.append((head, 1))
    return Table(columns, lines, notes.listed(), heads=heads)


def _grid(title: str, number: str, table: Table, taken: Sequence[Figure]) -> Grid:
    held = any(line.role == "paper" for line in table.lines)
    sentence = paper.sentence(number) if held else ""
    oracle = any(plots.is_oracle(f.group) for f in taken)
    key = number.lower().replace(" ", "")
    return Grid(key, f"{title}, as in {number}", sentence, table, oracle=oracle)
