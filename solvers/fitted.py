"""What a fit returns: the maps in float64 and an account of how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .projection import Projection

REPORT_KEYS = (
    "numerical_rank",
    "cutoff",
    "decided_by",
    "sigma_max",
    "sigma_min",
    "n_pairs",
    "path",
    "statement",
    "requested_rank",
    "effective_rank",
)


def make_report(**known: Any) -> dict[str, Any]:
    """Return a report with every key, None where the method has nothing to say."""
    return {**dict.fromkeys(REPORT_KEYS), **known}


@dataclass(frozen=True, eq=False)
class Fitted:
    """Maps, centre and report of one fit.

    Attributes
    ----------
    query_map, reference_map
        (d, m); the same array for symmetric methods.
    center
        (d,) or None.
    score
        "cosine" or "bias".
    spectrum
        Values the method read off the data, descending.
    method, knobs, seed
        What ran.
    report
        numerical_rank, cutoff, decided_by, sigma_max, sigma_min (of T), n_pairs, path, statement,
        requested_rank and effective_rank; None where the method has no T.
    query_center, norm_map
        See :class:`Projection`.
    """

    query_map: np.ndarray
    reference_map: np.ndarray
    center: np.ndarray | None
    score: str
    spectrum: np.ndarray
    method: str
    knobs: Mapping[str, Any]
    seed: int | None = None
    report: Mapping[str, Any] = field(default_factory=make_report)
    query_center: np.ndarray | None = None
    norm_map: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Number of columns obtained."""
        return int(self.query_map.shape[1])

    def projection(
        self,
        *,
        space_id: str = "",
        data_hash: str = "",
        used_identities: np.ndarray | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Projection:
        """Freeze the maps (float32) together with where the data came from."""
        used = np.zeros(0, dtype=np.uint64) if used_identities is None else used_identities
        return Projection(
            self.query_map,
            self.reference_map,
            center=self.center,
            score=self.score,
            spectrum=self.spectrum,
            method=self.method,
            knobs=dict(self.knobs),
            space_id=space_id,
            data_hash=data_hash,
            used_identities=used,
            seed=self.seed,
            query_center=self.query_center,
            norm_map=self.norm_map,
            provenance={**(provenance or {}), "fit": dict(self.report)},
        )
