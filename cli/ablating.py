"""ablate: the paper's ablations on a store, all trained by one recipe, measured on seen and unseen models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from cli import ablation_tables as tables
from cli import account, measure, recipe, settling, training
from cli.choosing import Judge
from cli.collection import Collection, Queries
from latentstore import results
from latentstore.encoders.devices import pick_device
from latentstore.errors import UsageError
from latentstore.results import Report
from latentstore.schema import check_space
from solvers.errors import NoPairsError, SolverError
from solvers.heads import DEEPEST
from solvers.losses import DEFAULTS
from solvers.projection import Projection, identity_hash
from solvers.rank import check_rank
from solvers.sgd import CosFace
from solvers.training import TrainResult, train

Say = Callable[[str], None]
HARDLY = 0.01
"""Of mAP: a variant that validation raises by less has learned next to nothing."""


@dataclass(frozen=True)
class AblateOptions:
    """What is trained.

    Attributes
    ----------
    what : tuple of str
        Keys of :data:`cli.ablation_tables.TABLES`.
    rank : int or None
        Of all but the rank sweep; None for 512, or the dimension where that is smaller.
    ranks, layers : tuple of int
        Of the rank sweep (empty: powers of two up to 512) and of the MLPs.
    steps : int or None
        Of every run; None for as many as ``budget`` seconds allow.
    budget : float or None
        Seconds that a run may take; by default 40, unless the steps are named.
    seed : int
    """

    what: tuple[str, ...] = tuple(tables.TABLES)
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    layers: tuple[int, ...] = (1, 2, 3)
    steps: int | None = None
    budget: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [w for w in self.what if w not in tables.TABLES]
        if unknown or not self.what:
            raise UsageError(f"--what is {', '.join(unknown) or 'empty'}; use {', '.join(tables.TABLES)}.")
        recipe.check_budget(self.budget)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list like ``1,2,3``, ascending, each once.

    Raises
    ------
    UsageError
        An entry is no number of layers.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and 1 <= int(word) <= DEEPEST for word in words):
        raise UsageError(
            f"--layers is {text!r}; it must be whole numbers of 1 to {DEEPEST} between commas, as in 1,2,3."
        )
    return tuple(sorted({int(word) for word in words}))


class HeadMap:
    """A trained head with what measuring needs of a Projection.

    Parameters
    ----------
    result : TrainResult
    cfg : CosFace
    dim : int
    space_id : str
    used_identities : (n,) uint64 array
        Sorted hashes of the identities it was fitted and chosen on.
    """

    def __init__(
        self, result: TrainResult, cfg: CosFace, *, dim: int, space_id: str, used_identities: Any
    ) -> None:
        self.snapshot, self.dim, self.rank = result.snapshot, dim, cfg.rank
        self.method, self.knobs = cfg.head, {"rank": cfg.rank, "layers": cfg.layers}
        self.space_id, self.used_identities = space_id, used_identities

    def queries(self, x: Any) -> np.ndarray:
        """Return embeddings of rows, normalised; a zero row stays zero."""
        assert self.snapshot is not None  # noqa: S101 - a finished run has one
        y = self.snapshot.embed(x)
        norm = np.linalg.norm(y, axis=1, keepdims=True)
        return cast("np.ndarray", y / np.where(norm > 0, norm, 1))

    references = queries

    def check_space(self, space_id: str) -> None:
        """Refuse latents of another space, as a Projection does."""
        Projection.check_space(cast("Projection", self), space_id)


def ablate(
    store: Path,
    options: AblateOptions,
    *,
    queries: Path | None = None,
    out: Path | None = None,
    table: Path | None = None,
    plot: Path | None = None,
    progress: training.Progress | None = None,
    say: Say = lambda text: None,
    command: str = "",
) -> tables.Ablated:
    """Train every variant by the same recipe, choose on validation, report on test.

    Parameters
    ----------
    store : Path
        Of pairs; its training split is fitted, its validation split chooses each run's step.
    queries : Path, optional
        A store of further test queries, by models that the training split lacks.
    out, table, plot : Path, optional
        Results JSON, CSV and PNG to write.
    progress : callable, optional
        Takes (step, steps, loss) of each run.
    say : callable
        Takes a line when a run begins.

    Raises
    ------
    UsageError
        No test queries, sizes that cannot be, or files that cannot be written.
    NoPairsError
        The training split has no pairs.
    """
    began = time.perf_counter()
    settling.check_files(out=out, csv=table, plot=plot)
    collection = Collection.open(store)
    collection.require_gallery()
    if not len(collection.pairs("train")[1]):
        raise NoPairsError(
            f"ablate trains on pairs (an origin and its translation), and the training split of {store} has "
            f"none. Make some with latentstore simulate --store {store} --out simulated.zarr, or encode your "
            "own translations with a manifest."
        )
    groups = _groups(collection, queries)
    plan = _plan(collection, options)
    judge = Judge.of(collection, collection.queries("validation"), collection.store.layout.dim)
    runs: dict[CosFace, TrainResult] = {}
    lost: list[str] = []
    todo = list(dict.fromkeys(plan.values()))
    for at, cfg in enumerate(todo, start=1):
        say(f"{at} of {len(todo)}: {tables.run_name(cfg)}, at most {cfg.steps:,} steps")
        try:
            runs[cfg] = _run(collection, cfg, judge, progress)
        except (KeyboardInterrupt, SolverError) as error:
            if isinstance(error, KeyboardInterrupt) and not runs:
                raise KeyboardInterrupt(
                    "Stopped before the first variant was trained: nothing was kept."
                ) from None
            if not runs and at == len(todo):
                raise
            lost.append(f"{tables.run_name(cfg)}: {str(error) or 'stopped by hand'}")
            if isinstance(error, KeyboardInterrupt):
                lost += [f"{tables.run_name(c)}: not begun" for c in todo[at:]]
                break
    if not runs:
        raise UsageError(f"None of the variants could be trained. {lost[0]}")
    plan = {key: cfg for key, cfg in plan.items() if cfg in runs}
    trained = time.perf_counter()
    maps = {tables.run_name(cfg): _map(collection, cfg, result, judge) for cfg, result in runs.items()}
    widest = max(cfg.rank for cfg in runs)
    control_set = measure.fit_controls(collection, widest)
    measured = [measure.evaluate(collection, group, maps, control_set) for group in groups]
    if not any(evaluation.methods for evaluation in measured):
        raise UsageError(
            f"None of the test queries has its origin in {store}: nothing can be measured. Encode their "
            "origins into the same store."
        )
    rows = [
        row
        for group, evaluation in zip(groups, measured, strict=True)
        if evaluation.methods
        for row in tables.rows(plan, runs, group.group, evaluation)
    ]
    gaps = tables.gaps(plan, groups, measured)
    best = {
        group.group: tables.best_control(evaluation)
        for group, evaluation in zip(groups, measured, strict=True)
        if evaluation.methods
    }
    base = next(iter(runs))
    report = Report(
        kind="ablation",
        title=f"Ablations: {', '.join(options.what)}",
        summary=tables.summary(rows, gaps, best),
        data=account.describe(collection, groups[0], measured[0]),
        settings={
            "what": list(options.what),
            "rank": base.rank,
            "seed": options.seed,
            "steps": base.steps,
            "seconds a run": base.max_seconds,
            "weight_init": base.weight_init,
            "recipe": "the same for every variant; its step chosen on validation",
        },
        reproduce=[command] if command else [],
        figures=tables.figures(plan, runs, rows, gaps, measured),
        curves=tables.curves(rows),
        caveats=[
            *(f"Left out: {text}" for text in lost),
            *_caveats(collection, groups, measured, runs, judge),
        ],
        timings={"train": trained - began, "evaluate": time.perf_counter() - trained},
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    if table is not None:
        tables.write_csv(rows, table)
    ablated = tables.Ablated(rows, gaps, best, report)
    if plot is not None:
        from cli.render_ablate import draw

        draw(ablated, plot)
    return ablated


def _plan(collection: Collection, options: AblateOptions) -> dict[tuple[str, str], CosFace]:
    """Return (table, variant) → its recipe. Variants of different tables that are one run have one recipe."""
    dim = collection.store.layout.dim
    rank = min(512, dim) if options.rank is None else check_rank(options.rank, dim)
    data = training.training_rows(collection)
    # One start for all, the seeded random W that other heads have inside: a start is no part of a variant.
    named: dict[str, Any] = {"weight_init": "random"}
    if options.steps is not None:
        named["steps"] = options.steps
    base = recipe.build(
        "auto",
        named,
        n_identities=int(data.labels.max()) + 1,
        n_rows=len(data.labels),
        dim=dim,
        rank=rank,
        seed=options.seed,
        budget=options.budget,
    )
    shape = tuple(collection.store.space.latent_shape)
    shaped = shape if len(shape) == 3 and math.prod(shape) == dim else None
    plan: dict[tuple[str, str], CosFace] = {}
    if "losses" in options.what:
        for loss, (scale, margin) in DEFAULTS.items():
            plan["losses", loss] = replace(base, loss=loss, scale=scale, margin=margin)
    if "transformations" in options.what:
        plan["transformations", "linear"] = base
        for head in ("convolution", "attention"):
            plan["transformations", head] = replace(base, head=head, latent_shape=shaped)
    if "layers" in options.what:
        for n in options.layers:
            # One layer is W itself.
            plan["layers", str(n)] = base if n == 1 else replace(base, head="mlp", layers=n)
    if "ranks" in options.what:
        asked = options.ranks or tuple(2**k for k in range(6, 10) if 2**k <= dim) or (dim,)
        for k in asked:
            plan["ranks", str(k)] = replace(base, rank=check_rank(k, dim))
    return plan


def _run(
    collection: Collection, cfg: CosFace, judge: Judge | None, progress: training.Progress | None
) -> TrainResult:
    """Train one variant on the training split."""
    data = training.training_rows(collection)
    source, _, left = training.placed(data, cfg, None, str(pick_device(cfg.device)))

    def validate(snapshot: Any) -> float:
        assert judge is not None  # noqa: S101 - given to train only when there is one
        probe = TrainResult(None, snapshot=snapshot)
        found = HeadMap(probe, cfg, dim=source.dim, space_id="", used_identities=np.zeros(0, dtype=np.uint64))
        return judge.ranking(cast("Projection", found)).map

    return train(
        cfg,
        source,
        validate=None if judge is None else validate,
        progress=progress,
        free_bytes=left,
    )


def _map(collection: Collection, cfg: CosFace, result: TrainResult, judge: Judge | None) -> Projection:
    """Return what measuring takes: a Projection, or a head with its surface."""
    used = measure.used_names(collection, collection.pairs("train")[1])
    if judge is not None:
        used += measure.used_names(judge.chosen_on.collection, judge.chosen_on.rows)
    facts: dict[str, Any] = {
        "space_id": collection.store.space.id,
        "used_identities": np.unique(identity_hash(used)),
    }
    if result.weights is None:
        head = HeadMap(result, cfg, dim=collection.store.layout.dim, **facts)
        return cast("Projection", head)
    return Projection(result.weights, result.weights, method="cosface", seed=cfg.seed, **facts)


def _groups(collection: Collection, other: Path | None) -> list[Queries]:
    """Return the test queries by seen and by unseen models, of the store and of another one.

    A model is seen when translations by it are in the training split.
    """
    asked = [collection]
    if other is not None:
        asked.append(Collection.open(other))
        check_space(asked[1].store.space.id, collection.store.space.id, what=f"--queries {other}")
    seen = {m or "unnamed" for m in collection.model[collection.pairs("train")[1]]}
    out: list[Queries] = []
    for one in asked:
        found = one.queries("test", origins_elsewhere=one is not collection)
        known = np.array([(m or "unnamed") in seen for m in one.model[found.rows]], bool)
        for kind, rows in ((tables.SEEN, found.rows[known]), (tables.UNSEEN, found.rows[~known])):
            taken = any(q.group == kind for q in out)
            if len(rows):
                out.append(replace(found, rows=rows, group=f"{kind}, --queries" if taken else kind))
    if not out:
        measure.require_queries(asked[-1].queries("test"), str(other or collection.store.path))
    return sorted(out, key=lambda q: not q.group.startswith(tables.SEEN))


def _caveats(
    collection: Collection,
    groups: Sequence[Queries],
    measured: Sequence[measure.Evaluation],
    runs: Mapping[CosFace, TrainResult],
    judge: Judge | None,
) -> list[str]:
    out = []
    if not any(g.group.startswith(tables.UNSEEN) for g in groups):
        out.append(
            "Every test query is by a model of the training split: nothing is said of unseen models. Give "
            "translations by another one with --queries."
        )
    else:
        out.append(
            "A gap holds both what is lost on an unseen model and how much harder its translations are: read "
            "it beside the gap of the controls, which learned from no model."
        )
    if judge is None:
        out.append("There are no validation queries: every variant is that of its last step.")
    idle = [
        tables.run_name(cfg)
        for cfg, r in runs.items()
        if r.best_map is not None and r.start_map is not None and r.best_map < r.start_map + HARDLY
    ]
    if idle:
        out.append(
            f"On validation hardly better than their random start (by less than {100 * HARDLY:g} point): "
            f"{'; '.join(idle)}. Too little training to tell them apart: give more --steps or --budget."
        )
    cut = [tables.run_name(cfg) for cfg, result in runs.items() if result.stopped_early == "max_seconds"]
    if cut:
        out.append(f"The clock ended before the steps did, which favours the others: {'; '.join(cut)}.")
    return [*out, *account.caveats(collection, groups[0], measured[0])]
