"""Maps that need no pairs: the controls, PCA whitening and the analytic map."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .data import PairData
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .linalg import fix_signs, orthonormalise
from .projection import SCORES
from .rank import check_rank
from .spectrum import Spectrum

ENERGY_FLOOR = 1e-4  # of the largest eigenvalue: a covariance estimated from few rows knows no less


class Capabilities:
    """What a method needs and promises; read by the verb, the sweep, the command line and the tests."""

    name: ClassVar[str]
    needs_pairs: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_torch: ClassVar[bool] = False
    nested_ranks: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    all_ranks: ClassVar[bool] = False


def _eye(dim: int) -> np.ndarray:
    return np.eye(dim, dtype=np.float32)


@dataclass(frozen=True)
class Identity(Capabilities):
    """Raw latents under cosine: the first control. W = I; costs nothing."""

    name: ClassVar[str] = "identity"
    nested_ranks: ClassVar[bool] = False

    def fit(self, data: PairData) -> Fitted:
        """Return the identity map of the data's dimension."""
        W = _eye(data.dim)
        return Fitted(W, W, None, "cosine", np.zeros(0), self.name, {})


@dataclass(frozen=True)
class Centred(Capabilities):
    """Latents minus the collection's mean, under cosine. W = I; one pass for the mean."""

    name: ClassVar[str] = "centred"
    nested_ranks: ClassVar[bool] = False

    def fit(self, data: PairData) -> Fitted:
        """Return the identity map centred on the gallery's mean."""
        W = _eye(data.dim)
        return Fitted(W, W, data.gallery_spectrum.mean, "cosine", np.zeros(0), self.name, {})


@dataclass(frozen=True)
class RandomSubspace(Capabilities):
    """Seeded random orthonormal W: the control that knows nothing. Price: one QR of d x m.

    Parameters
    ----------
    rank
        Number of columns.
    seed
        Seed of the Gaussian matrix whose columns are made orthonormal. Ranks are nested: a smaller
        rank with the same seed is a prefix.
    """

    rank: int = 512
    seed: int = 0
    name: ClassVar[str] = "random"

    def fit(self, data: PairData) -> Fitted:
        """Draw the subspace; only the data's dimension is used."""
        check_rank(self.rank, data.dim)
        W = random_orthonormal(data.dim, self.rank, self.seed)
        return Fitted(W, W, None, "cosine", np.zeros(0), self.name, asdict(self), seed=self.seed)


@dataclass(frozen=True)
class Pca(Capabilities):
    """Principal components of the collection, each divided by a power of its variance.

    W = V diag(e^-exponent), with cov = V diag(e) V^T centred. Exponent 1/2 is full whitening, 1/4 half
    of it. Price: one covariance of the gallery and its eigen-decomposition.

    Parameters
    ----------
    rank
        Number of components; None for all that have variance. Where fewer have any, those are kept.
    exponent
        0 rotates only; 1/4 and 1/2 are the usual whitenings.
    """

    rank: int | None = 512
    exponent: float = 0.25
    name: ClassVar[str] = "pca"
    all_ranks: ClassVar[bool] = True

    def fit(self, data: PairData) -> Fitted:
        """Fit on the gallery."""
        spectrum = data.gallery_spectrum
        m = _available(self.rank, spectrum)
        W = spectrum.vectors[:, :m] * spectrum.values[:m] ** -self.exponent
        return Fitted(
            W,
            W,
            spectrum.mean,
            "cosine",
            spectrum.values,
            self.name,
            asdict(self),
            report=_gallery_report(spectrum, self.rank, m),
        )


