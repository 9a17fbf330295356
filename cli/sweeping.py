"""sweep: mAP and Acc over the rank of W, from one factorisation; the rank is chosen on validation."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cli import account, measure, solving
from cli.collection import Collection, Queries
from cli.render import percent
from cli.render_sweep import LEVEL, draw
from latentstore import results
from latentstore.errors import UsageError
from latentstore.results import Curve, Report, Role
from solvers.gallery_maps import Pca
from solvers.generalised import fit_path
from solvers.methods import get
from solvers.projection import Projection, identity_hash
from solvers.selection import controls

SMALLEST = 16
"""First of the default ranks, which double up to the dimension."""
WHITENED = (("PCA-whitened ¼", 0.25), ("PCA-whitened ½", 0.5))
COLUMNS = ("method", "rank", "group", "split", "mAP", "lower", "upper", "Acc", "n")

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Point:
    """What one map of one rank reached on one group of queries; fractions, with mAP's 95 % interval."""

    method: str
    rank: int
    group: str
    split: Split
    role: Role
    map: float
    interval: tuple[float, float] | None
    acc: float
    n: int


@dataclass(frozen=True)
class Swept:
    """A sweep: every point, the rank that validation chose (None without validation), the report."""

    method: str
    points: list[Point]
    best: int | None
    report: Report


def parse_ranks(text: str) -> tuple[int, ...]:
    """Return the ranks of a list like ``64,128,256``, ascending, each once.

    Raises
    ------
    UsageError
        An entry is no whole number, or below 1.
    """
    try:
        ranks = sorted({int(word) for word in text.split(",")})
    except ValueError:
        ranks = [0]
    if ranks[0] < 1:
        raise UsageError(
            f"--ranks is {text!r}; it must be whole numbers of at least 1 between commas, as in 64,128,256."
        )
    return tuple(ranks)


def default_ranks(dim: int) -> tuple[int, ...]:
    """Return the powers of two from 16 up to the dimension; the dimension itself where that is smaller."""
    return tuple(2**k for k in range(SMALLEST.bit_length() - 1, dim.bit_length())) or (dim,)


def sweep(
    store: Path,
    method: str = "svd",
    ranks: Sequence[int] | None = None,
    *,
    refit: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    progress: solving.Progress | None = None,
    command: str = "",
) -> Swept:
    """Fit a method once, cut W to every rank, choose the rank on validation and report all on test.

    Where several ridges of ``gnull`` are tried, validation chooses one for each rank, as ``solve`` does.

    Parameters
    ----------
    store : Path
        Of pairs, or of a collection and queries.
    method : str
    ranks : sequence of int or None
        None for :func:`default_ranks`; those above what the method can give are dropped, and said to be.
    refit : bool
        Fit every rank apart: the only way for a method whose ranks are not nested.
    out : Path or None
        CSV to write; the results JSON goes beside it.
    plot : Path or None
        PNG to write.

    Raises
    ------
    UsageError
        A method without ranks, or without nested ones and no ``refit``; no rank, query or folder to use.
    NoPairsError
        The method learns from pairs and there are none in the training split.
    """
    began = time.perf_counter()
    _check_method(method, refit)
    if out is not None:
        solving.check_writable(out)
    if plot is not None:
        _check_plot(plot)
    collection = Collection.open(store)
    dim = collection.store.layout.dim
    asked = tuple(ranks or default_ranks(dim))
    candidates = _candidates(collection, method, [k for k in asked if k <= dim], refit, progress)
    if not candidates:
        raise UsageError(
            f"None of the ranks {_listed(asked)} can be had: latents of {store} have {dim} values, and "
            f"{method} finds no such rank in them. Give smaller --ranks."
        )
    fitted = time.perf_counter()
    kept, validated = _validate(collection, method, candidates)
    best = max(validated, key=lambda p: (p.map, -p.rank)).rank if validated else None
    queries = collection.queries("test")
    measure.require_queries(queries, str(store))
    control_set = _controls(collection, list(kept))
    methods = {_name(method, k): p for k, p in kept.items()}
    sources = {**{_name(method, k): (method, k) for k in kept}, **_control_sources(control_set, dim)}
    groups = _groups(collection, queries, learned=get(method).needs_pairs)
    measured = [measure.evaluate(collection, group, methods, control_set) for group in groups]
    points = [*validated]
    for evaluation, group in zip(measured, groups, strict=True):
        points += _points(evaluation, group.group, "test", sources)
    if not measured[0].methods:
        raise UsageError(
            f"None of the {len(queries.rows)} test queries has its origin in {store}: nothing can be "
            "measured. Encode their origins into the same store."
        )
    dropped = [k for k in asked if k not in kept]
    report = Report(
        kind="sweep",
        title=f"{method} over {len(kept)} rank{'s' * (len(kept) > 1)}",
        summary=_summary(method, best, validated, measured, points),
        data=account.describe(collection, queries, measured[0]),
        settings={
            "method": method,
            "ranks": list(kept),
            "dropped ranks": dropped,
            "refit": refit,
            "chosen rank": best,
            "chosen on": "validation",
            "knobs": {str(k): dict(p.knobs) for k, p in kept.items()},
        },
        reproduce=[command] if command else [],
        figures=[figure for evaluation in measured for figure in evaluation.figures],
        curves=_curves(points, list(kept)),
        caveats=[*_dropped(method, dropped, kept), *account.caveats(collection, queries, measured[0])],
        timings={"fit": fitted - began, "evaluate": time.perf_counter() - fitted},
        **results.stamp(),
    )
    if out is not None:
        write_csv(points, out)
        report.write(solving.results_path(out))
    if plot is not None:
        draw(report.curves, best, plot)
    return Swept(method, points, best, report)


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Write one line a point; fractions in full, an empty cell where there is no interval."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for p in points:
            low, high = p.interval or ("", "")
            writer.writerow([p.method, p.rank, p.group, p.split, p.map, low, high, p.acc, p.n])


