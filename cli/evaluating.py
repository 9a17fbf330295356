"""evaluate: what maps find of test queries beside the controls, in the groups of the paper's tables."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cli import account, efficiency, failures, grouping, leakage, measure, settling, upper
from cli.collection import Collection
from cli.grouping import Slice
from cli.measure import Group
from cli.ranked import Asked, rankings
from cli.settling import load_projection
from latentstore import results, search
from latentstore.errors import UsageError
from latentstore.report import write_html
from latentstore.results import Curve, Figure, Match, Report, Role
from latentstore.schema import check_space
from solvers.methods import METHODS
from solvers.metrics import Ranking
from solvers.projection import Projection

BINS = 40
DEEPEST = 100
"""Of the curve of recall over the number of candidates."""
OnMaps = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured beside the figures of every group.

    Attributes
    ----------
    upper : bool
        Fit the method on each unseen model, too.
    efficiency : bool
        Time training, extraction and matching.
    pictures : int
        Queries to show with their candidates.
    device : str
        Of what is timed.
    """

    upper: bool = False
    efficiency: bool = False
    pictures: int = 8
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise UsageError(f"--pictures is {self.pictures}; it cannot be negative.")


@dataclass(frozen=True)
class Evaluated:
    """A report with what it is laid out by: the leakage check and the groups of queries."""

    report: Report
    checks: list[leakage.Check]
    slices: list[Slice]
    methods: list[str]

    @property
    def findings(self) -> list[leakage.Check]:
        """What may make a figure too good."""
        return [check for check in self.checks if check.finding]


@dataclass
class _Made:
    """What goes into the report, as it is measured."""

    measured: list[measure.Measured] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