@dataclass(frozen=True)
class Analytic(Capabilities):
    """The Bayes map of a one-step diffusion translation under a Gaussian prior; no pairs, no tuning.

    With originals N(mu, V diag(e) V^T) scaled to mean eigenvalue 1, the one-step estimate of Lemma 1 is
    linear and Gaussian: h = sqrt(ab) e / (ab e + 1 - ab), a = sqrt(ab) h, s = e (1 - a^2), so that in
    V-coordinates a query is N(a o, s). Query map V s^-1/2, reference map V diag(a) s^-1/2, both after
    subtracting mu; with the score "bias" this is the exact log-likelihood up to a constant per query.
    A random prompt that moves the prior's mean with variance prompt^2 e adds (1 - a)^2 prompt^2 e to s.
    Price: one covariance of the gallery and its eigen-decomposition.

    Parameters
    ----------
    alpha_bar
        Share of the signal that survives the noising, between 0 and 1.
    rank
        Number of components, those of largest a^2 e / s first (PCA's order); None for all.
    prompt
        Standard deviation of the prompt's shift of the mean, in units of the prior's.
    score
        "cosine", or "bias" for the exact Bayes score.
    """

    alpha_bar: float = 0.1
    rank: int | None = 512
    prompt: float = 0.0
    score: str = "cosine"
    name: ClassVar[str] = "analytic"
    all_ranks: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha_bar < 1.0:
            raise SolverUsageError(
                f"alpha_bar must lie strictly between 0 and 1, not {self.alpha_bar}. 0.1 is a fair default."
            )
        if not (np.isfinite(self.prompt) and self.prompt >= 0.0):
            raise SolverUsageError(f"prompt must be finite and at least 0, not {self.prompt}.")
        if self.score not in SCORES:
            raise SolverUsageError(f"The score must be one of {', '.join(SCORES)}, not {self.score!r}.")

    def fit(self, data: PairData) -> Fitted:
        """Fit on the gallery. With n < d rows the components are those of the rows' span."""
        spectrum = data.gallery_spectrum
        _available(self.rank, spectrum)
        scale = spectrum.dim / spectrum.total  # the mean is over all d dimensions, spanned or not
        e = spectrum.values * scale
        e = np.maximum(e, ENERGY_FLOOR * e[0])
        ab = self.alpha_bar
        a = ab * e / (ab * e + 1.0 - ab)
        s = e * (1.0 - a**2) + (1.0 - a) ** 2 * self.prompt**2 * e
        # A random prompt can unsettle PCA's order among the large components; floored ones tie, in order.
        order = np.argsort(-(a**2) * e / s, kind="stable")[: self.rank]
        # Latents arrive unscaled, so the maps carry the scale.
        query = spectrum.vectors[:, order] * np.sqrt(scale / s[order])
        reference = query * a[order]
        return Fitted(
            query,
            reference,
            spectrum.mean,
            self.score,
            spectrum.values,
            self.name,
            asdict(self),
            report=_gallery_report(spectrum, self.rank, len(order)),
        )


def random_orthonormal(dim: int, rank: int, seed: int, against: np.ndarray | None = None) -> np.ndarray:
    """Seeded random orthonormal columns (dim x rank), orthogonal to those of `against` if given."""
    # Drawn row by row, so that fewer columns are a prefix of more.
    draws = np.random.default_rng(seed).standard_normal((rank, dim)).T
    if against is None:
        return fix_signs(orthonormalise(draws))
    for _ in range(2):  # one projection leaves rounding of the size of what was removed
        draws = orthonormalise(draws - against @ (against.T @ draws))
    return fix_signs(draws)


def _available(rank: int | None, spectrum: Spectrum) -> int:
    if rank is not None:
        check_rank(rank, spectrum.dim)
    if spectrum.rank < 1:
        raise SolverUsageError(
            f"The {spectrum.n} rows of the collection are all equal, so their covariance has rank 0 (1 "
            "needed). "
            "Use more, and different, images."
        )
    return spectrum.rank if rank is None else min(rank, spectrum.rank)


def _gallery_report(spectrum: Spectrum, asked: int | None, kept: int) -> dict[str, Any]:
    span = spectrum.n < spectrum.dim
    text = (
        f"The covariance of {spectrum.n} rows has {spectrum.rank} of {spectrum.dim} directions with variance."
    )
    if asked is not None and kept < asked:
        text += f" Rank {asked} was asked for; {kept} is all there is."
    path = "span" if span else "primal"
    return make_report(path=path, statement=text, requested_rank=asked, effective_rank=kept)
