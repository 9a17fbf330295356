"""solve --simulate: pairs for who has none, drawn in memory from the store's own training images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.collection import BLOCK, Collection, Rows
from cli.knobs import Strengths
from latentstore.errors import UsageError
from latentstore.simulate import Diffusion, GaussianPrior, translate
from solvers.data import PairData
from solvers.spectrum import fit_spectrum


@dataclass(frozen=True, eq=False)
class SimulatedPairs:
    """Each training image with one translation of it by the analytic diffusion; nothing is written.

    Attributes
    ----------
    collection : Collection
    strengths : Strengths
    rows : (n,) array
        The training images.
    """

    collection: Collection
    strengths: Strengths
    rows: Rows

    @classmethod
    def of(cls, collection: Collection, strengths: Strengths) -> SimulatedPairs:
        """Take every valid origin and reference of the training split.

        Raises
        ------
        UsageError
            Fewer than two of them, or a strength that is none.
        """
        rows = collection.gallery[collection.split[collection.gallery] == "train"]
        if len(rows) < 2:
            raise UsageError(
                f"{collection.store.path} has {len(rows)} valid images in its training split (8 identities "
                "in 10, by hash); --simulate fits its prior on at least 2. Encode more images."
            )
        made = cls(collection, strengths, rows)
        _ = made._diffusions  # refuses a wrong strength before anything is read
        return made

    @cached_property
    def _diffusions(self) -> list[Diffusion]:
        s = self.strengths
        return [Diffusion(a, s.prompt, seed=s.seed) for a in s.alpha_bars]

    @cached_property
    def _level(self) -> npt.NDArray[np.int64]:
        """Which strength each row gets: each as often as any other, in a seeded order."""
        even = np.arange(len(self.rows)) % len(self._diffusions)
        return np.random.default_rng(self.strengths.seed).permutation(even)

    @cached_property
    def _prior(self) -> GaussianPrior:
        """N(mean, Σ) of the training images alone: it must not know what is reported on."""
        blocks = self.collection.blocks(self.rows)
        spectrum = fit_spectrum(blocks, self.collection.store.layout.dim, len(self.rows))
        return GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Yield blocks of (origins, translations), both in the stored dtype."""
        for at in range(0, len(self.rows), BLOCK):
            rows, level = self.rows[at : at + BLOCK], self._level[at : at + BLOCK]
            origins = self.collection.read(rows)
            made = np.empty_like(origins)
            for k in np.unique(level):
                here = level == k
                made[here] = translate(origins[here], self._prior, self._diffusions[k], rows[here])
            yield origins, made

    @cached_property
    def data(self) -> PairData:
        """The pairs as the closed forms read them, with the store's own gallery."""
        return replace(
            self.collection.data,
            n_pairs=len(self.rows),
            n_origins=len(self.rows),
            pairs_source=self.pairs,
            origins_source=lambda: self.collection.blocks(self.rows),
            moments_source=lambda: None,  # those kept are of the store's own pairs
        )
