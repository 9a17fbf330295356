"""Streamed second moments in float64: what a closed form needs to know of the data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import numpy as np

from .arrays import as_rows
from .errors import ProjectionFormatError, SolverUsageError, SolverWriteError


class Moments:
    """Running sums over pairs (origin o, translation g), O(dim^2) memory, independent of the row count.

    The difference t = g - o is formed before its product: Sum(tt) from the other sums would cancel
    exactly the small directions that the null space is about.

    Parameters
    ----------
    dim
        Length of a latent. Four dim x dim float64 matrices are held.

    Attributes
    ----------
    n
        Number of pairs.
    sum_o, sum_g
        Sums of the rows, (dim,).
    oo, gg, og, tt
        Sums of the outer products, (dim, dim); og has o along its rows.
    """

    _fields = ("sum_o", "sum_g", "oo", "gg", "og", "tt")

    def __init__(self, dim: int) -> None:
        self.dim = _checked_dim(dim)
        self.n = 0
        self.sum_o, self.sum_g = np.zeros(dim), np.zeros(dim)
        self.oo, self.gg, self.og, self.tt = (np.zeros((dim, dim)) for _ in range(4))

    def update(self, o_block: Any, g_block: Any) -> None:
        """Add a block of pairs; row i of both belongs together."""
        o, g = as_rows(o_block, self.dim, "origins"), as_rows(g_block, self.dim, "translations")
        if len(o) != len(g):
            raise SolverUsageError(
                f"A block of pairs needs as many origins as translations; got {len(o)} and {len(g)}. "
                "Pass the origin of every translation, repeated where it has several."
            )
        t = g - o
        self.n += len(o)
        self.sum_o += o.sum(axis=0)
        self.sum_g += g.sum(axis=0)
        self.oo += o.T @ o
        self.gg += g.T @ g
        self.og += o.T @ g
        self.tt += t.T @ t

    def merge(self, other: Moments) -> None:
        """Add the sums of another part."""
        _same_dim(self.dim, other.dim)
        self.n += other.n
        for name in self._fields:
            getattr(self, name).__iadd__(getattr(other, name))

    @property
    def mean_o(self) -> np.ndarray:
        """Mean of the origins, (dim,)."""
        return self.sum_o / _some(self.n)

    @property
    def mean_g(self) -> np.ndarray:
        """Mean of the translations, (dim,)."""
        return self.sum_g / _some(self.n)

    @property
    def cov_o(self) -> np.ndarray:
        """Centred covariance of the origins (divided by n), (dim, dim)."""
        return self.oo / _some(self.n) - np.outer(self.mean_o, self.mean_o)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums to a safetensors file, atomically."""
        tensors = {name: getattr(self, name) for name in self._fields}
        tensors["n"] = np.array([self.n], dtype=np.int64)
        write_safetensors(path, tensors, {"format": "solvers.moments", "version": "1"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read sums written by `save`."""
        tensors, _ = read_safetensors(path, "solvers.moments")
        moments = cls(len(tensors["sum_o"]))
        moments.n = int(tensors["n"][0])
        for name in cls._fields:
            setattr(moments, name, tensors[name])
        return moments


class CovMoments:
    """Running sum and outer product of unlabelled rows, in float64.

    Parameters
    ----------
    dim
        Length of a row.

    Attributes
    ----------
    n, sum, xx
        Row count, sum (dim,), sum of outer products (dim, dim).
    """

    def __init__(self, dim: int) -> None:
        self.dim = _checked_dim(dim)
        self.n = 0
        self.sum = np.zeros(dim)
        self.xx = np.zeros((dim, dim))

    def update(self, block: Any) -> None:
        """Add a block of rows."""
        x = as_rows(block, self.dim)
        self.n += len(x)
        self.sum += x.sum(axis=0)
        self.xx += x.T @ x

    def merge(self, other: CovMoments) -> None:
        """Add the sums of another part."""
        _same_dim(self.dim, other.dim)
        self.n += other.n
        self.sum += other.sum
        self.xx += other.xx

    @property
    def mean(self) -> np.ndarray:
        """Mean of the rows, (dim,)."""
        return self.sum / _some(self.n)

    @property
    def cov(self) -> np.ndarray:
        """Centred covariance (divided by n), (dim, dim)."""
        return self.xx / _some(self.n) - np.outer(self.mean, self.mean)


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file beside its place and rename it, so that a reader never sees half a file."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        # The library makes files that their owner alone can read; keep the mode of the user's umask.
        part.touch()
        mode = part.stat().st_mode
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, part, metadata=metadata)
        part.chmod(mode)
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(target)
    except SafetensorError as error:
        # The library wraps what the disk said; the disk being full is the usual reason.
        raise SolverWriteError(
            f"{path} could not be written ({error}). Is the disk full? Make room and run the same again; "
            "nothing was changed."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(
    path: str | os.PathLike[str], expected: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file whose metadata names the format `expected`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != expected:
                raise ProjectionFormatError(
                    f"{path} is not a {expected} file: its format is {metadata.get('format', 'unnamed')!r}. "
                    "Pass a file that was written by this package."
                )
            return {name: handle.get_tensor(name) for name in handle.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ProjectionFormatError(
            f"{path} cannot be read as safetensors ({error}). The file is damaged or of another kind; "
            "write it again."
        ) from error


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
