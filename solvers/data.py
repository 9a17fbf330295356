"""What the closed forms read: re-iterable blocks of pairs, origins and unlabelled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from .arrays import as_float64, as_rows, namespace
from .errors import NoPairsError, SolverUsageError
from .linalg import eigh, on_host, qr
from .moments import Moments, products_for
from .rank import Cutoff, rank_cutoff
from .spectrum import ROUGH_ROWS, Spectrum, check_count, collect, fit_spectrum, sums_spectrum
from .sums import RowSums


def _nothing() -> tuple[()]:
    return ()


def _none() -> None:
    return None


@dataclass(frozen=True, eq=False)
class PairData:
    """Callables that start a fresh iteration over the same rows each time.

    Attributes
    ----------
    dim
        Length of a latent.
    n_pairs, n_origins, n_gallery
        Row counts.
    stored_eps
        Machine epsilon of the dtype the latents were stored in; None when they were never rounded
        (or are stored in float64), so that arithmetic alone sets the rank cutoff.
    pairs_source
        Gives blocks of pairs: (origins, translations) row by row, or (origins, translations, of) with each
        origin once and `of` the index of every translation's.
    origins_source
        Gives blocks of the origins used for fitting, each origin once.
    gallery_source
        Gives blocks of unlabelled rows of the collection.
    moments_source
        Gives moments of these very pairs that were summed elsewhere (kept parts, a cluster), or None where
        there are none; they are then summed here, once for all methods.
    gallery_sums_source
        The same for the gallery's sums.
    """

    dim: int
    n_pairs: int
    n_origins: int
    n_gallery: int
    stored_eps: float | None
    pairs_source: Callable[[], Iterable[tuple[Any, ...]]] = _nothing
    origins_source: Callable[[], Iterable[Any]] = _nothing
    gallery_source: Callable[[], Iterable[Any]] = _nothing
    moments_source: Callable[[], Moments | None] = _none
    gallery_sums_source: Callable[[], RowSums | None] = _none

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over blocks of pairs, row i of both belonging together."""
        for origins, translations, *of in self.pairs_source():
            yield (origins[of[0]] if of else origins), translations

    def origins(self) -> Iterator[Any]:
        """Iterate over blocks of origins."""
        return iter(self.origins_source())

    def gallery(self) -> Iterator[Any]:
        """Iterate over blocks of the collection."""
        return iter(self.gallery_source())

    @cached_property
    def gallery_spectrum(self) -> Spectrum:
        """Spectrum of the gallery, computed once and shared by every method that reads it."""
        if self.n_gallery < 1:
            raise SolverUsageError(
                "This method reads the collection's covariance, and there are 0 rows in it. "
                "Encode the collection first, or pass gallery rows."
            )
        sums = self.gallery_sums_source()
        if sums is not None:
            return sums_spectrum(sums)
        return fit_spectrum(self.gallery(), self.dim, self.n_gallery, precision=products_for(self.stored_eps))

    @cached_property
    def moments(self) -> Moments:
        """Sums over the pairs and their origins, made in one pass and shared by every method.

        With fewer origins and translations together than dimensions, the sums are of coordinates in the
        span of all of them (`Moments.basis`): no covariance reaches outside it. (Pairs whose origins are not
        among the announced ones are summed whole.)
        """
        self.require_pairs("moments")
        found = self.moments_source()
        if found is not None:
            self.check_counts(found)
            return found
        inside = _span(self) if self.n_origins + self.n_pairs < self.dim else None
        return _summed(self) if inside is None else inside

    @cached_property
    def second_t(self) -> tuple[Any, Any]:
        """Eigenvalues, descending, and eigenvectors of E[t t^T] in the coordinates of `moments`."""
        values, vectors = eigh(self.moments.pairs.second_t)
        xp = namespace(values)
        return xp.clip(values, min=0.0), vectors

    def check_counts(self, moments: Moments) -> None:
        """Raise `SolverUsageError` unless moments hold as many pairs and origins as announced here."""
        check_count(moments.pairs.n, self.n_pairs, "pairs")
        check_count(moments.origins.n, self.n_origins, "origins")

    def require_pairs(self, method: str) -> None:
        """Raise `NoPairsError` when there is nothing for `method` to learn from."""
        if self.n_pairs < 1 or self.n_origins < 1:
            raise NoPairsError(
                f"The method {method} learns from pairs of an origin and its translation; there are "
                f"{self.n_pairs} pairs and {self.n_origins} origins. Translate or simulate some, "
                "or use the method analytic, which needs the collection alone."
            )

    @classmethod
    def from_arrays(
        cls,
        o: Any,
        g: Any,
        *,
        origins: Any = None,
        gallery: Any = None,
        stored_eps: float | None = None,
        block: int = 4096,
    ) -> Self:
        """Wrap arrays: row i of `o` is the origin of row i of `g`.

        Without `origins` the rows of `o` serve, without `gallery` the origins do. Without `stored_eps`
        the arrays' own dtype gives it: float16 and float32 rows carry rounding, float64 rows none.
        """
        if o.ndim != 2 or tuple(o.shape) != tuple(g.shape):
            raise SolverUsageError(
                f"Origins and translations must have one shape (pairs, d); got {tuple(o.shape)} and "
                f"{tuple(g.shape)}. "
                "Repeat an origin for each of its translations."
            )
        origins = o if origins is None else origins
        gallery = origins if gallery is None else gallery
        if stored_eps is None:
            stored_eps = max(filter(None, (dtype_eps(o), dtype_eps(g))), default=None)
        return cls(
            dim=int(o.shape[1]),
            n_pairs=len(o),
            n_origins=len(origins),
            n_gallery=len(gallery),
            stored_eps=stored_eps,
            pairs_source=lambda: zip(_blocks(o, block), _blocks(g, block), strict=True),
            origins_source=lambda: _blocks(origins, block),
            gallery_source=lambda: _blocks(gallery, block),
        )

    @classmethod
    def from_gallery(cls, gallery: Any, *, block: int = 4096) -> Self:
        """Wrap a collection without pairs, for the methods that need none."""
        return cls(
            dim=int(gallery.shape[1]),
            n_pairs=0,
            n_origins=0,
            n_gallery=len(gallery),
            stored_eps=dtype_eps(gallery),
            gallery_source=lambda: _blocks(gallery, block),
        )


