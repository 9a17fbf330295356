"""Maps with a metric's view of pairs: the rotation that aligns them, a likelihood ratio of differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .arrays import namespace
from .data import PairData
from .fitted import Fitted
from .gallery_maps import Capabilities
from .generalised import difference_basis, ridge
from .joint import PairMap, columns, fitted
from .linalg import eigh, gram, inverse, shifted, svd

GRAM_FLOOR = 1e-4
"""Down to this share of the largest a Gram gives singular values to 2e-8, and a float32 map keeps no more."""


@dataclass(frozen=True)
class Procrustes(Capabilities):
    """The rotation that lays translations on their origins, cut to the directions that agree most.

    With cov(g, o) = U diag(s) V^T the orthogonal Q that minimises ||(G - mu_g) Q - (O - mu_o)||_F is U V^T:
    query map U, reference map V, first m columns. Each side has its own centre; the score is the cosine,
    which at full rank is that of g Q and o. It learns an orientation and no weights: of use where the two
    sides are turned against each other, and otherwise a control of what weights are worth.

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
    Equivalent for small data: ``scipy.linalg.orthogonal_procrustes(G, O)``. Price: the moments and a singular
    value decomposition of d x d, by an eigen-decomposition of its Gram where that resolves the m directions.

    Parameters
    ----------
    rank
        Number of columns; None for all that co-vary.
    """

    rank: int | None = 512
    name: ClassVar[str] = "procrustes"
    needs_pairs: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    all_ranks: ClassVar[bool] = True

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs."""
        top = columns(self, data)
        query, sigma, reference = leading_svd(data.moments.pairs.cov_og.T, top)
        return fitted(self, data, query, reference, sigma, "directions in which the two sides co-vary")


@dataclass(frozen=True)
class Kissme(PairMap):
    """Likelihood ratio of differences: M = S_t^-1 - S_n^-1, "one identity" against "two" (KISSME).

    S_t = E[t t^T] of pairs' differences and S_n = cov(o) + cov(g) + delta delta^T of differences between
    strangers, delta = mu_g - mu_o: the mean over every translation with every origin, without drawing any.
    Both get the same ridge. W = V sqrt(values) over M's positive eigenvalues, largest first, so that W W^T
    is M made positive semi-definite. The score "bias" ranks by the distance (q - r)^T W W^T (q - r).

    Source: Köstinger et al., Large scale metric learning from equivalence constraints, CVPR 2012. Price: the
    moments, one inverse, one symmetric product and one eigen-decomposition of d x d.

    Parameters
    ----------
    rank
        Number of columns; None for all positive directions.
    lam
        Ridge of both, at least 0, in units of the mean diagonal of S_t.
    score
        "bias", or "cosine" of the same map.
    """

    lam: float = 1.0
    name: ClassVar[str] = "kissme"

    def fit(self, data: PairData) -> Fitted:
        """Fit on pairs."""
        top = columns(self, data)
        pairs = data.moments.pairs
        basis, tau = difference_basis(data)
        xp, delta = namespace(tau), pairs.mean_t
        added = ridge(self.lam, tau, data.moments.full_dim)
        strangers = shifted(pairs.cov_oo + pairs.cov_gg + delta[:, None] * delta[None, :], added)
        metric = gram(((tau + added) ** -0.5)[:, None] * basis.T) - inverse(strangers)
        values, vectors = eigh(metric, top)
        W = vectors * xp.clip(values, min=0.0) ** 0.5
        what = "directions in which strangers differ more than pairs"
        return fitted(self, data, W, W, values, what, centres=1)


def leading_svd(a: Any, top: int | None) -> tuple[Any, Any, Any]:
    """Return U, singular values (descending) and V of the `top` largest; None for all.

    A Gram's eigenvectors take a third of the time of a full decomposition and are as good while no value
    falls below `GRAM_FLOOR` of the largest.
    """
    d = min(a.shape)
    k = d if top is None else min(top, d)
    if k <= d // 3:
        squares, right = eigh(gram(a), k)
        if float(squares[-1]) > GRAM_FLOOR**2 * float(squares[0]):
            sigma = squares**0.5
            return a @ right / sigma, sigma, right
    left, sigma, right_t = svd(a)
    return left[:, :k], sigma[:k], right_t.T[:, :k]
