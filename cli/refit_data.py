"""A model's training pairs as refits read them: all of them, without one part, or resampled by identity.

Nothing is read once per fit. With fewer rows than dimensions the rows are read once, and their coordinates in
their common span are kept; otherwise the sums of each part are made once, and a part is taken out of the
total. Resamples alone, which weigh every identity anew, go over the rows again where sums are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cli import kept, streams
from cli.collection import Collection, Rows
from cli.passes import PARTS, PairPass
from cli.streams import Task
from latentstore.errors import StoreWriteError
from solvers.data import PairData
from solvers.errors import SolverWriteError
from solvers.moments import Moments

_SPARE = 2 * kept.PAIR_MATRICES
"""Matrices for which memory must be free yet, twice a fit's, for a part's sums to stay in it."""


@dataclass(eq=False)
class ModelPairs:
    """The training pairs of one model, sorted by part, and in a part by origin.

    Attributes
    ----------
    collection : Collection
    plan : PairPass
        Of all models, in parts hashed from the photo.
    tasks : list of Task
        The model's own, a part each.
    """

    collection: Collection
    plan: PairPass
    tasks: list[Task]
    _held: dict[int, Moments] = field(default_factory=dict)

    @classmethod
    def by_model(cls, collection: Collection, parts: int | None) -> dict[str, ModelPairs]:
        """Return the pairs of every model, in ``parts`` parts (None: as many as are kept by default)."""
        plan = collection.pair_pass("train", models=True, parts=parts or PARTS)
        models = sorted({t.model for t in plan.tasks if t.model is not None})
        return {m: cls(collection, plan, [t for t in plan.tasks if t.model == m]) for m in models}

    @property
    def parts(self) -> list[int]:
        """The parts that hold pairs of this model."""
        return [t.part for t in self.tasks]

    @cached_property
    def origins(self) -> Rows:
        """The (n,) origin rows, pair by pair."""
        return np.concatenate([t.origins for t in self.tasks])

    @cached_property
    def translations(self) -> Rows:
        """The (n,) translation rows."""
        return np.concatenate([t.translations for t in self.tasks])

    @cached_property
    def identities(self) -> npt.NDArray[np.int64]:
        """The (n,) numbers, from 0, of the pairs' identities; copies and near-duplicates are one."""
        names = self.collection.labels(self.collection.identity[self.translations])
        return np.unique([str(name) for name in names], return_inverse=True)[1]

    @cached_property
    def in_span(self) -> bool:
        """Whether there are fewer rows than dimensions: their span is then the smaller problem."""
        rows = len(np.unique(self.origins)) + len(self.translations)
        return rows < self.collection.store.layout.dim

    @cached_property
    def whole(self) -> PairData:
        """All pairs, each origin once."""
        if self.in_span:
            own, of = np.unique(self.origins, return_inverse=True)
            o, g = self.collection.read(own), self.collection.read(self.translations)
            return replace(
                self._data(np.arange(len(of)), own),
                pairs_source=lambda: iter([(o, g, of)]),
                origins_source=lambda: iter([o]),
            )
        kept.check_memory(self.collection.store.layout.dim, kept.PAIR_MATRICES)
        everything = np.arange(len(self.origins))
        return replace(self._data(everything, np.unique(self.origins)), moments_source=lambda: self._total)

    def without(self, part: int) -> PairData:
        """Return all pairs but those of one part, each origin once."""
        chosen = np.flatnonzero(np.repeat(self.parts, [len(t.origins) for t in self.tasks]) != part)
        own = np.unique(self.origins[chosen])
        left = self._data(chosen, own)
        if self.in_span:
            return replace(left, moments_source=lambda: self._coordinates.sums(chosen, own))
        if part not in self.parts:
            return self.whole
        return replace(left, moments_source=lambda: less(self._total, self._part(part)))

    def drawn(self, rng: np.random.Generator) -> PairData:
        """Return the pairs of as many identities as there are, drawn with replacement.

        Each time an identity is drawn its pairs count once more, and each of its origins once more, however
        many translations that has: as if another identity looked the same.
        """
        count = int(self.identities.max()) + 1
        drawn = rng.integers(count, size=count)
        pairs = _of_each(self.identities, count)
        origin_of = [np.unique(self.origins[own]) for own in pairs]
        chosen = np.concatenate([pairs[i] for i in drawn])
        own = np.concatenate([origin_of[i] for i in drawn])
        again = self._data(chosen, own)
        if self.in_span:
            return replace(again, moments_source=lambda: self._coordinates.sums(chosen, own))
        return again

    def forget(self) -> None:
        """Give back the memory of rows and sums: each model is fitted in its turn."""
        self._held.clear()
        for name in ("whole", "_total", "_coordinates"):
            self.__dict__.pop(name, None)

    def _data(self, chosen: npt.NDArray[np.int64], own: Rows) -> PairData:
        """Return chosen pairs (by their number here) and origin rows, both with repeats, as blocks."""
        origins, translations = self.origins[chosen], self.translations[chosen]
        return replace(
            self.collection.data,
            n_pairs=len(chosen),
            n_origins=len(own),
            pairs_source=lambda: streams.pair_blocks(self.collection.store.reader, origins, translations),
            origins_source=lambda: self.collection.blocks(own),
            moments_source=lambda: None,  # those of the collection are of all its pairs
        )

    @cached_property
    def _coordinates(self) -> _Coordinates:
        return _Coordinates.of_data(self.whole, np.unique(self.origins))

    @cached_property
    def _total(self) -> Moments:
        if self.plan.pays and not self.plan.done():
            with suppress(StoreWriteError, SolverWriteError):  # nobody asked for them to be kept
                self.plan.run()
        total = Moments(self.plan.store.layout.dim, shift=self.plan.shift, precision=self.plan.precision)
        for part in self.parts:
            total.merge(self._part(part))
        return total

    def _part(self, part: int) -> Moments:
        """Return the sums of one part, which stay in memory while there is plenty."""
        if part in self._held:
            return self._held[part]
        others = [t.part for t in self.plan.tasks if t.part != part]
        found = self.plan.moments(self.tasks[0].model, without=others)
        if kept.free_memory() > _SPARE * 8 * found.dim**2:
            self._held[part] = found
        return found


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """Rows in an orthonormal basis of the span of all of them, in float64.

    Attributes
    ----------
    whole : Moments
        Of all pairs, with the (d, k) basis.
    rows : (m,) array
        The origin rows, ascending.
    origins : (m, k) array
    differences : (n, k) array
    of : (n,) array
        Which origin each difference has.
    """

    whole: Moments
    rows: Rows
    origins: npt.NDArray[np.float64]
    differences: npt.NDArray[np.float64]
    of: npt.NDArray[np.int64]

    @classmethod
    def of_data(cls, data: PairData, rows: Rows) -> _Coordinates:
        ((o, g, of),) = data.pairs_source()
        o, basis = o.astype(np.float64), data.moments.basis
        # The difference is formed before anything else is done to it.
        return cls(data.moments, rows, o @ basis, (g - o[of]) @ basis, of)

    def sums(self, chosen: npt.NDArray[np.int64], own: Rows) -> Moments:
        """Return the moments of chosen pairs and origin rows, both with repeats."""
        basis, shift = self.whole.basis, self.whole.pairs.shift
        made = Moments(self.whole.dim, basis=basis, shift=shift)
        block = made.pairs.prepare_differences(self.origins[self.of[chosen]], self.differences[chosen])
        made.pairs.add(block)
        made.origins.update(self.origins[np.searchsorted(self.rows, own)])
        return made


def less(total: Moments, part: Moments) -> Moments:
    """Return the sums of what is left of a total without one of its parts.

    Both are about the same shift, so that nothing but float64 sums of like size are subtracted; what was
    zero in every other part is zero again, exactly.
    """
    left = Moments(total.dim, shift=total.pairs.shift, precision=total.precision)
    left.merge(total)
    sides: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
        (left.pairs, part.pairs, ("sum_o", "sum_t", "oo", "ot", "tt")),
        (left.origins, part.origins, ("sum", "xx")),
    )
    for into, own, names in sides:
        into.n -= own.n
        for name in names:
            sums = getattr(into, name)
            sums -= getattr(own, name)
    return left


def _of_each(numbers: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """Return for each number below ``count`` where it stands."""
    ends = np.cumsum(np.bincount(numbers, minlength=count))[:-1]
    return np.split(np.argsort(numbers, kind="stable"), ends)


def mean_of(blocks: Iterator[Any], dim: int) -> npt.NDArray[np.float64]:
    """Return the mean of rows, (dim,), in float64."""
    total, n = np.zeros(dim), 0
    for block in blocks:
        total += block.sum(axis=0, dtype=np.float64)
        n += len(block)
    return total / n
