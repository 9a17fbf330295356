"""sweep: mAP and Acc over the rank of W, from one factorisation; the rank is chosen on validation."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cli import account, choosing, measure, solving
from cli.choosing import default_ranks
from cli.collection import Collection, Queries
from cli.knobs import AUTO, SolveOptions, check_foreign, has_rank
from cli.ranks import Wanted, listed
from cli.ranks import dropped as dropped_ranks
from cli.render import counted, percent
from cli.render_sweep import CHANCE, LADDERS, LEVEL, draw
from latentstore import results
from latentstore.errors import UsageError
from latentstore.results import Curve, Report, Role
from solvers.methods import get
from solvers.metrics import Ranking, bootstrap
from solvers.projection import Projection, identity_hash
from solvers.selection import controls

COLUMNS = ("method", "rank", "group", "split", "mAP", "lower", "upper", "Acc", "n")

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Point:
    """What one map of one rank reached on one group of queries; fractions, with mAP's 95 % interval.

    A control that keeps every dimension has the latents' dimension as its rank; chance has rank 0.
    """

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


def sweep(
    store: Path,
    method: str = "svd",
    ranks: Sequence[int] | None = None,
    *,
    knobs: Mapping[str, Any] | None = None,
    refit: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    progress: solving.Progress | None = None,
    command: str = "",
) -> Swept:
    """Fit a method once, cut W to every rank, choose the rank on validation and report all on test.

    Knobs that are left open (a ridge, a score) are chosen on validation for each rank, as ``solve`` does.

    Parameters
    ----------
    store : Path
        Of pairs, or of a collection and queries.
    method : str
    ranks : sequence of int or None
        None for :func:`default_ranks` and the largest rank that the method finds. Of those that are named,
        the ones that cannot be had are dropped, and said to be.
    knobs : mapping, optional
        Of the method, as in :class:`SolveOptions`.
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
    knobs = dict(knobs or {})
    check_foreign(method, list(knobs))
    if out is not None:
        solving.check_writable(out)
    if plot is not None:
        check_plot(plot)
    collection = Collection.open(store)
    dim = collection.store.layout.dim
    asked = tuple(ranks or sorted({*default_ranks(dim), dim}))
    options = SolveOptions(method, knobs=knobs)
    wanted = Wanted(tuple(k for k in asked if k <= dim), top=ranks is None)
    kept, validated = _chosen(collection, options, wanted, refit, progress)
    if not kept:
        raise UsageError(
            f"None of the ranks {listed(asked)} can be had: latents of {store} have {dim} values, and "
            f"{method} finds no such rank in them. Give smaller --ranks, or leave it out."
        )
    fitted = time.perf_counter()
    best = max(validated, key=lambda p: (p.map, -p.rank)).rank if validated else None
    queries = collection.queries("test")
    measure.require_queries(queries, str(store))
    control_set = _controls(collection, list(kept))
    methods = {_name(method, k): p for k, p in kept.items()}
    sources = {**{_name(method, k): (method, k) for k in kept}, **_control_sources(control_set, dim)}
    groups = _groups(collection, queries, learned=get(method).needs_pairs)
    measured = [
        measure.evaluate(collection, group, methods, control_set, every_rank=True) for group in groups
    ]
    points = [*validated]
    for evaluation, group in zip(measured, groups, strict=True):
        points += _points(evaluation, group.group, "test", sources)
    if not measured[0].methods:
        raise UsageError(
            f"None of the {len(queries.rows)} test queries has its origin in {store}: nothing can be "
            "measured. Encode their origins into the same store."
        )
    dropped = [k for k in asked if k not in kept] if ranks else []
    report = Report(
        kind="sweep",
        title=f"{method} over {counted(len(kept), 'rank')}",
        summary=_summary(method, best, validated, measured, points),
        data=account.describe(collection, queries, measured[0]),
        settings={
            "method": method,
            "ranks": list(kept),
            "dropped ranks": dropped,
            "refit": refit,
            "chosen rank": best,
            "chosen on": "validation",
            **({} if best is None else {results.CHOSEN: _name(method, best)}),
            "knobs": {str(k): dict(p.knobs) for k, p in kept.items()},
        },
        reproduce=[command] if command else [],
        figures=[figure for evaluation in measured for figure in evaluation.figures],
        curves=_curves(points, list(kept)),
        caveats=[
            *dropped_ranks(method, dropped, list(kept), dim),
            *_seen(groups),
            *account.caveats(collection, queries, measured[0], learned=get(method).needs_pairs),
        ],
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
    """Write one line a point; fractions in full, an empty cell where there is no interval or no rank."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for p in points:
            low, high = p.interval or ("", "")
            writer.writerow([p.method, p.rank or "", p.group, p.split, p.map, low, high, p.acc, p.n])


def _check_method(method: str, refit: bool) -> None:
    if method == AUTO:
        raise UsageError(
            "The method auto tries many ranks of every method by itself: solve --method auto prints them "
            "all. Give one method to sweep."
        )
    known = get(method)
    if not has_rank(method):
        raise UsageError(
            f"The method {method} has no rank to sweep: it keeps every dimension. solve shows it "
            "as a control beside every other method."
        )
    if not (known.nested_ranks or refit):
        raise UsageError(
            f"The ranks of {method} are not nested: its W of a smaller rank is no part of its W of a larger "
            "one, so one fit cannot give all. --refit fits every rank apart, each at the price of a solve."
        )


def check_plot(plot: Path) -> None:
    """Refuse before any work a plot that could not be written after it.

    Raises
    ------
    UsageError
    """
    if plot.is_dir() or not plot.parent.is_dir() or not os.access(plot.parent, os.W_OK):
        raise UsageError(
            f"--plot is {plot}, and no file can be written there: it must name a file in a folder that "
            "exists and may be written to. Make the folder, or choose another."
        )


def _chosen(
    collection: Collection,
    options: SolveOptions,
    wanted: Wanted,
    refit: bool,
    progress: solving.Progress | None,
) -> tuple[dict[int, Projection], list[Point]]:
    """Return the map of every rank that can be had, and how it did on validation.

    Where a setting of the knobs was left open, it is the one that did best there at that rank. Only the best
    so far are held: at full rank a map takes as much memory as a covariance.
    """
    if not wanted.ranks:
        return {}, []
    queries = collection.queries("validation")
    judge = choosing.Judge.of(collection, queries, collection.store.layout.dim)
    made = (
        _refitted(collection, options, wanted, progress) if refit else _settings(collection, options, wanted)
    )
    kept: dict[int, Projection] = {}
    points: dict[int, Point] = {}
    for p, there in made:
        if judge is None:
            kept |= {k: p.truncated(k) for k in there if k not in kept}
            continue
        for k, ranking in judge.prefixes(p, there).items() if there else ():
            if k not in points or ranking.map > points[k].map:
                kept[k], points[k] = p.truncated(k), _validated(options.method, k, ranking, judge)
    if judge is not None:
        chosen_on = identity_hash(measure.used_names(collection, queries.rows))
        kept = {k: p.using(chosen_on) for k, p in kept.items()}
    return {k: kept[k] for k in sorted(kept)}, [points[k] for k in sorted(points)]


def _refitted(
    collection: Collection, options: SolveOptions, wanted: Wanted, progress: solving.Progress | None
) -> Iterator[tuple[Projection, list[int]]]:
    """Fit every rank apart, as ``solve`` does; a rank that cannot be had is left out."""
    for k in wanted.ranks:
        p = solving.fit(collection, replace(options, rank=k), progress=progress)[0]
        if p.rank == k or wanted.top:
            yield p, [p.rank]
        if p.rank < k:
            return


def _settings(
    collection: Collection, options: SolveOptions, wanted: Wanted
) -> Iterator[tuple[Projection, list[int]]]:
    """Fit every setting of the open knobs once; without validation the one that is named, or the default."""
    options, known = replace(options, rank=max(wanted.ranks)), get(options.method)
    asked = choosing.settings(options.knobs, choosing.open_knobs(options.method))
    alone = len(asked) < 2 or not len(collection.queries("validation").rows)
    # Without pairs solve's own refusal is wanted, which knows the store.
    if alone or (known.needs_pairs and not collection.data.n_pairs):
        p = solving.fit(collection, options)[0]
        yield p, wanted.within(p.rank)
        return
    collection.require_gallery()
    used = np.zeros(0, np.uint64)
    if known.needs_pairs:
        used = identity_hash(measure.used_names(collection, collection.pairs("train")[1]))
    for p, _ in choosing.fits(collection.data, options.method, options.rank, asked):
        p = replace(p, space_id=collection.store.space.id, used_identities=used)
        yield p, wanted.within(p.rank)


def _validated(method: str, rank: int, ranking: Ranking, judge: choosing.Judge) -> Point:
    groups = judge.groups[ranking.queries]
    interval = bootstrap(ranking.ap, groups) if len(np.unique(groups)) > 1 else None
    return Point(
        method,
        rank,
        "validation",
        "validation",
        "method",
        ranking.map,
        interval,
        ranking.acc,
        len(ranking.ap),
    )


def _controls(collection: Collection, ranks: Sequence[int]) -> dict[str, Projection]:
    """Return the controls without a rank, then the others at every rank; whitening over its span, too."""
    found = controls(collection.data, max(ranks))
    own = {name: found[name] for name in LEVEL if name in found}
    for name in LADDERS:
        full = found.get(f"{name}, all", found[name])
        for k in sorted({*(min(k, full.rank) for k in ranks), full.rank}):
            cut = full if k == full.rank else full.truncated(k)
            own[_name(name, k)] = replace(cut, knobs={**full.knobs, "rank": k})
    return own


def _control_sources(control_set: Mapping[str, Projection], dim: int) -> dict[str, tuple[str, int]]:
    own = {name: (name.partition(" @")[0], min(p.rank, dim)) for name, p in control_set.items()}
    return {**own, CHANCE: (CHANCE, 0)}


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
    figures = {(f.name, f.subject): f for f in evaluation.figures if f.role != "note"}
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
    levels = (*LEVEL, CHANCE)
    # Whitening over the gallery's whole span may lie right of every rank of W.
    wide = sorted({*ranks, *(p.rank for p in tested if p.method not in levels)})
    for group in dict.fromkeys(p.group for p in tested):
        for method in dict.fromkeys(p.method for p in tested if p.group == group):
            line = [p for p in tested if (p.group, p.method) == (group, method)]
            level = method in levels
            shown = [line[0]] * 2 if level else line
            x = [wide[0], wide[-1]] if level else [p.rank for p in line]
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
    judged = counted(chosen.n, "query", "queries")
    head = (
        f"Rank {best} was chosen on validation (mAP {percent(chosen.map)} %, {judged}); on test it "
        f"has mAP {percent(at.map)} % and Acc {percent(at.acc)} %."
    )
    own = [m.verdict for e in measured for m in e.methods if m.subject == _name(method, best)]
    return [head, *own]


def _seen(groups: Sequence[Queries]) -> list[str]:
    """Say what "seen" means where models are told apart."""
    if not any("in training" in g.group for g in groups):
        return []
    return [
        "A model is seen in training when some of its translations of training identities were fitted on."
    ]


def _name(method: str, rank: int) -> str:
    return f"{method} @{rank}"
