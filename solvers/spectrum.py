"""Mean and principal directions of rows, by whichever of the two Gram matrices is smaller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import as_float64, as_rows, namespace, to_host
from .errors import SolverUsageError
from .linalg import eigh, fix_signs, on_host, orthonormalise
from .products import Precision
from .rank import rank_cutoff, tile_noise
from .sums import RowSums

ROUGH_ROWS = 256
"""Rows whose mean is near enough to the whole's to be a shift."""


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


def collect(blocks: Iterable[Any], dim: int, n: int, what: str = "rows") -> Any:
    """Stack blocks into (n, dim) float64 rows of their library, refusing a different count."""
    rows = [as_float64(block, dim, what) for block in blocks]
    check_count(sum(len(x) for x in rows), n, what)
    return namespace(*rows).concat(rows)


def check_count(seen: int, announced: int, what: str = "rows") -> None:
    """Refuse blocks that hold a different number of rows than announced."""
    if seen != announced:
        raise SolverUsageError(
            f"{announced} {what} were announced, but the blocks held {seen}. "
            "The blocks must give the same rows every time they are iterated."
        )


def row_sums(
    blocks: Iterable[Any], dim: int, n: int, what: str = "rows", *, precision: Precision = "float64"
) -> RowSums:
    """Stream sums about the first block's mean, in the blocks' own library."""
    sums: RowSums | None = None
    seen = 0
    for block in blocks:
        if len(block) == 0:
            continue
        if sums is None:
            like = None if on_host(block) else block
            shift = as_rows(block[:ROUGH_ROWS], dim, what).mean(axis=0)
            sums = RowSums(dim, shift=shift, precision=precision, like=like)
        sums.update(block)
        seen += len(block)
    check_count(seen, n, what)
    if sums is None:
        raise SolverUsageError(f"There are no {what} (0, at least 1 needed). Check the selection of rows.")
    return sums


def dual_gram(rows: Any) -> tuple[Any, Any]:
    """All n singular values (descending) and left singular vectors of n < d rows, by the n x n Gram."""
    values, left = eigh(rows @ rows.T)
    return namespace(values).clip(values, min=0.0) ** 0.5, left


def dual_vectors(rows: Any, sigma: Any, left: Any) -> Any:
    """Right singular vectors for the given values, (d, len(sigma)).

    Each loses digits as its value shrinks, so they are made orthonormal again.
    """
    return orthonormalise((rows.T @ left) / sigma)


def fit_spectrum(
    blocks: Iterable[Any], dim: int, n: int, *, floor: float = 0.0, precision: Precision = "float64"
) -> Spectrum:
    """Fit mean, eigenvalues and eigenvectors of the centred covariance.

    With fewer rows than dimensions the n x n Gram of the centred rows is solved (n x d floats are held),
    in float64; otherwise the streamed d x d scatter, whose eigenproblem is in float64 too.

    Parameters
    ----------
    blocks
        Iterable of (b, dim) arrays, n rows in all.
    dim, n
        Shape of the stacked rows.
    floor
        Singular values of the centred rows at or below this are left out as well.
    precision
        Of the streamed products.
    """
    if n < 1:
        raise SolverUsageError("A covariance needs at least 1 row, got 0. Check the selection of rows.")
    if n >= dim:
        return sums_spectrum(row_sums(blocks, dim, n, precision=precision), floor=floor)
    rows = collect(blocks, dim, n)
    mean = rows.mean(axis=0)
    rows = rows - mean
    sigma, left = dual_gram(rows)
    keep = int((sigma > max(rank_cutoff(float(sigma[0]), n, dim, gram=True).value, floor)).sum())
    vectors = fix_signs(dual_vectors(rows, sigma[:keep], left[:, :keep]))
    return Spectrum(to_host(mean), to_host(sigma[:keep]) ** 2 / n, to_host(vectors), n, dim)


def sums_spectrum(sums: RowSums, *, floor: float = 0.0) -> Spectrum:
    """Fit the spectrum of sums that are there already; the eigenproblem runs where they lie."""
    n, dim = sums.n, sums.dim
    scatter = sums.cov * n
    values, vectors = eigh(scatter)
    values, vectors = to_host(values), to_host(fix_signs(vectors))
    sigma = np.sqrt(np.clip(values, 0.0, None))
    noise = (
        tile_noise(to_host(namespace(scatter).linalg.diagonal(scatter)))
        if sums.precision == "float32"
        else 0.0
    )
    cutoff = rank_cutoff(float(sigma[0]), n, dim, gram=True, tile_noise=noise)
    keep = sigma > max(cutoff.value, floor)
    return Spectrum(to_host(sums.mean), sigma[keep] ** 2 / n, vectors[:, keep], n, dim)
