"""What a run starts from: W, and the class weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import to_host
from .errors import BadRowsError, SolverUsageError
from .gallery_maps import random_orthonormal
from .linalg import fix_signs, orthonormalise

if TYPE_CHECKING:
    from .sgd import CosFace
    from .training import LabelledRows

_BLOCK = 2048
"""Rows that are read at a time."""
_SAMPLE = 8192
"""Rows that the principal directions are taken from."""


def start_name(cfg: CosFace, init: np.ndarray | None) -> str:
    """Return which start is asked for: "init", "principal", "random", "auto", or "seeded" for other heads.

    Raises
    ------
    SolverUsageError
        An `init` for a head that is no matrix.
    """
    if cfg.head == "linear":
        return cfg.weight_init if init is None else "init"
    if init is not None:
        raise SolverUsageError(
            f"The head {cfg.head} is no matrix and cannot start from one. Leave init out, or train the head "
            "linear."
        )
    return "seeded"


def given_weights(init: np.ndarray, dim: int, rank: int) -> np.ndarray:
    """Return `init` as float32 (dim, rank), scaled by a power of two to the size of orthonormal columns.

    The scale changes no cosine, and none of its bits; without it, a learning rate would mean something else
    for every W.

    Raises
    ------
    SolverUsageError
        Another shape, or values that are not finite or all zero.
    """
    W = np.asarray(to_host(init), dtype=np.float64)
    if W.shape != (dim, rank):
        raise SolverUsageError(
            f"W to start from has the shape {W.shape}; these rows and this rank need {(dim, rank)}. Give a W "
            "of the same space and its leading columns."
        )
    size = float(np.sqrt(np.mean(W**2)))
    if not (math.isfinite(size) and size > 0):
        raise SolverUsageError(
            f"W to start from has entries of size {size}; they must be finite and not all zero. Fit it again."
        )
    return np.ldexp(W, -round(math.log2(size * math.sqrt(dim)))).astype(np.float32)


def start_weights(name: str, cfg: CosFace, source: LabelledRows, rng: np.random.Generator) -> np.ndarray:
    """Return the start called "principal" or "random", orthonormal columns (d, rank)."""
    d, m = source.dim, cfg.rank
    if name == "random":
        return random_orthonormal(d, m, cfg.seed).astype(np.float32)
    # Top right singular vectors by randomised subspace iteration; uncentred, because W has no centre.
    n = len(source.labels)
    chosen = np.sort(rng.choice(n, size=min(n, _SAMPLE), replace=False))
    parts = [_read(source, chosen[at : at + _BLOCK]) for at in range(0, len(chosen), _BLOCK)]
    rows = np.concatenate(parts)
    basis = rng.standard_normal((d, min(m + 16, d))).astype(np.float32)
    for _ in range(3):
        basis = orthonormalise(rows.T @ (rows @ basis))
    inside = (rows @ basis).astype(np.float64)
    turn = np.linalg.eigh(inside.T @ inside)[1][:, ::-1]
    # Made orthonormal again in float64: few rows leave columns that float32 left nearly parallel.
    return fix_signs(orthonormalise(basis.astype(np.float64) @ turn))[:, :m].astype(np.float32)


def random_classes(cfg: CosFace, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return Gaussian class weights of length about 1, (C, rank) float32."""
    draws = rng.standard_normal((n_classes, cfg.rank), dtype=np.float32)
    draws /= np.float32(math.sqrt(cfg.rank))
    return draws


def mean_classes(
    classes: np.ndarray, source: LabelledRows, labels: np.ndarray, embed: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """Return the normalised mean of each class's normalised embeddings; one pass over all rows.

    Parameters
    ----------
    classes
        (C, rank): the weights that a class keeps where its embeddings cancel.
    embed
        Rows (n, d) -> embeddings (n, rank).

    Raises
    ------
    BadRowsError
        Rows that are not finite.
    """
    sums = np.zeros_like(classes)
    for at in range(0, len(labels), _BLOCK):
        rows = np.arange(at, min(at + _BLOCK, len(labels)))
        y = embed(_read(source, rows))
        y /= np.maximum(np.linalg.norm(y, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        np.add.at(sums, labels[rows], y)
    norm = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norm > 0, sums / np.where(norm > 0, norm, 1), classes).astype(np.float32)


def check_finite(block: np.ndarray, rows: np.ndarray) -> None:
    """Refuse a block (b, d) that holds values which are not finite.

    Raises
    ------
    BadRowsError
        Naming how many rows, and the first.
    """
    bad = rows[~np.isfinite(block).all(axis=1)]
    if len(bad):
        raise BadRowsError(
            f"{len(bad)} of {len(rows)} training rows that were read hold values that are not finite, row "
            f"{bad[0]} of the source first. Leave such rows out: a single one spoils every weight."
        )


def _read(source: LabelledRows, rows: np.ndarray) -> np.ndarray:
    block = np.asarray(to_host(source.gather(rows)), dtype=np.float32)
    check_finite(block, rows)
    return block
