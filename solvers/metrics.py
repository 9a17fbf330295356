"""Retrieval metrics from exact rankings: recall, µAP, chance, intervals over identities, residuals, leaks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np

from .arrays import to_host
from .errors import LeakError, SolverUsageError
from .projection import Projection, as_hashes
from .ranking import Ranking, average_precision, ranked

__all__ = [
    "Ranking",
    "average_precision",
    "balanced_mean",
    "bootstrap",
    "chance_map",
    "chance_micro",
    "micro_average_precision",
    "micro_bootstrap",
    "paired_bootstrap",
    "quantile_bootstrap",
    "ranked",
    "recall_at",
    "refuse_leak",
    "residual_of_blocks",
    "residual_ratio",
]

_AT_ONCE = 50
"""Resamples that are worked on at a time."""
_KEPT = 1 << 21
"""Numbers, at most, of a set of resamples that is kept: every figure of a report asks for the same one."""


def recall_at(ranking: Ranking, k: int) -> np.ndarray:
    """Return, (q,) bool, whether a positive is among the first k references of each query."""
    if k < 1:
        raise SolverUsageError(f"recall@{k} has no meaning; k must be at least 1.")
    return ranking.rank <= k


def micro_average_precision(ranking: Ranking, *, top: int = 10) -> float:
    """Return µAP: average precision over the pairs of all queries in one list, sorted by score.

    One threshold serves all queries, so scores have to mean the same for each of them. Of every query its
    `top` best references are predictions; pairs beyond count as not found. Equal scores stand in the worst
    order.

    Parameters
    ----------
    ranking
        Made with at least as many negatives for each query as `top`.
    top
        Predictions of a query.

    Notes
    -----
    The measure of the Image Similarity Challenge: Douze et al., "The 2021 Image Similarity Dataset and
    Challenge", arXiv:2106.09672, section 4; there a query had ten predictions on average.
    """
    return float(_Predictions.of(ranking, top).values(np.ones((1, len(ranking.ap))))[0])


def micro_bootstrap(
    ranking: Ranking,
    groups: Any,
    *,
    strata: Any = None,
    top: int = 10,
    repeats: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of µAP (of the mean of the strata's), resampling whole groups."""
    codes = np.unique(_aligned(ranking.ap, groups), return_inverse=True)[1]
    own = _strata(strata, len(codes))
    lists = [_Predictions.of(ranking.subset(_chosen(mine, len(codes))), top) for mine in own]
    found = []
    for weights in _resampled(int(codes.max()) + 1, repeats, seed):
        each = np.stack([p.values(weights[:, codes[m]]) for p, m in zip(lists, own, strict=True)])
        found.append(_mean_of_drawn(each, np.stack([weights[:, codes[m]].any(axis=1) for m in own])))
    return _percentiles(np.concatenate(found), level)


@dataclass(frozen=True, eq=False)
class _Predictions:
    """Predictions of all queries, in the worst order by score: whose they are, and which are right."""

    query: np.ndarray
    right: np.ndarray
    n_positives: np.ndarray

    @classmethod
    def of(cls, ranking: Ranking, top: int) -> Self:
        p, negatives = ranking.positives, ranking.negatives
        if top < 1 or top > negatives.score.shape[1]:
            raise SolverUsageError(
                f"µAP over {top} predictions a query needs a ranking that keeps as many negatives; this one "
                f"keeps {negatives.score.shape[1]}. Rank with top={top}."
            )
        in_list = p.rank <= top
        room = top - np.bincount(p.of[in_list], minlength=len(ranking.ap))
        shown = (np.arange(negatives.score.shape[1]) < room[:, None]) & (negatives.position >= 0)
        of = np.concatenate([np.nonzero(shown)[0], p.of[in_list]])
        right = np.repeat([False, True], [np.count_nonzero(shown), np.count_nonzero(in_list)])
        order = np.lexsort((right, -np.concatenate([negatives.score[shown], p.score[in_list]])))
        return cls(of[order], right[order], np.bincount(p.of, minlength=len(ranking.ap)))

    def values(self, weights: np.ndarray) -> np.ndarray:
        """Return µAP with every query counted as often as its weight says, (r, q) → (r,); 0 without any."""
        w = weights[:, self.query]
        listed, found = np.cumsum(w, axis=1), np.cumsum(w * self.right, axis=1)
        precision = np.divide(found, listed, out=np.zeros(w.shape), where=listed > 0)
        total = weights @ self.n_positives
        return np.divide(
            (w * self.right * precision).sum(axis=1), total, out=np.zeros(len(w)), where=total > 0
        )


