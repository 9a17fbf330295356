"""Pairs grouped by their origin: each origin's translations are added up before anything is multiplied."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from .arrays import as_like, namespace
from .errors import SolverUsageError
from .halves import single
from .linalg import on_host


def checked_of(origins: Any, translations: Any, of: Any) -> np.ndarray | None:
    """Return which origin each translation has as int64, or say why it cannot be."""
    k, n = origins.shape[0], translations.shape[0]
    if of is None:
        if k != n:
            raise SolverUsageError(
                f"A block of pairs needs as many origins as translations; got {k} and {n}. Repeat the origin "
                "of every translation, or say with `of` which it is."
            )
        return None
    which = np.asarray(of)
    if which.dtype.kind not in "iu" or which.shape != (n,) or (n and not 0 <= which.min() <= which.max() < k):
        raise SolverUsageError(
            f"`of` must give one of the {k} origins for each of the {n} translations, as whole numbers; it "
            f"holds {which.size} of type {which.dtype}."
        )
    return which.astype(np.int64)


def grouped(o: Any, g: Any, of: np.ndarray, out: np.ndarray | None = None) -> tuple[Any, Any, Any]:
    """Return all differences, each origin's sum of them, and its count, in its library.

    `out`, (n, dim) of the origins' dtype, takes the differences of NumPy rows.
    """
    xp = namespace(o)
    if (np.diff(of) < 0).any():
        order = np.argsort(of, kind="stable")
        of = of[order]
        g = g[order] if on_host(g) else xp.take(g, xp.asarray(order, device=g.device), axis=0)
    if not on_host(o):
        t = xp.astype(g, o.dtype, copy=False) - xp.take(o, xp.asarray(of, device=o.device), axis=0)
        # Running sums in float64, and the differences between their ends.
        running = xp.cumulative_sum(xp.astype(t, xp.float64), axis=0, include_initial=True)
        edges = xp.asarray(np.searchsorted(of, np.arange(o.shape[0] + 1)), device=o.device)
        ends = xp.take(running, edges, axis=0)
        summed = xp.astype(ends[1:] - ends[:-1], t.dtype)
        return t, summed, as_like(np.bincount(of, minlength=o.shape[0]).astype(np.float64), o)
    # Sorted, an origin's translations lie together: one short look at each, while it is in the cache.
    t, summed = _copied(g, o.dtype, out), np.zeros_like(o)
    edges = np.flatnonzero(np.diff(of, prepend=-1, append=-1))
    if len(edges) == len(of) + 1:  # one each: nothing to add up
        t -= o[of]
        summed[of] = t
        return t, summed, np.bincount(of, minlength=len(o)).astype(o.dtype)
    for first, end in pairwise(edges.tolist()):
        own = t[first:end]
        own -= o[of[first]]
        own.sum(axis=0, out=summed[of[first]])
    return t, summed, np.bincount(of, minlength=len(o)).astype(o.dtype)


def _copied(g: np.ndarray, dtype: np.dtype[Any], out: np.ndarray | None) -> np.ndarray:
    if dtype == np.float32:
        return single(g, out)
    if out is None:
        return g.astype(dtype)
    np.copyto(out, g)
    return out
