"""Exact ranking in one pass over the references, block by block: what is kept is what figures are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import to_host
from .errors import SolverUsageError

EPS32 = float(np.finfo(np.float32).eps)
BLOCK = 8192
"""References scored at a time, of those that are in memory."""
_PRODUCTS = 1 << 22
"""Numbers that an exact second look multiplies at a time."""


@dataclass(frozen=True, eq=False)
class Positives:
    """Every true pair of a query and a reference, query by query, the best first.

    Attributes
    ----------
    of
        (p,) which of the ranked queries.
    position
        (p,) of the reference.
    rank
        (p,) among all references, from 1; a negative that scores as high stands before it.
    score
        (p,) float64.
    """

    of: np.ndarray
    position: np.ndarray
    rank: np.ndarray
    score: np.ndarray


@dataclass(frozen=True, eq=False)
class Negatives:
    """The references of other identities that each query scores highest.

    Attributes
    ----------
    position
        (q, k) falling by score, then by position; -1 where there are fewer.
    score
        (q, k) float64; -inf where there are fewer.
    """

    position: np.ndarray
    score: np.ndarray


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
    tied
        (q,) negatives that score exactly as a positive of the query does; each counts against it.
    n_references
        Rows ranked.
    n_without
        Queries without a positive, left out.
    positives, negatives
        What µAP, margins and pictures are made of.
    """

    ap: np.ndarray
    hit1: np.ndarray
    rank: np.ndarray
    queries: np.ndarray
    tied: np.ndarray
    n_references: int
    n_without: int
    positives: Positives
    negatives: Negatives

    @property
    def map(self) -> float:
        """Mean average precision."""
        return float(self.ap.mean()) if len(self.ap) else float("nan")

    @property
    def acc(self) -> float:
        """Share of queries whose first result is a positive."""
        return float(self.hit1.mean()) if len(self.hit1) else float("nan")

    @property
    def ties(self) -> int:
        """Exact ties with negatives, over all queries."""
        return int(self.tied.sum())

    @property
    def margin(self) -> np.ndarray:
        """(q,) float64: score of the best positive less that of the best negative; inf without a negative."""
        best = np.full(len(self.ap), -np.inf)
        np.maximum.at(best, self.positives.of, self.positives.score)
        return best - self.negatives.score[:, 0]

    def subset(self, chosen: np.ndarray) -> Ranking:
        """Return the ranking of some of the ranked queries alone.

        Parameters
        ----------
        chosen
            (q,) bool.
        """
        kept, p = np.flatnonzero(chosen), self.positives
        place = np.cumsum(chosen) - 1
        own = chosen[p.of]
        return replace(
            self,
            ap=self.ap[kept],
            hit1=self.hit1[kept],
            rank=self.rank[kept],
            queries=self.queries[kept],
            tied=self.tied[kept],
            n_without=0,
            positives=Positives(place[p.of[own]], p.position[own], p.rank[own], p.score[own]),
            negatives=Negatives(self.negatives.position[kept], self.negatives.score[kept]),
        )


def average_precision(
    query_emb: Any, query_ids: Any, ref_emb: Any, ref_ids: Any, *, block: int = 256, top: int = 1
) -> Ranking:
    """Rank every reference for every query and compute average precision; see `ranked`.

    Parameters
    ----------
    query_emb, ref_emb
        Outputs of `Projection.queries` and `Projection.references`.
    query_ids, ref_ids
        Identities, integers or strings; the positives of a query are the references of its identity.
    block
        Queries per product.
    top
        Negatives kept for each query.
    """
    references = np.ascontiguousarray(to_host(ref_emb), dtype=np.float32)
    if len(references) != len(np.asarray(ref_ids)):
        raise _uncounted(len(references), len(np.asarray(ref_ids)))
    return ranked(
        query_emb,
        query_ids,
        ref_ids,
        (references[at : at + BLOCK] for at in range(0, len(references), BLOCK)),
        lambda positions: references[positions],
        block=block,
        top=top,
    )


