"""Reading rows at the speed of the disk.

Shards that are plain rows (no compression, contiguous index: what latentstore writes, and what
zarr-python, tensorstore and zarrs write for the same settings) are read with ``preadv`` straight into
the caller's rows. Anything else goes through zarr, behind the same interface.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore import codecs
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.schema import LATENTS, Layout
from latentstore.shards import latents_file, read_index_is_plain

_MAX_OPEN = 512
_IOV_MAX = 1024  # POSIX lets one preadv fill so many buffers.
_PIECE = 2 << 20
_LARGE = 16 << 20
"""Bytes from which a read is worth several threads: they copy from the page cache side by side."""
_THREADS = min(4, os.cpu_count() or 1)


class _File:
    """An open descriptor; closed when its last user lets go, also if it was evicted while being read."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Reader:
    """Reads latents of one store.

    Parameters
    ----------
    root : Path
    layout : Layout
    array : str
        Of the store.

    Notes
    -----
    Rows that were never written read as zeros, as in zarr; use the store's statuses to tell. Threads may
    share a reader.
    """

    def __init__(self, root: Path, layout: Layout, array: str = LATENTS) -> None:
        self.root, self.layout, self.array = root, layout, array
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._plain: dict[int, bool] = {}
        self._zarr: Any = None
        self._direct = _is_plain_rows(root / array)

    def read(
        self, start: int, stop: int, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """Return rows ``start`` to ``stop`` in the stored dtype, (stop - start, dim).

        Parameters
        ----------
        out : array, optional
            Filled and returned when given: C-contiguous, the stored dtype.
        """
        if not 0 <= start <= stop <= self.layout.rows:
            raise UsageError(f"rows {start}:{stop} are outside the store's {self.layout.rows} rows.")
        out = self._buffer(stop - start, out)
        runs = []
        row = start
        while row < stop:
            shard = row // self.layout.shard_rows
            end = min(stop, self.layout.span(shard).stop)
            runs.append((shard, row, out[row - start : end - start]))
            row = end
        if len(runs) > 1 and out.nbytes >= _LARGE and _THREADS > 1:
            # A thread a shard: the kernel reads ahead in each of them.
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(lambda run: self._read_run(*run), runs):
                    pass
        else:
            for run in runs:
                self._read_run(*run)
        return out

    def gather(
        self, rows: Sequence[int] | npt.NDArray[np.integer[Any]], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """Return arbitrary rows, in the order asked, (len(rows), dim)."""
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.layout.rows):
            raise UsageError(
                f"rows {wanted.min()} to {wanted.max()} were asked of a store of {self.layout.rows}."
            )
        out = self._buffer(len(wanted), out)
        order = np.argsort(wanted, kind="stable")
        runs = list(_runs(wanted[order], self.layout.shard_rows))
        for first, last in runs:
            self._announce(int(wanted[order[first]]), last - first)
        for first, last in runs:
            row = int(wanted[order[first]])
            self._scatter(row // self.layout.shard_rows, row, [out[i] for i in order[first:last]])
        return out

    def blocks(self, rows: int) -> Iterator[tuple[int, npt.NDArray[np.floating[Any]]]]:
        """Yield (first row, block) over the whole store; the block's memory is reused by the next one."""
        buffer = np.empty((rows, self.layout.dim), np.dtype(self.layout.dtype))
        for start in range(0, self.layout.rows, rows):
            stop = min(start + rows, self.layout.rows)
            yield start, self.read(start, stop, buffer[: stop - start])

    # --- one shard -----------------------------------------------------------------------------------

    def _read_run(self, shard: int, row: int, out: npt.NDArray[Any]) -> None:
        file = self._file(shard)
        if file is None:
            out[:] = self._through_zarr(row, row + len(out))
            return
        view, offset = out.data.cast("B"), self._offset(row)
        while view:
            done = os.preadv(file.fd, [view[:_PIECE]], offset)
            if not done:
                raise CorruptStoreError(f"shard {shard} of {self.root} ends before row {row + len(out)}.")
            view, offset = view[done:], offset + done

    def _scatter(self, shard: int, row: int, rows: list[npt.NDArray[Any]]) -> None:
        """Fill each of ``rows`` with the consecutive stored rows from ``row`` on."""
        file = self._file(shard)
        if file is None:
            for target, source in zip(rows, self._through_zarr(row, row + len(rows)), strict=True):
                target[:] = source
            return
        for first in range(0, len(rows), _IOV_MAX):
            part = rows[first : first + _IOV_MAX]
            if (
                os.preadv(file.fd, [a.data for a in part], self._offset(row + first))
                != len(part) * self.layout.row_bytes
            ):
                # A short read: take the rows one by one.
                for i, target in enumerate(part):
                    self._read_run(shard, row + first + i, target[None])

    def _announce(self, row: int, count: int) -> None:
        """Tell the kernel what comes, so that cold reads overlap."""
        file = self._file(row // self.layout.shard_rows)
        if file is not None:
            os.posix_fadvise(
                file.fd, self._offset(row), count * self.layout.row_bytes, os.POSIX_FADV_WILLNEED
            )

    def _offset(self, row: int) -> int:
        return (row % self.layout.shard_rows) * self.layout.row_bytes

    def _file(self, shard: int) -> _File | None:
        """Return an open plain shard, or None where zarr must read."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            if not self._direct or self._plain.get(shard) is False:
                return None
            path = latents_file(self.root, shard, self.array)
            try:
                self._plain[shard] = read_index_is_plain(path, self.layout, shard)
                if not self._plain[shard]:
                    return None
                file = _File(path)
            except FileNotFoundError:
                self._plain[shard] = False
                return None
            while len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)
            self._open[shard] = file
            return file

    def _through_zarr(self, start: int, stop: int) -> npt.NDArray[Any]:
        if self._zarr is None:
            self._zarr = codecs.open_array(self.root / self.array)
        try:
            return np.asarray(self._zarr[start:stop])
        except Exception as exc:  # zarr's codecs raise many kinds; all of them mean bad bytes here
            raise CorruptStoreError(
                f"rows {start}:{stop} of {self.root} cannot be read ({type(exc).__name__}: {exc}). "
                "Delete the done-record of that shard and run the command that made the store again."
            ) from exc

    def _buffer(self, rows: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        shape, dtype = (rows, self.layout.dim), np.dtype(self.layout.dtype)
        if out is None:
            return np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise UsageError(f"out is {out.shape} {out.dtype}; {shape} {dtype}, C-contiguous, is needed.")
        return out


def _runs(rows: npt.NDArray[np.int64], shard_rows: int) -> Iterator[tuple[int, int]]:
    """Yield index ranges of sorted ``rows`` that are consecutive and in one shard."""
    if not len(rows):
        return
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % shard_rows == 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    yield from pairwise(edges)


def _is_plain_rows(path: Path) -> bool:
    """Tell from the array's metadata whether its shards can be plain rows."""
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    array = codecs.open_array(path)
    outer: Any = getattr(array.metadata, "codecs", ())
    if len(outer) != 1 or not isinstance(outer[0], ShardingCodec):
        return False
    inner, index = outer[0].codecs, outer[0].index_codecs
    return (
        len(inner) == 1
        and isinstance(inner[0], BytesCodec)
        and (inner[0].endian is None or str(inner[0].endian.value) == "little")
        and [type(c) for c in index] == [BytesCodec, Crc32cCodec]
        and str(outer[0].index_location.value) == "end"
    )
