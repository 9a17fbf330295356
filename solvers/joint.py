"""Joint Gaussians of origin and translation: the likelihood of a pair as an inner product and a bias.

All three methods model (o, g) as one Gaussian, each side about its own mean, and score a pair by
log p(g | o). In directions where the model is diagonal, with the correlation rho, g given o is N(rho o,
1 - rho^2), so the query map carries 1 / sqrt(1 - rho^2), the reference map rho / sqrt(1 - rho^2), and with
the reference bias -||r||^2 / 2 the score is the log-likelihood up to a constant of the query. The cosine of
the same maps is that score maximised over the length of the reference: what Bayes would do who does not trust
the contrast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .arrays import namespace, to_host
from .data import PairData
from .errors import SolverUsageError
from .fitted import Fitted
from .frequency import Shape, check_shape
from .gallery_maps import Capabilities
from .generalised import difference_basis, difference_report, ridge
from .invariant import invariant
from .linalg import cholesky, eigh, fix_signs, gram, shifted, solve_lower
from .projection import SCORES
from .rank import EPS64, check_rank


@dataclass(frozen=True)
class PairMap(Capabilities):
    """What maps learned from pairs have in common.

    Parameters
    ----------
    rank
        Number of columns, the most telling first; None for all. Where fewer tell anything, those are kept.
    lam
        Ridge, at least 0, in units of the mean diagonal of the covariance that it is added to.
    score
        "bias", or "cosine" of the same maps.
    """

    rank: int | None = 512
    lam: float = 0.1
    score: str = "bias"
    needs_pairs: ClassVar[bool] = True
    all_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (np.isfinite(self.lam) and self.lam >= 0):
            raise SolverUsageError(f"lam must be finite and at least 0, not {self.lam}. Try 0.1.")
        if self.score not in SCORES:
            raise SolverUsageError(f"The score must be one of {', '.join(SCORES)}, not {self.score!r}.")


@dataclass(frozen=True)
class JointMap(PairMap):
    """What the joint Gaussians have in common.

    Parameters
    ----------
    rank, lam, score
        As for :class:`PairMap`.
    latent_shape
        (C, H, W) takes every covariance to be the same everywhere in the picture, for few pairs: with 50 to
        1,000 pairs of 1,024 numbers it gained 1 to 25 points of mAP over the best ridge. None takes the
        sample's.
    """

    latent_shape: Shape | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_shape is not None:  # JSON brings lists
            object.__setattr__(self, "latent_shape", tuple(self.latent_shape))

    def _cov(self, data: PairData, name: str) -> Any:
        """Return a covariance of the pairs by its name, in the coordinates that the method works in."""
        moments = data.moments
        found = getattr(moments.pairs, name)
        if self.latent_shape is None:
            return found
        shape = check_shape(self.latent_shape, data.dim)
        return invariant(found if moments.basis is None else moments.basis @ found @ moments.basis.T, shape)


@dataclass(frozen=True)
class Plda(JointMap):
    """Two-covariance model: an identity y ~ N(0, S_b), and both its images N(y, S_w) (PLDA).

    S_w = cov(t) / 2 with t = g - o, and S_b = (cov(o) + cov(g)) / 2 - S_w, which is the symmetric part of
    cov(o, g). With V^T (S_w + ridge) V = I and V^T S_b V = diag(b), the log-likelihood ratio of "one
    identity" against "two" is, up to a constant of the query, the sum of
    b / (2b + 1) q r - b^2 / (2 (b + 1)(2b + 1)) r^2: query map V sqrt((b + 1) / (2b + 1)), reference map
    V b / sqrt((b + 1)(2b + 1)). Largest b first; negative ones, which no identity can have, are left out.
    Exact where origins and translations vary alike (diffusion that samples); it then needs half the
    parameters of a regression.

    Sources: Ioffe, Probabilistic Linear Discriminant Analysis, ECCV 2006; Brümmer and de Villiers, The
    speaker partitioning problem, Odyssey 2010. Price: the moments, one Cholesky factor, two triangular
    solves and one eigen-decomposition of d x d.
    """

    name: ClassVar[str] = "plda"
    symmetric: ClassVar[bool] = False

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs."""
        top = columns(self, data)
        lower = cholesky(with_ridge(self._cov(data, "cov_tt") / 2, self.lam, data.dim))
        cross = self._cov(data, "cov_og")
        b, vectors = eigh(whitened((cross + cross.T) / 2, lower, lower), top)
        b = namespace(b).clip(b, min=0.0)
        directions = solve_lower(lower, vectors, transposed=True)
        query = directions * ((b + 1) / (2 * b + 1)) ** 0.5
        reference = directions * (b / ((b + 1) * (2 * b + 1)) ** 0.5)
        return fitted(self, data, query, reference, b, "directions in which identities differ")


