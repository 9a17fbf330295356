"""Where two latents agree: the score of a match, taken apart into the places it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import SolverUsageError
from .projection import Projection


def contributions(W: Projection, q: Any, r: Any) -> np.ndarray:
    """Split the score of a query against a reference over the entries of a latent.

    The score is bilinear, s = q^T M r with M = Wq Wr^T, centred and divided by the norms: entry j of the
    query takes q_j (M r)_j and entry j of the reference r_j (M^T q)_j. Either set of entries adds up to s;
    the mean of both favours no side. A reference bias belongs to the reference's entries.

    Parameters
    ----------
    W
        The map that ranked.
    q, r
        (d,) latents of the query and of the reference.

    Returns
    -------
    np.ndarray
        (d,) float64; its sum is the score.

    Raises
    ------
    SolverUsageError
        Latents of another length.
    """
    rows = {"query": _row(q), "reference": _row(r)}
    mapped = {side: W.coordinates(row, side)[0] for side, row in rows.items()}
    centred = {side: W._centred(row, side)[0] for side, row in rows.items()}
    query = centred["query"] * _back(W, "query_map", mapped["reference"])
    reference = centred["reference"] * _back(W, "reference_map", mapped["query"])
    split = 0.5 * (query + reference)
    if W.score == "bias":
        own = centred["reference"] * _back(W, "reference_map", mapped["reference"])
        return np.asarray(split - 0.5 * own)
    norms = [_norm(centred[side], mapped[side], W) for side in rows]
    scale = float(np.prod(norms))
    return np.asarray(split / scale if scale > 0 else np.zeros_like(split))


def grid(contributions: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Sum the channels of contributions, (d,), to the (H, W) places of latents of `shape` (C, H, W).

    Raises
    ------
    SolverUsageError
        The shape holds another number of entries.
    """
    values = np.asarray(contributions, np.float64)
    if values.ndim != 1 or len(values) != int(np.prod(shape)):
        raise SolverUsageError(
            f"Contributions of shape {values.shape} cannot be laid out as {tuple(shape)}: these are "
            f"{int(np.prod(shape))} numbers. Give the latents' own shape."
        )
    return np.asarray(values.reshape(shape).sum(axis=0))


def _row(x: Any) -> np.ndarray:
    row = np.asarray(x, np.float64)
    if row.ndim != 1:
        raise SolverUsageError(f"One latent is a row of numbers; got an array of shape {row.shape}.")
    return row[None]


def _back(W: Projection, name: str, mapped: np.ndarray) -> np.ndarray:
    """Return W y, (d,): what each entry of a latent is multiplied with."""
    return mapped if W._is_identity(name) else np.asarray(W._placed(name, mapped) @ mapped)


def _norm(centred: np.ndarray, mapped: np.ndarray, W: Projection) -> float:
    measured = mapped if W.norm_map is None else centred @ W._placed("norm_map", centred)
    return float(np.linalg.norm(measured))
