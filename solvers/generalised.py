"""The generalised null space: what the origins vary in, against what translation changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg

from .data import PairData, difference_cutoff, differences
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities
from .rank import EPS64, check_rank
from .spectrum import centred_gram, collect, fix_signs


@dataclass(frozen=True)
class GeneralisedNull(Capabilities):
    """Top generalised eigenvectors of (S_o, S_t + lam * meandiag(S_t) * I).

    S_o is the centred covariance of the origins, S_t = E[t t^T] the uncentred one of the differences
    t = g - o. The literal null space minimises w^T S_t w alone and so also finds directions in which
    nothing varies; this maximises origin variance per translation variance. Columns are normalised
    W^T (S_t + lam I) W = I, which sets their weights in the cosine, largest ratio first; both sides are
    centred with the origins' mean.

    Equivalent for small data: ``scipy.linalg.eigh(S_o, S_t + reg * I)``. Price: two streamed d x d
    covariances and two eigen-decompositions; with fewer origins and pairs together than dimensions, one
    tall QR and problems of that smaller size, which is exact because outside their span S_o is zero.

    Parameters
    ----------
    rank
        Number of columns; where fewer directions carry origin variance, those are kept.
    lam
        Ridge in units of the mean diagonal of S_t, positive; 0.1 to 100 is the useful range.
    """

    rank: int = 512
    lam: float = 1.0
    name: ClassVar[str] = "gnull"
    needs_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (np.isfinite(self.lam) and self.lam > 0):
            raise SolverUsageError(
                f"lam must be positive and finite, not {self.lam}: without a ridge S_t may be singular. "
                "Try 1."
            )

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs and their origins."""
        return fit_path(data, [self.lam], self.rank)[0]


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The pair of covariances in the eigenbasis of S_t: everything that does not depend on lam."""

    basis: np.ndarray  # (d, k) orthonormal eigenvectors of S_t inside the working space
    tau: np.ndarray  # (k,) eigenvalues of S_t
    cov_o: np.ndarray  # (k, k)
    mean: np.ndarray  # (d,)
    squares: float  # of the latents behind the differences, for the rank cutoff
    path: str


def fit_path(data: PairData, lams: Sequence[float], rank: int) -> list[Fitted]:
    """Fit `GeneralisedNull` for many ridges: the data are read once, the covariances reduced once."""
    methods = [GeneralisedNull(rank, lam) for lam in lams]
    data.require_pairs(GeneralisedNull.name)
    check_rank(rank, data.dim)
    reduced = _span(data) if data.n_origins + data.n_pairs < data.dim else _primal(data)
    if not reduced.tau[-1] > 0:
        raise SolverUsageError(
            f"All {data.n_pairs} differences are zero (largest variance 0): every translation equals its "
            "origin. "
            "Check that translations are paired with origins, not with themselves."
        )
    return [_solve(data, reduced, method) for method in methods]


def _solve(data: PairData, reduced: _Reduced, method: GeneralisedNull) -> Fitted:
    # Units of the mean over all d dimensions, whichever space the problem was reduced to.
    ridge = method.lam * float(reduced.tau.sum()) / data.dim
    whiten = 1.0 / np.sqrt(reduced.tau + ridge)
    k = len(whiten)
    top = min(method.rank, k)
    values, vectors = scipy.linalg.eigh(
        reduced.cov_o * np.outer(whiten, whiten), subset_by_index=[k - top, k - 1], driver="evr"
    )
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = values > max(data.n_origins, k) * EPS64 * values[0]
    if not keep.any():
        raise SolverUsageError(
            f"The {data.n_origins} origins do not vary (rank 0, at least 1 needed). Use more, and "
            "different, origins."
        )
    values, vectors = values[keep], vectors[:, keep]
    W = fix_signs(reduced.basis @ (whiten[:, None] * vectors))
    return Fitted(
        W,
        W,
        reduced.mean,
        "cosine",
        values,
        method.name,
        {"rank": method.rank, "lam": method.lam},
        report=_report(data, reduced, method.rank, len(values)),
    )


def _report(data: PairData, reduced: _Reduced, asked: int, kept: int) -> dict[str, object]:
    n, d = data.n_pairs, data.dim
    sigma = np.sqrt(np.clip(reduced.tau[::-1] * n, 0.0, None))[: min(n, d)]
    cutoff = difference_cutoff(data, float(sigma[0]), reduced.squares)
    text = f"{kept} directions, by origin variance per translation variance."
    if kept < asked:
        text += f" Rank {asked} was asked for; no more of them carry origin variance."
    return make_report(
        numerical_rank=int(np.count_nonzero(sigma > cutoff.value)),
        cutoff=cutoff.value,
        decided_by=cutoff.decided_by,
        sigma_max=float(sigma[0]),
        sigma_min=float(sigma[-1]),
        n_pairs=n,
        path=reduced.path,
        statement=text,
        requested_rank=asked,
        effective_rank=kept,
    )


def _primal(data: PairData) -> _Reduced:
    gram = np.zeros((data.dim, data.dim))
    squares = 0.0
    for t, energy in differences(data):
        gram += t.T @ t
        squares += energy
    tau, basis = np.linalg.eigh(gram / data.n_pairs)
    mean, scatter = centred_gram(data.origins(), data.dim, data.n_origins, "origins")
    cov_o = basis.T @ (scatter / data.n_origins) @ basis
    return _Reduced(basis, np.clip(tau, 0.0, None), (cov_o + cov_o.T) / 2, mean, squares, "primal")


def _span(data: PairData) -> _Reduced:
    origins = collect(data.origins(), data.dim, data.n_origins, "origins")
    mean = origins.mean(axis=0)
    origins -= mean
    parts = list(differences(data))
    T = np.concatenate([t for t, _ in parts])
    squares = sum(energy for _, energy in parts)
    basis = np.linalg.qr(np.concatenate([origins, T]).T)[0]
    inside = T @ basis
    tau, rotation = np.linalg.eigh(inside.T @ inside / data.n_pairs)
    basis = basis @ rotation
    inside = origins @ basis
    return _Reduced(basis, np.clip(tau, 0.0, None), inside.T @ inside / data.n_origins, mean, squares, "span")
