"""Exact search by inner product, streamed: memory is one block of references, whatever their number."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from latentstore.errors import MissingExtraError, UsageError

Backend = Literal["auto", "faiss", "numpy"]
BACKENDS: tuple[Backend, ...] = ("auto", "faiss", "numpy")


def select_backend(backend: Backend = "auto") -> Literal["faiss", "numpy"]:
    """Return the backend that ``auto`` stands for here: FAISS when it is installed.

    Raises
    ------
    MissingExtraError
        FAISS was asked for and is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend is {backend!r}; use {', '.join(BACKENDS)}.")
    found = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not found:
        raise MissingExtraError(
            "FAISS is not installed: pip install 'latentstore[cpu]', or use --backend numpy."
        )
    return "faiss" if found and backend != "numpy" else "numpy"


def top_k(
    queries: npt.NDArray[np.floating[Any]],
    references: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]],
    k: int,
    *,
    backend: Backend = "auto",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the k references of largest inner product for each query.

    Parameters
    ----------
    queries : (q, m) array
    references : iterable of ((b,) row numbers, (b, m) block)
        Any number of blocks, in any order; blocks may be reused memory.
    k : int

    Returns
    -------
    scores : (q, k') float32 array
        Falling; ``k'`` is k, or the number of references if there are fewer.
    rows : (q, k') int64 array
        Equal scores are ordered by row number, so the answer does not depend on the blocks' order.
    """
    if k < 1:
        raise UsageError(f"--top is {k}; at least 1 is needed.")
    chosen = select_backend(backend)
    q = np.ascontiguousarray(queries, np.float32)
    best_s = np.empty((len(q), 0), np.float32)
    best_r = np.empty((len(q), 0), np.int64)
    for rows, block in references:
        if (np.diff(rows) < 0).any():
            ascending = np.argsort(rows)
            rows, block = rows[ascending], block[ascending]
        b = np.ascontiguousarray(block, np.float32)
        scores, local = (_faiss if chosen == "faiss" else _numpy)(q, b, min(k, len(b)))
        scores = np.concatenate([best_s, scores], 1)
        found = np.concatenate([best_r, rows[local]], 1)
        order = np.lexsort((found, -scores), axis=1)[:, :k]
        best_s, best_r = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return best_s, best_r


def _numpy(
    q: npt.NDArray[np.float32], b: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    scores = q @ b.T
    # A stable sort keeps the lower row first among equals, also at the k-th place.
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order.astype(np.int64)


def _faiss(
    q: npt.NDArray[np.float32], b: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    import faiss

    ask = min(k + 1, len(b))
    while True:
        scores, order = faiss.knn(q, b, ask, metric=faiss.METRIC_INNER_PRODUCT)
        # FAISS keeps any of the equals at the k-th place: ask until all of them are seen.
        if ask == len(b) or not (scores[:, k - 1] == scores[:, -1]).any():
            break
        ask = min(2 * ask, len(b))
    by_row = np.lexsort((order, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, by_row, 1), np.take_along_axis(order, by_row, 1)
