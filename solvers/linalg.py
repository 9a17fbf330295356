"""Dense linear algebra in the array's own library: SciPy for NumPy arrays, the library's own elsewhere.

Every routine takes and returns float64 arrays of one library (NumPy, CuPy, torch) and keeps their device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat
import numpy as np
import scipy.linalg

from .arrays import namespace
from .errors import SolverUsageError

_STRIP = 256


def on_host(a: Any) -> bool:
    """Tell whether an array is NumPy's."""
    return bool(array_api_compat.is_numpy_array(a))


def eigh(a: Any, top: int | None = None) -> tuple[Any, Any]:
    """Return eigenvalues (k,), descending, and eigenvectors (d, k) of a symmetric matrix.

    Parameters
    ----------
    a
        (d, d); both triangles must be filled.
    top
        How many of the largest; None for all. Libraries without a partial solver compute all and cut.
    """
    d = a.shape[0]
    k = d if top is None else min(top, d)
    if on_host(a):
        # Below about a third of the spectrum the partial driver is the faster one.
        if k <= d // 3:
            values, vectors = scipy.linalg.eigh(
                a, subset_by_index=[d - k, d - 1], driver="evr", check_finite=False
            )
        else:
            values, vectors = scipy.linalg.eigh(a, driver="evd", check_finite=False)
        return values[::-1][:k], vectors[:, ::-1][:, :k]
    xp = namespace(a)
    values, vectors = xp.linalg.eigh(a)
    return xp.flip(values)[:k], xp.flip(vectors, axis=1)[:, :k]


def cholesky(a: Any) -> Any:
    """Return the lower L with L Lᵀ = a.

    Raises
    ------
    SolverUsageError
        The matrix is not positive definite.
    """
    try:
        # SciPy's runs in parallel blocks: 7 times as quick as NumPy's at d = 3,072.
        if on_host(a):  # transposed it is the same matrix, in the order that LAPACK copies at once
            found = scipy.linalg.cholesky(a.T, lower=True, check_finite=False)
        else:
            found = namespace(a).linalg.cholesky(a)
    except Exception as error:  # each library has a type of its own for it
        raise SolverUsageError(
            "A covariance of this fit is not positive definite: fewer rows than dimensions, or dimensions "
            "that are constant. Give a larger ridge (--lam)."
        ) from error
    # CuPy does not look at the outcome.
    if not bool(namespace(found).isfinite(found[-1, -1])):
        raise SolverUsageError(
            "A covariance of this fit is not positive definite: fewer rows than dimensions, or dimensions "
            "that are constant. Give a larger ridge (--lam)."
        )
    return found


def gram(a: Any) -> Any:
    """Return aᵀ a: on NumPy half the arithmetic of a product, and symmetric to the last bit."""
    if not on_host(a):
        with full_precision(a):
            return a.T @ a
    # Either order is one that BLAS reads without a copy.
    if a.flags.f_contiguous:
        upper = scipy.linalg.blas.dsyrk(1.0, a, trans=1)
    else:
        upper = scipy.linalg.blas.dsyrk(1.0, a.T)
    return mirrored(upper).T


def mirrored(upper: np.ndarray) -> np.ndarray:
    """Copy the upper triangle of a matrix over its lower one, in place, and return it.

    Strip by strip: `numpy.triu` of the whole takes ten times as long.
    """
    for at in range(0, len(upper), _STRIP):
        end = at + _STRIP
        corner = upper[at:end, at:end]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        upper[end:, at:end] = upper[at:end, end:].T
    return upper


def add_transposed(a: Any, b: Any) -> None:
    """Add bᵀ to a, in place; on NumPy strip by strip, where columns would be read one number at a time."""
    if not on_host(a):
        a += b.T
        return
    for at in range(0, len(a), _STRIP):
        a[at : at + _STRIP] += b[:, at : at + _STRIP].T


def shifted(a: Any, value: float) -> Any:
    """Return a + value I."""
    if on_host(a):
        found = np.array(a)
        found.flat[:: a.shape[0] + 1] += value
        return found
    return a + value * namespace(a).eye(a.shape[0], dtype=a.dtype, device=a.device)


def inverse(a: Any) -> Any:
    """Return the inverse of a positive definite matrix, symmetric to the last bit.

    Raises
    ------
    SolverUsageError
        The matrix is not positive definite.
    """
    lower = cholesky(a)
    if not on_host(a):
        xp = namespace(a)
        root = xp.linalg.solve(lower, xp.eye(a.shape[0], dtype=a.dtype, device=a.device))
        return gram(root)
    found, _ = scipy.linalg.lapack.dpotri(lower, lower=1)
    return mirrored(found.T)


def solve_lower(lower: Any, b: Any, *, transposed: bool = False) -> Any:
    """Return L⁻¹ b, or L⁻ᵀ b, for a lower triangular L."""
    if on_host(lower):
        return scipy.linalg.solve_triangular(
            lower, b, lower=True, trans=1 if transposed else 0, check_finite=False
        )
    return namespace(lower).linalg.solve(lower.T if transposed else lower, b)


def svd(a: Any) -> tuple[Any, Any, Any]:
    """Return the thin SVD U, σ (descending), Vᵀ."""
    if on_host(a):
        u, sigma, vt = scipy.linalg.svd(a, full_matrices=False)
        return u, sigma, vt
    found = namespace(a).linalg.svd(a, full_matrices=False)
    return found[0], found[1], found[2]


def qr(a: Any) -> tuple[Any, Any]:
    """Return the reduced Q and R."""
    found = np.linalg.qr(a) if on_host(a) else namespace(a).linalg.qr(a)
    return found[0], found[1]


def triangle(a: Any) -> Any:
    """Return R of the reduced QR of a, without forming Q where the library can."""
    return np.linalg.qr(a, mode="r") if on_host(a) else qr(a)[1]


def fix_signs(vectors: Any) -> Any:
    """Flip columns so that the entry of largest magnitude is positive: one answer for every LAPACK."""
    if vectors.shape[1] == 0:
        return vectors
    xp = namespace(vectors)
    high, low = xp.max(vectors, axis=0), xp.min(vectors, axis=0)
    return vectors * xp.where(high >= -low, xp.ones_like(high), -xp.ones_like(high))


def orthonormalise(vectors: Any) -> Any:
    """Orthonormal columns of the same nested spans, keeping each column's direction."""
    if vectors.shape[1] == 0:
        return vectors
    xp = namespace(vectors)
    q, r = qr(vectors)
    diagonal = xp.linalg.diagonal(r)
    return q * xp.where(diagonal < 0, -xp.ones_like(diagonal), xp.ones_like(diagonal))


@contextmanager
def full_precision(like: Any) -> Iterator[None]:
    """Keep float32 products of torch tensors out of TF32, and put the setting back."""
    if not array_api_compat.is_torch_array(like):
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
