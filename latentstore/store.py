"""A store on disk: create, open, grow, lock. A Zarr v3 group that plain zarr, dask and xarray open."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentstore import codecs
from latentstore.errors import (
    CorruptStoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreLockedError,
    StoreNotFoundError,
)
from latentstore.files import sweep_partials, write_atomic, write_errors
from latentstore.manifest import INPUT_SCHEMA, MANIFEST_SCHEMA
from latentstore.reader import Reader
from latentstore.schema import (
    LATENTS,
    STATUS_NAMES,
    Layout,
    Space,
    read_attributes,
    status_name,
)
from latentstore.seal import SEAL, read_seal, sealed_files, write_seal
from latentstore.shards import Record, is_done, parquet_bytes, recover, status_file

_FOLDERS = ("manifest", "inputs", "done", "projections")


class LatentStore:
    """One array of a store that exists, with the rows' manifest. Opening reads only metadata.

    See :func:`create`, :func:`add_array` and :func:`open_store`.

    Attributes
    ----------
    root : Path
    array : str
        ``"latents"``, or the name of a further encoder's array.
    kind : {"images", "simulated", "imported"}
    space : Space
    layout : Layout
    provenance, origin : dict
        See :class:`~latentstore.schema.StoreSpec`.
    schema : int
        The store's schema version.
    """

    def __init__(self, root: Path, array: str = LATENTS) -> None:
        import zarr

        self.root, self.array = root, array
        try:
            group: Any = zarr.open_group(root, mode="r")
            attrs = read_attributes(group.attrs.asdict(), str(root))
            latents = codecs.open_array(root / array)
            own: Any = latents.attrs.asdict()["latentstore"]
            self.kind: str = attrs["kind"]
            self.schema: int = attrs["schema"]
            self.origin: dict[str, Any] = attrs["origin"]
            self.space = Space.from_dict(own["space"])
            self.provenance: dict[str, Any] = own["provenance"]
            rows, dim = latents.shape
            shard_rows = group[status_name(array)].chunks[0]
            dtype = str(latents.dtype)
        except StoreFormatError:
            raise
        except FileNotFoundError as exc:
            raise _no_store(root) from exc
        except (KeyError, ValueError, TypeError, AttributeError) as exc:
            raise StoreFormatError(
                f"{root} is not a latentstore store ({type(exc).__name__}: {exc})."
            ) from exc
        self.layout = Layout(rows, dim, shard_rows, dtype, own.get("codec"))
        if self.space.dim != dim:
            raise StoreFormatError(f"{root}: rows of {dim} numbers, but its space says {self.space.dim}.")

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        return (
            f"LatentStore({str(self.path)!r}, rows={len(self)}, dim={self.layout.dim}, space={self.space.id})"
        )

    @property
    def path(self) -> Path:
        """What opens this array: the store's folder, or ``STORE/NAME`` for a further array."""
        return self.root if self.array == LATENTS else self.root / self.array

    @property
    def first(self) -> LatentStore:
        """The store's first array, which decides the manifest."""
        return self if self.array == LATENTS else LatentStore(self.root)

    def arrays(self) -> list[str]:
        """Return the names of the store's arrays, the first one first."""
        names = {p.parent.name for p in self.root.glob("*/zarr.json")}
        return [LATENTS, *sorted(n for n in names - {LATENTS} if status_name(n) in names)]

    @cached_property
    def reader(self) -> Reader:
        """The reader of the latents: direct ``preadv`` where the shards are plain rows, else zarr."""
        return Reader(self.root, self.layout, self.array)

    # --- completeness -------------------------------------------------------------------------------

    def todo(self) -> list[int]:
        """Return the shards that are not committed."""
        return [s for s in range(self.layout.n_shards) if not self.is_done(s)]

    def is_done(self, shard: int) -> bool:
        """Tell whether a shard is committed."""
        if not is_done(self.root, self.layout, shard, self.space.id, self.array):
            return False
        return self.array == LATENTS or self._follows(shard)

    def _follows(self, shard: int) -> bool:
        """Tell whether a further array's shard was made for the manifest part that the first one has now."""
        first, own = Record.read(self.root, shard), self.record(shard)
        return first is not None and own is not None and own.follows == first.manifest_crc32

    def record(self, shard: int) -> Record | None:
        """Return a shard's done-record, or None."""
        return Record.read(self.root, shard, self.array)

    def require_complete(self) -> None:
        """Refuse a store that still has unwritten rows.

        Raises
        ------
        StoreIncompleteError
        """
        todo = self.todo()
        if todo:
            raise StoreIncompleteError(
                f"{self.path} is not finished: {len(todo)} of {self.layout.n_shards} shards are not written. "
                "Run the command that makes it again; it goes on where it stopped."
            )

    def data_hash(self) -> str:
        """Return 16 hexadecimal digits that change when any committed latent or status changes."""
        digest = hashlib.sha256(self.space.id.encode())
        for shard in range(self.layout.n_shards):
            record = self.record(shard)
            digest.update(f"{record and (record.rows, record.latents_crc32, record.status_crc32)}".encode())
        return digest.hexdigest()[:16]

    # --- rows ---------------------------------------------------------------------------------------

    def status(self) -> npt.NDArray[np.uint8]:
        """Return the (rows,) status codes; see :data:`~latentstore.schema.STATUS_NAMES`."""
        out = np.zeros(len(self), np.uint8)
        for shard in range(self.layout.n_shards):
            span = self.layout.span(shard)
            path = status_file(self.root, shard, self.array)
            if path.exists():
                out[span.start : span.stop] = np.fromfile(path, np.uint8)[: len(span)]
        return out

    def counts(self) -> dict[str, int]:
        """Return how many rows have each status."""
        codes, counts = np.unique(self.status(), return_counts=True)
        if len(codes) and codes[-1] >= len(STATUS_NAMES):
            raise CorruptStoreError(
                f"{self.path} has a row of status {codes[-1]}, which does not exist. Run `latentstore verify "
                f"{self.root}`: it names the damaged shard."
            )
        return {STATUS_NAMES[c]: int(n) for c, n in zip(codes, counts, strict=True)}

    def manifest(self, columns: list[str] | None = None) -> pa.Table:
        """Return the manifest of the committed rows, in row order (of all arrays; statuses are the first's).

        Raises
        ------
        CorruptStoreError
            A part is missing or cannot be read.
        """
        parts = []
        for shard in range(self.layout.n_shards):
            record = Record.read(self.root, shard)
            if record is not None:
                parts.append(self.manifest_part(record, columns))
        if not parts:
            names = columns or MANIFEST_SCHEMA.names
            return pa.schema([MANIFEST_SCHEMA.field(n) for n in names]).empty_table()
        return pa.concat_tables(parts)

    def manifest_part(self, record: Record, columns: list[str] | None = None) -> pa.Table:
        """Return one shard's manifest rows."""
        path = self.root / "manifest" / record.manifest_part
        try:
            return pq.ParquetFile(path).read(columns=columns)
        except (OSError, pa.ArrowException) as exc:
            raise CorruptStoreError(
                f"manifest part {path.name} of {self.root} is missing or damaged ({exc}). Delete "
                f"done/{record.shard:06d}.json and encode again: only that shard is made anew."
            ) from exc

    # --- inputs -------------------------------------------------------------------------------------

    def inputs(self) -> pa.Table:
        """Return the committed input list, in row order (:data:`~latentstore.manifest.INPUT_SCHEMA`)."""
        parts = sorted((self.root / "inputs").glob("part-*.parquet"))
        return (
            pa.concat_tables([pq.ParquetFile(p).read() for p in parts])
            if parts
            else INPUT_SCHEMA.empty_table()
        )

    def extend(self, new: pa.Table) -> LatentStore:
        """Commit more inputs behind the present ones and return the grown store. Needs the writer's lock.

        The list is committed first; :func:`settle` finishes a growth that was killed in between.
        """
        number = len(list((self.root / "inputs").glob("part-*.parquet")))
        write_atomic(self.root / "inputs" / f"part-{number:06d}.parquet", parquet_bytes(new))
        return settle(self)


