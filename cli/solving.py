"""solve and evaluate: fit W on the training split, choose on validation, report on test."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cli import account, measure
from cli.collection import Collection
from latentstore import results
from latentstore._version import __version__
from latentstore.errors import UsageError
from latentstore.results import Report
from solvers.errors import NoPairsError
from solvers.methods import build, check_rank, get
from solvers.metrics import Ranking, average_precision
from solvers.nullspace import difference_facts
from solvers.projection import Projection, identity_hash

LAMBDAS = (0.1, 1.0, 10.0, 100.0)
"""Shrinkages of gnull, in units of Σ_t's mean diagonal, from which validation chooses."""

KNOBS: dict[str, tuple[str, ...]] = {
    "analytic": ("alpha_bar", "prompt_strength", "score"),
    "gnull": ("lam",),
    "cosface": ("preset", "budget", "seed"),
}
"""Which method each knob of :class:`SolveOptions` belongs to."""

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class SolveOptions:
    """What ``solve`` was asked for.

    Attributes
    ----------
    method : str
    rank : int
    alpha_bar, prompt_strength : float
        Of ``analytic``.
    score : {"cosine", "bias"}
        Of ``analytic``.
    lam : float or None
        Of ``gnull``; None chooses on validation.
    preset : {"auto", "paper"}
        Of ``cosface``.
    budget : float
        Seconds that ``cosface --preset auto`` may train on two cores.
    seed : int
    """

    method: str = "svd"
    rank: int = 512
    alpha_bar: float = 0.1
    prompt_strength: float = 0.0
    score: str = "cosine"
    lam: float | None = None
    preset: str = "auto"
    budget: float = 40.0
    seed: int = 0

    @classmethod
    def of(cls, method: str, rank: int, **knobs: Any) -> SolveOptions:
        """Take the knobs that were named (not None), and refuse those of another method.

        Raises
        ------
        SolverUsageError, UsageError
        """
        get(method)
        if not 1 <= (knobs.get("budget") or 1) < float("inf"):
            raise UsageError(f"--budget is {knobs['budget']}; it must be a number of seconds, at least 1.")
        named = {k: v for k, v in knobs.items() if v is not None}
        for knob in named:
            owner = next(m for m, own in KNOBS.items() if knob in own)
            if owner != method:
                raise UsageError(
                    f"--{knob.replace('_', '-')} is a knob of {owner}, and the method is {method}, which "
                    f"would ignore it. Leave it out, or use --method {owner}."
                )
        return cls(method=method, rank=rank, **named)


@dataclass(frozen=True)
class Solved:
    """A Projection, its report and how it fared."""

    projection: Projection
    report: Report
    facts: dict[str, Any]
    evaluation: measure.Evaluation


def fit(
    collection: Collection, options: SolveOptions, *, progress: Progress | None = None
) -> tuple[Projection, dict[str, Any], list[dict[str, Any]]]:
    """Fit one method on the training split; choose its open knobs on validation.

    Returns
    -------
    projection, facts, choices
        ``facts`` is the fit's own account; ``choices`` the validation table (empty when nothing was chosen).

    Raises
    ------
    NoPairsError
        The method learns from pairs and the store holds none in its training split.
    """
    rank = check_rank(options.rank, collection.store.layout.dim)
    method = get(options.method)
    collection.require_gallery()
    data = collection.data
    if method.needs_pairs and not data.n_pairs:
        raise NoPairsError(_no_pairs(collection, options.method))
    choices: list[dict[str, Any]] = []
    chosen_on = np.zeros(0, np.uint64)
    if options.method == "gnull":
        fitted, choices = _fit_gnull(collection, data, options, rank)
    elif options.method == "cosface":
        fitted, choices = _fit_cosface(collection, options, rank, progress)
    else:
        knobs: dict[str, Any] = (
            {"rank": rank} if "rank" in getattr(method, "__dataclass_fields__", {}) else {}
        )
        if options.method == "analytic":
            knobs |= {
                "alpha_bar": options.alpha_bar,
                "prompt": options.prompt_strength,
                "score": options.score,
            }
        fitted = build(options.method, **knobs).fit(data)
    if choices:
        queries = collection.queries("validation")
        chosen_on = identity_hash(measure.used_names(collection, queries.rows))
    facts = dict(fitted.report)
    if data.n_pairs and facts.get("numerical_rank") is None:
        facts |= difference_facts(data)
    used = chosen_on
    if method.needs_pairs:
        learned = measure.used_names(collection, collection.pairs("train")[1])
        used = np.union1d(used, identity_hash(learned))
    projection = fitted.projection(
        space_id=collection.store.space.id,
        data_hash=collection.data_hash,
        used_identities=used,
        provenance={
            "latentstore": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "store": collection.store.path.name,
            "encoder": collection.store.provenance.get("encoder", {}).get("name"),
            **{
                k: facts[k]
                for k in ("numerical_rank", "decided_by", "path", "statement", "n_pairs")
                if k in facts
            },
        },
    )
    return projection, facts, choices