@dataclass(frozen=True)
class Cca(JointMap):
    """Canonical correlations of origins and translations, each covariance with a ridge.

    With cov(o) + ridge = L_o L_o^T, the same for g, and K = L_o^-1 cov(o, g) L_g^-T = U diag(rho) V^T, the
    query map is L_g^-T V / sqrt(1 - rho^2), the reference map L_o^-T U rho / sqrt(1 - rho^2): with the bias
    log p(g | o) exactly for Gaussians. The cosine weighs the canonical coordinates by the same factors, and
    not by sqrt(rho) on each side, so that a reference's norm is the one of the Bayes score. Largest
    correlation first.

    Sources: Hotelling, Relations between two sets of variates, Biometrika 1936; Vinod, Canonical ridge and
    econometrics of joint production, J. Econometrics 1976. Equivalent for small data and without a ridge:
    ``sklearn.cross_decomposition.CCA``. Price: the moments, two Cholesky factors, four triangular solves and
    one eigen-decomposition of d x d. K's Gram is solved instead of K: what it cannot
    tell from zero are correlations below 1e-6, whose columns carry no score.
    """

    score: str = "cosine"
    name: ClassVar[str] = "cca"
    symmetric: ClassVar[bool] = False

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs."""
        top = columns(self, data)
        lower_o = cholesky(with_ridge(self._cov(data, "cov_oo"), self.lam, data.dim))
        lower_g = cholesky(with_ridge(self._cov(data, "cov_gg"), self.lam, data.dim))
        K = whitened(self._cov(data, "cov_og"), lower_o, lower_g)
        squares, vectors = eigh(gram(K), top)
        xp = namespace(squares)
        squares = xp.clip(squares, min=0.0)
        # Without a ridge, equal sides have rho = 1: what is left of 1 - rho^2 is rounding.
        left = xp.clip(1 - squares, min=len(K) * EPS64) ** 0.5
        query = solve_lower(lower_g, vectors, transposed=True) / left
        reference = solve_lower(lower_o, K @ vectors, transposed=True) / left
        return fitted(self, data, query, reference, squares**0.5, "canonical correlations", roots=True)


@dataclass(frozen=True)
class Regression(JointMap):
    """Ridge regression of translations on origins, g ~ N(M o, R), scored by its likelihood.

    M = cov(g, o) (cov(o) + ridge)^-1 and R = cov(g) - M cov(o, g), with a ridge of its own, in units of R's
    mean diagonal. With R = L L^T and V the eigenvectors of the explained signal L^-1 M cov(o, g) L^-T,
    largest first, the query map is L^-T V and the reference map M^T L^-T V: with the bias log N(g; M o, R).
    The eigenvalues are rho^2 / (1 - rho^2) of the canonical correlations, so that without ridges this is
    :class:`Cca`; with one the two differ in what they shrink: here the noise, there the translations.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2009, sections 3.4 and 3.7.
    Price: as for :class:`Cca`.
    """

    name: ClassVar[str] = "regression"
    symmetric: ClassVar[bool] = False

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs."""
        top = columns(self, data)
        lower_o = cholesky(with_ridge(self._cov(data, "cov_oo"), self.lam, data.dim))
        half = solve_lower(lower_o, self._cov(data, "cov_og"))
        lower = cholesky(with_ridge(self._cov(data, "cov_gg") - gram(half), self.lam, data.dim))
        half = solve_lower(lower, half.T).T
        signal, vectors = eigh(gram(half), top)
        query = solve_lower(lower, vectors, transposed=True)
        reference = solve_lower(lower_o, half @ vectors, transposed=True)
        return fitted(self, data, query, reference, signal, "directions with explained signal")


