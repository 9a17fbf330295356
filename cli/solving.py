"""solve: fit W on the training split, choose on validation, report on test."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cli import account, auto, choosing, measure, settling
from cli.collection import Collection, OnPass, Queries
from cli.knobs import AUTO, SolveOptions, check_name, has_rank
from cli.settling import check_writable as check_writable
from cli.settling import load_projection as load_projection
from cli.simulating import SimulatedPairs
from cli.training import Progress, Run, finished, fit_cosface
from latentstore import results
from latentstore._version import __version__
from latentstore.results import Report
from latentstore.schema import check_space
from solvers.data import PairData
from solvers.errors import DivergedError, NoPairsError
from solvers.methods import METHODS, build, check_rank, get
from solvers.nullspace import difference_facts
from solvers.projection import Projection, identity_hash

_KEPT = ("numerical_rank", "decided_by", "path", "statement", "n_pairs")
"""What a map's provenance tells of its fit beside the fit's whole account."""


@dataclass(frozen=True)
class Solved:
    """A Projection, its report, how it fared, and the file that it was written to."""

    projection: Projection
    report: Report
    facts: dict[str, Any]
    evaluation: measure.Evaluation
    out: Path


def fit(
    collection: Collection,
    options: SolveOptions,
    *,
    asked: Collection | None = None,
    progress: Progress | None = None,
    say: auto.Say = lambda text: None,
    init: Projection | None = None,
    run: Run | None = None,
) -> tuple[Projection, dict[str, Any], list[dict[str, Any]]]:
    """Fit one method on the training split, or all; choose what is left open on validation.

    Parameters
    ----------
    collection : Collection
    options : SolveOptions
    asked : Collection, optional
        Whose validation queries choose; by default the collection's own.
    progress : callable, optional
        Takes (step, steps, loss) of a training run.
    say : callable
        Takes the lines of ``auto``, one a fit, and those of a training run.
    init : Projection, optional
        Where the W of a training run starts.
    run : Run, optional
        What a training run keeps; by default nothing.

    Returns
    -------
    projection, facts, choices
        ``facts`` is the fit's own account; ``choices`` the validation table (empty when nothing was chosen).

    Raises
    ------
    NoPairsError
        The method learns from pairs and the store holds none in its training split.
    DivergedError
        Its text names the file of the last good W, where the run keeps any.
    """
    check_name(options.method)
    rank = _checked_rank(options, collection.store.layout.dim)
    collection.require_gallery()
    simulated = None if options.simulate is None else SimulatedPairs.of(collection, options.simulate)
    data = collection.data if simulated is None else simulated.data
    needs_pairs = options.method != AUTO and get(options.method).needs_pairs
    if needs_pairs and not data.n_pairs:
        raise NoPairsError(_no_pairs(collection, options.method))
    elsewhere = asked is not None and asked is not collection
    queries = (asked or collection).queries("validation", origins_elsewhere=elsewhere)
    fitting = _Fitting(collection, options, queries, simulated, init, progress, say, run)
    try:
        bare, facts, choices = _fitted(fitting, data, rank)
    except DivergedError as error:
        raise _with_last_good(error, fitting) from error
    if data.n_pairs and get(bare.method).needs_pairs and facts.get("numerical_rank") is None:
        facts |= difference_facts(data)
    return _signed(bare, fitting, facts, judged=bool(choices)), facts, choices


@dataclass(frozen=True)
class _Fitting:
    """What a fit is asked for, and by which means."""

    collection: Collection
    options: SolveOptions
    queries: Queries
    simulated: SimulatedPairs | None
    init: Projection | None
    progress: Progress | None
    say: auto.Say
    run: Run | None


def _signed(bare: Projection, fitting: _Fitting, facts: Mapping[str, Any], *, judged: bool) -> Projection:
    """Return a map with where it is from: space, data, and the identities that it must not report on."""
    collection, queries, simulated = fitting.collection, fitting.queries, fitting.simulated
    used = np.zeros(0, np.uint64) if fitting.init is None else fitting.init.used_identities
    if judged:
        used = np.union1d(used, identity_hash(measure.used_names(queries.collection, queries.rows)))
    if get(bare.method).needs_pairs:
        learned = collection.pairs("train")[1] if simulated is None else simulated.rows
        used = np.union1d(used, identity_hash(measure.used_names(collection, learned)))
    return replace(
        bare,
        space_id=collection.store.space.id,
        data_hash=collection.data_hash,
        used_identities=used,
        provenance={
            **bare.provenance,
            "latentstore": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "store": collection.store.path.name,
            "encoder": collection.store.provenance.get("encoder", {}).get("name"),
            **{k: facts[k] for k in _KEPT if k in facts},
            **_fitted_on(bare.method, fitting.options),
            **_models(bare.method, fitting),
        },
    )


def _models(method: str, fitting: _Fitting) -> dict[str, list[str]]:
    """Return the models whose translations were learned from: of simulated pairs there are none."""
    if not get(method).needs_pairs:
        return {}
    collection = fitting.collection
    rows = collection.pairs("train")[1] if fitting.simulated is None else np.empty(0, np.int64)
    return {"models": sorted(set(collection.named_model[rows].tolist()))}


def _with_last_good(error: DivergedError, fitting: _Fitting) -> DivergedError:
    """Write the last good W of a run that diverged, and return the failure with the file's name."""
    run = fitting.run or Run()
    path = run.beside(".last-good.safetensors")
    if path is None or not run.leads or error.weights is None:
        return error
    W = Projection(error.weights, error.weights, method=fitting.options.method, knobs=fitting.options.recipe)
    _signed(W, fitting, {"statement": str(error)}, judged=True).save(path)
    return DivergedError(f"{error} The last good W is {path}.", error.weights)


