"""Near-duplicates of a collection (re-compressed, resized, brightened), found from its latents alone.

The score of two rows is the cosine of their PCA-whitened sketches, in which pictures that merely share a
background or a brightness lie far apart. What the sketch leaves out must not speak against it: the whole
centred latents need a cosine of 0.8 as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from latentstore.errors import MissingExtraError, UsageError
from latentstore.groups import Groups, Rows
from latentstore.search import has_faiss

FLOOR, CEILING = 0.85, 0.95
"""Between these the threshold is set by the collection itself."""
WHOLE = 0.8
"""Least cosine of whole centred latents: a tenth of brightness or a small watermark stays above."""
FIT_ROWS = 1024
"""Rows that the whitening is fitted on at most: four for each direction of the largest sketch."""
EXACT_ROWS = 50_000
"""Rows up to which every pair is compared."""
MAX_PAIRS = 20_000_000
_LARGEST, _LEAST = 256, 16
_BLOCK = 2048
_TAIL = (0.3, 0.6)
"""Sketch cosines of different pictures that the tail is fitted on: above, true duplicates would count."""
_TAIL_ROWS, _TAIL_PAIRS = 4096, 20

Search = Literal["auto", "exact", "ivf"]


@dataclass(frozen=True, eq=False)
class Whitening:
    """What makes a sketch of a latent: ``(x − mean) @ map``, normalised.

    Attributes
    ----------
    mean : (d,) array
    map : (d, m) array
        Principal directions of the collection, each divided by its standard deviation.
    """

    mean: npt.NDArray[np.floating[Any]]
    map: npt.NDArray[np.floating[Any]]


def sketch_rank(rows: int) -> int:
    """Return how many directions to whiten: a quarter of the rows, half of few, at most 256.

    Whitened over its full span, a collection has no two rows alike, duplicates neither.
    """
    return min(_LARGEST, max(rows // 4, min(rows // 2, 2 * _LEAST)))


def find(
    read: Callable[[Rows], npt.NDArray[np.floating[Any]]],
    rows: Rows,
    whitening: Whitening,
    *,
    threshold: float | None = None,
    search: Search = "auto",
    on_rows: Callable[[int, int], None] | None = None,
) -> Groups:
    """Find the groups of near-duplicates among rows.

    Memory is one sketch of all rows (at most 1 kB a row) and one block of latents.

    Parameters
    ----------
    read : callable
        Rows → (n, d) latents.
    rows : (n,) int64 array
        Rising.
    whitening : Whitening
        Of at least 16 directions.
    threshold : float, optional
        Least score of a near-duplicate; by default see :func:`set_threshold`.
    search : {"auto", "exact", "ivf"}
        Compare all pairs, or those that FAISS finds in near cells; by default the latter from 50,000 rows.
    on_rows : callable, optional
        Called with (rows sketched, 0).

    Raises
    ------
    UsageError
        The rows vary in fewer than 16 directions, the threshold is none, or holds too many pairs.
    MissingExtraError
        FAISS is needed and not installed.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(f"--threshold is {threshold}; it is a cosine, above 0 and at most 1.")
    if whitening.map.shape[1] < _LEAST:
        raise UsageError(
            f"The {len(rows)} images vary in {whitening.map.shape[1]} directions that can be told from "
            f"chance; near-duplicates need {_LEAST} (32 different images). Files that are equal byte for "
            "byte count as one without this."
        )
    sketch, same = _sketch(read, rows, whitening, on_rows)
    own = np.flatnonzero(same == np.arange(len(rows)))
    unique = sketch[own]
    limit, how = set_threshold(unique) if threshold is None else (threshold, {"set by": "--threshold"})
    pairs, recall = _candidates(unique, limit, search)
    pairs = own[pairs]
    score, whole = _rescore(read, rows, sketch, whitening.mean, pairs)
    keep = (score >= limit) & (whole >= min(limit, WHOLE))
    row, group, component, against = _group(pairs[keep], score[keep], same)
    split = int((_lookup(row, group, pairs[keep, 0]) != _lookup(row, group, pairs[keep, 1])).sum())
    settings = {
        "score": "cosine of whitened sketches",
        "threshold": float(limit),
        "whole centred latents at least": min(float(limit), WHOLE),
        **how,
        "directions": whitening.map.shape[1],
        "rows compared": len(rows),
        "equal latents": len(rows) - len(own),
        "pairs": int(keep.sum()),
        "pairs between groups": split,
        **recall,
    }
    return Groups(rows[row], rows[group], rows[component], against, settings)


# --- the threshold ----------------------------------------------------------------------------------------


