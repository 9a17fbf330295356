"""Queries ranked: which of them can be ranked fairly, and what ranks they give the gallery by each map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.collection import Collection, Queries, Rows
from solvers.metrics import Ranking, average_precision, ranked, refuse_leak
from solvers.projection import Projection

HELD = 1 << 30
"""Bytes of projected references that are ranked from memory; more are projected block by block."""


@dataclass(frozen=True)
class Asked:
    """The queries that can be ranked fairly, of one store or several, as one list.

    Attributes
    ----------
    parts : tuple of Queries
    labels : (q,) int64 array
        What counts as the origin of each.
    reference_labels : (n,) int64 array
        The same of the gallery's rows, all of which are ranked.
    n_without_origin, n_copies : int
        Queries left out: without an origin in the gallery, and of whose origin a copy or near-duplicate
        stands in a split that was fitted or chosen on.
    """

    parts: tuple[Queries, ...]
    labels: npt.NDArray[np.int64]
    reference_labels: npt.NDArray[np.int64]
    n_without_origin: int
    n_copies: int

    @classmethod
    def of(cls, gallery: Collection, queries: Sequence[Queries]) -> Asked:
        """Leave out the queries that nothing can be told by."""
        references = gallery.labels(gallery.identity[gallery.gallery])
        known = set(references.tolist())
        parts, kept, without, copies = [], [references[:0]], 0, 0
        for asked in queries:
            labels = gallery.labels(asked.identity)
            findable = np.array([x in known for x in labels], bool)
            clean = gallery.is_clean(asked.identity, asked.collection.split[asked.rows])
            parts.append(replace(asked, rows=asked.rows[findable & clean]))
            kept.append(labels[findable & clean])
            without += int((~findable).sum())
            copies += int((findable & ~clean).sum())
        codes = np.unique(np.concatenate([references, *kept]), return_inverse=True)[1]
        return cls(tuple(parts), codes[len(references) :], codes[: len(references)], without, copies)

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column of the queries' manifests, (q,)."""
        return np.concatenate([getattr(p.collection, name)[p.rows] for p in self.parts])

    @cached_property
    def photos(self) -> npt.NDArray[Any]:
        """The photo behind each query: what stands or falls together, (q,)."""
        return self.column("group")

    def embedded(self, projection: Projection) -> npt.NDArray[np.float32]:
        """Return the queries projected, (q, m)."""
        some = [p for p in self.parts if len(p.rows)]
        return np.concatenate([p.collection.project_queries(projection, p.rows) for p in some])

    def check(self, gallery: Collection, methods: Mapping[str, Projection]) -> None:
        """Refuse maps of another space, and maps that were fitted or chosen on what is asked.

        Raises
        ------
        SpaceError
        LeakError
        """
        names = sorted({name for p in self.parts for name in used_names(p.collection, p.rows)})
        for projection in methods.values():
            projection.check_space(gallery.store.space.id)
            for part in self.parts:
                projection.check_space(part.collection.store.space.id)
            refuse_leak(projection, names)


def rankings(
    gallery: Collection,
    asked: Asked,
    maps: Mapping[str, Projection],
    *,
    top: int = 1,
    on_map: Callable[[int, int], None] | None = None,
) -> dict[str, Ranking]:
    """Rank the whole gallery for every query by every map, in one pass over the references for each.

    Parameters
    ----------
    top : int
        Negatives kept for each query.
    on_map : callable, optional
        Called with (1, 0) after each map.
    """
    out = {}
    for name, projection in maps.items():
        out[name] = _ranking(gallery, asked, projection, top)
        if on_map is not None:
            on_map(1, 0)
    return out


def _ranking(gallery: Collection, asked: Asked, projection: Projection, top: int) -> Ranking:
    rows, queries = gallery.gallery, asked.embedded(projection)
    if queries.shape[1] * 4 * len(rows) <= HELD:
        references = gallery.references(projection, rows)
        return average_precision(queries, asked.labels, references, asked.reference_labels, top=top)

    def fetch(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.concatenate(list(gallery.reference_blocks(projection, rows[positions])))

    blocks = gallery.reference_blocks(projection, rows)
    return ranked(queries, asked.labels, asked.reference_labels, blocks, fetch, top=top)


def used_names(collection: Collection, rows: Rows) -> list[str]:
    """Return the names by which rows count as used or reported: identities, and the photos behind them."""
    photos = {f"group {g}" for g in collection.group[rows].tolist()}
    return sorted(photos | set(collection.identity[rows].tolist()))