def solve(
    store: Path,
    out: Path | None,
    options: SolveOptions,
    *,
    queries: Path | None = None,
    progress: Progress | None = None,
    say: auto.Say = lambda text: None,
    command: str = "",
    run: Run | None = None,
    on_pass: OnPass | None = None,
) -> Solved | None:
    """Fit, write the Projection, evaluate it on the test split, and write the results beside it.

    Parameters
    ----------
    out : Path, optional
        By default ``W-METHOD-RANK.safetensors`` in the working folder.
    queries : Path, optional
        Another store whose validation queries choose and whose test queries measure.
    run : Run, optional
        How a training run starts and what it keeps beside ``out``.
    on_pass : callable, optional
        Told how many rows a pass over the store will read; returns what counts them.

    Returns
    -------
    Solved or None
        None in all but the first of several processes that train together.
    """
    began = time.perf_counter()
    run = run or Run()
    settling.check_files(out=out or Path("W.safetensors"), log=run.log, plot=run.plot)
    check_name(options.method)
    settling.check_start(options, run.init)
    world = settling.world(options)
    collection = Collection.open(store)
    collection.on_pass = on_pass
    asked = collection
    if queries is not None:
        asked = Collection.open(queries)
        check_space(asked.store.space.id, collection.store.space.id, what=f"--queries {queries}")
    init = None if run.init is None else settling.start(run.init, collection)
    options, notes = settling.settled_rank(options, collection.store.layout.dim, init)
    out = out or settling.default_out(options)
    run = replace(run, out=out, world=world)
    speak = say if run.leads else (lambda text: None)
    projection, facts, choices = fit(
        collection, options, asked=asked, progress=progress, say=speak, init=init, run=run
    )
    if world is not None:
        world.close()
    if not run.leads:
        return None
    fitted = time.perf_counter()
    notes += settling.replaced(out, projection)
    results_path(out).unlink(missing_ok=True)  # they are another W's
    projection.save(out)
    trained = facts.pop("curves", None)
    control_set = measure.fit_controls(collection, projection.rank)
    if options.method == AUTO:
        control_set |= auto.rival(collection, options, choices)
    test = asked.queries("test", origins_elsewhere=asked is not collection)
    name = options.method if options.method != AUTO else f"auto: {projection.method}"
    evaluation = measure.evaluate(collection, test, {name: projection}, control_set)
    figures = list(evaluation.figures) + account.solver_figures(name, facts)
    figures += measure.residuals(collection, projection, control_set["random subspace"], "test")
    timings = {"fit": fitted - began, "evaluate": time.perf_counter() - fitted}
    simulated, facts["chosen"] = _fitted_on(projection.method, options), _chosen(options, choices)
    report = Report(
        kind="solve",
        title=f"W by {name}, rank {projection.rank}"
        + (", fitted on simulated translations" * bool(simulated)),
        summary=[
            *filter(None, [facts["chosen"]]),
            *account.summary(evaluation, facts, test),
        ],
        data={
            **account.describe(collection, test, evaluation),
            **({"training pairs": facts.get("n_pairs")} if simulated else {}),
            **simulated,
            **({"latents": facts["latents"]} if "latents" in facts else {}),
            **({"tried": choices} if choices else {}),
        },
        settings={
            "method": options.method,
            "requested rank": options.rank,
            **dict(projection.knobs),
            "out": str(out),
        },
        reproduce=[command] if command else [],
        figures=figures,
        curves=trained
        or account.solver_curves(projection.method, facts, choices if options.method != AUTO else []),
        caveats=[
            *notes,
            *_simulated_caveat(simulated),
            *settling.at_an_edge(options, choices),
            *facts.get("left out", []),
            *account.caveats(collection, test, evaluation, learned=_learned(projection)),
        ],
        timings=timings,
        **results.stamp(),
    )
    report.write(results_path(out))
    if trained is not None:
        finished(run, trained, facts.get("best_step"))
    return Solved(projection, report, {**facts, "choices": choices}, evaluation, out)