def ranked(
    query_emb: Any,
    query_ids: Any,
    ref_ids: Any,
    blocks: Iterable[Any],
    fetch: Callable[[np.ndarray], Any],
    *,
    block: int = 256,
    top: int = 1,
) -> Ranking:
    """Rank references that come block by block, each once: memory does not grow with their number.

    Scores are inner products in float32, taken `block` queries at a time. The i-th best positive has the
    rank (negatives scoring at least as high) + i, and AP = mean(i / rank_i): ties count against the
    method. Scores that differ by no more than float32 rounding are compared in float64, so that two equal
    rows tie wherever they stand.

    Parameters
    ----------
    query_emb
        (q, m) outputs of `Projection.queries`.
    query_ids, ref_ids
        Identities of every query and of every reference, integers or strings.
    blocks
        (b, m) outputs of `Projection.references`, in the order of `ref_ids`.
    fetch
        Gives the references at some positions, (n, m): the same bits as in their block.
    block
        Queries per product.
    top
        Negatives kept for each query, at least 1.

    Raises
    ------
    SolverUsageError
        Shapes or counts that do not fit, or scores that are not finite.
    """
    queries = np.ascontiguousarray(to_host(query_emb), dtype=np.float32)
    q_codes, r_codes = _codes(query_ids, ref_ids, len(queries))
    order = np.argsort(r_codes, kind="stable")
    start = np.searchsorted(r_codes[order], q_codes, side="left")
    counts = np.searchsorted(r_codes[order], q_codes, side="right") - start
    kept = np.flatnonzero(counts)
    counts = counts[kept]
    of = np.repeat(np.arange(len(kept)), counts)
    place = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    position = order[start[kept][of] + place]
    state = _State(queries[kept], of, position, fetch, top)
    at = 0
    for rows in blocks:
        here = np.ascontiguousarray(to_host(rows), dtype=np.float32)
        _check_columns(queries, here)
        state.add(here, at, block)
        at += len(here)
    if at != len(r_codes):
        raise _uncounted(at, len(r_codes))
    return state.ranking(kept, len(queries) - len(kept), at)


class _State:
    """What one pass adds up for each query and each of its positives."""

    def __init__(
        self,
        queries: np.ndarray,
        of: np.ndarray,
        position: np.ndarray,
        fetch: Callable[[np.ndarray], Any],
        top: int,
    ) -> None:
        self.queries = queries
        wanted, back = np.unique(position, return_inverse=True)
        rows = np.ascontiguousarray(to_host(fetch(wanted)), np.float32) if len(wanted) else queries[:0]
        if len(wanted):
            _check_columns(queries, rows)
        score = _exact(queries, of, rows, back)
        best_first = np.lexsort((position, -score, of))
        self.of, self.position, self.score = of[best_first], position[best_first], score[best_first]
        self.above, self.ties = np.zeros((2, len(of)), np.int64)
        # A bound on float32 rounding: only scores this near need a second look.
        self.near = 8 * EPS32 * np.linalg.norm(queries, axis=1).astype(np.float64)
        self.largest = float(np.linalg.norm(rows, axis=1).max(initial=0.0))
        self.first = np.searchsorted(self.of, np.arange(len(queries) + 1))
        self.by_position = np.argsort(self.position, kind="stable")
        self.top_score = np.full((len(queries), top), -np.inf)
        self.top_position = np.full((len(queries), top), -1, np.int64)

    def add(self, rows: np.ndarray, at: int, block: int) -> None:
        """Count a block of references, the first of which has the position `at`."""
        largest = max(self.largest, float(np.linalg.norm(rows, axis=1).max(initial=0.0)))
        own = self.by_position[
            slice(*np.searchsorted(self.position, [at, at + len(rows)], sorter=self.by_position))
        ]
        for low in range(0, len(self.queries), block):
            high = min(low + block, len(self.queries))
            scores = self.queries[low:high] @ rows.T
            if not np.isfinite(scores).all():
                raise SolverUsageError(
                    f"{int(np.count_nonzero(~np.isfinite(scores)))} of {scores.size} scores are not finite, "
                    "so nothing can be ranked. Look for rows that are not finite among the latents."
                )
            # From here on there are negatives alone.
            mine = own[(self.of[own] >= low) & (self.of[own] < high)]
            scores[self.of[mine] - low, self.position[mine] - at] = -np.inf
            near = self.near[low:high] * largest
            self._count(scores, rows, low, near)
            self._keep_best(scores, rows, low, at, near)

    def _count(self, scores: np.ndarray, rows: np.ndarray, low: int, near: np.ndarray) -> None:
        """Add the negatives of a block that score at least as high as each positive."""
        first = self.first[low : low + len(scores) + 1]
        held = np.diff(first)
        for j in range(int(held.max(initial=0))):
            some = np.flatnonzero(held > j)
            mine = first[:-1][some] + j
            part = scores if len(some) == len(scores) else scores[some]
            upper = (self.score[mine] + near[some]).astype(np.float32)
            lower = (self.score[mine] - near[some]).astype(np.float32)
            clear = np.count_nonzero(part > upper[:, None], axis=1)
            self.above[mine] += clear
            unclear = np.count_nonzero(part >= lower[:, None], axis=1) - clear
            for i in np.flatnonzero(unclear):
                close = np.flatnonzero((part[i] >= lower[i]) & (part[i] <= upper[i]))
                exact = _exact(self.queries, np.full(len(close), low + some[i]), rows, close)
                self.above[mine[i]] += int(np.count_nonzero(exact >= self.score[mine[i]]))
                self.ties[mine[i]] += int(np.count_nonzero(exact == self.score[mine[i]]))

    def _keep_best(self, scores: np.ndarray, rows: np.ndarray, low: int, at: int, near: np.ndarray) -> None:
        """Merge a block into the best negatives; among equals the lower position stays."""
        k = self.top_score.shape[1]
        worst = self.top_score[low : low + len(scores), -1]
        peak = scores.max(axis=1, initial=-np.inf)
        some = np.flatnonzero((peak >= worst - near) & (peak > -np.inf))
        if not len(some):
            return
        part = scores if len(some) == len(scores) else scores[some]
        cut = part.shape[1] - k
        kth = np.partition(part, cut, axis=1)[:, cut] if cut > 0 else np.full(len(part), -np.inf)
        # What rounding may have put behind the k-th is looked at, too.
        least = np.maximum(kth, worst[some]) - near[some]
        line, column = np.nonzero((part >= least.astype(np.float32)[:, None]) & (part > -np.inf))
        exact = _exact(self.queries, low + some[line], rows, column)
        of = np.concatenate([np.repeat(np.arange(len(some)), k), line])
        score = np.concatenate([self.top_score[low + some].ravel(), exact])
        position = np.concatenate([self.top_position[low + some].ravel(), at + column])
        order = np.lexsort((position, -score, of))
        first = np.searchsorted(of[order], np.arange(len(some)))
        best = order[first[:, None] + np.arange(k)]
        self.top_score[low + some], self.top_position[low + some] = score[best], position[best]

    def ranking(self, kept: np.ndarray, n_without: int, n_references: int) -> Ranking:
        """Return what was counted."""
        counts = np.diff(self.first)
        nth = np.arange(1, len(self.of) + 1) - self.first[:-1][self.of]
        rank = self.above + nth
        ap = np.bincount(self.of, weights=nth / rank, minlength=len(kept)) / np.maximum(counts, 1)
        first = rank[self.first[:-1]] if len(rank) else np.zeros(0, np.int64)
        tied = np.bincount(self.of, weights=self.ties, minlength=len(kept)).astype(np.int64)
        return Ranking(
            ap,
            first == 1,
            first,
            kept,
            tied,
            n_references,
            n_without,
            Positives(self.of, self.position, rank, self.score),
            Negatives(self.top_position, self.top_score),
        )


