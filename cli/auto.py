"""--method auto: every method, knob and rank tried on validation, the controls among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from cli import measure
from cli.choosing import SIGNS, Judge, default_ranks, fits, nested, number, open_knobs, row, settings
from cli.collection import Collection
from cli.knobs import SolveOptions, fields, has_rank
from cli.render import counted, percent
from cli.simulating import SimulatedPairs
from cli.training import Progress, fit_cosface
from solvers.analytic import Analytic
from solvers.data import PairData
from solvers.errors import SolverUsageError
from solvers.methods import METHODS, get
from solvers.projection import Projection

ALPHA_BARS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""Noise levels that ``analytic`` is tried at."""
SHAPED = (1.0,)
"""Ridges that are tried with covariances that are the same everywhere: each is a fit in all dimensions."""
SHOWN = ("lam", "score", "alpha_bar", "latent_shape")
"""Knobs that tell one line of the table from another."""

Say = Callable[[str], None]


@dataclass
class Found:
    """The best map so far, its fit's account, and the table of all that were tried.

    A row of the table holds ``label``, ``method``, ``knobs``, ``rank``, ``control``, and validation's ``map``
    and ``acc``. ``left_out`` says of methods that these data are not for why.
    """

    projection: Projection
    facts: dict[str, Any]
    table: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    key: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Map:
    """One fitted map, whose prefixes are candidates where its ranks are nested."""

    label: str
    projection: Projection
    facts: dict[str, Any]
    ranks: list[int]
    control: bool


def top_rank(options: SolveOptions, dim: int) -> int:
    """Return the largest rank that is tried: ``--rank``, or the dimension."""
    return dim if isinstance(options.rank, str) else min(options.rank, dim)