def results_path(out: Path) -> Path:
    """Return where the results of a written file go: ``W.safetensors`` → ``W.results.json``."""
    return out.with_suffix(".results.json")


def _learned(W: Projection) -> bool:
    """Tell whether a map was learned from pairs, as one of an unknown method may have been."""
    return W.method not in METHODS or bool(METHODS[W.method].needs_pairs)


def _no_pairs(collection: Collection, method: str) -> str:
    n, total = len(collection.translations), len(collection.gallery)
    held = f"{n} pairs, none in the training split" if n else "no pairs"
    return (
        f"--method {method} learns from pairs (an origin and its translation), and {collection.store.path} "
        f"holds {held}: {total} images without translations. Three ways on: --method analytic needs the "
        f"collection alone; latentstore simulate --store {collection.store.path} --out simulated.zarr makes "
        "pairs by the analytic diffusion; or encode your own translations with --manifest LIST.csv (columns "
        "path,identity,role) or by names like T000123.jpg and T000123_1.jpg."
    )


def _checked_rank(options: SolveOptions, dim: int) -> int | str:
    """Refuse a rank that cannot be had before anything is read."""
    if options.method == AUTO:
        return check_rank(auto.top_rank(options, dim), dim)
    if not has_rank(options.method):
        return options.rank
    if isinstance(options.rank, str):
        build(options.method, rank=options.rank)
        return options.rank
    return check_rank(options.rank, dim)


def _fitted(
    fitting: _Fitting, data: PairData, rank: int | str
) -> tuple[Projection, dict[str, Any], list[dict[str, Any]]]:
    """Return the map, still without where it is from, its fit's account and the validation table."""
    collection, queries = fitting.collection, fitting.queries
    options, dim = settling.with_shape(fitting.options, collection), collection.store.layout.dim
    if options.method == AUTO:
        found = auto.fit_auto(
            collection,
            data,
            options,
            choosing.Judge.of(collection, queries, dim),
            simulated=fitting.simulated,
            progress=fitting.progress,
            say=fitting.say,
        )
        return found.projection, {**found.facts, "left out": found.left_out}, found.table
    if get(options.method).needs_torch:
        made = fit_cosface(
            collection,
            options,
            int(rank),
            judge=choosing.Judge.of(collection, queries, dim),
            asked=queries,
            simulated=fitting.simulated,
            init=fitting.init,
            progress=fitting.progress,
            run=fitting.run,
            say=fitting.say,
        )
        told = {"latents": made.latents, "left out": made.notes, "curves": made.curves}
        return made.fitted.projection(), {**made.fitted.report, **told}, made.choices
    return _closed(collection, data, options, rank, queries)


def _closed(
    collection: Collection, data: PairData, options: SolveOptions, rank: int | str, queries: Queries
) -> tuple[Projection, dict[str, Any], list[dict[str, Any]]]:
    """Fit a closed form; where knobs are open and validation can tell, fit each setting and keep the best."""
    asked = choosing.settings(options.knobs, choosing.open_knobs(options.method))
    judge = choosing.Judge.of(collection, queries, collection.store.layout.dim) if len(asked) > 1 else None
    if judge is None:
        asked = [dict(options.knobs)]
    best: tuple[float, Projection, dict[str, Any]] | None = None
    at = 0
    choices: list[dict[str, Any]] = []
    source = data if get(options.method).needs_pairs else collection.data
    cut = rank if has_rank(options.method) else None
    for bare, report in choosing.fits(source, options.method, cut, asked):
        score = 0.0
        if judge is not None:
            ranking = judge.ranking(bare)
            choices.append(choosing.row(bare.method, bare, bare.rank, ranking, control=False))
            score = ranking.map
        if best is None or score > best[0]:
            best = (score, bare, report)
            at = len(choices) - 1
    assert best is not None  # noqa: S101 - there is always one setting
    if choices:
        choices[at]["chosen"] = True
    return best[1], best[2], choices


def _chosen(options: SolveOptions, choices: list[dict[str, Any]]) -> str:
    """Return the sentence on what validation chose; empty where it chose nothing."""
    if options.method == AUTO:
        return auto.summary(choices)
    return choosing.settled(options.method, options.knobs, choices)


def _fitted_on(method: str, options: SolveOptions) -> dict[str, str]:
    """Return what a map on simulated pairs says of them; nothing for any other."""
    if options.simulate is None or not get(method).needs_pairs:
        return {}
    return {"fitted on": f"simulated translations ({options.simulate.name})"}


def _simulated_caveat(simulated: Mapping[str, str]) -> list[str]:
    if not simulated:
        return []
    text = (
        f"W was fitted on {simulated['fitted on']} of the store's own training images: a diffusion model "
        "that is known exactly, not a text-guided network. What it learned is what that model does."
    )
    return [text]