def _exact(queries: np.ndarray, q: np.ndarray, rows: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the float64 scores of queries[q] and rows[r], pair by pair: equal rows have equal bits."""
    out = np.empty(len(q))
    for part in _parts(len(q), max(1, _PRODUCTS // max(1, queries.shape[1]))):
        out[part] = (rows[r[part]].astype(np.float64) * queries[q[part]].astype(np.float64)).sum(axis=1)
    return out


def _uncounted(rows: int, identities: int) -> SolverUsageError:
    return SolverUsageError(
        f"Every row needs its identity: {rows} references came with {identities} identities."
    )


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(at, min(n, at + size)) for at in range(0, n, size))


def _check_columns(queries: np.ndarray, references: np.ndarray) -> None:
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise SolverUsageError(
            f"Queries and references must have as many columns; got {queries.shape} and {references.shape}. "
            "Project both with one projection."
        )


def _codes(query_ids: Any, ref_ids: Any, n_queries: int) -> tuple[np.ndarray, np.ndarray]:
    queries, references = np.asarray(query_ids), np.asarray(ref_ids)
    if len(queries) != n_queries:
        raise SolverUsageError(
            f"Every row needs its identity: {n_queries} queries came with {len(queries)} identities."
        )
    if (queries.dtype.kind in "iu") != (references.dtype.kind in "iu") and len(queries) and len(references):
        raise SolverUsageError(
            f"Identities of queries and references must be of one kind; got {queries.dtype} and "
            f"{references.dtype}. Use the same names, or the same codes, for both."
        )
    codes = np.unique(np.concatenate([queries, references]), return_inverse=True)[1]
    return codes[:n_queries], codes[n_queries:]
