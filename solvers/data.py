"""What the closed forms read: re-iterable blocks of pairs, origins and unlabelled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from .arrays import as_rows
from .errors import NoPairsError, SolverUsageError
from .rank import Cutoff, rank_cutoff
from .spectrum import Spectrum, check_count, fit_spectrum


def _nothing() -> tuple[()]:
    return ()


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
        Gives (origins, translations) blocks.
    origins_source
        Gives blocks of the origins used for fitting, each origin once.
    gallery_source
        Gives blocks of unlabelled rows of the collection.
    """

    dim: int
    n_pairs: int
    n_origins: int
    n_gallery: int
    stored_eps: float | None
    pairs_source: Callable[[], Iterable[tuple[Any, Any]]] = _nothing
    origins_source: Callable[[], Iterable[Any]] = _nothing
    gallery_source: Callable[[], Iterable[Any]] = _nothing

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over blocks of pairs."""
        return iter(self.pairs_source())

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
        return fit_spectrum(self.gallery(), self.dim, self.n_gallery)

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


def differences(data: PairData) -> Iterator[tuple[np.ndarray, float]]:
    """Yield float64 blocks of t = g - o, and with each the sum of squares of the latents it came from.

    The difference is formed before any product, and rounding is relative to the latents, not to t.
    """
    seen = 0
    for o_block, g_block in data.pairs():
        o, g = as_rows(o_block, data.dim, "origins"), as_rows(g_block, data.dim, "translations")
        if len(o) != len(g):
            raise SolverUsageError(
                f"A block of pairs needs as many origins as translations; got {len(o)} and {len(g)}. "
                "Repeat an origin for each of its translations."
            )
        seen += len(o)
        yield g - o, float(np.einsum("ij,ij->", o, o) + np.einsum("ij,ij->", g, g))
    check_count(seen, data.n_pairs, "pairs")


def difference_cutoff(data: PairData, sigma_max: float, squares: float) -> Cutoff:
    """Cutoff for the singular values of T, read off its Gram; `squares` is summed by `differences`."""
    rms = float(np.sqrt(squares / (2 * data.n_pairs * data.dim)))
    return rank_cutoff(sigma_max, data.n_pairs, data.dim, gram=True, stored_eps=data.stored_eps, rms=rms)


def dtype_eps(array: Any) -> float | None:
    """Machine epsilon of a storage dtype narrower than float64, else None."""
    name = str(array.dtype).removeprefix("torch.")
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}.get(name)


def _blocks(rows: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
