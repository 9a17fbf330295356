"""Covariances that are the same everywhere in the picture: what few pairs can settle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.fft import dctn, idctn

from .arrays import as_like, to_host
from .frequency import Shape


def invariant(cov: Any, shape: Shape) -> Any:
    """Return the nearest matrix (Frobenius) that links only the channels of one spatial frequency.

    Cosine transforms (DCT-II) on both sides, the C x C blocks of equal frequencies kept, and back: C^2 H W
    numbers where there were (C H W)^2. Positive semi-definite blocks of several covariances stay a joint
    covariance, since this is a mean of sign changes, the same on both sides. Runs on the host.

    Parameters
    ----------
    cov
        (d, d) covariance or cross-covariance, d = C H W.
    shape
        (C, H, W).

    Returns
    -------
    (d, d) in the library of `cov`.
    """
    c, h, w = shape
    dim, places = math.prod(shape), np.arange(h * w)
    waves = dctn(to_host(cov).reshape(c, h, w, dim), axes=(1, 2), norm="ortho")
    waves = dctn(waves.reshape(dim, c, h, w), axes=(2, 3), norm="ortho").reshape(c, h * w, c, h * w)
    kept = np.zeros_like(waves)
    kept[:, places, :, places] = waves[:, places, :, places]
    back = idctn(kept.reshape(dim, c, h, w), axes=(2, 3), norm="ortho", overwrite_x=True)
    back = idctn(back.reshape(c, h, w, dim), axes=(1, 2), norm="ortho", overwrite_x=True)
    return as_like(back.reshape(dim, dim), cov)
