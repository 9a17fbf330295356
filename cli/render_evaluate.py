"""What a person sees of an evaluation: the leakage check, a table for each kind of group, the verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli import upper
from cli.efficiency import GROUP as EFFICIENCY
from cli.render import counted, folded, percent, table

if TYPE_CHECKING:
    from cli.evaluating import Evaluated
    from cli.grouping import Slice
    from latentstore.results import Figure

_SHARES = ("mAP", "Acc", "recall@5", "recall@10", "recall@100", "µAP")
_HEADS = {"mAP": "mAP, % [95 %]", "Acc": "Acc [95 %]"}
_TITLES = {
    "domain": "Models that W learned from or not, weighed alike",
    "model": "By model",
    "strength": "By strength",
}
_PCA = "PCA-whitened, best"


def said(evaluated: Evaluated, written: Sequence[Path] = ()) -> str:
    """Return the evaluation in the terminal, and which files were written."""
    lines = [evaluated.report.title, "", *_leaks(evaluated)]
    for cut in evaluated.slices:
        if cut.kind == "all":
            lines += ["", _whole(evaluated, cut)]
    for kind, title in _TITLES.items():
        cuts = [cut for cut in evaluated.slices if cut.kind == kind]
        if cuts:
            lines += ["", f"  {title}; mAP, % [95 %]; Acc", _by(evaluated, cuts, kind)]
    cells = [cut for cut in evaluated.slices if cut.kind == "cell"]
    if cells:
        for name in evaluated.methods:
            lines += ["", f"  {name} by strength and model; mAP, Acc, %", _cells(evaluated, cells, name)]
    lines += [*_bound(evaluated), *_costs(evaluated), ""]
    report = evaluated.report
    leaks = {f"{check.said}." for check in evaluated.checks}
    lines += [*report.summary, *(f"Note: {c}" for c in report.caveats if c not in leaks)]
    if report.matches:
        lines.append(f"{_pictures(evaluated)}: --html PAGE shows them.")
    lines += [f"Written: {path}" for path in written]
    return "\n".join(lines)


def _leaks(evaluated: Evaluated) -> list[str]:
    """Return the leakage check, findings marked."""
    n = len(evaluated.findings)
    head = counted(n, "finding") if n else "nothing found"
    return [
        f"  Leakage check: {head}",
        *(f"    {'!' if check.finding else ' '} {check.said}" for check in evaluated.checks),
    ]


def _whole(evaluated: Evaluated, cut: Slice) -> str:
    """Return every measure of every subject on all queries."""
    here = [f for f in evaluated.report.figures if f.group == cut.group.name and f.role != "note"]
    names = [n for n in _SHARES if any(f.name == n for f in here)]
    rows = []
    for subject in dict.fromkeys(f.subject for f in here):
        own = {f.name: f for f in here if f.subject == subject}
        rows.append([subject, *(_cell(own[n], span=n in _HEADS) if n in own else "" for n in names)])
    n = int(cut.chosen.sum())
    title = f"  {cut.group.name}: {counted(n, 'query', 'queries')} of {counted(cut.group.n_photos, 'photo')}"
    held = folded(["", *(_HEADS.get(n, n) for n in names)], rows)
    return "\n".join([title, held, *_margins(here)])


def _cell(figure: Figure, *, span: bool) -> str:
    return percent(figure.value, figure.interval if span else None)


def _margins(figures: Sequence[Figure]) -> list[str]:
    """Return the medians on a line of their own: each map scores on a scale of its own."""
    each = [f"{f.subject} {f.value:.3g}" for f in figures if f.name == "margin"]
    if not each:
        return []
    text = (
        "Margin, the origin's score less the best other's, median (each on its own map's scale: margins of "
        f"different maps cannot be compared): {'; '.join(each)}"
    )
    return _wrapped(text)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _by(evaluated: Evaluated, cuts: Sequence[Slice], kind: str) -> str:
    """Return groups as rows, and maps beside the main controls as columns."""
    subjects = [*evaluated.methods, "raw", "norm-weighted", _PCA, "chance"]
    rows = []
    for cut in cuts:
        found = _found(evaluated, cut)
        axis = cut.group.axes[kind]
        label = f"{axis:g}" if isinstance(axis, float | int) else axis
        domain = cut.group.axes.get("domain", "")
        cells = [f"{label} ({domain})" if kind == "model" and domain else label, f"{int(cut.chosen.sum()):,}"]
        for subject in subjects:
            ap, acc = found.get((subject, "mAP")), found.get((subject, "Acc"))
            both = (
                "" if ap is None or acc is None else f"{percent(ap.value, ap.interval)}; {percent(acc.value)}"
            )
            cells.append(both)
        rows.append(cells)
    held = [i for i in range(len(subjects) + 2) if i < 2 or any(row[i] for row in rows)]
    header = ["models" if kind == "domain" else kind, "queries", *subjects]
    return folded([header[i] for i in held], [[row[i] for i in held] for row in rows])


def _found(evaluated: Evaluated, cut: Slice) -> dict[tuple[str, str], Figure]:
    """Return (subject, measure) → figure of a group, PCA-whitening under one name: its best."""
    found: dict[tuple[str, str], Figure] = {}
    here = [f for f in evaluated.report.figures if f.group == cut.group.name and f.role != "note"]
    best = max((f for f in here if f.name == "mAP" and f.subject.startswith("PCA")), key=_value, default=None)
    for f in here:
        found[f.subject, f.name] = f
        if best is not None and f.subject == best.subject:
            found[_PCA, f.name] = f
    return found


def _value(figure: Figure) -> float:
    return figure.value


def _cells(evaluated: Evaluated, cells: Sequence[Slice], name: str) -> str:
    """Return strengths as rows and models as columns (Table 8)."""
    models = list(dict.fromkeys(str(cut.group.axes["model"]) for cut in cells))
    at = {(cut.group.axes["strength"], str(cut.group.axes["model"])): cut for cut in cells}
    rows = []
    for strength in sorted({float(cut.group.axes["strength"]) for cut in cells}):
        row = [f"{strength:g}"]
        for model in models:
            cut = at.get((strength, model))
            found = {} if cut is None else _found(evaluated, cut)
            both = [found[name, n] for n in ("mAP", "Acc") if (name, n) in found]
            row.append("; ".join(percent(f.value) for f in both))
        rows.append(row)
    return folded(["strength", *models], rows)


def _bound(evaluated: Evaluated) -> list[str]:
    """Return the upper bounds, each beside what W reached on the same queries."""
    here = [f for f in evaluated.report.figures if f.axes.get("domain") == "upper"]
    rows = []
    for subject in dict.fromkeys(f.subject for f in here):
        found = {(f.axes.get("model"), f.name): f for f in here if f.subject == subject}
        models = [str(model) for model, name in found if name == "mAP" and model is not None]
        reached = {m: _own_map(evaluated, subject, m) for m in models}
        for model in [*models, None] if len(models) > 1 else models:
            cells = [percent(f.value, f.interval) for f in (found[model, "mAP"], found[model, "Acc"])]
            own = sum(reached.values()) / len(reached) if model is None else reached[model]
            rows.append([model or "mean over models", subject, *cells, percent(own)])
    if not rows:
        return []
    head = ["model", "method", "mAP, % [95 %]", "Acc [95 %]", "W's own mAP"]
    if len({row[1] for row in rows}) == 1:
        head, *rows = ([line[0], *line[2:]] for line in (head, *rows))
    return ["", f"  {upper.GROUP[0].upper()}{upper.GROUP[1:]}", folded(head, rows)]


def _own_map(evaluated: Evaluated, subject: str, model: str) -> float:
    """Return what W itself reached on the queries by one model."""
    of_model = [cut for cut in evaluated.slices if cut.kind == "model" and cut.group.axes["model"] == model]
    cut = (of_model or evaluated.slices)[0]  # of a single model the whole is its group
    return _found(evaluated, cut)[subject, "mAP"].value


def _costs(evaluated: Evaluated) -> list[str]:
    """Return what was timed."""
    here = [f for f in evaluated.report.figures if f.group == EFFICIENCY]
    if not here:
        return []
    rows = [[f.name, f.subject, f"{f.value:.3g} {f.unit}"] for f in here]
    notes: dict[tuple[str, str], list[str]] = {}
    for f in here:
        notes.setdefault((f.name, f.note), []).append(f.subject)
    told = [f"{name} ({'; '.join(of)}): {note}" for (name, note), of in notes.items()]
    lines = [line for text in told for line in _wrapped(text)]
    return ["", "  Efficiency", table(["", "of", "median"], rows, left=3), *lines]


def _pictures(evaluated: Evaluated) -> str:
    """Say how many misses and finds are kept with their candidates."""
    missed = sum(m.rank != 1 for m in evaluated.report.matches)
    found = len(evaluated.report.matches) - missed
    return f"{counted(missed, 'miss', 'misses')} and {counted(found, 'find')} are kept with their candidates"
