"""When is a singular value zero: the one cutoff that every method uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import SolverUsageError

EPS64 = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)
_STORED = {
    float(np.finfo(np.float16).eps): "float16 storage",
    float(np.finfo(np.float32).eps): "float32 storage",
    2.0**-7: "bfloat16 storage",
}


@dataclass(frozen=True)
class Cutoff:
    """A singular value at or below `value` counts as zero; `decided_by` says which floor it is."""

    value: float
    decided_by: str


def rank_cutoff(
    sigma_max: float,
    n: int,
    d: int,
    *,
    gram: bool,
    stored_eps: float | None = None,
    rms: float = 0.0,
    tile_noise: float = 0.0,
) -> Cutoff:
    """Return the largest singular value of an n x d matrix that still counts as zero.

    The larger of two floors. Arithmetic: max(n, d) * eps64 * sigma_max, whose analogue on the Gram path
    is sqrt(max(n, d) * eps64) * sigma_max, because the Gram squares the condition number. Storage:
    sqrt(2 max(n, d)) * stored_eps * rms, the size of the rounding noise that two stored latents leave in
    their difference. A Gram of float32 tiles has a third: see `tile_noise`.

    Parameters
    ----------
    sigma_max
        Largest singular value of the matrix.
    n, d
        Its shape.
    gram
        Whether the values come from a Gram matrix (their squares were computed).
    stored_eps
        Machine epsilon of the dtype the latents were stored in; None for no storage floor.
    rms
        Root mean square of the stored, uncentred latents: rounding is relative to them, not to T.
    tile_noise
        From :func:`tile_noise` where the Gram is a sum of float32 products.
    """
    size = max(n, d)
    if gram:
        arithmetic, name = math.sqrt(size * EPS64) * sigma_max, "float64 arithmetic (Gram)"
    else:
        arithmetic, name = size * EPS64 * sigma_max, "float64 arithmetic"
    if gram and tile_noise > arithmetic:
        arithmetic, name = tile_noise, "float32 products (Gram)"
    if stored_eps is None:
        return Cutoff(arithmetic, name)
    storage = math.sqrt(2.0 * size) * stored_eps * rms
    if storage > arithmetic:
        return Cutoff(storage, _STORED.get(stored_eps, f"storage with eps {stored_eps:g}"))
    return Cutoff(arithmetic, name)


def tile_noise(diagonal: np.ndarray) -> float:
    """Return the singular values that rounding in float32 tiles leaves in a Gram matrix.

    An entry's error is of the size of eps32 / 2 * sqrt(g_ii g_jj) with random signs, and a d x d matrix of
    such has the norm 2 sqrt(d) times that; the root turns it into singular values. Rows with a common factor
    or a mean beside the shift correlate the errors, and were seen at 1.5 times that norm; four are allowed.
    """
    top = float(diagonal.max(initial=0.0))
    return math.sqrt(4.0 * math.sqrt(len(diagonal)) * EPS32 * top)


def check_rank(rank: int, dim: int) -> int:
    """Return `rank` if a W of `dim` rows can have so many columns, else raise `SolverUsageError`."""
    if rank < 1 or rank > dim:
        raise SolverUsageError(
            f"The rank must lie between 1 and the latents' dimension {dim}, not {rank}. Choose --rank "
            "accordingly."
        )
    return int(rank)
