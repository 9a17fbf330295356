"""How two spectra compare, in figures and words: cos φ beside its random band, spectra as curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from latentstore.results import Curve, Figure
from solvers.spectra import Band, MapSpectrum, cos_phi, draws_for, gaussian_sigmas, is_flat

BY_CONSTRUCTION = "1 by construction: both have equal singular values (orthonormal columns)"
ONE_FLAT = "one of the two has orthonormal columns, so this measures the spread of the other alone"
SPECTRUM = "spectrum"
"""The plot of singular values."""
PAPER_TABLE = "the paper's Table 1, SD2 beside"
"""Where a report's data holds the printed figures."""
PLACES = {
    "below": "below the random band: the spectra differ more than those of two random matrices",
    "inside": "inside the random band: two random matrices agree as closely",
    "above": "above the random band: the spectra agree more closely than those of two random matrices",
}
_ROUNDING = 1e-14


@dataclass
class Found:
    """What has been measured so far.

    Attributes
    ----------
    summary, figures, curves, caveats
        Of the report.
    dim : int
        Length of a latent.
    models : list of str
        Of the store, that were fitted.
    spread : str
        What ± is here, or why there is none.
    """

    dim: int
    summary: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    spread: str = ""


def cosine(value: float) -> str:
    """Return cos φ to as many decimals as show three digits of 1 − cos φ, at least six."""
    left = 1 - value
    if left < _ROUNDING:
        return "1"
    return f"{value:.{max(6, 2 - math.floor(math.log10(left)))}f}"


def gap(value: float) -> str:
    """Return 1 − cos φ."""
    return "0" if 1 - value < _ROUNDING else f"{1 - value:.2e}"


def cos_figure(group: str, a: MapSpectrum, b: MapSpectrum, band: Band) -> Figure:
    """Return cos φ of two maps' spectra; its note says where it lies."""
    value, k = cos_phi(a.sigma, b.sigma), min(len(a.sigma), len(b.sigma))
    flat = is_flat(a.sigma[:k]), is_flat(b.sigma[:k])
    note = BY_CONSTRUCTION if all(flat) else PLACES[band.place(value)]
    if any(flat) and not all(flat):
        note += f"; {ONE_FLAT}"
    if len(a.sigma) != len(b.sigma):
        note += f"; the {k} largest singular values of each"
    return Figure("cos φ", value, group, "method", group, n=k, note=note)


def band_figure(group: str, band: Band) -> Figure:
    """Return the random band that cos φ of a group stands beside."""
    return Figure(
        "cos φ",
        band.mean,
        "two Gaussian matrices",
        "control",
        group,
        interval=(band.low, band.high),
        n=band.draws,
        note="random band: 95 % of independent pairs of these shapes",
    )


def spectrum_curves(spectra: dict[str, MapSpectrum]) -> list[Curve]:
    """Return singular values as shares of the largest, and those of Gaussian matrices of the same shapes."""
    own = [_spectrum_curve(name, s.sigma) for name, s in spectra.items()]
    return [*own, *(_random_curve(shape) for shape in sorted({s.shape for s in spectra.values()}))]


def curve(plot: str, label: str, y: np.ndarray, x_label: str, y_label: str, *, log: bool = False) -> Curve:
    """Return y over 1, 2, ... as a line of a plot."""
    return Curve(plot, label, list(range(1, len(y) + 1)), y.tolist(), x_label, y_label, y_log=log)


def _spectrum_curve(name: str, sigma: np.ndarray) -> Curve:
    share = sigma / sigma[0]
    return curve(SPECTRUM, name, share, "singular value, largest first", "share of the largest", log=True)


def _random_curve(shape: tuple[int, int]) -> Curve:
    drawn = gaussian_sigmas(shape, draws_for(shape), seed=0)
    drawn /= drawn[:, :1]
    line = _spectrum_curve(f"Gaussian {shape[0]} × {shape[1]}", drawn.mean(axis=0))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return replace(line, role="control", low=low.tolist(), high=high.tolist())