def set_threshold(sketch: npt.NDArray[np.float32]) -> tuple[float, dict[str, Any]]:
    """Return where, by the tail of the collection's own scores, no pair of different pictures is expected.

    Cosines of different pictures fall off exponentially above chance. The rate is fitted between 0.3 and 0.6,
    where duplicates hardly count, and followed to the score that fewer than one of all pairs exceeds; the
    threshold is that, held between 0.85 and 0.95. The model: a near-duplicate keeps at least that share of
    its variance in the collection's directions, whatever the encoder.

    Parameters
    ----------
    sketch : (n, m) float32 array
        Of unit rows.

    Returns
    -------
    threshold, facts
        ``facts["different pairs expected"]`` is None where too few pairs score 0.3 to fit a tail.
    """
    n = len(sketch)
    some = sketch[np.random.default_rng(0).permutation(n)[:_TAIL_ROWS]]
    low, high = _TAIL
    tail = np.concatenate([np.empty(0, np.float32), *(s[(s > low) & (s < high)] for s in _upper(some))])
    # Each pair of the sample stands for so many of all.
    weight = n * (n - 1) / max(len(some) * (len(some) - 1), 1)
    if len(tail) < _TAIL_PAIRS:
        return FLOOR, {"set by": f"too few scores above {low} to follow", "different pairs expected": None}
    rate = _exponential_rate(tail.astype(np.float64) - low, high - low)
    total = weight * len(tail) / -np.expm1(-rate * (high - low))
    clear = low + np.log(total) / rate
    limit = float(np.clip(clear, FLOOR, CEILING))
    return limit, {
        "set by": "the scores of different images",
        "clear of different pairs from": float(clear),
        "different pairs expected": float(total * np.exp(-rate * (limit - low))),
    }


def _upper(sketch: npt.NDArray[np.float32]) -> Any:
    """Yield the cosines of each pair once, block by block."""
    for at in range(0, len(sketch), _BLOCK):
        scores = sketch[at : at + _BLOCK] @ sketch[at:].T
        yield scores[np.arange(scores.shape[1]) > np.arange(len(scores))[:, None]]


def _exponential_rate(x: npt.NDArray[np.float64], width: float) -> float:
    """Return the maximum-likelihood rate of an exponential that is cut off at ``width``; at least 1."""
    mean = float(x.mean())

    def surplus(rate: float) -> float:
        return 1 / rate - width / np.expm1(rate * width) - mean

    # A tail that does not fall has no rate: the least is as good as flat, and leads to the ceiling.
    flat, steep = 1.0, 1e3
    if surplus(flat) <= 0:
        return flat
    return steep if surplus(steep) >= 0 else float(brentq(surplus, flat, steep))


# --- candidates -------------------------------------------------------------------------------------------


def _sketch(
    read: Callable[[Rows], npt.NDArray[np.floating[Any]]],
    rows: Rows,
    whitening: Whitening,
    on_rows: Callable[[int, int], None] | None,
) -> tuple[npt.NDArray[np.float32], Rows]:
    """Return the unit sketches, and for each position the first with the same latent."""
    sketch = np.empty((len(rows), whitening.map.shape[1]), np.float32)
    same = np.arange(len(rows))
    first: dict[bytes, int] = {}
    for at in range(0, len(rows), _BLOCK):
        block = read(rows[at : at + _BLOCK])
        for i, latent in enumerate(block, start=at):
            same[i] = first.setdefault(hashlib.blake2b(latent.tobytes(), digest_size=16).digest(), i)
        part = (block.astype(np.float32) - whitening.mean.astype(np.float32)) @ whitening.map.astype(
            np.float32
        )
        norm = np.linalg.norm(part, axis=1, keepdims=True)
        sketch[at : at + len(block)] = np.divide(part, norm, out=part, where=norm > 0)
        if on_rows is not None:
            on_rows(len(block), 0)
    return sketch, same


def _candidates(sketch: npt.NDArray[np.float32], limit: float, search: Search) -> tuple[Rows, dict[str, Any]]:
    """Return the (p, 2) pairs that the sketch does not rule out, and how they were looked for."""
    # A float32 product of unit rows is off by at most m·2⁻²⁴, in any order of summation.
    least = limit - 1.01 * sketch.shape[1] * 2.0**-24
    if search == "exact" or (search == "auto" and len(sketch) <= EXACT_ROWS):
        return _all_pairs(sketch, least), {"search": "every pair"}
    if not has_faiss():
        raise MissingExtraError(
            f"Near-duplicates among {len(sketch):,} images are found with FAISS (every pair is compared up "
            f"to {EXACT_ROWS:,}), which is not installed: pip install 'latentstore[cpu]'."
        )
    pairs, cells, probed = _near_cells(sketch, least)
    found, wanted = _recall(sketch, pairs, least)
    return pairs, {
        "search": f"FAISS, {probed} of {cells} cells",
        "candidates sampled": wanted,
        "candidates found": found,
    }


def _all_pairs(sketch: npt.NDArray[np.float32], least: float) -> Rows:
    found: list[Rows] = []
    for a in range(0, len(sketch), _BLOCK):
        for b in range(a, len(sketch), _BLOCK):
            i, j = np.nonzero(sketch[a : a + _BLOCK] @ sketch[b : b + _BLOCK].T >= least)
            _keep(found, i + a, j + b)
    return _ordered(found)


