"""One pass over a store's pairs: moments in parts that are kept, taken up again, and merged.

Parts are hashed from the photo (the origin's ``group``): folds can merge parts instead of reading again, and
a killed pass loses the part that it was at. The sums are made on the CPU, where the store is read to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.gallery import SHARE
from cli.kept import (
    MERGE_MATRICES,
    PAIR_MATRICES,
    PART_MATRICES,
    STALE,
    check_memory,
    check_unchanged,
    folder_of,
    forget,
    free_memory,
    prepare_folder,
    writable,
)
from cli.merging import merge_tree
from cli.streams import OnRows, Rows, Task, rough_mean, sum_rows, summed
from latentstore.errors import StoreWriteError, UsageError
from latentstore.files import write_atomic
from latentstore.store import LatentStore, open_store
from solvers.errors import ProjectionFormatError, SolverWriteError
from solvers.moments import Moments, bytes_needed, merged, products_for, row_bytes
from solvers.products import Precision
from solvers.sums import RowSums

PARTS = 10


@dataclass
class PairPass:
    """The moments of a store's pairs, part by part.

    Attributes
    ----------
    store : LatentStore
    tasks : list of Task
    precision : {"float32", "float64"}
        Of the products.
    asked : dict
        ``models`` and ``parts``, as planned.
    """

    store: LatentStore
    tasks: list[Task]
    precision: Precision
    asked: dict[str, Any]

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
        precision = products_for(float(np.finfo(store.layout.dtype).eps))
        return cls(store, tasks, precision, {"models": models is not None, "parts": parts})

    @cached_property
    def data_hash(self) -> str:
        """Hash of the latents when the pass was planned."""
        return self.store.data_hash()

    @cached_property
    def shift(self) -> npt.NDArray[np.float64]:
        """What all parts are summed about, so that merging them adds and does nothing else."""
        return rough_mean(self.store.reader, np.unique(np.concatenate([t.origins for t in self.tasks])))

    @cached_property
    def folder(self) -> Path:
        """Where the parts are kept; another one when any latent has changed."""
        return folder_of(self.store) / f"pairs-{self.data_hash}"

    @property
    def bytes(self) -> int:
        """Bytes that the parts and their total take on disk."""
        return sum(self._bytes(task) for task in self.tasks) + bytes_needed(self.store.layout.dim)[1]

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
        digest.update(task.origins.tobytes() + task.translations.tobytes() + self.shift.tobytes())
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
            with suppress(OSError, StoreWriteError):  # of a store that can be read alone
                self._keep_plan()
            self._keep_total(client)
            self._sweep()
            return 0
        prepare_folder(self.folder, self.store, sum(map(self._bytes, todo)))
        check_memory(self.store.layout.dim, PART_MATRICES if len(self.tasks) < 2 else MERGE_MATRICES)
        if client is None:
            for task in todo:
                self._maker(task)(on_rows=on_rows)
        else:
            from dask.distributed import as_completed

            futures = {client.submit(self._maker(task), pure=False): task for task in todo}
            for future in as_completed(futures, loop=client.loop):
                future.result()
                if on_rows is not None:
                    on_rows(len(futures[future].translations), 0)
        self._keep_plan()
        self._keep_total(client)
        self._sweep()
        return len(todo)

    def _keep_plan(self) -> None:
        """Write down what was asked, once all parts are kept: fits then take them up, merged or not."""
        path = self.folder / "plan-{parts}{}.json".format("-models" * self.asked["models"], **self.asked)
        if self.tasks and not path.is_file():
            write_atomic(path, json.dumps(self.asked).encode())

    def _sweep(self) -> None:
        """Delete what was kept of latents that have changed since, unless another process may be at it."""
        for old in set(self.folder.parent.glob("pairs-*")) - {self.folder}:
            with suppress(OSError):
                finished = any(old.glob("plan-*.json")) and not any(old.glob(".*.partial"))
                if finished or time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old)

    @property
    def total(self) -> Path:
        """The file of all parts merged: what a fit reads instead of every part."""
        digest = hashlib.blake2b(digest_size=12)
        for task in self.tasks:
            digest.update(self.path(task).name.encode())
        return self.folder / f"total-{digest.hexdigest()}.safetensors"

    def _keep_total(self, client: Any) -> None:
        """Merge all parts in a tree and keep what comes out; without it every fit merges the parts."""
        pairs = [t for t in self.tasks if t.model is not None]
        if len(pairs) < 2 or self.total.is_file():
            return
        several = len(pairs) < len(self.tasks)
        out = self.folder / f".{self.total.stem}.partial" if several else self.total
        at_once = max(1, free_memory() // (MERGE_MATRICES * 8 * self.store.layout.dim**2))
        # A damaged part is summed anew by moments(), which need not have a total.
        with suppress(OSError, ProjectionFormatError, SolverWriteError):
            try:
                merge_tree([self.path(t) for t in pairs], out, client, at_once=at_once)
                if several:
                    total = Moments.load(out)[0]
                    total.origins = self._all_origins(self.tasks)
                    total.save(self.total)
            finally:
                if several:
                    forget(out)

    def _all_origins(self, tasks: Sequence[Task]) -> RowSums:
        """Return the origins of the parts, each once however many models translated it."""
        shared = [t for t in tasks if t.model is None]
        total = self._origins(shared[0])
        for task in shared[1:]:
            total.merge(self._origins(task))
        return total

    def _maker(self, task: Task) -> partial[None]:
        """Return what makes and keeps a part, here or on a worker."""
        return partial(
            make_part,
            self.store.path.absolute(),
            self.data_hash,
            task,
            self.path(task).absolute(),
            self.shift,
            self.precision,
        )

    def moments(self, model: str | None = None, *, without: Sequence[int] = ()) -> Moments:
        """Return the sums of one model or of all, without some of the parts: kept, or merged from the parts.

        Parts are merged in a fixed order. One that is not kept, or damaged, is summed anew.

        Raises
        ------
        UsageError
            No pairs are left.
        """
        if model is None and not without:
            try:
                return Moments.load(self.total)[0]
            except ProjectionFormatError:
                forget(self.total)  # the next run makes it anew
            except OSError:
                pass
        chosen = [t for t in self.tasks if t.part not in without]
        if model is not None:
            chosen = [t for t in chosen if t.model == model]
        pairs = [t for t in chosen if t.model is not None]
        if not pairs:
            raise UsageError(f"There are no pairs of {model or 'any model'} in what is left of the parts.")
        total = merged(self._part(task) for task in pairs)
        if len(pairs) < len(chosen):
            total.origins = self._all_origins(chosen)
        return total

    def _part(self, task: Task) -> Moments:
        try:
            return Moments.load(self.path(task))[0]
        except (OSError, ProjectionFormatError):
            forget(self.path(task))
            return summed(self.store.reader, task, self.shift, self.precision)

    def _origins(self, task: Task) -> RowSums:
        try:
            return RowSums.load(self.path(task))
        except (OSError, ProjectionFormatError):
            forget(self.path(task))
            return sum_rows(self.store.reader, task.origins, self.precision, self.shift)

    def settled(self, on_rows: OnRows | None = None) -> Moments:
        """Return the moments of all pairs: kept ones, or made now, and kept where that pays."""
        check_memory(self.store.layout.dim, PAIR_MATRICES)
        if self.done():
            return self.moments()
        if self.pays:
            with suppress(StoreWriteError, SolverWriteError):  # nobody asked for them to be kept
                self.run(on_rows=on_rows)
                return self.moments()
        return self.in_memory(on_rows)

    def in_memory(self, on_rows: OnRows | None = None) -> Moments:
        """Sum all pairs in one go and keep nothing."""
        pairs = [t for t in self.tasks if t.model is not None]
        origins, translations = (
            np.concatenate([getattr(t, name) for t in pairs]) for name in ("origins", "translations")
        )
        order = np.lexsort((translations, origins))
        task = Task("all", "", 0, origins[order], translations[order])
        found = summed(self.store.reader, task, self.shift, self.precision, on_rows)
        check_unchanged(self.store.path, self.data_hash)
        return found


def known_plans(folder: Path) -> list[dict[str, Any]]:
    """Return the `PairPass.asked` of the passes that were completed in a folder."""
    found = []
    for path in sorted(folder.glob("plan-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(path.read_bytes())
            found.append({"models": bool(said["models"]), "parts": int(said["parts"])})
    return found


def make_part(
    store: Path,
    data_hash: str,
    task: Task,
    path: Path,
    shift: npt.NDArray[np.float64],
    precision: Precision,
    on_rows: OnRows | None = None,
) -> None:
    """Sum one part and keep it: what a worker runs. Made twice, it holds the same numbers."""
    reader = open_store(store).reader
    if task.model is None:
        rows = sum_rows(reader, task.origins, precision, shift)
        check_unchanged(store, data_hash)
        rows.save(path)
    else:
        pairs = summed(reader, task, shift, precision, on_rows)
        check_unchanged(store, data_hash)
        pairs.save(path)


def _named(part: int, model: str | None, origins: Rows, translations: Rows) -> Task:
    shown = "origins" if model is None else f"model {model!r}" if model else "all models"
    return Task(f"part {part}, {shown}", model, part, origins, translations)


def _part(group: str, parts: int) -> int:
    digest = hashlib.blake2b(str(group).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % parts
