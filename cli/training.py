"""CosFace on a store's rows: what it is trained on, and how its run is sized."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cli.choosing import Judge
from cli.collection import Collection
from cli.knobs import SolveOptions
from cli.simulating import SimulatedPairs
from latentstore.errors import UsageError
from solvers.fitted import Fitted
from solvers.projection import Projection
from solvers.sgd import ArraySource, CosFace, preset_auto, preset_paper

Progress = Callable[[int, int, float], None]


def fit_cosface(
    collection: Collection,
    options: SolveOptions,
    rank: int,
    *,
    judge: Judge | None,
    simulated: SimulatedPairs | None = None,
    progress: Progress | None = None,
) -> tuple[Fitted, list[dict[str, Any]]]:
    """Train on the training split; a judge chooses the step.

    Returns
    -------
    fitted, choices
        ``choices`` is the validation table by step, empty without a judge.
    """
    source = _labelled(collection) if simulated is None else _labelled_simulated(simulated)
    cfg = _recipe(options, source, rank)

    def validate(W: np.ndarray) -> float:
        assert judge is not None  # noqa: S101 - given to fit only when there is one
        return judge.ranking(Projection(W, W)).map

    fitted = cfg.fit(source, validate=None if judge is None else validate, progress=progress)
    history = [h for h in fitted.report["history"] if h["map"] is not None]
    return fitted, [{"method": "cosface", "knobs": {"step": h["step"]}, "map": h["map"]} for h in history]


def _recipe(options: SolveOptions, source: ArraySource, rank: int) -> CosFace:
    if options.preset == "paper":
        return preset_paper(rank=rank, seed=options.seed)
    if options.preset != "auto":
        raise UsageError(f"--preset is {options.preset!r}; use auto or paper.")
    n = int(source.labels.max()) + 1
    return preset_auto(n, len(source.labels), source.dim, options.budget, rank=rank, seed=options.seed)


def _labelled(collection: Collection) -> ArraySource:
    origins, translated = collection.pairs("train")
    rows = np.concatenate([np.unique(origins), translated])
    labels = _classes(collection, rows)
    return ArraySource(_in_memory(collection, rows), labels)


def _labelled_simulated(simulated: SimulatedPairs) -> ArraySource:
    collection, rows = simulated.collection, simulated.rows
    labels = _classes(collection, rows)
    _check_memory(collection, 2 * len(rows))
    blocks = list(simulated.pairs())
    held = np.concatenate([side for sides in zip(*blocks, strict=True) for side in sides])
    return ArraySource(held, np.concatenate([labels, labels]))


def _classes(collection: Collection, rows: Any) -> np.ndarray:
    names, labels = np.unique(collection.labels(collection.identity[rows]).astype(str), return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            f"CosFace tells identities apart and needs at least 2 with pairs in the training split; "
            f"{collection.store.path} has {len(names)}. Encode more images, or use --method analytic."
        )
    return labels


def _in_memory(collection: Collection, rows: Any) -> Any:
    """Return the latents of rows in the stored dtype, after counting their bytes."""
    _check_memory(collection, len(rows))
    return collection.read(rows)


def _check_memory(collection: Collection, n: int) -> None:
    needed = n * collection.store.layout.row_bytes
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > 0.8 * have:
        raise UsageError(
            f"CosFace keeps its {n} latents in memory: {needed / 1e9:.1f} GB, and {have / 1e9:.1f} "
            "GB are free. Use a machine with more memory, or a closed form (svd, gnull, analytic), which "
            "streams."
        )