def columns(method: Any, data: PairData) -> int | None:
    """Refuse data that nothing can be learned from; return how many columns to look for, None for all."""
    data.require_pairs(method.name)
    if method.rank is not None:
        check_rank(method.rank, data.dim)
    difference_basis(data)
    if not data.moments.pairs.variance_o > 0:
        raise SolverUsageError(
            f"The origins of the {data.n_pairs} pairs do not vary (rank 0, at least 1 needed). Use more, and "
            "different, origins."
        )
    return method.rank


def fitted(
    method: Any,
    data: PairData,
    query: Any,
    reference: Any,
    spectrum: Any,
    what: str,
    *,
    centres: int = 2,
    roots: bool = False,
) -> Fitted:
    """Bring maps home, leaving out columns whose value is nothing but rounding.

    Parameters
    ----------
    query, reference
        (k, m) columns in the coordinates of the moments, or (d, m); the same array for a symmetric method.
    spectrum
        (m,) what each column is worth, descending.
    what
        Names the columns in the report.
    centres
        2 where queries have the translations' mean as theirs, 1 where the origins' serves both.
    roots
        Whether the values are square roots of what was solved for.
    """
    moments, pairs = data.moments, data.moments.pairs
    values = to_host(spectrum)
    # Arithmetic leaves this share of the largest value in one that is zero.
    rounding = (max(data.n_pairs, moments.dim) * EPS64) ** (0.5 if roots else 1.0)
    kept = int(np.count_nonzero(values > max(rounding * float(values[0]), 0.0)))
    if not kept:
        raise SolverUsageError(
            f"There are 0 {what} (at least 1 needed): these translations say nothing of their origins. "
            "Check that the pairs belong together."
        )
    text = f"{kept} {what}."
    if method.rank is not None and kept < method.rank:
        text += f" Rank {method.rank} was asked for; there are no more."
    both = [query] if reference is query else [query, reference]
    if query.shape[0] == moments.dim:
        both = [moments.lift(m[:, :kept]) for m in both]
    maps = namespace(query).concat([m[:, :kept] for m in both], axis=0)
    # Stacked, so that a column's sign turns in both maps or in none.
    W = list(to_host(fix_signs(maps)).reshape(len(both), moments.full_dim, kept))
    knobs = asdict(method)
    return Fitted(
        W[0],
        W[-1],
        to_host(moments.lift_row(pairs.mean_o)),
        knobs.get("score", "cosine"),
        values[:kept],
        method.name,
        knobs,
        report=difference_report(data, text, requested_rank=method.rank, effective_rank=kept),
        query_center=to_host(moments.lift_row(pairs.mean_g)) if centres == 2 else None,
    )


def with_ridge(cov: Any, lam: float, full_dim: int) -> Any:
    """Return cov + lam * (mean diagonal over all dimensions) * I."""
    xp = namespace(cov)
    return shifted(cov, ridge(lam, xp.linalg.diagonal(cov), full_dim))


def whitened(cross: Any, left: Any, right: Any) -> Any:
    """Return left^-1 cross right^-T for lower triangular factors."""
    return solve_lower(right, solve_lower(left, cross).T).T
