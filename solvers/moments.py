"""Streamed second moments: what every closed form needs to know of the data, from one pass over it.

Three kinds of sums (DESIGN: Moments). :class:`RowSums` of unlabelled rows; :class:`PairSums` of pairs of an
origin o and its translation g, with the difference t = g - o formed *before* any product, since differences
taken of finished sums would cancel exactly the small directions that the null space is about; and
:class:`Moments`, pairs together with their origins counted once each. All live in the library of the arrays
they are fed (NumPy, CuPy, torch), are added up in float64, merge in any order, and are saved packed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

from .errors import SolverUsageError
from .files import read_safetensors, write_safetensors
from .products import TILE, Precision
from .sums import PairSums, RowSums

_FORMAT = "solvers.moments"


def products_for(stored_eps: float | None) -> Precision:
    """Return in which precision tiles are multiplied, from the machine epsilon of the stored latents.

    Latents stored in half precision carry more rounding than float32 tiles add; others do not.
    """
    return "float32" if stored_eps is not None and stored_eps > 2.0**-20 else "float64"


class Moments:
    """Sums over pairs, and over their origins with each counted once: what the pair methods fit on.

    Memory: four dim x dim float64 matrices (d = 4,096: 0.5 GB), whatever the number of rows.

    Parameters
    ----------
    dim
        Length of a row.
    shift, precision, like
        As for :class:`RowSums`.
    basis
        (full_dim, dim) orthonormal, when the rows are coordinates in a subspace that holds all of them.

    Attributes
    ----------
    pairs
        :class:`PairSums`.
    origins
        :class:`RowSums`.
    """

    def __init__(
        self,
        dim: int,
        *,
        shift: Any = None,
        precision: Precision = "float64",
        like: Any = None,
        basis: Any = None,
    ) -> None:
        self.pairs = PairSums(dim, shift=shift, precision=precision, like=like)
        self.origins = RowSums(dim, shift=shift, precision=precision, like=like)
        self.basis = basis

    @property
    def dim(self) -> int:
        """Length of a row as it is summed."""
        return self.pairs.dim

    @property
    def full_dim(self) -> int:
        """Length of a latent: what "mean diagonal" is taken over."""
        return self.dim if self.basis is None else int(self.basis.shape[0])

    @property
    def precision(self) -> Precision:
        """In which tiles are multiplied."""
        return self.pairs.precision

    def update(self, origins: Any, translations: Any, of: Any = None) -> None:
        """Add all pairs of some origins: each origin counts once, each pair once.

        See :meth:`PairSums.update`; an origin whose translations come in several blocks would count in each.
        """
        self.pairs.update(origins, translations, of)
        self.origins.update(origins)

    def merge(self, other: Moments) -> None:
        """Add the sums of another part.

        Raises
        ------
        SolverUsageError
            Its rows are of another length, or coordinates in another basis.
        """
        if other.basis is not self.basis:
            raise SolverUsageError(
                "Sums of coordinates in different bases cannot be merged. Sum the latents themselves."
            )
        self.pairs.merge(other.pairs)
        self.origins.merge(other.origins)

    def lift(self, vectors: Any) -> Any:
        """Bring (dim, m) columns back to latents, (full_dim, m)."""
        return vectors if self.basis is None else self.basis @ vectors

    def lift_row(self, row: Any) -> Any:
        """Bring a (dim,) row, a mean say, back to latents."""
        return row if self.basis is None else self.basis @ row

    def save(self, path: str | os.PathLike[str], facts: Mapping[str, str] | None = None) -> None:
        """Write the sums to a safetensors file, atomically, with facts to compare when it is read."""
        if self.basis is not None:
            raise SolverUsageError(
                f"Sums of {self.dim} coordinates of {self.full_dim} are not saved: make them again."
            )
        tensors = {**self.pairs.tensors("pairs."), **self.origins.tensors("origins.")}
        info = {**(facts or {}), "format": _FORMAT, "version": "2", "precision": self.precision}
        write_safetensors(path, tensors, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Self, dict[str, str]]:
        """Read sums written by `save`, and their facts.

        Raises
        ------
        ProjectionFormatError
            The file is none of these, damaged, or of an older version.
        """
        tensors, facts = read_safetensors(path, _FORMAT, version="2")
        precision: Precision = "float32" if facts["precision"] == "float32" else "float64"
        made = cls.__new__(cls)
        made.pairs = PairSums.of(tensors, precision, "pairs.")
        made.origins = RowSums.of(tensors, precision, "origins.")
        made.basis = None
        return made, facts


def merged(parts: Iterable[Moments]) -> Moments:
    """Merge parts one by one, in their order; two are in memory at a time. The first is used up."""
    total: Moments | None = None
    for part in parts:
        if total is None:
            total = part
        else:
            total.merge(part)
    if total is None:
        raise SolverUsageError("There are no parts to merge (0, at least 1 needed).")
    return total


def bytes_needed(dim: int) -> tuple[int, int]:
    """Return the bytes that moments take while they are summed, and as a file.

    In memory: four matrices, three tiles' products in float32, and two blocks (one that is read ahead) of
    origins, weighted origins, differences and their sums in float32 beside what was read.
    """
    square = 8 * dim * dim
    return 4 * square + 3 * square // 2 + 2 * TILE * dim * (4 * 4 + 2 * 2), 3 * row_bytes(dim) + square


def row_bytes(dim: int) -> int:
    """Return the bytes that `RowSums` take as a file: a packed triangle."""
    return 4 * dim * (dim + 1)