def _check_method(method: str, refit: bool) -> None:
    known = get(method)
    if "rank" not in getattr(known, "__dataclass_fields__", {}):
        raise UsageError(
            f"The method {method} has no rank to sweep: it keeps every dimension. It stands in the table of "
            "every other method as a control."
        )
    if not (known.nested_ranks or refit):
        raise UsageError(
            f"The ranks of {method} are not nested: its W of a smaller rank is no part of its W of a larger "
            "one, so one fit cannot give all. --refit fits every rank apart, each at the price of a solve."
        )


def _check_plot(plot: Path) -> None:
    if plot.is_dir() or not plot.parent.is_dir() or not os.access(plot.parent, os.W_OK):
        raise UsageError(
            f"--plot is {plot}, and no file can be written there: it must name a file in a folder that "
            "exists and may be written to. Make the folder, or choose another."
        )


def _candidates(
    collection: Collection,
    method: str,
    ranks: Sequence[int],
    refit: bool,
    progress: solving.Progress | None,
) -> dict[int, list[Projection]]:
    """Return the maps of every rank that can be had; several where validation is to choose among them."""
    if not ranks:
        return {}
    if refit:
        each = [
            solving.fit(collection, solving.SolveOptions.of(method, k), progress=progress)[0] for k in ranks
        ]
        return {k: [p] for k, p in zip(ranks, each, strict=True) if p.rank == k}
    top = max(ranks)
    # Without pairs solve's own refusal is wanted, which knows the store.
    if method == "gnull" and collection.data.n_pairs:
        fits = _ridges(collection, top)
    else:
        fits = [solving.fit(collection, solving.SolveOptions.of(method, top), progress=progress)[0]]
    there = min(p.rank for p in fits)
    return {k: [p.truncated(k) for p in fits] for k in ranks if k <= there}


def _ridges(collection: Collection, rank: int) -> list[Projection]:
    """Fit ``gnull`` with every ridge that validation may choose from; with one where there is none."""
    collection.require_gallery()
    lams = solving.LAMBDAS if len(collection.queries("validation").rows) else (1.0,)
    learned = identity_hash(measure.used_names(collection, collection.pairs("train")[1]))
    return [
        fitted.projection(space_id=collection.store.space.id, used_identities=learned)
        for fitted in fit_path(collection.data, lams, rank)
    ]


def _validate(
    collection: Collection, method: str, candidates: Mapping[int, list[Projection]]
) -> tuple[dict[int, Projection], list[Point]]:
    """Return the map of every rank that did best on validation, marked as chosen there, and its points."""
    queries = replace(collection.queries("validation"), group="validation")
    named = {(k, i): f"{_name(method, k)} #{i}" for k, maps in candidates.items() for i in range(len(maps))}
    # Choosing may look at what earlier choices looked at; only the report on test may not.
    unused = np.zeros(0, np.uint64)
    tried = {named[k, i]: replace(candidates[k][i], used_identities=unused) for k, i in named}
    evaluation = measure.evaluate(collection, queries, tried, {})
    if not evaluation.methods:
        return {k: maps[0] for k, maps in candidates.items()}, []
    points = _points(evaluation, queries.group, "validation", {named[at]: (method, at[0]) for at in named})
    by_place = dict(zip(named, points, strict=True))
    chosen_on = identity_hash(measure.used_names(collection, queries.rows))
    kept, chosen = {}, []
    for k, maps in candidates.items():
        i = max(range(len(maps)), key=lambda i, k=k: by_place[k, i].map)  # type: ignore[misc]
        kept[k] = maps[i].using(chosen_on)
        chosen.append(by_place[k, i])
    return kept, chosen