def settle(store: LatentStore) -> LatentStore:
    """Bring the arrays' shapes to the committed input list (after a growth, or one that was killed)."""
    import zarr

    rows = store.inputs().num_rows
    # The first array comes last: its shape is what tells a later call that nothing is left to do.
    names = list(reversed(store.arrays()))
    grown = [name for name in names if LatentStore(store.root, name).layout.rows != rows]
    seal = read_seal(store.root)
    parts = {str(p.relative_to(store.root)) for p in (store.root / "inputs").glob("part-*.parquet")}
    # A list that is not sealed yet: arrays that were grown to it before a kill are not either.
    unsealed = names if seal and not parts <= seal.keys() else grown
    written = [f"{n}/zarr.json" for name in unsealed for n in (status_name(name), name)]
    with write_errors(store.root):
        for name in grown:
            zarr.open_array(store.root / status_name(name), mode="r+").resize((rows,))
            array = codecs.open_array(store.root / name, mode="r+")
            array.resize((rows, array.shape[1]))
    files = {str(p.relative_to(store.root)) for p in sealed_files(store.root)}
    # A step was killed just before its seal. A seal that is damaged is left for `verify` to tell.
    if grown or (not files <= seal.keys() and (seal or not (store.root / SEAL).exists())):
        write_seal(store.root, written=written)
    return LatentStore(store.root, store.array) if grown else store


