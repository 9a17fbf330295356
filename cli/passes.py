"""One pass over a store's latents: moments in parts that are kept, taken up again, and merged.

Pairs are summed in parts hashed from the photo (the manifest's ``group``), so that folds and the jackknife
merge parts instead of reading again, and a killed pass loses the part that it was at. The gallery is summed
in blocks of whole shards, named by what they hold, so that a collection that grew sums its new end alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cli.kept import PAIR_MATRICES, ROW_MATRICES, check_memory, folder_of, prepare_folder, writable
from latentstore.reader import Reader
from latentstore.store import LatentStore, open_store
from solvers.errors import ProjectionFormatError
from solvers.moments import Moments, bytes_needed, products_for, row_bytes
from solvers.products import TILE, Precision
from solvers.spectrum import ROUGH_ROWS
from solvers.sums import Prepared, RowSums

Rows = npt.NDArray[np.int64]
OnRows = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")

PARTS = 10
GALLERY_SHARDS = 16
"""Shards of a block of the gallery: its sums are then an eighth of its bytes, or less, at any dimension."""
SHARE = 0.5
"""Of the bytes of the latents: sums that take more are not kept of themselves, they cost less to make."""


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


@dataclass
class PairPass:
    """The moments of a store's pairs, part by part.

    Attributes
    ----------
    store : LatentStore
    tasks : list of Task
    precision : {"float32", "float64"}
        Of the products.
    """

    store: LatentStore
    tasks: list[Task]
    precision: Precision

    @classmethod
    def of(
        cls,
        store: LatentStore,
        origins: Rows,
        translations: Rows,
        groups: npt.NDArray[Any],
        models: npt.NDArray[Any] | None = None,
        *,
        parts: int = PARTS,
    ) -> PairPass:
        """Plan a pass over pairs of rows.

        Parameters
        ----------
        store : LatentStore
        origins, translations : (n,) arrays
        groups : (n,) array of str
            The photo behind each pair; its hash says in which part it goes.
        models : (n,) array of str, optional
            Of each translation: sums are then kept for each model, and pooled from them.
        parts : int
        """
        order = np.lexsort((translations, origins))
        origins, translations, groups = origins[order], translations[order], groups[order]
        names = np.full(len(origins), "") if models is None else models[order]
        part_of = {g: _part(g, parts) for g in dict.fromkeys(groups.tolist())}
        part = np.array([part_of[g] for g in groups.tolist()], np.int64)
        tasks, several = [], len(set(names.tolist())) > 1
        for number in range(parts):
            for model in dict.fromkeys(sorted(names.tolist())):
                own = np.flatnonzero((part == number) & (names == model))
                if len(own):
                    tasks.append(_named(number, model, origins[own], translations[own]))
            whole = np.unique(origins[part == number])
            if several and len(whole):
                tasks.append(_named(number, None, whole, whole[:0]))
        return cls(store, tasks, products_for(float(np.finfo(store.layout.dtype).eps)))

    @cached_property
    def folder(self) -> Path:
        """Where the parts are kept; another one when any latent has changed."""
        return folder_of(self.store) / f"pairs-{self.store.data_hash()}"

    @property
    def bytes(self) -> int:
        """Bytes that the parts take on disk."""
        return sum(self._bytes(task) for task in self.tasks)

    def _bytes(self, task: Task) -> int:
        rows, both = (f(self.store.layout.dim) for f in (row_bytes, lambda d: bytes_needed(d)[1]))
        return rows if task.model is None else both

    @property
    def rows(self) -> int:
        """Translations to read."""
        return sum(len(task.translations) for task in self.tasks)

    @property
    def pays(self) -> bool:
        """Whether the parts can be kept, and are small enough beside the latents to be so unasked."""
        return writable(self.store) and self.bytes <= SHARE * self.rows * self.store.layout.row_bytes

    def path(self, task: Task) -> Path:
        """Return the file of a part."""
        digest = hashlib.blake2b(json.dumps([task.model, self.precision]).encode(), digest_size=12)
        digest.update(task.origins.tobytes() + task.translations.tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def done(self) -> bool:
        """Tell whether every part is kept."""
        return bool(self.tasks) and not self.todo()

    def todo(self) -> list[Task]:
        """Return the parts that are not kept yet."""
        return [task for task in self.tasks if not self.path(task).is_file()]

    def run(self, *, client: Any = None, on_rows: OnRows | None = None) -> int:
        """Make and keep every part that is not kept yet; return how many were made.

        Parameters
        ----------
        client : dask.distributed.Client, optional
            Its workers make the parts, and must see the store under the same path; else this process does.
        on_rows : callable, optional
            Called with (translations summed, 0).

        Raises
        ------
        StoreWriteError
            The parts do not fit on the disk.
        SolverWriteError, SolverError
        """
        todo = self.todo()
        if not todo:
            return 0
        prepare_folder(self.folder, self.store, sum(map(self._bytes, todo)))
        for old in set(self.folder.parent.glob("pairs-*")) - {self.folder}:
            shutil.rmtree(old, ignore_errors=True)
        places = [(task, self.path(task)) for task in todo]
        if client is None:
            for task, path in places:
                make_part(self.store.path, task, path, self.precision, on_rows)
        else:
            from dask.distributed import as_completed

            futures = {
                client.submit(
                    make_part, self.store.path.absolute(), task, path.absolute(), self.precision, pure=False
                ): task
                for task, path in places
            }
            for future in as_completed(futures, loop=client.loop):
                future.result()
                if on_rows is not None:
                    on_rows(len(futures[future].translations), 0)
        return len(todo)

    def moments(self, model: str | None = None, *, without: Sequence[int] = ()) -> Moments:
        """Merge kept parts, in a fixed order: of one model or of all, without some parts.

        Raises
        ------
        ProjectionFormatError
            A kept part is damaged; it is deleted, so that the next run makes it anew.
        """
        chosen = [t for t in self.tasks if t.part not in without]
        if model is not None:
            chosen = [t for t in chosen if t.model == model]
        shared = [t for t in chosen if t.model is None]
        pairs = [t for t in chosen if t.model is not None]
        total = self._load(pairs[0])
        for task in pairs[1:]:
            total.merge(self._load(task))
        if shared:
            # An origin that several models translated counts once.
            total.origins = self._load_origins(shared[0])
            for task in shared[1:]:
                total.origins.merge(self._load_origins(task))
        return total

    def _load(self, task: Task) -> Moments:
        with _deleted_if_damaged(self.path(task)) as path:
            return Moments.load(path)[0]

    def _load_origins(self, task: Task) -> RowSums:
        with _deleted_if_damaged(self.path(task)) as path:
            return RowSums.load(path)

    def settled(self, on_rows: OnRows | None = None) -> Moments:
        """Return the moments of all pairs: kept ones, or made now, and kept where that pays."""
        check_memory(self.store.layout.dim, PAIR_MATRICES)
        if not self.done():
            if not self.pays:
                return self.in_memory(on_rows)
            self.run(on_rows=on_rows)
        return self.moments()

    def in_memory(self, on_rows: OnRows | None = None) -> Moments:
        """Sum all pairs in one go and keep nothing."""
        pairs = [t for t in self.tasks if t.model is not None]
        origins, translations = (
            np.concatenate([getattr(t, name) for t in pairs]) for name in ("origins", "translations")
        )
        order = np.lexsort((translations, origins))
        task = Task("all", "", 0, origins[order], translations[order])
        return summed(self.store.reader, task, self.precision, on_rows)


@contextmanager
def _deleted_if_damaged(path: Path) -> Iterator[Path]:
    try:
        yield path
    except ProjectionFormatError:
        path.unlink(missing_ok=True)
        raise


def make_part(
    store: Path, task: Task, path: Path, precision: Precision, on_rows: OnRows | None = None
) -> None:
    """Sum one part and keep it: what a worker runs. Made twice, it is the same file."""
    reader = open_store(store).reader
    if task.model is None:
        sum_rows(reader, task.origins, precision).save(path)
    else:
        summed(reader, task, precision, on_rows).save(path, {"part": task.name})


def summed(reader: Reader, task: Task, precision: Precision, on_rows: OnRows | None = None) -> Moments:
    """Sum one part, reading ahead while the products run."""
    own = np.unique(task.origins)
    moments = Moments(reader.layout.dim, shift=_rough_mean(reader, own), precision=precision)

    def prepared(rows: tuple[Rows, Rows, Rows]) -> Prepared:
        return moments.pairs.prepare(*_read_pairs(reader, *rows))

    for block in ahead(prepared, _blocks(task)):
        moments.pairs.add(block)
        if on_rows is not None:
            on_rows(block.n, 0)
    moments.origins = sum_rows(reader, own, precision)
    return moments


def sum_rows(reader: Reader, rows: Rows, precision: Precision, on_rows: OnRows | None = None) -> RowSums:
    """Sum rows of a store, reading ahead while the products run."""
    sums = RowSums(reader.layout.dim, shift=_rough_mean(reader, rows), precision=precision)
    for block in ahead(reader.gather, (rows[at : at + TILE] for at in range(0, len(rows), TILE))):
        sums.update(block)
        if on_rows is not None:
            on_rows(len(block), 0)
    return sums


def _rough_mean(reader: Reader, rows: Rows) -> npt.NDArray[np.float64]:
    """Return what to take sums about: any row near the mean will do, the same one for the same rows."""
    mean: npt.NDArray[np.float64] = reader.gather(rows[:ROUGH_ROWS]).astype(np.float64).mean(axis=0)
    return mean


def gallery_sums(
    store: LatentStore, rows: Rows, *, keep: bool | None = None, on_rows: OnRows | None = None
) -> RowSums:
    """Sum gallery rows block by block, taking up the blocks that are kept and still true.

    Parameters
    ----------
    store : LatentStore
    rows : (n,) sorted array
    keep : bool, optional
        By default where it pays; see :data:`SHARE`.
    """
    dim, size = store.layout.dim, GALLERY_SHARDS * store.layout.shard_rows
    check_memory(dim, ROW_MATRICES)
    precision = products_for(float(np.finfo(store.layout.dtype).eps))
    blocks = np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1)
    each = row_bytes(dim)
    if keep is None:
        keep = writable(store) and each * len(blocks) <= SHARE * len(rows) * store.layout.row_bytes
    folder, total, known = folder_of(store) / "gallery", None, []
    for block in blocks:
        path = folder / f"{_block_key(store, block, precision)}.safetensors"
        known.append(path)
        sums = _kept_rows(path) if keep else None
        if sums is None:
            sums = sum_rows(store.reader, block, precision, on_rows)
            if keep:
                prepare_folder(folder, store, each)
                sums.save(path)
        elif on_rows is not None:
            on_rows(len(block), 0)
        if total is None:
            total = sums
        else:
            total.merge(sums)
    assert total is not None  # noqa: S101 - a gallery without rows was refused before
    if keep:
        for old in set(folder.glob("*.safetensors")) - set(known):
            old.unlink(missing_ok=True)
    return total


def _kept_rows(path: Path) -> RowSums | None:
    try:
        return RowSums.load(path)
    except (OSError, ProjectionFormatError):
        return None  # not there, or damaged: it is ours to make again


def _block_key(store: LatentStore, rows: Rows, precision: Precision) -> str:
    """Name a block by its rows and by the checksums of the shards that hold them."""
    said: list[Any] = [store.space.id, precision]
    for shard in np.unique(rows // store.layout.shard_rows).tolist():
        record = store.record(shard)
        said.append(record and [record.latents_crc32, record.status_crc32])
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=12)
    digest.update(rows.tobytes())
    return digest.hexdigest()


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


def _blocks(task: Task) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Yield (origins, translations, which origin each has), each origin in one block alone."""
    starts = np.flatnonzero(np.diff(task.origins, prepend=-1))
    ends = np.append(starts[1:], len(task.translations))
    first = 0
    for at, end in enumerate(ends.tolist()):
        last = at + 1 == len(ends)
        if last or ends[at + 1] - starts[first] > TILE:
            rows = slice(int(starts[first]), end)
            own, of = np.unique(task.origins[rows], return_inverse=True)
            if len(task.translations):
                yield own, task.translations[rows], of
            first = at + 1


def _named(part: int, model: str | None, origins: Rows, translations: Rows) -> Task:
    shown = "origins" if model is None else f"model {model!r}" if model else "all models"
    return Task(f"part {part}, {shown}", model, part, origins, translations)


def _part(group: str, parts: int) -> int:
    digest = hashlib.blake2b(str(group).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % parts


def pair_blocks(reader: Reader, origins: Rows, translations: Rows) -> Iterator[tuple[Any, Any, Rows]]:
    """Yield the latents of pairs, read ahead: (origins, translations, which origin each has)."""
    order = np.lexsort((translations, origins))
    task = Task("", "", 0, origins[order], translations[order])
    yield from ahead(lambda rows: _read_pairs(reader, *rows), _blocks(task))