def _controls(collection: Collection, ranks: Sequence[int]) -> dict[str, Projection]:
    """Return raw, centred, and both PCA-whitenings at every rank and over the gallery's whole span."""
    found = controls(collection.data, max(ranks))
    own = {name: found[name] for name in LEVEL}
    for name, exponent in WHITENED:
        full = found[f"{name}, all"]
        for k in sorted({min(k, full.rank) for k in ranks} | {full.rank}):
            own[_name(name, k)] = replace(
                full.truncated(k), method=Pca.name, knobs={"rank": k, "exponent": exponent}
            )
    return own


def _control_sources(control_set: Mapping[str, Projection], dim: int) -> dict[str, tuple[str, int]]:
    return {name: (name.partition(" @")[0], min(p.rank, dim)) for name, p in control_set.items()}


def _groups(collection: Collection, queries: Queries, *, learned: bool) -> list[Queries]:
    """Return all queries, and those of each model where there are several.

    A model is seen when a method that learns from pairs had translations by it in the training split.
    """
    models = np.array([m or "unnamed" for m in collection.model], dtype=object)
    asked = models[queries.rows]
    names = sorted(set(asked.tolist()))
    if len(names) < 2:
        return [queries]
    seen = set(models[collection.pairs("train")[1]].tolist())
    kinds = {m: f", {'seen' if m in seen else 'unseen'} in training" if learned else "" for m in names}
    own = [replace(queries, rows=queries.rows[asked == m], group=f"model {m}{kinds[m]}") for m in names]
    return [queries, *own]


def _points(
    evaluation: measure.Evaluation, group: str, split: Split, sources: Mapping[str, tuple[str, int]]
) -> list[Point]:
    """Return the mAP and Acc of an evaluation's maps as points, in the order of ``sources``."""
    figures = {(f.name, f.subject): f for f in evaluation.figures if f.role in ("method", "control")}
    out = []
    for subject, (method, rank) in sources.items():
        if ("mAP", subject) in figures:
            found, acc = figures["mAP", subject], figures["Acc", subject]
            out.append(
                Point(
                    method,
                    rank,
                    group,
                    split,
                    found.role,
                    found.value,
                    found.interval,
                    acc.value,
                    found.n or 0,
                )
            )
    return out


def _curves(points: Sequence[Point], ranks: Sequence[int]) -> list[Curve]:
    """Return mAP over rank, a plot for each group; a control without a rank is a level line."""
    out = []
    tested = [p for p in points if p.split == "test"]
    for group in dict.fromkeys(p.group for p in tested):
        for method in dict.fromkeys(p.method for p in tested if p.group == group):
            line = [p for p in tested if (p.group, p.method) == (group, method)]
            level = method in LEVEL
            shown = [line[0]] * 2 if level else line
            x = [min(ranks), max(ranks)] if level else [p.rank for p in line]
            spans = [p.interval for p in shown if p.interval is not None]
            banded = line[0].role == "method" and len(spans) == len(shown)
            out.append(
                Curve(
                    f"mAP over rank: {group}",
                    method,
                    [float(v) for v in x],
                    [p.map for p in shown],
                    "rank of W",
                    "mAP",
                    x_log=True,
                    role=line[0].role,
                    low=[s[0] for s in spans] if banded else None,
                    high=[s[1] for s in spans] if banded else None,
                )
            )
    return out


def _summary(
    method: str,
    best: int | None,
    validated: Sequence[Point],
    measured: Sequence[measure.Evaluation],
    points: Sequence[Point],
) -> list[str]:
    if best is None:
        return ["There are no validation queries to choose a rank on; the table is all there is to say."]
    chosen = next(p for p in validated if p.rank == best)
    at = next(p for p in points if (p.method, p.rank, p.split) == (method, best, "test"))
    head = (
        f"Rank {best} was chosen on validation (mAP {percent(chosen.map)} %, {chosen.n} queries); on test it "
        f"has mAP {percent(at.map)} % and Acc {percent(at.acc)} %."
    )
    own = [m.verdict for e in measured for m in e.methods if m.subject == _name(method, best)]
    return [head, *own]


def _dropped(method: str, dropped: Sequence[int], kept: Mapping[int, Any]) -> list[str]:
    if not dropped:
        return []
    text = (
        f"Dropped ranks: {_listed(dropped)}. {method} finds fewer directions than that in these latents; "
        f"the largest rank measured is {max(kept)}."
    )
    return [text]


def _name(method: str, rank: int) -> str:
    return f"{method} @{rank}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
