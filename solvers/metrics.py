"""Retrieval metrics, exact: average precision, intervals over identities, residuals, leaks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import to_host
from .errors import LeakError, SolverUsageError
from .projection import Projection, as_hashes

EPS32 = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Exact ranking results of the queries that have a positive.

    Attributes
    ----------
    ap
        (q,) average precision.
    hit1
        (q,) whether a positive scores strictly above every negative.
    rank
        (q,) rank of the first positive, from 1.
    queries
        (q,) positions of these queries among all that were passed.
    ties
        Negatives that score exactly as a positive does, over all queries; each counts against it.
    n_references
        Rows ranked.
    n_without
        Queries without a positive, left out.
    """

    ap: np.ndarray
    hit1: np.ndarray
    rank: np.ndarray
    queries: np.ndarray
    ties: int
    n_references: int
    n_without: int

    @property
    def map(self) -> float:
        """Mean average precision."""
        return float(self.ap.mean()) if len(self.ap) else float("nan")

    @property
    def acc(self) -> float:
        """Share of queries whose first result is a positive."""
        return float(self.hit1.mean()) if len(self.hit1) else float("nan")


def average_precision(
    query_emb: Any, query_ids: Any, ref_emb: Any, ref_ids: Any, *, block: int = 256
) -> Ranking:
    """Rank every reference for every query and compute average precision.

    Scores are inner products in float32, taken `block` queries at a time. The i-th best positive has the
    rank (negatives scoring at least as high) + i, and AP = mean(i / rank_i): ties count against the
    method. Scores that differ, but by no more than float32 rounding, are compared again in float64, so
    that two equal rows tie wherever they stand.

    Parameters
    ----------
    query_emb, ref_emb
        Outputs of `Projection.queries` and `Projection.references`.
    query_ids, ref_ids
        Identities, integers or strings; the positives of a query are the references of its identity.
    block
        Queries per product.
    """
    queries = np.ascontiguousarray(to_host(query_emb), dtype=np.float32)
    references = np.ascontiguousarray(to_host(ref_emb), dtype=np.float32)
    q_codes, r_codes = _codes(query_ids, ref_ids, len(queries), len(references))
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise SolverUsageError(
            f"Queries and references must have as many columns; got {queries.shape} and {references.shape}. "
            "Project both with one projection."
        )
    order = np.argsort(r_codes, kind="stable")
    sorted_codes = r_codes[order]
    start = np.searchsorted(sorted_codes, q_codes, side="left")
    stop = np.searchsorted(sorted_codes, q_codes, side="right")
    kept = np.flatnonzero(stop > start)
    ap, first = np.zeros(len(kept)), np.zeros(len(kept), dtype=np.int64)
    largest = float(np.linalg.norm(references, axis=1).max(initial=0.0))
    ties = 0
    for at in range(0, len(kept), block):
        chunk = kept[at : at + block]
        scores = queries[chunk] @ references.T
        if not np.isfinite(scores).all():
            raise SolverUsageError(
                f"{int(np.count_nonzero(~np.isfinite(scores)))} of {scores.size} scores are not finite, so "
                "nothing "
                "can be ranked. Look for rows that are not finite among the latents."
            )
        for i, q in enumerate(chunk):
            positives = order[start[q] : stop[q]]
            ranks, tied = _ranks(scores[i], queries[q], references, positives, largest)
            ap[at + i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            first[at + i] = ranks[0]
            ties += tied
    return Ranking(ap, first == 1, first, kept, ties, len(references), len(queries) - len(kept))


def _ranks(
    scores: np.ndarray, query: np.ndarray, references: np.ndarray, positives: np.ndarray, largest: float
) -> tuple[np.ndarray, int]:
    """Ranks of the positives, best first, and the number of exact ties with negatives."""
    negative = np.ones(len(scores), dtype=bool)
    negative[positives] = False
    # A bound on float32 rounding: only scores this near need a second look.
    near = 8 * EPS32 * float(np.linalg.norm(query)) * largest
    above, ties = np.zeros(len(positives), dtype=np.int64), 0
    best_first = positives[np.argsort(-scores[positives], kind="stable")]
    for j, p in enumerate(best_first):
        s = scores[p]
        equal = int(np.count_nonzero(negative & (scores == s)))
        count = int(np.count_nonzero(negative & (scores > s))) + equal
        close = np.flatnonzero(negative & (scores != s) & (np.abs(scores - s) <= near))
        if len(close):
            exact = (references[np.append(close, p)].astype(np.float64) * query.astype(np.float64)).sum(
                axis=1
            )
            against = exact[:-1] >= exact[-1]
            equal += int(np.count_nonzero(exact[:-1] == exact[-1]))
            count += int(np.count_nonzero(against)) - int(np.count_nonzero(scores[close] > s))
        above[j], ties = count, ties + equal
    # The second look may reorder positives among themselves, never their number above.
    return np.sort(above) + np.arange(1, len(positives) + 1), ties


def _codes(query_ids: Any, ref_ids: Any, n_queries: int, n_refs: int) -> tuple[np.ndarray, np.ndarray]:
    queries, references = np.asarray(query_ids), np.asarray(ref_ids)
    if len(queries) != n_queries or len(references) != n_refs:
        raise SolverUsageError(
            f"Every row needs its identity: {n_queries} queries and {n_refs} references came with "
            f"{len(queries)} and {len(references)} identities."
        )
    if (queries.dtype.kind in "iu") != (references.dtype.kind in "iu") and n_queries and n_refs:
        raise SolverUsageError(
            f"Identities of queries and references must be of one kind; got {queries.dtype} and "
            f"{references.dtype}. "
            "Use the same names, or the same codes, for both."
        )
    codes = np.unique(np.concatenate([queries, references]), return_inverse=True)[1]
    return codes[:n_queries], codes[n_queries:]


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


def bootstrap(
    values: Any, groups: Any, *, repeats: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling whole groups (identities) with replacement.

    Queries of one identity stand or fall together, so resampling single queries would be too sure.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = np.asarray(groups)
    if len(values) != len(groups) or len(values) == 0:
        raise SolverUsageError(
            f"An interval needs one group for each of at least 1 value; got {len(values)} values and "
            f"{len(groups)} groups."
        )
    if not 0.0 < level < 1.0 or repeats < 1:
        raise SolverUsageError(
            f"level must lie between 0 and 1 and repeats be positive; got {level}, {repeats}."
        )
    codes = np.unique(groups, return_inverse=True)[1]
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    rng = np.random.default_rng(seed)
    means = np.empty(repeats)
    for at in range(0, repeats, 100):
        draws = rng.integers(len(sums), size=(min(100, repeats - at), len(sums)))
        means[at : at + len(draws)] = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: Any, b: Any, groups: Any, *, repeats: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(a) - mean(b) for values of the same queries, resampling groups."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise SolverUsageError(f"Paired values must be of the same queries; got {a.shape} and {b.shape}.")
    return bootstrap(a - b, groups, repeats=repeats, seed=seed, level=level)


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
