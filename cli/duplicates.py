"""duplicates: whitening fitted on the collection, groups found, kept in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import Collection
from latentstore import duplicates
from latentstore.groups import write
from solvers.spectrum import fit_spectrum


@dataclass(frozen=True)
class NearDuplicates:
    """What was found.

    Attributes
    ----------
    groups : list of list of (path, score)
        Largest first; the first member leads, with score 1.
    settings : dict
        As kept beside the groups.
    """

    store: str
    groups: list[list[tuple[str, float]]]
    settings: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows in all groups."""
        return sum(map(len, self.groups))


def run_duplicates(
    store: Path,
    *,
    threshold: float | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> NearDuplicates:
    """Find near-duplicates among the valid origins and references, and keep the groups in the store.

    Raises
    ------
    UsageError
        A collection too small or too uniform to tell duplicates from chance.
    """
    collection = Collection.open(store)
    collection.require_gallery()
    rows = collection.gallery
    if on_start is not None:
        on_start(len(rows), len(rows))
    found = duplicates.find(collection.read, rows, whiten(collection), threshold=threshold, on_rows=on_rows)
    write(collection.store, found, collection.data_hash)
    score = dict(zip(found.row.tolist(), found.score.tolist(), strict=True))
    groups = [[(str(collection.path[r]), score[r]) for r in rows] for rows in found.members.values()]
    return NearDuplicates(str(store), groups, found.settings)


def whiten(collection: Collection) -> duplicates.Whitening:
    """Fit the whitening on a seeded sample of the gallery."""
    rows = collection.gallery
    some = np.sort(np.random.default_rng(0).permutation(rows)[: duplicates.FIT_ROWS])
    spectrum = fit_spectrum(collection.blocks(some), collection.store.layout.dim, len(some))
    m = min(duplicates.sketch_rank(len(some)), spectrum.rank)
    return duplicates.Whitening(spectrum.mean, spectrum.vectors[:, :m] / np.sqrt(spectrum.values[:m]))
