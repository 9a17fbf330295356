"""Do two maps W agree: their singular values and column spaces, beside what random matrices give.

The cosine of two vectors of sorted singular values is close to 1 for almost any two matrices of one shape:
by construction where both have orthonormal columns, and by the concentration of random spectra otherwise
(two independent Gaussian 4096 x 512 matrices reach 0.999999). It says something only outside that band.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.linalg

from .errors import SolverUsageError

EPS32 = float(np.finfo(np.float32).eps)
_WORK = 40_000_000
"""Squared columns times draws that one random spectrum may cost: a few seconds."""
_DRAWS = (50, 400)


@dataclass(frozen=True, eq=False)
class MapSpectrum:
    """The singular values of a map and its column space.

    Attributes
    ----------
    sigma
        (min(d, m),) float64 singular values, descending.
    basis
        (d, r) float64 orthonormal basis of the column space; r is the numerical rank.
    shape
        (d, m) of the map.
    """

    sigma: np.ndarray
    basis: np.ndarray
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """Directions that are not rounding of the float32 that maps are kept in."""
        return int(self.basis.shape[1])

    @property
    def flat(self) -> bool:
        """Whether all singular values are one value: orthonormal columns, up to a factor."""
        return is_flat(self.sigma)


@dataclass(frozen=True)
class Band:
    """Where cos φ falls without any training: mean and 95 % interval of `draws` independent draws."""

    low: float
    mean: float
    high: float
    draws: int

    def place(self, value: float) -> str:
        """Return "below", "inside" or "above"."""
        if value < self.low:
            return "below"
        return "above" if value > self.high else "inside"


def map_spectrum(W: np.ndarray) -> MapSpectrum:
    """Decompose a (d, m) map. Price: one thin SVD in float64.

    Raises
    ------
    SolverUsageError
        The map has no entries, or is zero: its spectrum has no direction.
    """
    W = _checked(W)
    left, sigma, _ = scipy.linalg.svd(W, full_matrices=False)
    # Below this a singular value is rounding of float32 entries, and its direction is arbitrary.
    rank = int(np.count_nonzero(sigma > max(W.shape) * EPS32 * sigma[0]))
    return MapSpectrum(sigma, np.ascontiguousarray(left[:, :rank]), (int(W.shape[0]), int(W.shape[1])))


def singular_values(W: np.ndarray) -> np.ndarray:
    """Return the (min(d, m),) singular values of a map, descending, without its column space.

    Raises
    ------
    SolverUsageError
        As for :func:`map_spectrum`.
    """
    found: np.ndarray = scipy.linalg.svdvals(_checked(W))
    return found


def _checked(W: np.ndarray) -> np.ndarray:
    W = np.asarray(W, dtype=np.float64)
    if not W.any():
        raise SolverUsageError(
            f"The map of shape {W.shape} is zero (or empty), so its spectrum has no direction to compare. "
            "Solve W again."
        )
    return W


def is_flat(sigma: np.ndarray) -> bool:
    """Tell whether descending singular values are equal up to float32 rounding of an orthonormal W."""
    # Orthonormalised in float32, the columns' Gram is off by some eps32 for each of them; twice for slack.
    return bool(sigma[0] - sigma[-1] <= 2 * len(sigma) * EPS32 * sigma[0])


def cos_phi(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors of descending singular values, cut to the shorter's length."""
    k = min(len(a), len(b))
    a, b = a[:k] / a[0], b[:k] / b[0]
    return min(1.0, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))


def gaussian_sigmas(shape: tuple[int, int], draws: int, seed: int) -> np.ndarray:
    """Draw the singular values of independent Gaussian matrices, without making the matrices.

    Exact in distribution: Householder reflections take a Gaussian d x m matrix to the bidiagonal one with
    independent chi entries, d, d-1, ... degrees of freedom on the diagonal and m-1, m-2, ... beside it
    (Golub and Kahan's reduction; Silverstein 1985, Dumitriu and Edelman 2002). That turns d m^2 operations
    into m^2 a draw.

    Returns
    -------
    (draws, min(d, m)) float64, descending
    """
    tall, m = max(shape), min(shape)
    rng = np.random.default_rng(seed)
    diagonal = rng.chisquare(tall - np.arange(m), (draws, m))
    beside = rng.chisquare(np.arange(m - 1, 0, -1), (draws, m - 1))
    gram = diagonal.copy()
    gram[:, 1:] += beside
    off = np.sqrt(diagonal[:, :-1] * beside)
    squares = [
        scipy.linalg.eigvalsh_tridiagonal(g, o) if m > 1 else g for g, o in zip(gram, off, strict=True)
    ]
    return np.sqrt(np.clip(squares, 0.0, None))[:, ::-1]


def draws_for(*shapes: tuple[int, int]) -> int:
    """Return how many random spectra of these shapes to draw, so that large maps take seconds, too."""
    columns = max(min(shape) for shape in shapes)
    return int(np.clip(_WORK // columns**2, *_DRAWS))


@lru_cache(maxsize=64)
def random_band(a: tuple[int, int], b: tuple[int, int], *, draws: int | None = None, seed: int = 0) -> Band:
    """Return where cos φ of two independent Gaussian matrices of these shapes lies."""
    draws = draws_for(a, b) if draws is None else draws
    # Two streams of one seed: equal shapes must not give equal matrices.
    one, other = np.random.SeedSequence(seed).generate_state(2).tolist()
    pairs = zip(gaussian_sigmas(a, draws, one), gaussian_sigmas(b, draws, other), strict=True)
    return _band([cos_phi(x, y) for x, y in pairs])


def untrained_band(spectrum: MapSpectrum, *, draws: int | None = None, seed: int = 0) -> Band:
    """Return cos φ of a map against untrained maps of its shape: independent Gaussian entries."""
    draws = draws_for(spectrum.shape) if draws is None else draws
    return _band([cos_phi(spectrum.sigma, s) for s in gaussian_sigmas(spectrum.shape, draws, seed)])


def _band(values: list[float]) -> Band:
    low, high = np.quantile(values, (0.025, 0.975))
    return Band(float(low), float(np.mean(values)), float(high), len(values))


def principal_angles(a: MapSpectrum, b: MapSpectrum) -> np.ndarray:
    """Return the (min rank,) principal angles between two column spaces, in radians, ascending.

    Accurate to the root of eps64, below the rounding of the float32 that maps are kept in.

    Raises
    ------
    SolverUsageError
        The maps take latents of different lengths.
    """
    if a.shape[0] != b.shape[0]:
        raise SolverUsageError(
            f"Maps of latents with {a.shape[0]} and {b.shape[0]} values have no common space. Compare maps "
            "of one encoder."
        )
    return np.sort(scipy.linalg.subspace_angles(a.basis, b.basis))


def overlap(angles: np.ndarray) -> float:
    """Return ||Q_a^T Q_b||_F^2 / min rank: 1 where one space lies in the other, 0 where orthogonal."""
    return float(np.mean(np.cos(angles) ** 2))


def chance_overlap(a: MapSpectrum, b: MapSpectrum) -> float:
    """Return the mean overlap of independent random subspaces of these ranks: the larger rank over d."""
    return max(a.rank, b.rank) / a.shape[0]
