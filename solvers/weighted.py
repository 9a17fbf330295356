"""The control that changes nothing but how a reference's norm is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from .analytic import Analytic
from .data import PairData
from .fitted import Fitted
from .gallery_maps import Capabilities


@dataclass(frozen=True)
class NormWeighted(Capabilities):
    """Centred inner product, divided by the reference's norm under the analytic reference map.

    W = I; a reference r scores q r / ||diag(a s^-1/2) V^T r||, with a and s as in :class:`Analytic`. Most
    of what the analytic map gains over raw latents comes from this norm, which weighs down what translation
    would not keep: a map that does not beat it has learned little else. Price: the analytic map's.

    Parameters
    ----------
    alpha_bar
        As for :class:`Analytic`, between 0 and 1.
    """

    alpha_bar: float = 0.1
    name: ClassVar[str] = "norm-weighted"
    nested_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Analytic(self.alpha_bar)

    def fit(self, data: PairData) -> Fitted:
        """Fit on the gallery."""
        analytic = Analytic(self.alpha_bar, rank=None).fit(data)
        W = np.eye(data.dim, dtype=np.float32)
        return Fitted(
            W,
            W,
            analytic.center,
            "cosine",
            analytic.spectrum,
            self.name,
            asdict(self),
            report=analytic.report,
            norm_map=analytic.reference_map,
        )