def chance_map(n_references: int, n_positives: int = 1) -> float:
    """Return the expected average precision of a random order; H_N / N for one positive among N."""
    if not 1 <= n_positives <= n_references:
        raise SolverUsageError(
            f"There must be between 1 and {n_references} positives among {n_references} references, not "
            f"{n_positives}."
        )
    n, k = n_references, n_positives
    harmonic = float((1.0 / np.arange(1, n + 1)).sum())
    if n == 1:
        return 1.0
    return (harmonic + (k - 1) / (n - 1) * (n - harmonic)) / n


def chance_micro(n_queries: int, n_references: int, *, top: int = 10) -> float:
    """Return the expected µAP of random scores, one positive a query among the references.

    A query's positive is among its `top` with probability p = top / n_references; h of them in a list of n
    predictions in random order give h · chance_map(n, h) of the queries' positives.
    """
    n_listed = n_queries * min(top, n_references)
    p = min(1.0, top / n_references)
    if n_listed == 1:
        return p
    harmonic = float((1.0 / np.arange(1, n_listed + 1)).sum())
    one, two = n_queries * p, n_queries * (n_queries - 1) * p * p  # E[h], E[h (h - 1)], h binomial
    return (one * harmonic + two * (n_listed - harmonic) / (n_listed - 1)) / n_listed / n_queries


def balanced_mean(values: Any, strata: Any = None) -> float:
    """Return the mean of the strata's means, so that each weighs the same; without strata the plain mean."""
    values = np.asarray(values, dtype=np.float64)
    if strata is None:
        return float(values.mean())
    codes = np.unique(_aligned(values, strata), return_inverse=True)[1]
    return float((np.bincount(codes, weights=values) / np.bincount(codes)).mean())