def fit_auto(
    collection: Collection,
    data: PairData,
    options: SolveOptions,
    judge: Judge | None,
    *,
    simulated: SimulatedPairs | None = None,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> Found:
    """Try methods x knobs x ranks, and the controls, on validation; keep the best.

    Equals are settled for the simpler: a control, then a method without pairs, then the lower rank. Without
    a judge nothing can be chosen, and the answer is ``analytic`` at its defaults.

    Parameters
    ----------
    collection : Collection
    data : PairData
        What the pair methods are fitted on; they are left out when it holds no pairs.
    options : SolveOptions
    judge : Judge or None
    simulated : SimulatedPairs, optional
        Where ``data`` comes from, when it is not the store's own pairs.
    say : callable
        Takes a line for each method, with the time that is left.
    """
    top = top_rank(options, collection.store.layout.dim)
    if judge is None:
        fitted = Analytic(rank=top).fit(collection.data)
        return Found(fitted.projection(), dict(fitted.report))
    ranks = sorted({*default_ranks(top), top})
    controls = _controls(collection, top, ranks)
    own = {m.projection.method for m in controls}
    methods = [
        name
        for name in sorted(METHODS, key=_level)
        if name not in own
        and (data.n_pairs or not get(name).needs_pairs)
        and (options.with_cosface or not get(name).needs_torch)
    ]
    plan = {name: _settings(collection, data, name) for name in methods}

    left_out: list[str] = []

    def maps() -> Iterator[_Map]:
        yield from controls
        for name in methods:
            if get(name).needs_torch:
                fitted = fit_cosface(
                    collection, options, top, judge=judge, simulated=simulated, progress=progress
                ).fitted
                yield _Map(name, fitted.projection(), dict(fitted.report), [fitted.rank], False)
                continue
            source = data if get(name).needs_pairs else collection.data
            try:
                for made, facts in fits(source, name, top if has_rank(name) else None, plan[name]):
                    yield _Map(name, made, facts, _prefixes(name, made.rank, ranks), False)
            except SolverUsageError as error:  # of these data: another method may do
                left_out.append(f"{name} was left out: {error}")
                say(f"auto: {left_out[-1]}")

    found = _tournament(maps(), len(controls) + sum(map(len, plan.values())), judge, say)
    found.left_out = left_out
    return found


def _settings(collection: Collection, data: PairData, method: str) -> list[dict[str, Any]]:
    """Return the settings of a method that are tried.

    The last of the noise levels is all of them at once. A covariance that is the same everywhere in the
    picture pays where there are fewer rows than dimensions, and is tried only there.
    """
    if get(method).needs_torch:
        return [{}]
    grid = open_knobs(method)
    if "alpha_bar" in fields(method):
        grid = {"alpha_bar": (*ALPHA_BARS, ALPHA_BARS), **grid}
    tried = settings({}, grid)
    rows = data.n_pairs if get(method).needs_pairs else data.n_gallery
    if rows < data.dim and "latent_shape" in fields(method):
        grid |= {"lam": SHAPED} if "lam" in grid else {}
        tried += settings({"latent_shape": collection.store.space.latent_shape}, grid)
    return tried


def _tournament(maps: Iterator[_Map], total: int, judge: Judge, say: Say) -> Found:
    best: Found | None = None
    table: list[dict[str, Any]] = []
    began = time.perf_counter()
    done = 0
    for _, fits_of_one in groupby(maps, key=lambda tried: tried.label):
        here: list[dict[str, Any]] = []
        for tried in fits_of_one:
            p, done = tried.projection, done + 1
            for k, ranking in judge.prefixes(p, tried.ranks).items():
                here.append(row(tried.label, p, k, ranking, control=tried.control))
                key = (
                    -ranking.map,
                    not tried.control,
                    _level(p.method),
                    k if has_rank(p.method) else 0,
                    done,
                )
                if best is None or key < best.key:
                    cut = p if k == p.rank else p.truncated(k)
                    best = Found(cut, _cut_facts(tried.facts, p.rank, k), row=here[-1], key=key)
        table += here
        seconds = time.perf_counter() - began
        first = max(here, key=lambda r: r["map"])
        say(
            f"auto: {done} of {total} fits, {described(first)}: validation mAP {percent(first['map'])} %; "
            f"{seconds:.0f} s so far, about {seconds / done * (total - done):.0f} s left"
        )
    assert best is not None  # noqa: S101 - the controls are always there
    best.row["chosen"] = True
    best.table = table
    return best


def described(tried: Mapping[str, Any]) -> str:
    """Return a row's map in words: ``gnull, λ 10, rank 64``."""
    # A control's name tells its knobs.
    shown = {} if tried["control"] else {k: tried["knobs"].get(k) for k in SHOWN}
    knobs = [f"{SIGNS.get(k, k)} {number(v)}" for k, v in shown.items() if v is not None]
    rank = [f"rank {tried['rank']}"] if has_rank(tried["method"]) else []
    return ", ".join([tried["label"], *knobs, *rank])


def rival(
    collection: Collection, options: SolveOptions, table: Sequence[Mapping[str, Any]]
) -> dict[str, Projection]:
    """Return the control that did best on validation, under its name, for the table on test."""
    if not table:
        return {}
    best = max((r for r in table if r["control"]), key=lambda r: r["map"])
    k, top = best["rank"], top_rank(options, collection.store.layout.dim)
    p = next(m.projection for m in _controls(collection, top, [k]) if m.label == best["label"])
    name = f"{best['label']} @{k}" if has_rank(p.method) else best["label"]
    return {name: p if p.rank == k else p.truncated(k)}


def winner(table: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row that was chosen, or None where nothing could be."""
    return next((r for r in table if r["chosen"]), None)


def summary(table: Sequence[Mapping[str, Any]]) -> str:
    """Say in one sentence what was chosen, and what the best control had on validation."""
    best = winner(table)
    if best is None:
        return (
            "There are no validation queries to choose on, so nothing was tried: this is the analytic map at "
            "its defaults, made from the collection alone."
        )
    judged = counted(best["n"], "validation query", "validation queries")
    tried = f"{len(table)} maps were tried on {judged}"
    if best["n"] < measure.ROUGH:
        tried += " (so few that much of the choice is chance)"
    if best["control"]:
        return (
            f"{tried}, and no W was better than the controls: the answer is the control {described(best)}, "
            f"with mAP {percent(best['map'])} % there."
        )
    control = max((r for r in table if r["control"]), key=lambda r: r["map"])
    return (
        f"{tried}; the best is {described(best)}, with mAP {percent(best['map'])} % there. The best control "
        f"has {percent(control['map'])} % ({described(control)})."
    )


def _level(method: str) -> int:
    """How much a method asks for: equals are settled for the one that asks for less."""
    known = get(method)
    return int(has_rank(method)) + 2 * int(known.needs_pairs) + 4 * int(known.needs_torch)


def _prefixes(method: str, rank: int, ranks: Sequence[int]) -> list[int]:
    if not (nested(method) and has_rank(method)):
        return [rank]
    return sorted({*(k for k in ranks if k <= rank), rank})


def _controls(collection: Collection, top: int, ranks: Sequence[int]) -> list[_Map]:
    """Return the controls that stand in every table, the widest of each kind with its prefixes."""
    kinds: dict[tuple[Any, ...], list[tuple[str, Projection]]] = {}
    for name, p in measure.fit_controls(collection, top).items():
        if p.method in METHODS:  # a random subspace is to be beaten, never to be chosen
            kind = (p.method, *sorted((k, v) for k, v in p.knobs.items() if k != "rank"))
            kinds.setdefault(kind, []).append((name, p))
    out = []
    for same in kinds.values():
        widest = max((p for _, p in same), key=lambda p: p.rank)
        own = _prefixes(widest.method, widest.rank, [*ranks, *(p.rank for _, p in same)])
        out.append(_Map(min((n for n, _ in same), key=len), widest, {}, own, True))
    return out


def _cut_facts(facts: dict[str, Any], rank: int, k: int) -> dict[str, Any]:
    """Return a fit's account for its first k columns."""
    if k == rank:
        return facts
    statement = f"The first {k} of {rank} columns of a fit. {facts.get('statement') or ''}".strip()
    return {**facts, "effective_rank": k, "statement": statement}
