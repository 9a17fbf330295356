"""The generalised null space: what the origins vary in, against what translation changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .arrays import namespace, to_host
from .data import PairData, difference_cutoff
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities
from .linalg import eigh, fix_signs
from .moments import Moments
from .rank import EPS64, check_rank, tile_noise

LARGEST_RIDGE = 1e6
"""In units of the mean diagonal; beyond it W is the principal components in all but name."""


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
        if not 0 < self.lam <= LARGEST_RIDGE:
            raise SolverUsageError(
                f"lam must be positive and at most {LARGEST_RIDGE:g}, not {self.lam}: without a ridge S_t "
                "may be singular, and beside a larger one nothing is left of it. Try 1."
            )

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs and their origins."""
        return fit_path(data, [self.lam], self.rank)[0]


def fit_path(data: PairData, lams: Sequence[float], rank: int) -> list[Fitted]:
    """Fit `GeneralisedNull` for many ridges: the data are read once, the covariances reduced once."""
    methods = [GeneralisedNull(rank, lam) for lam in lams]
    data.require_pairs(GeneralisedNull.name)
    check_rank(rank, data.dim)
    basis, tau = difference_basis(data)
    rotated = basis.T @ data.moments.origins.cov @ basis
    return [_solve(data, basis, tau, rotated, method) for method in methods]


def difference_basis(data: PairData) -> tuple[Any, Any]:
    """Return the eigenvectors (k, k) of E[t t^T] and its eigenvalues (k,), descending.

    Raises
    ------
    SolverUsageError
        All differences are zero.
    """
    tau, basis = data.second_t
    if not float(tau[0]) > 0:
        raise SolverUsageError(
            f"All {data.n_pairs} differences are zero (largest variance 0): every translation equals its "
            "origin. "
            "Check that translations are paired with origins, not with themselves."
        )
    return basis, tau


def ridge(lam: float, values: Any, full_dim: int) -> float:
    """Return lam in units of the mean diagonal over all dimensions, whichever space was reduced to."""
    xp = namespace(values)
    return lam * float(xp.sum(values)) / full_dim


def pencil(rotated: Any, weights: Any, top: int) -> tuple[Any, Any]:
    """Solve A v = theta diag(weights) v: the `top` largest theta, descending, and V with V^T diag V = I."""
    whiten = weights**-0.5
    values, vectors = eigh(rotated * whiten[:, None] * whiten[None, :], top)
    return values, whiten[:, None] * vectors


def origin_noise(moments: Moments) -> float:
    """Return the variance that float32 tiles alone would leave in a direction in which no origin varies."""
    if moments.precision != "float32":
        return 0.0
    scatter = moments.origins.xx
    return tile_noise(to_host(namespace(scatter).linalg.diagonal(scatter))) ** 2 / moments.origins.n


def _solve(data: PairData, basis: Any, tau: Any, rotated: Any, method: GeneralisedNull) -> Fitted:
    moments = data.moments
    found, vectors = pencil(rotated, tau + ridge(method.lam, tau, moments.full_dim), method.rank)
    values = to_host(found)
    # A direction's variance of origins, w' S_o w / w'w, beside what rounding leaves in S_o.
    xp = namespace(vectors)
    variance = values / to_host(xp.sum(vectors * vectors, axis=0))
    above = (values > max(data.n_origins, len(tau)) * EPS64 * values[0]) & (variance > origin_noise(moments))
    kept = len(above) if above.all() else int(np.argmin(above))
    if not kept or not values[0] > 0:
        alike = (
            "There is 1 origin: alone it does" if data.n_origins == 1 else f"The {data.n_origins} origins do"
        )
        raise SolverUsageError(
            f"{alike} not vary (rank 0, at least 1 needed). Use more, and different, origins."
        )
    W = to_host(fix_signs(moments.lift(basis @ vectors[:, :kept])))
    text = f"{kept} directions, by origin variance per translation variance."
    if kept < method.rank:
        text += f" Rank {method.rank} was asked for; no more of them carry origin variance."
    report = difference_report(data, text, requested_rank=method.rank, effective_rank=kept)
    return Fitted(
        W,
        W,
        to_host(moments.lift_row(moments.origins.mean)),
        "cosine",
        values[:kept],
        method.name,
        {"rank": method.rank, "lam": method.lam},
        report=report,
    )


def difference_report(data: PairData, statement: str, **known: Any) -> dict[str, Any]:
    """Return the account of a fit on pairs: T's numerical rank and extremes beside the method's own facts."""
    n, d, moments = data.n_pairs, data.dim, data.moments
    sigma = np.sqrt(to_host(data.second_t[0]) * n)[: min(n, d)]
    diagonal = to_host(namespace(moments.pairs.tt).linalg.diagonal(moments.pairs.tt))
    noise = tile_noise(diagonal) if moments.precision == "float32" else 0.0
    cutoff = difference_cutoff(data, float(sigma[0]), moments.pairs.squares, noise=noise)
    return make_report(
        numerical_rank=int(np.count_nonzero(sigma > cutoff.value)),
        cutoff=cutoff.value,
        decided_by=cutoff.decided_by,
        sigma_max=float(sigma[0]),
        sigma_min=float(sigma[-1]),
        n_pairs=n,
        path="primal" if moments.basis is None else "span",
        statement=statement,
        **known,
    )