def solve(
    store: Path, out: Path, options: SolveOptions, *, progress: Progress | None = None, command: str = ""
) -> Solved:
    """Fit, write the Projection, evaluate it on the test split, and write the results beside it."""
    began = time.perf_counter()
    check_writable(out)
    collection = Collection.open(store)
    projection, facts, choices = fit(collection, options, progress=progress)
    fitted = time.perf_counter()
    projection.save(out)
    control_set = measure.fit_controls(collection, projection.rank)
    queries = collection.queries("test")
    evaluation = measure.evaluate(collection, queries, {options.method: projection}, control_set)
    figures = list(evaluation.figures) + account.solver_figures(options.method, facts)
    figures += measure.residuals(collection, projection, control_set["random subspace"], "test")
    timings = {"fit": fitted - began, "evaluate": time.perf_counter() - fitted}
    report = Report(
        kind="solve",
        title=f"W by {options.method}, rank {projection.rank}",
        summary=account.summary(evaluation, facts, queries),
        data=account.describe(collection, queries, evaluation),
        settings={
            "method": options.method,
            "requested rank": options.rank,
            **dict(projection.knobs),
            "out": str(out),
        },
        reproduce=[command] if command else [],
        figures=figures,
        curves=account.solver_curves(options.method, facts, choices),
        caveats=account.caveats(collection, queries, evaluation),
        timings=timings,
        **results.stamp(),
    )
    report.write(results_path(out))
    return Solved(projection, report, {**facts, "choices": choices}, evaluation)


