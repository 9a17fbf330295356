"""Sums over chosen rows of a store, block by block, the next block being read while this one is added."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from latentstore.reader import Reader
from solvers.moments import Moments
from solvers.products import TILE, Precision
from solvers.spectrum import ROUGH_ROWS
from solvers.sums import PairSums, Prepared, RowSums

PIECE = TILE // 4
"""Pairs that are read ahead: until the first of them are there, nothing can be multiplied."""
Rows = npt.NDArray[np.int64]
OnRows = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Task:
    """One part: what is summed, and the file that keeps it.

    Attributes
    ----------
    name : str
        Of the file, without its suffix.
    model : str or None
        Of the translations; None for all models' origins alone, each once.
    origins, translations : (n,) arrays of rows
        Pair by pair, sorted by the origin; ``translations`` is empty where there are none.
    """

    name: str
    model: str | None
    part: int
    origins: Rows
    translations: Rows


def summed(
    reader: Reader,
    task: Task,
    shift: npt.NDArray[np.float64],
    precision: Precision,
    on_rows: OnRows | None = None,
) -> Moments:
    """Sum one part, reading ahead while the products run. On the CPU: the host's memory is read into."""
    moments = Moments(reader.layout.dim, shift=shift, precision=precision)
    _sum_pairs(reader, task, moments.pairs, on_rows)
    moments.origins = sum_rows(reader, np.unique(task.origins), precision, shift)
    return moments


def _sum_pairs(reader: Reader, task: Task, sums: PairSums, on_rows: OnRows | None) -> None:
    # One block's differences are read from while the next one's are formed; no more memory than that.
    largest, dim = min(PIECE, len(task.translations)), reader.layout.dim
    stored = np.empty((largest, dim), reader.layout.dtype)
    differences = itertools.cycle([np.empty((largest, dim), sums.precision) for _ in range(2)])

    def prepared(rows: tuple[Rows, Rows, Rows]) -> Prepared:
        own, translations, of = rows
        n = len(translations)
        g = reader.gather(translations, stored[:n])
        return sums.prepare(reader.gather(own), g, of, out=next(differences)[:n])

    for block in ahead(prepared, _blocks(task, PIECE)):
        sums.add(block)
        if on_rows is not None:
            on_rows(block.n, 0)
    sums.settle()


def sum_rows(
    reader: Reader,
    rows: Rows,
    precision: Precision,
    shift: npt.NDArray[np.float64] | None = None,
    on_rows: OnRows | None = None,
) -> RowSums:
    """Sum rows of a store, reading ahead while the products run."""
    about = rough_mean(reader, rows) if shift is None else shift
    sums = RowSums(reader.layout.dim, shift=about, precision=precision)
    for block in ahead(reader.gather, (rows[at : at + PIECE] for at in range(0, len(rows), PIECE))):
        sums.update(block)
        if on_rows is not None:
            on_rows(len(block), 0)
    return sums


def rough_mean(reader: Reader, rows: Rows) -> npt.NDArray[np.float64]:
    """Return what to take sums about: any row near the mean will do, the same one for the same rows."""
    mean: npt.NDArray[np.float64] = reader.gather(rows[:ROUGH_ROWS]).astype(np.float64).mean(axis=0)
    return mean


def ahead(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what is read of each item, the next one being read while this one is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting: Future[R] | None = None
        for item in items:
            coming = pool.submit(read, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _read_pairs(reader: Reader, own: Rows, translations: Rows, of: Rows) -> tuple[Any, Any, Rows]:
    return reader.gather(own), reader.gather(translations), of


def _blocks(task: Task, largest: int = TILE) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Yield (origins, translations, which origin each has) block by block, an origin in one where it fits."""
    if not len(task.translations):
        return
    starts = np.flatnonzero(np.diff(task.origins, prepend=-1))
    ends = np.append(starts[1:], len(task.translations))
    first = 0
    for at, end in enumerate(ends.tolist()):
        last = at + 1 == len(ends)
        if last or ends[at + 1] - starts[first] > largest:
            # One origin with more translations than that is cut: it counts once by its own sum.
            for begin in range(int(starts[first]), end, largest):
                rows = slice(begin, min(begin + largest, end))
                own, of = np.unique(task.origins[rows], return_inverse=True)
                yield own, task.translations[rows], of
            first = at + 1


def pair_blocks(reader: Reader, origins: Rows, translations: Rows) -> Iterator[tuple[Any, Any, Rows]]:
    """Yield the latents of pairs, read ahead: (origins, translations, which origin each has)."""
    order = np.lexsort((translations, origins))
    task = Task("", "", 0, origins[order], translations[order])
    yield from ahead(lambda rows: _read_pairs(reader, *rows), _blocks(task))
