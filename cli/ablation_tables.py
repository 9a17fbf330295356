"""The tables of the paper's ablations: rows, gaps between seen and unseen models, figures and curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli import measure
from cli.collection import Queries
from cli.render import percent
from latentstore.results import Curve, Figure, Report
from solvers.metrics import Ranking, paired_bootstrap
from solvers.sgd import CosFace
from solvers.training import TrainResult

TABLES = {
    "losses": "Supervision (Table 6)",
    "transformations": "Transformation (Table 7)",
    "layers": "MLP layers (Figure 9)",
    "ranks": "Rank of W (Figure 8)",
}
SEEN, UNSEEN = "seen models", "unseen models"
PAPER: Mapping[tuple[str, str], tuple[float, float, float, float]] = {
    ("losses", "cosface"): (88.8, 86.6, 86.6, 84.5),
    ("losses", "softmax"): (76.1, 72.6, 62.4, 59.0),
    ("losses", "circle"): (84.9, 82.0, 82.5, 80.4),
    ("transformations", "linear"): (88.8, 86.6, 86.6, 84.5),
    ("transformations", "convolution"): (37.4, 33.8, 32.5, 29.6),
    ("transformations", "attention"): (89.0, 87.2, 80.7, 78.2),
    ("layers", "1"): (88.8, 86.6, 86.6, 84.5),
    ("layers", "2"): (91.4, 89.4, 80.3, 77.3),
    ("ranks", "512"): (88.8, 86.6, 86.6, 84.5),
}
"""The paper's figures in percent: mAP and Acc on seen models, mAP and Acc on unseen ones."""
COLUMNS = (
    *("table", "variant", "group", "mAP", "lower", "upper", "Acc", "n", "validation", "chosen"),
    *("parameters", "multiply_adds", "step", "seconds"),
)


@dataclass(frozen=True)
class Row:
    """One variant of one table on one group of queries; fractions, with mAP's 95 % interval."""

    table: str
    variant: str
    group: str
    map: float
    interval: tuple[float, float] | None
    acc: float
    n: int
    validation: float | None
    chosen: bool
    parameters: int
    multiply_adds: int
    step: int
    seconds: float


@dataclass(frozen=True)
class Gap:
    """How much less a variant finds of unseen models; ``interval`` where both ask for the same photos."""

    table: str
    variant: str
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Ablated:
    """The rows of all tables, the gaps and the report; ``controls`` are group → (name, its mAP)."""

    rows: list[Row]
    gaps: list[Gap]
    controls: dict[str, tuple[str, float]]
    report: Report


def run_name(cfg: CosFace) -> str:
    """Return what a run is called; runs that differ in loss, head or rank have different names."""
    head = f"mlp of {cfg.layers} layers" if cfg.head == "mlp" else cfg.head
    return f"{cfg.loss}, {head} @{cfg.rank}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line a row; fractions in full, an empty cell where there is nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for r in rows:
            low, high = r.interval or ("", "")
            validation = "" if r.validation is None else r.validation
            cells = [r.table, r.variant, r.group, r.map, low, high, r.acc, r.n, validation, r.chosen]
            writer.writerow([*cells, r.parameters, r.multiply_adds, r.step, r.seconds])


def rows(
    plan: Mapping[tuple[str, str], CosFace],
    runs: Mapping[CosFace, TrainResult],
    group: str,
    evaluation: measure.Evaluation,
) -> list[Row]:
    """Return every variant of every table on one group of queries."""
    out = []
    for (table, variant), cfg in plan.items():
        result, found = runs[cfg], {f.name: f for f in evaluation.figures if f.subject == run_name(cfg)}
        rivals = [runs[c] for (t, _), c in plan.items() if t == table]
        scores = [r.best_map for r in rivals if r.best_map is not None]
        assert result.snapshot is not None  # noqa: S101 - a finished run has one
        head = result.snapshot.head
        out.append(
            Row(
                table,
                variant,
                group,
                found["mAP"].value,
                found["mAP"].interval,
                found["Acc"].value,
                found["mAP"].n or 0,
                result.best_map,
                bool(scores) and result.best_map == max(scores),
                head.parameter_count,
                head.multiply_adds,
                result.best_step,
                result.seconds,
            )
        )
    return out


def gaps(
    plan: Mapping[tuple[str, str], CosFace],
    groups: Sequence[Queries],
    measured: Sequence[measure.Evaluation],
) -> list[Gap]:
    """Return mAP on seen less mAP on unseen models, of every variant; none where a side is missing."""
    found = {g.group: (g, e) for g, e in zip(groups, measured, strict=True) if e.methods}
    if SEEN not in found or UNSEEN not in found:
        return []
    out = []
    for (table, variant), cfg in plan.items():
        sides = []
        for group in (SEEN, UNSEEN):
            asked, evaluation = found[group]
            sides.append(_by_photo(evaluation.rankings[run_name(cfg), group], asked))
        seen, unseen = (evaluation.rankings[run_name(cfg), g].map for g, (_, evaluation) in _two(found))
        photos = sorted(sides[0])
        interval = None
        if photos == sorted(sides[1]) and len(photos) > 1:
            a, b = (np.array([side[p] for p in photos]) for side in sides)
            interval = paired_bootstrap(a, b, np.array(photos, dtype=object))
        out.append(Gap(table, variant, seen - unseen, interval))
    return out