def evaluate(
    store: Path, projection: Path, *, queries: Path | None = None, out: Path | None = None, command: str = ""
) -> Report:
    """Report mAP and Acc of a Projection on the test queries of a store, beside the controls."""
    began = time.perf_counter()
    if out is not None:
        check_writable(out)
    W = load_projection(projection)
    gallery = Collection.open(store)
    W.check_space(gallery.store.space.id)
    asked = (gallery if queries is None else Collection.open(queries)).queries("test")
    measure.require_queries(asked, str(queries or store))
    name = W.method or projection.stem
    control_set = measure.fit_controls(gallery, W.rank)
    evaluation = measure.evaluate(gallery, asked, {name: W}, control_set)
    if not evaluation.methods:
        raise UsageError(
            f"None of the {len(asked.rows)} test queries has its origin in {store}: nothing can be measured. "
            "Evaluate against the store that holds their origins."
        )
    report = Report(
        kind="evaluation",
        title=f"{name} on {asked.group}",
        summary=evaluation.verdicts,
        data=account.describe(gallery, asked, evaluation),
        settings={"projection": str(projection), "method": W.method, **dict(W.knobs)},
        reproduce=[command] if command else [],
        figures=evaluation.figures,
        caveats=account.caveats(gallery, asked, evaluation),
        timings={"evaluate": time.perf_counter() - began},
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    return report


def load_projection(path: Path) -> Projection:
    """Load a Projection.

    Raises
    ------
    UsageError
        There is no such file.
    """
    if not path.is_file():
        raise UsageError(
            f"There is no projection {path} (looked in {Path.cwd()}). Make one with solve, "
            "or leave --projection out to use the collection's own analytic map."
        )
    return Projection.load(path)


def results_path(out: Path) -> Path:
    """Return where the results of a written file go: ``W.safetensors`` → ``W.results.json``."""
    return out.with_suffix(".results.json")


def check_writable(out: Path) -> None:
    """Refuse before any work what could not be written after it.

    Raises
    ------
    UsageError
    """
    import os

    if out.is_dir():
        raise UsageError(f"{out} is a folder; --out names the file to write.")
    if not out.parent.is_dir():
        raise UsageError(f"--out is {out}, but there is no folder {out.parent}. Make it, or choose another.")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out is {out}, but the folder {out.parent.absolute()} cannot be written to.")


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


def _validate(collection: Collection) -> Callable[[Projection], Ranking] | None:
    """Return a function that ranks validation queries, or None when there are none."""
    queries = collection.queries("validation")
    if not len(queries.rows):
        return None
    latents = collection.read(queries.rows)
    rows = measure.affordable(collection, queries, collection.store.layout.dim)
    references = collection.read(rows)
    labels, ids = collection.labels(queries.identity), collection.labels(collection.identity[rows])

    def rank(projection: Projection) -> Ranking:
        return average_precision(projection.queries(latents), labels, projection.references(references), ids)

    return rank


def _fit_gnull(
    collection: Collection, data: Any, options: SolveOptions, rank: int
) -> tuple[Any, list[dict[str, Any]]]:
    from solvers.closed import fit_path
    from solvers.selection import choose

    validate = _validate(collection) if options.lam is None else None
    if validate is None:
        return fit_path(data, [1.0 if options.lam is None else options.lam], rank)[0], []
    candidates = fit_path(data, LAMBDAS, rank)
    best, table = choose([c.projection() for c in candidates], validate)
    return candidates[best], table


def _fit_cosface(
    collection: Collection, options: SolveOptions, rank: int, progress: Progress | None
) -> tuple[Any, list[dict[str, Any]]]:
    from solvers.sgd import ArraySource, preset_auto, preset_paper

    origins, translated = collection.pairs("train")
    own = np.unique(origins)
    rows = np.concatenate([own, translated])
    names, labels = np.unique(collection.labels(collection.identity[rows]).astype(str), return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            f"CosFace tells identities apart and needs at least 2 with pairs in the training split; "
            f"{collection.store.path} has {len(names)}. Encode more images, or use --method analytic."
        )
    if options.preset == "paper":
        cfg = preset_paper(rank=rank, seed=options.seed)
    elif options.preset == "auto":
        cfg = preset_auto(
            len(names), len(rows), collection.store.layout.dim, options.budget, rank=rank, seed=options.seed
        )
    else:
        raise UsageError(f"--preset is {options.preset!r}; use auto or paper.")
    source = ArraySource(_in_memory(collection, rows), labels)
    rank_validation = _validate(collection)

    def validate(W: np.ndarray) -> float:
        assert rank_validation is not None  # noqa: S101 - given to fit only when there is one
        return rank_validation(Projection(W, W)).map

    fitted = cfg.fit(source, validate=validate if rank_validation else None, progress=progress)
    history = [h for h in fitted.report["history"] if h["map"] is not None]
    return fitted, [{"method": "cosface", "knobs": {"step": h["step"]}, "map": h["map"]} for h in history]


def _in_memory(collection: Collection, rows: Any) -> Any:
    """Return the latents of rows in the stored dtype, after counting their bytes."""
    import os

    needed = len(rows) * collection.store.layout.row_bytes
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > 0.8 * have:
        raise UsageError(
            f"CosFace keeps its {len(rows)} latents in memory: {needed / 1e9:.1f} GB, and {have / 1e9:.1f} "
            "GB are free. Use a machine with more memory, or a closed form (svd, gnull, analytic), which "
            "streams."
        )
    return collection.read(rows)
