"""The null space of translation differences, literally (Lemma 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from .arrays import as_rows
from .data import PairData, difference_cutoff, differences
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities, random_orthonormal
from .rank import EPS64, Cutoff, check_rank
from .spectrum import centred_gram, dual_gram, dual_vectors, fit_spectrum, fix_signs, orthonormalise


@dataclass(frozen=True)
class NullSpace(Capabilities):
    """W from the (near-)null space of T, row i = E(g_i) - E(o_i): T W = 0 (Lemma 2).

    With T = U S V^T, W holds the last m right singular vectors, smallest first. Inside a null space
    larger than m every choice is equally a solution; the m directions of largest origin variance are
    taken, so that every backend gives one W. Orthonormal. Symmetric, without a centre: T is a difference,
    so the lemma says nothing about the mean. The lemma's proof counts rows: T is n x d, so its null space
    has d - rank(T) dimensions.

    Equivalent for small data: ``scipy.linalg.svd(T)[2][-m:].T``. Price: with fewer pairs than dimensions
    the n x n Gram of T and n x d floats, otherwise a streamed d x d Gram (d = 4,096: 134 MB) and its
    eigen-decomposition; both in float64, both squaring the condition number, which the cutoff knows.

    Parameters
    ----------
    rank
        Number of columns m.
    """

    rank: int = 512
    name: ClassVar[str] = "svd"
    needs_pairs: ClassVar[bool] = True

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs; origins break the tie inside a large null space."""
        data.require_pairs(self.name)
        m = check_rank(self.rank, data.dim)
        decomposition = _dual(data) if data.n_pairs < data.dim else _primal(data)
        d, r = data.dim, decomposition.numerical_rank
        nulls = d - r
        null_part = _null_directions(data, decomposition, min(m, nulls))
        rows_part = decomposition.row_vectors[:, ::-1][:, : m - null_part.shape[1]]
        W = np.concatenate([null_part, fix_signs(rows_part)], axis=1)
        sigma, cutoff = decomposition.sigma, decomposition.cutoff
        report = make_report(
            numerical_rank=r,
            cutoff=cutoff.value,
            decided_by=cutoff.decided_by,
            sigma_max=float(sigma[0]),
            sigma_min=float(sigma[-1]),
            n_pairs=data.n_pairs,
            path="dual (n x n)" if data.n_pairs < d else "primal",
            statement=_statement(data.n_pairs, d, r, m),
            requested_rank=m,
            effective_rank=m,
        )
        return Fitted(W, W, None, "cosine", sigma, self.name, asdict(self), report=report)


@dataclass(frozen=True, eq=False)
class _Decomposition:
    sigma: np.ndarray  # all min(n, d) singular values, descending
    row_vectors: np.ndarray  # (d, r) right singular vectors above the cutoff, descending
    null_vectors: np.ndarray | None  # (d, d - r), where the path gives them
    cutoff: Cutoff

    @property
    def numerical_rank(self) -> int:
        return self.row_vectors.shape[1]


def _dual(data: PairData) -> _Decomposition:
    T, squares = _stack(data)
    sigma, left = dual_gram(T)
    cutoff = difference_cutoff(data, float(sigma[0]), squares)
    keep = sigma > cutoff.value
    return _Decomposition(sigma, dual_vectors(T, sigma[keep], left[:, keep]), None, cutoff)


def _primal(data: PairData) -> _Decomposition:
    gram, squares = _scatter(data)
    values, vectors = np.linalg.eigh(gram)
    sigma, vectors = np.sqrt(np.clip(values[::-1], 0.0, None)), vectors[:, ::-1]
    cutoff = difference_cutoff(data, float(sigma[0]), squares)
    r = int(np.count_nonzero(sigma > cutoff.value))
    return _Decomposition(sigma, vectors[:, :r], vectors[:, r:], cutoff)


def _stack(data: PairData) -> tuple[np.ndarray, float]:
    """Return T (n, d) and the sum of squares of the latents behind it."""
    T = np.empty((data.n_pairs, data.dim))
    at, squares = 0, 0.0
    for t, energy in differences(data):
        T[at : at + len(t)] = t[: data.n_pairs - at]
        at, squares = at + len(t), squares + energy
    return T, squares


def _scatter(data: PairData) -> tuple[np.ndarray, float]:
    """Return the streamed Gram T'T (d, d) and the sum of squares of the latents behind it."""
    gram, squares = np.zeros((data.dim, data.dim)), 0.0
    for t, energy in differences(data):
        gram += t.T @ t
        squares += energy
    return gram, squares


def _null_directions(data: PairData, decomposition: _Decomposition, count: int) -> np.ndarray:
    """Return `count` orthonormal null directions, those of largest origin variance first."""
    if count == 0:
        return np.zeros((data.dim, 0))
    rows, basis = decomposition.row_vectors, decomposition.null_vectors
    if basis is not None:
        coordinates = (as_rows(b, data.dim, "origins") @ basis for b in data.origins())
        scatter = centred_gram(coordinates, basis.shape[1], data.n_origins, "origins")[1]
        inside = np.linalg.eigh(scatter)[1][:, ::-1][:, :count]
        return fix_signs(basis @ inside)

    def projected() -> Iterator[np.ndarray]:
        for block in data.origins():
            x = as_rows(block, data.dim, "origins")
            yield x - (x @ rows) @ rows.T

    # Rounding of what was projected away is no variance: measure it against the whole origins.
    energy = sum(float((as_rows(b, data.dim, "origins") ** 2).sum()) for b in data.origins())
    floor = float(np.sqrt(max(data.n_origins, data.dim) * EPS64 * energy))
    found = fit_spectrum(projected(), data.dim, data.n_origins, floor=floor).vectors[:, :count]
    if found.shape[1]:
        found = fix_signs(orthonormalise(found - rows @ (rows.T @ found)))
    missing = count - found.shape[1]
    if missing == 0:
        return found
    filling = random_orthonormal(data.dim, missing, 0, against=np.concatenate([rows, found], axis=1))
    return np.concatenate([found, filling], axis=1)


def _statement(n: int, d: int, r: int, m: int) -> str:
    nulls = d - r
    if n < d:
        return (
            f"T has {n} rows and {d} columns, so an exact null space of at least {d - n} dimensions is "
            "arithmetic, "
            "not learned: judge W by its held-out residual beside a random subspace."
        )
    if nulls == 0:
        return "T is full rank: no exact null space; these are the smallest singular directions."
    if nulls < m:
        return (
            f"T has numerical rank {r} of {d}: its null space has {nulls} of the {m} directions asked for; "
            f"the other {m - nulls} are the smallest singular directions."
        )
    return f"T has numerical rank {r} of {d}: W lies in its null space of {nulls} dimensions."


def difference_facts(data: PairData) -> dict[str, object]:
    """Return numerical rank, cutoff and extreme singular values of T, for methods that do not factor it.

    Price: the n x n (or d x d) Gram of T in float64, and its eigenvalues.
    """
    if data.n_pairs < data.dim:
        T, squares = _stack(data)
        gram = T @ T.T
    else:
        gram, squares = _scatter(data)
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0.0, None))
    cutoff = difference_cutoff(data, float(sigma[0]), squares)
    return {
        "numerical_rank": int(np.count_nonzero(sigma > cutoff.value)),
        "cutoff": cutoff.value,
        "decided_by": cutoff.decided_by,
        "sigma_max": float(sigma[0]),
        "sigma_min": float(sigma[-1]),
        "n_pairs": data.n_pairs,
    }