def bootstrap(
    values: Any,
    groups: Any,
    *,
    strata: Any = None,
    repeats: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of `balanced_mean`, resampling whole groups (identities) with replacement.

    Queries of one identity stand or fall together, so resampling single queries would be too sure. A
    stratum that a resample misses is left out of its mean.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = _aligned(values, groups)
    if not 0.0 < level < 1.0 or repeats < 1:
        raise SolverUsageError(
            f"level must lie between 0 and 1 and repeats be positive; got {level}, {repeats}."
        )
    codes = np.unique(groups, return_inverse=True)[1]
    n, own = int(codes.max()) + 1, _strata(strata, len(codes))
    sums = np.stack([np.bincount(codes[m], weights=values[m], minlength=n) for m in own], 1)
    counts = np.stack([np.bincount(codes[m], minlength=n) for m in own], 1).astype(np.float64)
    means = []
    for weights in _resampled(n, repeats, seed, kept_at_once=repeats):
        held, total = weights @ counts, weights @ sums
        each = np.divide(total, held, out=np.zeros(total.shape), where=held > 0)
        means.append(_mean_of_drawn(each.T, held.T > 0))
    return _percentiles(np.concatenate(means), level)


def paired_bootstrap(
    a: Any,
    b: Any,
    groups: Any,
    *,
    strata: Any = None,
    repeats: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of mean(a) - mean(b) for values of the same queries, resampling groups."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise SolverUsageError(f"Paired values must be of the same queries; got {a.shape} and {b.shape}.")
    return bootstrap(a - b, groups, strata=strata, repeats=repeats, seed=seed, level=level)


def quantile_bootstrap(
    values: Any,
    groups: Any,
    shares: Sequence[float],
    *,
    repeats: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> list[tuple[float, float]]:
    """Percentile intervals of quantiles, resampling whole groups."""
    values = np.asarray(values, dtype=np.float64)
    codes = np.unique(_aligned(values, groups), return_inverse=True)[1]
    order = np.argsort(values, kind="stable")
    found = []
    for weights in _resampled(int(codes.max()) + 1, repeats, seed):
        below = np.cumsum(weights[:, codes[order]], axis=1)
        at = [(below >= share * below[:, -1:]).argmax(axis=1) for share in shares]
        found.append(values[order[np.stack(at, 1)]])
    return [_percentiles(column, level) for column in np.concatenate(found).T]


def _resampled(n: int, repeats: int, seed: int, kept_at_once: int = _AT_ONCE) -> Iterator[np.ndarray]:
    """Yield how often each of n groups is drawn, (r, n) float64 at a time; the same for the same seed."""
    if n * repeats > _KEPT:
        yield from _drawn(n, repeats, seed)
    else:
        kept = _drawn_once(n, repeats, seed)
        yield from (kept[at : at + kept_at_once] for at in range(0, repeats, kept_at_once))


@lru_cache(maxsize=4)
def _drawn_once(n: int, repeats: int, seed: int) -> np.ndarray:
    kept = np.concatenate(list(_drawn(n, repeats, seed)))
    kept.flags.writeable = False
    return kept


def _drawn(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for at in range(0, repeats, _AT_ONCE):
        r = min(_AT_ONCE, repeats - at)
        draws = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(draws.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def _strata(strata: Any, n: int) -> list[np.ndarray]:
    """Return which of n values each stratum holds, as positions."""
    if strata is None:
        return [np.arange(n)]
    codes = np.unique(strata, return_inverse=True)[1]
    return [np.flatnonzero(codes == stratum) for stratum in range(codes.max() + 1)]


def _chosen(positions: np.ndarray, n: int) -> np.ndarray:
    chosen = np.zeros(n, bool)
    chosen[positions] = True
    return chosen


def _mean_of_drawn(each: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the mean over strata, (m, r) → (r,), of those that a resample holds."""
    mean: np.ndarray = (each * drawn).sum(axis=0) / drawn.sum(axis=0)
    return mean


def _aligned(values: np.ndarray, groups: Any) -> np.ndarray:
    groups = np.asarray(groups)
    if len(values) != len(groups) or len(values) == 0:
        raise SolverUsageError(
            f"An interval needs one group for each of at least 1 value; got {len(values)} values and "
            f"{len(groups)} groups."
        )
    return groups


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def residual_ratio(projection: Projection, o: Any, g: Any) -> float:
    """Return ||(g - mu) W_q - (o - mu) W_r||_F / ||(o - mu) W_r||_F, without normalising rows.

    For a symmetric map this is ||T W||_F / ||(O - mu) W||_F, with t = g - o formed first. Zero says
    that translation is invisible through W; one, that it is as large as the origins themselves.
    """
    return residual_of_blocks(projection, [(o, g)])


def residual_of_blocks(projection: Projection, blocks: Iterable[tuple[Any, Any]]) -> float:
    """Return `residual_ratio` of pairs that come block by block; one at a time is in float64."""
    above = below = 0.0
    for o, g in blocks:
        o, g = to_host(o).astype(np.float64), to_host(g).astype(np.float64)
        if o.shape != g.shape:
            raise SolverUsageError(
                f"Row i of both must belong together; got the shapes {o.shape} and {g.shape}."
            )
        base = projection.coordinates(o, "reference")
        if projection.symmetric:
            difference = (g - o) @ projection.query_map.astype(np.float64)
        else:
            difference = projection.coordinates(g, "query") - base
        below += float(np.vdot(base, base))
        above += float(np.vdot(difference, difference))
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return math.sqrt(above / below)


def refuse_leak(projection: Projection, identities: Any) -> None:
    """Raise `LeakError` if any reported identity (name or hash) was used for fitting or choosing."""
    reported = as_hashes(identities)
    shared = np.intersect1d(projection.used_identities, reported)
    if len(shared):
        raise LeakError(
            f"{len(shared)} of the {len(reported)} reported identities were used to fit or choose this "
            "projection "
            f"(which used {len(projection.used_identities)}). Report on identities it has not seen: the "
            "test split."
        )
