"""Seeded worlds with known answers."""

from __future__ import annotations

import numpy as np


def orthonormal(rng, d, m):
    return np.linalg.qr(rng.standard_normal((d, m)))[0]


def planted(n, d, rank, *, seed=0, noise=0.0):
    """Pairs whose differences have exactly `rank` directions: o, g and the null basis (d, d - rank)."""
    rng = np.random.default_rng(seed)
    basis = orthonormal(rng, d, d)
    t = rng.standard_normal((n, rank)) @ basis[:, :rank].T + noise * rng.standard_normal((n, d))
    o = rng.standard_normal((n, d)) * np.linspace(2.0, 0.5, d) + 0.3
    return o, o + t, basis[:, rank:]


def gaussian(d, identities, per, *, alpha_bar=0.3, prompt=0.0, seed=0, decay=1.0, extra=0):
    """Origins of a Gaussian prior with decaying spectrum and their one-step translations (float32)."""
    rng = np.random.default_rng(seed)
    V = orthonormal(rng, d, d)
    e = (1.0 + np.arange(d)) ** -decay
    e *= d / e.sum()
    mu = rng.standard_normal(d)
    z = rng.standard_normal((identities + extra, d)) * np.sqrt(e)
    a = alpha_bar * e / (alpha_bar * e + 1 - alpha_bar)
    s = e * (1 - a**2)
    labels = np.repeat(np.arange(identities), per)
    shift = rng.standard_normal((len(labels), d)) * np.sqrt(e) * prompt
    g = a * z[labels] + np.sqrt(s) * rng.standard_normal((len(labels), d)) + (1 - a) * shift
    return (z @ V.T + mu).astype(np.float32), (g @ V.T + mu).astype(np.float32), labels