def _two(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(group, found[group]) for group in (SEEN, UNSEEN)]


def _by_photo(ranking: Ranking, asked: Queries) -> dict[str, float]:
    """Return the mean average precision of each photo's queries."""
    photos = asked.collection.group[asked.rows]
    held: dict[str, list[float]] = {}
    if len(photos) != len(ranking.ap):
        return {}
    for photo, ap in zip(photos.tolist(), ranking.ap.tolist(), strict=True):
        held.setdefault(photo, []).append(ap)
    return {photo: float(np.mean(values)) for photo, values in held.items()}


def best_control(evaluation: measure.Evaluation) -> tuple[str, float]:
    """Return the control with the highest mAP, and that."""
    found = [
        f
        for f in evaluation.figures
        if f.role == "control" and f.name == "mAP" and not f.subject.startswith(measure.RANDOM)
    ]
    best = max(found, key=lambda f: f.value)
    return best.subject, best.value


def paper_note(table: str, variant: str, group: str, name: str) -> str:
    """Return the paper's figure as a sentence; empty where it prints none."""
    known = PAPER.get((table, variant))
    if known is None or name not in ("mAP", "Acc"):
        return ""
    at = (2 if group.startswith(UNSEEN) else 0) + (name == "Acc")
    return f"the paper has {known[at]} on other images and models"


def figures(
    plan: Mapping[tuple[str, str], CosFace],
    runs: Mapping[CosFace, TrainResult],
    rows: Sequence[Row],
    gaps: Sequence[Gap],
    measured: Sequence[measure.Evaluation],
) -> list[Figure]:
    """Return what was measured, with the paper's figures beside, and what each run is and took."""
    notes = {}
    for (table, variant), cfg in plan.items():
        for group in (SEEN, UNSEEN):
            for name in ("mAP", "Acc"):
                note = paper_note(table, variant, group, name)
                if note:
                    notes[run_name(cfg), group, name] = note
    out = []
    for figure in (f for evaluation in measured for f in evaluation.figures):
        note = notes.get((figure.subject, figure.group, figure.name), "")
        out.append(replace(figure, note="; ".join(filter(None, [figure.note, note]))))
    done = set()
    for row in rows:
        cfg = plan[row.table, row.variant]
        if cfg in done:
            continue
        done.add(cfg)
        name = run_name(cfg)
        out.append(Figure("parameters", float(row.parameters), name, "note"))
        out.append(Figure("multiply-adds a row", float(row.multiply_adds), name, "note"))
        out.append(Figure("seconds of training", runs[cfg].seconds, name, "note", unit="s"))
    named = {run_name(plan[g.table, g.variant]): g for g in gaps}
    out += [
        Figure("seen less unseen mAP", g.value, name, "note", unit="fraction", interval=g.interval)
        for name, g in named.items()
    ]
    return out


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Return mAP over layers and over the rank, a line for each group."""
    out = []
    for table, label in (("layers", "layers"), ("ranks", "rank of W")):
        for group in dict.fromkeys(r.group for r in rows if r.table == table):
            line = sorted(
                (r for r in rows if (r.table, r.group) == (table, group)), key=lambda r: int(r.variant)
            )
            spans = [r.interval for r in line if r.interval is not None]
            whole = len(spans) == len(line)
            out.append(
                Curve(
                    TABLES[table],
                    group,
                    [float(r.variant) for r in line],
                    [r.map for r in line],
                    label,
                    "mAP",
                    x_log=table == "ranks",
                    low=[s[0] for s in spans] if whole else None,
                    high=[s[1] for s in spans] if whole else None,
                )
            )
    return out


def summary(rows: Sequence[Row], gaps: Sequence[Gap], controls: Mapping[str, tuple[str, float]]) -> list[str]:
    """Say what validation chose in each table, what it reached, and what the best control reaches."""
    out = []
    for table in dict.fromkeys(r.table for r in rows):
        best = next((r for r in rows if r.table == table and r.chosen), None)
        if best is None:
            continue
        tested = [r for r in rows if (r.table, r.variant) == (table, best.variant)]
        figures = "; ".join(f"{r.group} {percent(r.map, r.interval)}" for r in tested)
        gap = next((g for g in gaps if (g.table, g.variant) == (table, best.variant)), None)
        lost = "" if gap is None else f" (gap {percent(gap.value, gap.interval)})"
        out.append(
            f"{TABLES[table]}: validation chose {best.variant} (mAP {percent(best.validation or 0)}); "
            f"test mAP: {figures}{lost}."
        )
    for group, (name, value) in controls.items():
        out.append(f"The best control on {group} is {name}: mAP {percent(value)}.")
    return out
