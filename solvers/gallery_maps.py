"""Maps that need no pairs: the controls and PCA whitening."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .data import PairData
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .linalg import fix_signs, orthonormalise
from .rank import check_rank
from .spectrum import Spectrum


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

    def __post_init__(self) -> None:
        if not 0.0 <= self.exponent <= 1.0:
            raise SolverUsageError(
                f"The exponent must lie between 0 (rotate only) and 1, not {self.exponent}; 0.25 and 0.5 are "
                "the usual whitenings."
            )

    def fit(self, data: PairData) -> Fitted:
        """Fit on the gallery."""
        spectrum = data.gallery_spectrum
        m = available_rank(self.rank, spectrum)
        W = spectrum.vectors[:, :m] * spectrum.values[:m] ** -self.exponent
        return Fitted(
            W,
            W,
            spectrum.mean,
            "cosine",
            spectrum.values,
            self.name,
            asdict(self),
            report=gallery_report(spectrum, self.rank, m),
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


def available_rank(rank: int | None, spectrum: Spectrum) -> int:
    """Return how many directions of the asked rank (None: all) the gallery has, or raise if none."""
    if rank is not None:
        check_rank(rank, spectrum.dim)
    if spectrum.rank < 1:
        raise SolverUsageError(
            f"The {spectrum.n} rows of the collection are all equal, so their covariance has rank 0 (1 "
            "needed). "
            "Use more, and different, images."
        )
    return spectrum.rank if rank is None else min(rank, spectrum.rank)


def gallery_report(spectrum: Spectrum, asked: int | None, kept: int) -> dict[str, Any]:
    """Say what the gallery's covariance had to give."""
    span = spectrum.n < spectrum.dim
    text = (
        f"The covariance of {spectrum.n} rows has {spectrum.rank} of {spectrum.dim} directions with variance."
    )
    if asked is not None and kept < asked:
        text += f" Rank {asked} was asked for; {kept} is all there is."
    path = "span" if span else "primal"
    return make_report(path=path, statement=text, requested_rank=asked, effective_rank=kept)