def _near_cells(sketch: npt.NDArray[np.float32], least: float) -> tuple[Rows, int, int]:
    """Search each row in the cells nearest to it; return pairs, cells, cells probed."""
    import faiss

    n, m = sketch.shape
    cells = max(1, min(int(4 * np.sqrt(n)), n // 40))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(m), m, cells, faiss.METRIC_INNER_PRODUCT)
    index.nprobe, index.cp.niter = min(32, cells), 10
    index.train(sketch[np.sort(np.random.default_rng(0).permutation(n)[: 64 * cells])])
    index.add(sketch)
    found: list[Rows] = []
    for at in range(0, n, _BLOCK):
        ends, _, near = index.range_search(sketch[at : at + _BLOCK], least)
        own = np.repeat(np.arange(at, at + len(ends) - 1), np.diff(ends.astype(np.int64)))
        # Either row may find the other.
        _keep(found, np.minimum(own, near), np.maximum(own, near))
    return _ordered(found), cells, index.nprobe


def _recall(sketch: npt.NDArray[np.float32], pairs: Rows, least: float, rows: int = 1000) -> tuple[int, int]:
    """Return how many of all pairs of a sample of rows are among ``pairs``, and how many there are."""
    some = np.sort(np.random.default_rng(1).permutation(len(sketch))[:rows])
    exact: list[Rows] = []
    for at in range(0, len(sketch), _BLOCK):
        i, j = np.nonzero(sketch[some] @ sketch[at : at + _BLOCK].T >= least)
        _keep(exact, np.minimum(some[i], j + at), np.maximum(some[i], j + at))
    wanted = _ordered(exact)
    n = len(sketch)
    return int(np.isin(wanted @ [n, 1], pairs @ [n, 1]).sum()), len(wanted)


def _keep(found: list[Rows], i: Any, j: Any) -> None:
    """Append the pairs with i < j; refuse when there are too many to hold."""
    found.append(np.column_stack([i, j])[i < j].astype(np.int64))
    count = sum(map(len, found))
    if count > MAX_PAIRS:
        raise UsageError(
            f"More than {MAX_PAIRS:,} pairs of images score above the threshold: the collection holds very "
            "many that look the same (blank pages, say). Ask for more likeness with a higher --threshold."
        )


def _ordered(found: list[Rows]) -> Rows:
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)


def _rescore(
    read: Callable[[Rows], npt.NDArray[np.floating[Any]]],
    rows: Rows,
    sketch: npt.NDArray[np.float32],
    mean: npt.NDArray[np.floating[Any]],
    pairs: Rows,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the (p,) cosines of sketches and of whole centred latents, in float64."""
    score, cosine = np.empty(len(pairs)), np.empty(len(pairs))
    step = max(16, (1 << 22) // len(mean))
    for at in range(0, len(pairs), step):
        part = pairs[at : at + step]
        own, place = np.unique(part, return_inverse=True)
        whole = read(rows[own]).astype(np.float64) - mean
        whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        i, j = place.reshape(part.shape).T
        brief = sketch[own].astype(np.float64)
        score[at : at + step] = np.minimum(np.einsum("pd,pd->p", brief[i], brief[j]), 1)
        cosine[at : at + step] = np.einsum("pd,pd->p", whole[i], whole[j])
    return score, cosine


# --- groups -----------------------------------------------------------------------------------------------


def _group(
    pairs: Rows, score: npt.NDArray[np.float64], same: Rows
) -> tuple[Rows, Rows, Rows, npt.NDArray[np.float64]]:
    """Return (position, first member, component, score) of all that have a near-duplicate or an equal.

    The row with the most near-duplicates takes them as its group, then the next among those left: a chain
    of small steps does not make one group of its two ends.
    """
    n = len(same)
    i, j = pairs.T
    graph = csr_array((np.r_[score, score], (np.r_[i, j], np.r_[j, i])), shape=(n, n))
    degree = np.diff(graph.indptr)
    first, against = np.full(n, -1), np.ones(n)
    for v in np.lexsort((np.arange(n), -degree)):
        if degree[v] == 0:
            break
        if first[v] < 0:
            near = slice(graph.indptr[v], graph.indptr[v + 1])
            free = first[graph.indices[near]] < 0
            taken = graph.indices[near][free]
            first[taken], against[taken] = v, graph.data[near][free]
            first[v] = v
    first[first < 0] = np.flatnonzero(first < 0)
    # Equal latents stand where the first of them stands.
    first, against = first[same], against[same]
    _, label = connected_components(graph, directed=False)
    component = np.unique(label, return_index=True)[1][label][same]
    involved = np.flatnonzero((degree[same] > 0) | (np.bincount(same, minlength=n)[same] > 1))
    order = involved[np.lexsort((involved, involved != first[involved], first[involved]))]
    return order, first[order], component[order], against[order]


def _lookup(row: Rows, value: Rows, wanted: Rows) -> Rows:
    """Return the value of each wanted row; all are among ``row``."""
    order = np.argsort(row)
    return value[order[np.searchsorted(row[order], wanted)]] if len(wanted) else wanted
