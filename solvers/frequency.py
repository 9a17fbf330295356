"""A covariance for latents of few rows: the same everywhere in the picture, so diagonal over frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.fft import dctn, idctn

from .arrays import as_rows
from .errors import SolverUsageError
from .linalg import fix_signs
from .rank import rank_cutoff
from .spectrum import check_count

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class FrequencySpectrum:
    """Eigen-decomposition of a covariance that links only the channels of one spatial frequency.

    Attributes
    ----------
    mean
        (d,).
    values
        (r,) eigenvalues of the covariance (divided by n), descending, only those above the cutoff.
    n
        Rows seen.
    shape
        (C, H, W) of a latent, whose row is that array flattened; d = C H W.
    places
        (r,) index of each eigenvalue's frequency, v + W u.
    channels
        (r, C) unit vectors, the entry of largest magnitude positive: the eigenvector at its frequency. (A
        wave's own largest entries come in both signs, so that rounding would choose between them.)
    """

    mean: np.ndarray
    values: np.ndarray
    n: int
    shape: Shape
    places: np.ndarray
    channels: np.ndarray

    @property
    def dim(self) -> int:
        """Length of a latent."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """Number of directions with variance."""
        return len(self.values)

    @property
    def total(self) -> float:
        """Trace of the covariance."""
        return float(self.values.sum())

    def leading(self, m: int) -> np.ndarray:
        """Return the eigenvectors of the m largest values, (d, m) orthonormal."""
        c, h, w = self.shape
        cosines = np.zeros((m, c, h * w))
        cosines[np.arange(m), :, self.places[:m]] = self.channels[:m]
        waves = idctn(cosines.reshape(m, c, h, w), axes=(2, 3), norm="ortho", overwrite_x=True)
        return np.asarray(waves.reshape(m, -1).T)


def check_shape(shape: Shape, dim: int) -> Shape:
    """Return `shape` if latents of `dim` values can have it, else raise `SolverUsageError`."""
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) != dim:
        raise SolverUsageError(
            f"A latent of {dim} values cannot have the shape {tuple(shape)}: channels x height x width must "
            "be three positive numbers whose product is its length. Take the shape from the encoder."
        )
    return shape


def fit_frequency(blocks: Iterable[Any], shape: Shape, n: int) -> FrequencySpectrum:
    """Fit the covariance that is the same everywhere in the picture, in one pass.

    A cosine transform (DCT-II) of each channel, then one C x C covariance for each of the H x W
    frequencies: a stationary field with reflecting borders. It has C (C + 1) H W / 2 numbers where the
    sample covariance has d (d + 1) / 2, so that few rows settle it, and it reaches outside their span.
    What differs from place to place (sky above, ground below) is left to the mean.

    Price: O(n d (C + log d)) and 8 C d bytes; no d x d matrix, so that d = 16,384 costs little more.

    Parameters
    ----------
    blocks
        Iterable of (b, C H W) arrays, n rows in all.
    shape
        (C, H, W).
    n
        Rows announced.

    Raises
    ------
    SolverUsageError
        The shape is not the rows', the rows are not finite or all equal, or there are 0 or not n of them.
    """
    c, h, w = shape
    dim = math.prod(shape)
    shift: np.ndarray | None = None
    total, second = np.zeros((h * w, c)), np.zeros((h * w, c, c))
    seen = 0
    for block in blocks:
        rows = as_rows(block, dim)
        if len(rows) == 0:
            continue
        # About the first block's mean: raw second moments lose the digits that the variance needs.
        shift = rows.mean(axis=0) if shift is None else shift
        cosines = dctn((rows - shift).reshape(-1, c, h, w), axes=(2, 3), norm="ortho", overwrite_x=True)
        by_place = cosines.reshape(len(rows), c, h * w).transpose(2, 1, 0)
        second += by_place @ by_place.transpose(0, 2, 1)
        total += by_place.sum(axis=2)
        seen += len(rows)
    check_count(seen, n)
    if shift is None:
        raise SolverUsageError("A covariance needs at least 1 row, got 0. Check the selection of rows.")
    offset = total / seen
    values, vectors = np.linalg.eigh(second / seen - offset[:, :, None] * offset[:, None, :])
    mean = shift + idctn(offset.T.reshape(c, h, w), axes=(1, 2), norm="ortho").ravel()
    return _sorted(mean, values, vectors, seen, shape)


def _sorted(
    mean: np.ndarray, values: np.ndarray, vectors: np.ndarray, n: int, shape: Shape
) -> FrequencySpectrum:
    flat = values.ravel()
    order = np.argsort(-flat, kind="stable")
    sigma = np.sqrt(np.clip(flat[order] * n, 0.0, None))
    order = order[sigma > rank_cutoff(float(sigma[0]), n, len(flat), gram=True).value]
    if len(order) == 0:
        raise SolverUsageError(
            f"The {n} rows of the collection are all equal, so their covariance has rank 0 (1 needed). "
            "Use more, and different, images."
        )
    place, column = np.divmod(order, shape[0])
    channels = fix_signs(vectors[place, :, column].T).T
    return FrequencySpectrum(mean, flat[order], n, shape, place, channels)