def differences(data: PairData) -> Iterator[tuple[Any, float]]:
    """Yield float64 blocks of t = g - o, and with each the sum of squares of the latents it came from.

    The difference is formed before any product, and rounding is relative to the latents, not to t.
    """
    seen = 0
    for o_block, g_block in data.pairs():
        o, g = as_float64(o_block, data.dim, "origins"), as_float64(g_block, data.dim, "translations")
        if len(o) != len(g):
            raise SolverUsageError(
                f"A block of pairs needs as many origins as translations; got {len(o)} and {len(g)}. "
                "Repeat an origin for each of its translations."
            )
        seen += len(o)
        yield g - o, float((o * o).sum() + (g * g).sum())
    check_count(seen, data.n_pairs, "pairs")


def difference_cutoff(
    data: PairData, sigma_max: float, squares: float, *, gram: bool = True, noise: float = 0.0
) -> Cutoff:
    """Cutoff for the singular values of T; `squares` is that of all latents behind it."""
    rms = float(np.sqrt(max(squares, 0.0) / (2 * data.n_pairs * data.dim)))
    return rank_cutoff(
        sigma_max,
        data.n_pairs,
        data.dim,
        gram=gram,
        stored_eps=data.stored_eps,
        rms=rms,
        tile_noise=noise,
    )


def _summed(data: PairData) -> Moments:
    """Stream the moments of all pairs in the blocks' own library, and of their origins, each once."""
    moments: Moments | None = None
    for origins, translations, *of in data.pairs_source():
        if not len(translations):
            continue
        if moments is None:
            like = None if on_host(origins) else origins
            shift = as_rows(origins[:ROUGH_ROWS], data.dim, "origins").mean(axis=0)
            moments = Moments(data.dim, shift=shift, precision=products_for(data.stored_eps), like=like)
        moments.pairs.update(origins, translations, *of)
    if moments is None:
        raise SolverUsageError(f"{data.n_pairs} pairs were announced, but there are no blocks of them.")
    for block in data.origins():
        moments.origins.update(block)
    data.check_counts(moments)
    return moments


def _span(data: PairData) -> Moments | None:
    """Sum the coordinates of all rows in an orthonormal basis of their span, in float64.

    None when the pairs' own origins lie outside the span of the announced origins and the differences.
    """
    origins = collect(data.origins(), data.dim, data.n_origins, "origins")
    pairs = [
        (as_float64(o, data.dim, "origins"), as_float64(g, data.dim, "translations")) for o, g in data.pairs()
    ]
    check_count(sum(len(g) for _, g in pairs), data.n_pairs, "pairs")
    # Differences are formed before anything else is done to them.
    moved = [(o, g - o) for o, g in pairs]
    basis = qr(namespace(origins).concat([origins, *(t for _, t in moved)]).T)[0]
    for o, _ in moved:
        outside = float(((o - (o @ basis) @ basis.T) ** 2).sum())
        if outside > 1e-20 * float((o**2).sum()):
            return None
    like = None if on_host(basis) else basis
    moments = Moments(basis.shape[1], basis=basis, shift=origins.mean(axis=0) @ basis, like=like)
    for o, t in moved:
        moments.pairs.add(moments.pairs.prepare_differences(o @ basis, t @ basis))
    moments.origins.update(origins @ basis)
    data.check_counts(moments)
    return moments


def dtype_eps(array: Any) -> float | None:
    """Machine epsilon of a storage dtype narrower than float64, else None."""
    name = str(array.dtype).removeprefix("torch.")
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}.get(name)


def _blocks(rows: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
