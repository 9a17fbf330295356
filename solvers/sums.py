"""Sums of outer products, streamed: of rows, and of pairs of an origin and its translation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .arrays import as_like, namespace, to_host
from .blocks import cast, checked, finite_sum, tiles
from .errors import SolverUsageError
from .files import read_safetensors, write_safetensors
from .grouping import checked_of, grouped
from .linalg import add_transposed
from .products import TILE, Precision, Tiled, pack, symmetric, unpack

_FORMAT = "solvers.row_sums"


class RowSums:
    """Count, sum and sum of outer products of rows, about a fixed shift.

    Sums about zero of rows that lie far from it lose the digits that the covariance needs: give a rough
    mean as the shift. Memory: one dim x dim float64 matrix, whatever the number of rows.

    Parameters
    ----------
    dim
        Length of a row.
    shift
        (dim,) subtracted from every row first; None for zero.
    precision
        Of a tile's product; tiles are added up in float64.
    like
        An array of the library and device that the rows will have; None for NumPy.

    Attributes
    ----------
    n
        Rows seen.
    sum
        (dim,) of the shifted rows.
    """

    def __init__(
        self, dim: int, *, shift: Any = None, precision: Precision = "float64", like: Any = None
    ) -> None:
        self.dim, self.precision, self.n = _checked_dim(dim), precision, 0
        zeros = np.zeros if like is None else _zeros_like(like)
        self.shift = zeros(dim) if shift is None else _placed(shift, like, precision)
        self.sum, self._xx = zeros(dim), Tiled(_square(dim, like))

    def update(self, block: Any) -> None:
        """Add a block of rows, (rows, dim); one that is refused leaves nothing behind."""
        namespace(block, self.shift)
        if block.shape[0] > TILE:
            finite_sum(checked(block, self.dim, "rows"), "rows")
        for x in tiles(block, self.dim, "rows"):
            rows = cast(x, self.precision) - cast(self.shift, self.precision)
            total = finite_sum(rows, "rows")
            self.n += rows.shape[0]
            self.sum += total
            self._xx.add_gram(rows)

    def merge(self, other: RowSums) -> None:
        """Add the sums of another part, about whatever shift they are."""
        _same_dim(self.dim, other.dim)
        namespace(self.shift, other.shift)
        if other.precision == "float32":
            self.precision = "float32"
        move = other.shift - self.shift
        if bool(namespace(move).any(move != 0)):
            cross, xx = _outer(other.sum, move), self.xx
            xx += cross + cross.T + other.n * _outer(move, move)
            self.sum += other.n * move
        self.n += other.n
        self.sum += other.sum
        total = self.xx
        total += other.xx

    @property
    def xx(self) -> Any:
        """Sum of the shifted rows' outer products, (dim, dim); on NumPy its upper triangle."""
        return self._xx.total

    @property
    def mean(self) -> Any:
        """Mean of the rows, (dim,)."""
        return self.shift + self.sum / _some(self.n)

    @property
    def cov(self) -> Any:
        """Centred covariance (divided by n), (dim, dim)."""
        offset = self.sum / _some(self.n)
        return _centred(symmetric(self.xx), self.n, offset, offset)

    @property
    def squares(self) -> float:
        """Sum of the squares of all values, about zero."""
        return _squares(self.xx, self.sum, self.shift, self.n)

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return what is saved: the triangle packed, float64, on the host."""
        return {
            f"{prefix}n": np.array([self.n], np.int64),
            f"{prefix}shift": to_host(self.shift),
            f"{prefix}sum": to_host(self.sum),
            f"{prefix}xx": pack(to_host(self.xx)),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums to a safetensors file, atomically."""
        info = {"format": _FORMAT, "version": "1", "precision": self.precision}
        write_safetensors(path, self.tensors(), info)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read sums written by `save`.

        Raises
        ------
        ProjectionFormatError
        """
        tensors, facts = read_safetensors(path, _FORMAT)
        return cls.of(tensors, "float32" if facts["precision"] == "float32" else "float64")

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], precision: Precision, prefix: str = "") -> Self:
        """Return sums from what :meth:`tensors` gave."""
        made = cls(len(tensors[f"{prefix}sum"]), shift=tensors[f"{prefix}shift"], precision=precision)
        made.n = int(tensors[f"{prefix}n"][0])
        made.sum = np.array(tensors[f"{prefix}sum"])
        made._xx = Tiled(unpack(tensors[f"{prefix}xx"], made.dim))
        return made


@dataclass(frozen=True, eq=False)
class Prepared:
    """A block of pairs as :class:`PairSums` adds it: what its products are taken of, and its sums."""

    n: int
    o: Any
    weighted: Any
    t: Any
    summed: Any
    sum_o: Any
    sum_t: Any


class PairSums:
    """Sums over pairs of an origin and a translation; each pair counts once.

    An origin with k translations enters its own outer product once, with weight k, and the sum of its
    differences once: with 20 translations an origin that is 20 times fewer rows for two of the three
    products.

    Attributes
    ----------
    n
        Pairs seen.
    sum_o, sum_t
        (dim,) sums of the shifted origins and of the differences.
    """

    def __init__(
        self, dim: int, *, shift: Any = None, precision: Precision = "float64", like: Any = None
    ) -> None:
        self.dim, self.precision, self.n = _checked_dim(dim), precision, 0
        zeros = np.zeros if like is None else _zeros_like(like)
        self.shift = zeros(dim) if shift is None else _placed(shift, like, precision)
        self.sum_o, self.sum_t = zeros(dim), zeros(dim)
        self._sums = {"oo": Tiled(_square(dim, like)), "tt": Tiled(_square(dim, like))}
        self._sums["ot"] = Tiled(zeros((dim, dim)))

    def update(self, origins: Any, translations: Any, of: Any = None) -> None:
        """Add a block of pairs.

        Parameters
        ----------
        origins
            (k, dim).
        translations
            (n, dim).
        of
            (n,) integers on the host: which origin each translation has. None when row i of both belongs
            together.
        """
        which = checked_of(origins, translations, of)
        n = translations.shape[0]
        if n <= 2 * TILE:
            self.add(self.prepare(origins, translations, which))
            return
        for rows, what in ((origins, "origins"), (translations, "translations")):
            finite_sum(checked(rows, self.dim, what), what)
        which = np.arange(n) if which is None else which
        for at in range(0, n, TILE):
            used, inverse = np.unique(which[at : at + TILE], return_inverse=True)
            self.add(self.prepare(origins[used], translations[at : at + TILE], inverse))

    def prepare(
        self, origins: Any, translations: Any, of: Any = None, *, out: np.ndarray | None = None
    ) -> Prepared:
        """Form what the products are taken of; another thread may do it while products run.

        Parameters are those of :meth:`update`, whose blocks may be of any size; this one's are a tile.
        `out`, (n, dim) NumPy rows of the precision, may take the differences: fresh memory of that size
        costs the kernel's time.
        """
        namespace(origins, translations, self.shift)
        which = checked_of(origins, translations, of)
        o = cast(checked(origins, self.dim, "origins"), self.precision)
        g = checked(translations, self.dim, "translations")
        if which is None:
            t = cast(g, self.precision) - o
            summed, counts = t, None
        else:
            t, summed, counts = grouped(o, g, which, out)
        return self._prepared(o, t, summed, counts)

    def prepare_differences(self, origins: Any, differences: Any) -> Prepared:
        """Form the same of origins and differences t = g - o that were formed before, row by row."""
        o = cast(checked(origins, self.dim, "origins"), self.precision)
        t = cast(checked(differences, self.dim, "differences"), self.precision)
        return self._prepared(o, t, t, None)

    def _prepared(self, o: Any, t: Any, summed: Any, counts: Any) -> Prepared:
        o = o - cast(self.shift, self.precision)
        weighted = o if counts is None else o * counts[:, None] ** 0.5
        sum_o = finite_sum(o if counts is None else o * counts[:, None], "origins")
        sum_t = finite_sum(summed, "translations", of=t)
        return Prepared(t.shape[0], o, weighted, t, summed, sum_o, sum_t)

    def add(self, block: Prepared) -> None:
        """Add the products of a prepared block."""
        self._sums["ot"].add_product(block.o, block.summed)
        self._sums["tt"].add_gram(block.t)
        self._sums["oo"].add_gram(block.weighted)
        self.n += block.n
        self.sum_o += block.sum_o
        self.sum_t += block.sum_t

    def settle(self) -> None:
        """Give back the memory that only further blocks would need."""
        for sums in self._sums.values():
            _ = sums.total

    def merge(self, other: PairSums) -> None:
        """Add the sums of another part, about whatever shift they are."""
        _same_dim(self.dim, other.dim)
        namespace(self.shift, other.shift)
        if other.precision == "float32":
            self.precision = "float32"
        move = other.shift - self.shift
        moved = bool(namespace(move).any(move != 0))
        if moved:
            cross, oo, ot = _outer(other.sum_o, move), self.oo, self.ot
            oo += cross + cross.T + other.n * _outer(move, move)
            ot += _outer(move, other.sum_t)
            self.sum_o += other.n * move
        self.n += other.n
        for name in ("sum_o", "sum_t", "oo", "ot", "tt"):
            total = getattr(self, name)
            total += getattr(other, name)

    @property
    def oo(self) -> Any:
        """Sum of o oᵀ of the shifted origins, (dim, dim); on NumPy its upper triangle."""
        return self._sums["oo"].total

    @property
    def ot(self) -> Any:
        """Sum of o tᵀ, (dim, dim), o along the rows."""
        return self._sums["ot"].total

    @property
    def tt(self) -> Any:
        """Sum of t tᵀ, (dim, dim); on NumPy its upper triangle."""
        return self._sums["tt"].total

    @property
    def mean_o(self) -> Any:
        """Mean of the pairs' origins, (dim,)."""
        return self.shift + self.sum_o / _some(self.n)

    @property
    def mean_t(self) -> Any:
        """Mean of the differences, (dim,)."""
        return self.sum_t / _some(self.n)

    @property
    def mean_g(self) -> Any:
        """Mean of the translations, (dim,)."""
        return self.mean_o + self.mean_t

    @property
    def second_t(self) -> Any:
        """E[t tᵀ], uncentred, (dim, dim): Σ_t of the null spaces."""
        return symmetric(self.tt) / _some(self.n)

    @property
    def cov_oo(self) -> Any:
        """Centred covariance of the pairs' origins, (dim, dim)."""
        offset = self.sum_o / _some(self.n)
        return _centred(symmetric(self.oo), self.n, offset, offset)

    @property
    def variance_o(self) -> float:
        """Trace of `cov_oo`, without forming it."""
        xp, offset = namespace(self.oo), self.sum_o / _some(self.n)
        return float(xp.linalg.trace(self.oo)) / self.n - float(xp.sum(offset * offset))

    @property
    def cov_ot(self) -> Any:
        """Centred cross-covariance of origins (along the rows) and differences, (dim, dim)."""
        offset = self.sum_o / _some(self.n)
        return _centred(namespace(self.ot).asarray(self.ot, copy=True), self.n, offset, self.mean_t)

    @property
    def cov_tt(self) -> Any:
        """Centred covariance of the differences, (dim, dim)."""
        return _centred(symmetric(self.tt), _some(self.n), self.mean_t, self.mean_t)

    @property
    def cov_og(self) -> Any:
        """Centred cross-covariance of origins (along the rows) and translations, (dim, dim)."""
        found = self.cov_oo
        found += self.cov_ot
        return found

    @property
    def cov_gg(self) -> Any:
        """Centred covariance of the translations, (dim, dim)."""
        found, ot = self.cov_oo, self.cov_ot
        found += ot
        add_transposed(found, ot)
        found += self.cov_tt
        return found

    @property
    def squares(self) -> float:
        """Sum of the squares of all values of all pairs' latents, about zero."""
        origins = _squares(self.oo, self.sum_o, self.shift, self.n)
        xp = namespace(self.tt)
        crossed = float(xp.linalg.trace(self.ot)) + float(xp.sum(self.shift * self.sum_t))
        return 2 * origins + 2 * crossed + float(xp.linalg.trace(self.tt))

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return what is saved: triangles packed, float64, on the host."""
        return {
            f"{prefix}n": np.array([self.n], np.int64),
            **{f"{prefix}{name}": to_host(getattr(self, name)) for name in ("shift", "sum_o", "sum_t", "ot")},
            **{f"{prefix}{name}": pack(to_host(getattr(self, name))) for name in ("oo", "tt")},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], precision: Precision, prefix: str = "") -> Self:
        """Return sums from what :meth:`tensors` gave."""
        made = cls(len(tensors[f"{prefix}sum_o"]), shift=tensors[f"{prefix}shift"], precision=precision)
        made.n = int(tensors[f"{prefix}n"][0])
        for name in ("sum_o", "sum_t"):
            setattr(made, name, np.array(tensors[f"{prefix}{name}"]))
        found = {name: unpack(tensors[f"{prefix}{name}"], made.dim) for name in ("oo", "tt")}
        found["ot"] = np.array(tensors[f"{prefix}ot"])
        made._sums = {name: Tiled(total) for name, total in found.items()}
        return made


def _centred(total: Any, n: int, left: Any, right: Any) -> Any:
    total /= n  # in the memory of `total`
    total -= _outer(left, right)
    return total


def _outer(a: Any, b: Any) -> Any:
    return a[:, None] * b[None, :]


def _squares(xx: Any, total: Any, shift: Any, n: int) -> float:
    xp = namespace(xx)
    return float(xp.linalg.trace(xx)) + 2 * float(xp.sum(shift * total)) + n * float(xp.sum(shift * shift))


def _zeros_like(like: Any) -> Any:
    xp = namespace(like)
    return lambda shape: xp.zeros(shape, dtype=xp.float64, device=like.device)


def _square(dim: int, like: Any) -> Any:
    """Return zeros to add products to; on NumPy in Fortran order, as BLAS gives them."""
    return np.zeros((dim, dim), order="F") if like is None else _zeros_like(like)((dim, dim))


def _placed(row: Any, like: Any, precision: Precision) -> Any:
    """Return a shift in float64 that is exact in the products' precision, as rows are shifted by that."""
    host = to_host(row).astype(precision).astype(np.float64)
    return host if like is None else as_like(host, _zeros_like(like)(1))


def _checked_dim(dim: int) -> int:
    if dim < 1:
        raise SolverUsageError(f"The dimension of a latent must be at least 1, not {dim}.")
    return int(dim)


def _same_dim(mine: int, other: int) -> None:
    if mine != other:
        raise SolverUsageError(
            f"Moments of dimension {mine} cannot be merged with moments of dimension {other}. "
            "Merge parts of one encoder only."
        )


def _some(n: int) -> int:
    if n < 1:
        raise SolverUsageError("There are no rows yet (0, at least 1 needed). Call update first.")
    return n
