"""The analytic map: what a diffusion translation leaves of its origin, known without any pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .data import PairData
from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .frequency import FrequencySpectrum, Shape, check_shape, fit_frequency
from .gallery_maps import Capabilities, available_rank, gallery_report
from .projection import SCORES
from .rank import check_rank
from .spectrum import Spectrum

ENERGY_FLOOR = 1e-4  # of the largest eigenvalue: a covariance estimated from few rows knows no less


@dataclass(frozen=True)
class Analytic(Capabilities):
    """The Bayes map of a one-step diffusion translation under a Gaussian prior; no pairs, no tuning.

    With originals N(mu, V diag(e) V^T) scaled to mean eigenvalue 1, the one-step estimate of Lemma 1 is
    linear and Gaussian: h = sqrt(ab) e / (ab e + 1 - ab), a = sqrt(ab) h, s = e (1 - a^2), so that in
    V-coordinates a query is N(a o, s). Query map V s^-1/2, reference map V diag(a) s^-1/2, both after
    subtracting mu; with the score "bias" this is the exact log-likelihood up to a constant per query.
    A random prompt that moves the prior's mean with variance prompt^2 e adds (1 - a)^2 prompt^2 e to s.

    Translations of unknown strength: for ab drawn from several values, Cov(g, o) = E[a] e and
    Var g = e (1 + prompt^2 E[(1 - a)^2]), so the linear-Gaussian model nearest to the mixture (least
    Kullback-Leibler divergence) has a = E[a] and s = Var g - E[a]^2 e. Its score stays one inner product;
    the mixture's own likelihood, which weighs the strengths anew for every pair, does not. The strengths'
    spread counts as noise in proportion to e, so the map leans towards whitening: that helps against
    changes as large as the pictures' own variation (colour, gamma) and hurts where translation keeps the
    largest components. One value in the middle then comes nearer to the mixture: see benchmarks/analytic.py.

    Price: one covariance of the gallery and its eigen-decomposition; with `latent_shape`, one pass.

    Parameters
    ----------
    alpha_bar
        Share of the signal that survives the noising, between 0 and 1; less is a stronger translation.
        Several values are several strengths, equally likely; one that is given twice counts twice.
    rank
        Number of components, those of largest a^2 e / s first (PCA's order); None for all.
    prompt
        Standard deviation of the prompt's shift of the mean, in units of the prior's.
    score
        "cosine", or "bias" for the exact Bayes score.
    latent_shape
        (C, H, W) takes the prior of `fit_frequency`, which is the same everywhere in the picture: for
        collections of fewer rows than dimensions, with all ranks. None takes the sample covariance.

    Raises
    ------
    SolverUsageError
        A knob outside its range; from `fit`, a shape that is not the latents', or rows that are all equal.
    """

    alpha_bar: float | tuple[float, ...] = 0.1
    rank: int | None = 512
    prompt: float = 0.0
    score: str = "cosine"
    latent_shape: Shape | None = None
    name: ClassVar[str] = "analytic"
    all_ranks: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.alpha_bar, Sequence):  # JSON brings lists
            object.__setattr__(self, "alpha_bar", tuple(self.alpha_bar))
        if self.latent_shape is not None:
            object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        values = np.atleast_1d(self.alpha_bar)
        if len(values) == 0 or not ((values > 0.0) & (values < 1.0)).all():
            raise SolverUsageError(
                "alpha_bar must be one or several numbers strictly between 0 and 1, not "
                f"{self.alpha_bar}. 0.1 is a fair default."
            )
        if not (np.isfinite(self.prompt) and self.prompt >= 0.0):
            raise SolverUsageError(f"prompt must be finite and at least 0, not {self.prompt}.")
        if self.score not in SCORES:
            raise SolverUsageError(f"The score must be one of {', '.join(SCORES)}, not {self.score!r}.")

    def fit(self, data: PairData) -> Fitted:
        """Fit on the gallery. With n < d rows the sample covariance has the components of their span."""
        spectrum: Spectrum | FrequencySpectrum
        if self.latent_shape is None:
            spectrum = data.gallery_spectrum
            m = available_rank(self.rank, spectrum)
            vectors, report = spectrum.vectors[:, :m], gallery_report(spectrum, self.rank, m)
        else:
            check_rank(data.dim if self.rank is None else self.rank, data.dim)
            spectrum = fit_frequency(data.gallery(), check_shape(self.latent_shape, data.dim), data.n_gallery)
            m = min(self.rank or spectrum.rank, spectrum.rank)
            vectors, report = spectrum.leading(m), _frequency_report(spectrum, self.rank, m)
        scale = spectrum.dim / spectrum.total  # the mean is over all d dimensions, spanned or not
        e = spectrum.values[:m] * scale
        a, s = transfer(np.maximum(e, ENERGY_FLOOR * e[0]), self.alpha_bar, self.prompt)
        # Latents arrive unscaled, so the maps carry the scale.
        query = vectors * np.sqrt(scale / s)
        return Fitted(
            query,
            query * a,
            spectrum.mean,
            self.score,
            spectrum.values,
            self.name,
            asdict(self),
            report=report,
        )


def transfer(
    e: np.ndarray, alpha_bar: float | tuple[float, ...], prompt: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (a, s), each (r,), of g ~ N(a o, s) for directions of prior variance e, mean eigenvalue 1.

    Both a and a^2 e / s grow with e, whatever the strengths and the prompt: PCA's order is theirs.
    """
    ab = np.atleast_1d(np.asarray(alpha_bar, dtype=np.float64))[:, None]
    each = ab * e / (ab * e + 1.0 - ab)
    a = each.mean(axis=0)
    return a, e * (1.0 - a**2 + prompt**2 * ((1.0 - each) ** 2).mean(axis=0))


def _frequency_report(spectrum: FrequencySpectrum, asked: int | None, kept: int) -> dict[str, Any]:
    c, h, w = spectrum.shape
    text = (
        f"The covariance of {spectrum.n} rows, taken to be the same everywhere in the picture ({c} x {c} for "
        f"each of {h} x {w} frequencies), has {spectrum.rank} of {spectrum.dim} directions with variance."
    )
    if asked is not None and kept < asked:
        text += f" Rank {asked} was asked for; {kept} is all there is."
    return make_report(path="frequency", statement=text, requested_rank=asked, effective_rank=kept)