def evaluate(
    store: Path,
    projections: Sequence[Path],
    options: EvaluateOptions | None = None,
    *,
    queries: Sequence[Path] = (),
    out: Path | None = None,
    table: Path | None = None,
    html: Path | None = None,
    on_start: OnMaps | None = None,
    on_map: OnMaps | None = None,
    command: str = "",
) -> Evaluated:
    """Report what projections find of the test queries, beside the controls; look for leaks first.

    Parameters
    ----------
    store : Path
        The gallery.
    projections : sequence of Path
    options : EvaluateOptions, optional
    queries : sequence of Path
        Stores of queries; by default the gallery's own.
    out, table, html : Path, optional
        Results JSON, CSV and page to write.
    on_start, on_map : callable, optional
        Told how many maps are to be ranked by (with controls), and called with (1, 0) after each.

    Raises
    ------
    UsageError
        Files that are not there or cannot be written, a device that is not there, a store of queries named
        twice; no query that can be found.
    LeakError
        A projection was fitted or chosen on identities that are asked.
    SpaceError, SpaceMismatchError
    """
    began = time.perf_counter()
    options = options or EvaluateOptions()
    settling.check_files(out=out, csv=table, html=html)
    search.find_device(options.device)  # a device that is not there is told before the work
    _refuse_twice(queries)
    maps, files = _loaded(projections)
    gallery = Collection.open(store)
    measure.require_gallery(gallery)
    parts = [gallery] if not queries else [Collection.open(path) for path in queries]
    for W in maps.values():
        W.check_space(gallery.store.space.id)
    for path, part in zip(queries, parts, strict=False):
        check_space(part.store.space.id, gallery.store.space.id, what=f"--queries {path}")
    found = [part.queries("test", origins_elsewhere=bool(queries)) for part in parts]
    measure.require_queries(max(found, key=lambda q: len(q.rows)), ", ".join(map(str, queries)) or str(store))
    asked = Asked.of(gallery, found)
    if not len(asked):
        n = sum(len(q.rows) for q in found)
        raise UsageError(
            f"None of {n} test queries can be measured against {store}: {asked.n_without_origin} have no "
            f"origin in it, and of {asked.n_copies} a copy of the origin stands in a split that was fitted "
            "or chosen on. Evaluate against the store that holds their origins."
        )
    checks = leakage.look(gallery, asked, maps)
    asked.check(gallery, maps)

    stores = list(dict.fromkeys([*parts, gallery]))
    learned_from = grouping.seen_by_each(maps, stores)
    seen, differ = grouping.seen_by_all(learned_from)
    cuts = grouping.slices(asked, seen)
    control_set = measure.fit_controls(gallery, max(W.rank for W in maps.values()))
    if on_start is not None:
        on_start(len(control_set) + len(maps), len(control_set) + len(maps))
    ranked = rankings(gallery, asked, {**control_set, **maps}, top=measure.TOP, on_map=on_map)
    made = _Made(caveats=[f"{check.said}." for check in checks if check.finding] + differ)
    _fill(made, ranked, cuts, list(maps), list(control_set), len(gallery.gallery))
    made.timings["rank and report"] = time.perf_counter() - began
    if options.upper:
        _bound(made, gallery, stores, asked, maps, learned_from)
    if options.efficiency:
        _costs(made, gallery, asked, maps, files, control_set, options.device)
    first = next(iter(maps))
    if options.pictures:
        made.matches = failures.pictured(gallery, asked, ranked[first], options.pictures)
    made.figures += [check.figure for check in checks]
    report = Report(
        kind="evaluation",
        title=_title(maps, cuts[0].group),
        summary=[m.verdict for m in made.measured if m.verdict],
        data=_described(gallery, asked, cuts, learned_from if seen is None else seen),
        settings=_settings(maps, files, options, first),
        reproduce=[command] if command else [],
        figures=made.figures,
        curves=made.curves,
        matches=made.matches,
        caveats=_caveats(gallery, asked, maps, made),
        timings=made.timings,
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    if table is not None:
        write_csv(report, table)
    if html is not None:
        write_html(report, html)
    return Evaluated(report, checks, cuts, list(maps))


def _refuse_twice(queries: Sequence[Path]) -> None:
    """Refuse a store of queries that is named twice: each of its queries would count twice."""
    real = [path.resolve() for path in queries]
    twice = sorted({str(path) for path, own in zip(queries, real, strict=True) if real.count(own) > 1})
    if twice:
        raise UsageError(f"--queries names one store twice ({', '.join(twice)}): name each store once.")


def _title(maps: Mapping[str, Projection], group: Group) -> str:
    """Return what was measured on what; of a single model whether it was learned from."""
    domain = group.axes.get("domain")
    return f"{', '.join(maps)} on {group.name}{f' ({domain} model)' if domain else ''}"


def _loaded(projections: Sequence[Path]) -> tuple[dict[str, Projection], dict[str, Path]]:
    """Load every projection under its method's name; where two have one, under their files'."""
    loaded = [(path, load_projection(path, "name another with --projection")) for path in projections]
    methods = [W.method or path.stem for path, W in loaded]
    names = [m if methods.count(m) == 1 else p.stem for m, (p, _) in zip(methods, loaded, strict=True)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"Several projections would be called {', '.join(twice)} in the tables: name each file once, and "
            "give files of one name in different folders different names."
        )
    maps = {name: W for name, (_, W) in zip(names, loaded, strict=True)}
    return maps, {name: path for name, (path, _) in zip(names, loaded, strict=True)}


def _fill(
    made: _Made,
    ranked: Mapping[str, Ranking],
    cuts: Sequence[Slice],
    methods: list[str],
    control_set: list[str],
    n_references: int,
) -> None:
    """Add the figures of every group, the sentences of the main ones, and the curves of all queries."""
    own = [name for name in control_set if name not in methods]
    for cut in cuts:
        figures, measured = grouping.reported(ranked, cut, methods, own, n_references=n_references)
        made.figures += figures
        if cut.kind in ("all", "domain"):
            made.measured += measured
    shown = measure.best_of_ladders(own, {name: ranked[name].map for name in own})
    made.curves += _recall_curves(ranked, methods, [n for n in shown if not n.startswith(measure.RANDOM)])
    for name in methods:
        made.curves += _score_curves(name, ranked[name])


def _recall_curves(
    ranked: Mapping[str, Ranking], methods: Sequence[str], controls: Sequence[str]
) -> list[Curve]:
    """Return how many queries have their origin among the first k, over k."""
    n = min(DEEPEST, ranked[methods[0]].n_references - 1)
    k = np.unique(np.geomspace(1, max(1, n), 24).round().astype(int))
    if len(k) < 2:
        return []
    return [
        Curve(
            "Recall by number of candidates",
            name,
            [float(x) for x in k],
            [float((ranked[name].rank <= x).mean()) for x in k],
            "candidates",
            "recall",
            x_log=True,
            role="method" if name in methods else "control",
        )
        for name in (*methods, *controls)
    ]


def _score_curves(name: str, ranking: Ranking) -> list[Curve]:
    """Return how the scores of origins lie beside those of the best other image, as shares of queries."""
    other = ranking.negatives.score[:, 0]
    best = ranking.margin + other
    told = np.isfinite(other) & np.isfinite(best)
    if told.sum() < 2:
        return []
    edges = np.histogram_bin_edges(np.concatenate([best[told], other[told]]), BINS)
    middle = [float(x) for x in (edges[:-1] + edges[1:]) / 2]
    looks: tuple[tuple[str, Any, Role], ...] = (
        ("matches: the origin", best, "method"),
        ("non-matches: the best other image", other, "control"),
    )
    return [
        Curve(
            f"Scores of {name}",
            label,
            middle,
            [float(c) / told.sum() for c in np.histogram(values[told], edges)[0]],
            "score",
            "share of queries",
            role=role,
        )
        for label, values, role in looks
    ]


def _bound(
    made: _Made,
    gallery: Collection,
    stores: Sequence[Collection],
    asked: Asked,
    maps: Mapping[str, Projection],
    seen: Mapping[str, set[str]],
) -> None:
    began = time.perf_counter()
    if not seen:
        made.caveats.append("Upper bound: no projection here learned from pairs, so it has none.")
        return
    figures, said = upper.upper_bound(gallery, stores, asked, maps, seen)
    made.figures += figures
    made.caveats += said
    made.timings["upper bound"] = time.perf_counter() - began


def _costs(
    made: _Made,
    gallery: Collection,
    asked: Asked,
    maps: Mapping[str, Projection],
    files: Mapping[str, Path],
    control_set: Mapping[str, Projection],
    device: str,
) -> None:
    began = time.perf_counter()
    raw = {"raw": control_set["raw"]}
    figures, said = efficiency.efficiency(gallery, asked, maps, files, raw, device=device)
    made.figures += figures
    made.caveats += said
    made.timings["efficiency"] = time.perf_counter() - began


def _described(
    gallery: Collection, asked: Asked, cuts: Sequence[Slice], seen: set[str] | Mapping[str, set[str]]
) -> dict[str, Any]:
    """Return what the figures were measured on; seen models are of all maps, or of each where they differ."""
    told = sorted(seen) if isinstance(seen, set) else {name: sorted(models) for name, models in seen.items()}
    largest = max(asked.parts, key=lambda p: len(p.rows))
    evaluation = measure.Evaluation(n_references=len(gallery.gallery))
    strengths = asked.column("strength")
    return {
        **account.describe(gallery, largest, evaluation),
        "test queries": len(asked),
        "test photos": cuts[0].group.n_photos,
        "queries": cuts[0].group.name,
        "query stores": [str(p.collection.store.path) for p in asked.parts],
        "models": sorted(set(asked.column("named_model").tolist())),
        **({} if told == {} else {"seen models": told}),
        "strengths": np.unique(strengths[~np.isnan(strengths)]).tolist()[: grouping.STRENGTHS],
    }


def _settings(
    maps: Mapping[str, Projection], files: Mapping[str, Path], options: EvaluateOptions, first: str
) -> dict[str, Any]:
    """Return how it was measured: of one projection its knobs, of several each one's."""
    own: dict[str, Any] = {
        name: {"projection": str(files[name]), "method": W.method, **dict(W.knobs)}
        for name, W in maps.items()
    }
    shown: dict[str, Any] = own[first] if len(own) == 1 else own
    more = {"pictures of": first} if options.pictures else {}
    return {**shown, "µAP over": f"the best {measure.TOP} references of each query", **more}


def _caveats(gallery: Collection, asked: Asked, maps: Mapping[str, Projection], made: _Made) -> list[str]:
    """Return leaks first, then what the figures cannot say."""
    learned = any(W.method not in METHODS or METHODS[W.method].needs_pairs for W in maps.values())
    largest = max(asked.parts, key=lambda p: len(p.rows))
    # Copies and near-duplicates are told by the leakage check.
    evaluation = measure.Evaluation(
        methods=made.measured,
        n_references=len(gallery.gallery),
        n_without_origin=asked.n_without_origin,
    )
    told = account.caveats(gallery, largest, evaluation, learned=learned)
    return list(dict.fromkeys([*made.caveats, *(c for c in told if c != gallery.near[1])]))


def write_csv(report: Report, path: Path) -> None:
    """Write one line a figure; text that a spreadsheet would run as a formula is defused."""
    from latentstore.report.exports import FIGURE_COLUMNS, defused, figure_rows

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIGURE_COLUMNS)
        writer.writerows([defused(cell) for cell in row] for row in figure_rows(report))
