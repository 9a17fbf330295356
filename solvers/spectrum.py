"""Mean and principal directions of rows, by whichever of the two Gram matrices is smaller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import as_rows
from .errors import SolverUsageError
from .rank import rank_cutoff


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigen-decomposition of a centred covariance.

    Attributes
    ----------
    mean
        (d,).
    values
        (r,) eigenvalues of the covariance (divided by n), descending, only those above the cutoff.
    vectors
        (d, r) orthonormal; the entry of largest magnitude in every column is positive.
    n
        Rows seen.
    dim
        d.
    """

    mean: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    n: int
    dim: int

    @property
    def rank(self) -> int:
        """Number of directions with variance."""
        return len(self.values)

    @property
    def total(self) -> float:
        """Trace of the covariance."""
        return float(self.values.sum())


def fix_signs(vectors: np.ndarray) -> np.ndarray:
    """Flip columns so that the entry of largest magnitude is positive: one answer for every LAPACK."""
    if vectors.shape[1] == 0:
        return vectors
    pivots = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    return vectors * np.where(pivots < 0, -1.0, 1.0)


def orthonormalise(vectors: np.ndarray) -> np.ndarray:
    """Orthonormal columns of the same nested spans, keeping each column's direction."""
    if vectors.shape[1] == 0:
        return vectors
    q, r = np.linalg.qr(vectors)
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0))


def collect(blocks: Iterable[Any], dim: int, n: int, what: str = "rows") -> np.ndarray:
    """Stack blocks into (n, dim) float64 rows, refusing a different count."""
    rows = np.empty((n, dim))
    at = 0
    for block in blocks:
        x = as_rows(block, dim, what)
        if at + len(x) <= n:
            rows[at : at + len(x)] = x
        at += len(x)
    check_count(at, n, what)
    return rows


def check_count(seen: int, announced: int, what: str = "rows") -> None:
    """Refuse blocks that hold a different number of rows than announced."""
    if seen != announced:
        raise SolverUsageError(
            f"{announced} {what} were announced, but the blocks held {seen}. "
            "The blocks must give the same rows every time they are iterated."
        )


def centred_gram(
    blocks: Iterable[Any], dim: int, n: int, what: str = "rows"
) -> tuple[np.ndarray, np.ndarray]:
    """Stream the mean and the centred scatter matrix (not divided by n).

    Sums are taken about the first block's mean, since the raw second moment of rows that lie far from
    zero would lose the digits that the variance needs.
    """
    shift: np.ndarray | None = None
    total, scatter = np.zeros(dim), np.zeros((dim, dim))
    seen = 0
    for block in blocks:
        x = as_rows(block, dim, what)
        if len(x) == 0:
            continue
        if shift is None:
            shift = x.mean(axis=0)
        x = x - shift
        seen += len(x)
        total += x.sum(axis=0)
        scatter += x.T @ x
    check_count(seen, n, what)
    if shift is None:
        raise SolverUsageError(f"There are no {what} (0, at least 1 needed). Check the selection of rows.")
    offset = total / seen
    return shift + offset, scatter - seen * np.outer(offset, offset)


def dual_gram(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All n singular values (descending) and left singular vectors of n < d rows, by the n x n Gram."""
    values, left = np.linalg.eigh(rows @ rows.T)
    return np.sqrt(np.clip(values[::-1], 0.0, None)), left[:, ::-1]


def dual_vectors(rows: np.ndarray, sigma: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Right singular vectors for the given values, (d, len(sigma)).

    Each loses digits as its value shrinks, so they are made orthonormal again.
    """
    return orthonormalise((rows.T @ left) / sigma)


def fit_spectrum(blocks: Iterable[Any], dim: int, n: int, *, floor: float = 0.0) -> Spectrum:
    """Fit mean, eigenvalues and eigenvectors of the centred covariance.

    With fewer rows than dimensions the n x n Gram of the centred rows is solved (n x d floats are held),
    otherwise the streamed d x d scatter; both in float64.

    Parameters
    ----------
    blocks
        Iterable of (b, dim) arrays, n rows in all.
    dim, n
        Shape of the stacked rows.
    floor
        Singular values of the centred rows at or below this are left out as well.
    """
    if n < 1:
        raise SolverUsageError("A covariance needs at least 1 row, got 0. Check the selection of rows.")
    if n < dim:
        rows = collect(blocks, dim, n)
        mean = rows.mean(axis=0)
        rows -= mean
        sigma, left = dual_gram(rows)
        keep = sigma > max(rank_cutoff(float(sigma[0]), n, dim, gram=True).value, floor)
        sigma = sigma[keep]
        vectors = dual_vectors(rows, sigma, left[:, keep])
    else:
        mean, scatter = centred_gram(blocks, dim, n)
        values, vectors = np.linalg.eigh(scatter)
        sigma, vectors = np.sqrt(np.clip(values[::-1], 0.0, None)), vectors[:, ::-1]
        keep = sigma > max(rank_cutoff(float(sigma[0]), n, dim, gram=True).value, floor)
        sigma, vectors = sigma[keep], vectors[:, keep]
    return Spectrum(mean, sigma**2 / n, fix_signs(vectors), n, dim)