def locate(path: Path | str) -> tuple[Path, str]:
    """Split ``STORE`` or ``STORE/ARRAY`` into the store's folder and the array's name."""
    path = Path(path)
    if path.name not in ("", "..") and not is_store(path) and is_store(path.parent):
        return path.parent, path.name
    return path, LATENTS


def is_store(path: Path) -> bool:
    """Tell whether a folder is the group of a store."""
    try:
        body = json.loads((path / "zarr.json").read_bytes())
        return bool(body["node_type"] == "group" and "latentstore" in body["attributes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_store(path: Path | str) -> LatentStore:
    """Open a store for reading: its first array, or with ``STORE/NAME`` the array of that name.

    Raises
    ------
    StoreNotFoundError, StoreFormatError
    """
    root, array = locate(path)
    if not root.exists():
        raise _no_store(root)
    if array != LATENTS:
        names = LatentStore(root).arrays()
        if array not in names:
            raise StoreNotFoundError(
                f"{root} has no array {array!r}; it has {', '.join(names)}. Add one with "
                f"`latentstore encode --store {root / array} --encoder NAME`."
            )
    return LatentStore(root, array)


def exists(path: Path) -> bool:
    """Tell whether something that may be a store (or that array of it) lies at the path."""
    root, array = locate(path)
    return (root / "zarr.json").exists() and (array == LATENTS or array in LatentStore(root).arrays())


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the store's writer lock; the system drops it when the process dies.

    What a kill interrupted is finished first, and stale partials are swept.

    Raises
    ------
    StoreLockedError
        Another process holds it.
    """
    path = root / "done" / "lock"
    with write_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreLockedError(
                f"{root} is being written by process {holder}. Wait for it, or stop it; nothing was changed."
            ) from exc
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        recover(root)
        sweep_partials(root)
        yield
    finally:
        os.close(fd)


def _no_store(root: Path) -> StoreNotFoundError:
    return StoreNotFoundError(
        f"There is no store at {root} (looked in {Path.cwd()}). Make one with "
        f"`latentstore encode FOLDER --store {root}`, or name another with --store."
    )
