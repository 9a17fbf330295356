"""A store on disk: create, open, grow, lock. A Zarr v3 group that plain zarr, dask and xarray open."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentstore.errors import (
    CorruptStoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreLockedError,
    StoreNotFoundError,
    StoreWriteError,
    UsageError,
)
from latentstore.manifest import INPUT_SCHEMA, MANIFEST_SCHEMA
from latentstore.reader import Reader
from latentstore.schema import (
    CHUNK_ROWS,
    LATENTS,
    SCHEMA_VERSION,
    STATUS,
    STATUS_NAMES,
    Layout,
    Space,
    StoreSpec,
    canonical_json,
    read_attributes,
)
from latentstore.shards import (
    Record,
    fsync_dir,
    fsync_tree,
    is_done,
    sweep_partials,
    write_atomic,
    write_errors,
)

SEAL = Path("done") / "seal.json"
_FOLDERS = ("manifest", "inputs", "done", "projections")


class LatentStore:
    """A store that exists. Opening reads only metadata; see :func:`create` and :func:`open_store`.

    Attributes
    ----------
    root : Path
    kind : {"images", "simulated"}
    space : Space
    layout : Layout
    provenance, origin : dict
        See :class:`~latentstore.schema.StoreSpec`.
    """

    def __init__(self, root: Path) -> None:
        import zarr

        self.root = root
        try:
            group: Any = zarr.open_group(root, mode="r")
            attrs = read_attributes(group.attrs.asdict(), str(root))
            latents = group[LATENTS]
            own: Any = latents.attrs.asdict()["latentstore"]
            self.kind: str = attrs["kind"]
            self.origin: dict[str, Any] = attrs["origin"]
            self.space = Space.from_dict(own["space"])
            self.provenance: dict[str, Any] = own["provenance"]
            rows, dim = latents.shape
            shard_rows = group[STATUS].chunks[0]
            dtype = str(latents.dtype)
        except StoreFormatError:
            raise
        except FileNotFoundError as exc:
            raise _no_store(root) from exc
        except (KeyError, ValueError, TypeError, AttributeError) as exc:
            raise StoreFormatError(
                f"{root} is not a latentstore store ({type(exc).__name__}: {exc})."
            ) from exc
        self.layout = Layout(rows=rows, dim=dim, shard_rows=shard_rows, dtype=dtype)
        if self.space.dim != dim:
            raise StoreFormatError(f"{root}: rows of {dim} numbers, but its space says {self.space.dim}.")

    def __len__(self) -> int:
        return self.layout.rows

    def __repr__(self) -> str:
        return (
            f"LatentStore({str(self.root)!r}, rows={len(self)}, dim={self.layout.dim}, space={self.space.id})"
        )

    @cached_property
    def reader(self) -> Reader:
        """The reader of the latents: direct ``preadv`` where the shards are plain rows, else zarr."""
        return Reader(self.root, self.layout)

    # --- completeness -------------------------------------------------------------------------------

    def todo(self) -> list[int]:
        """Return the shards that are not committed."""
        return [
            s for s in range(self.layout.n_shards) if not is_done(self.root, self.layout, s, self.space.id)
        ]

    def require_complete(self) -> None:
        """Refuse a store that still has unwritten rows.

        Raises
        ------
        StoreIncompleteError
        """
        todo = self.todo()
        if todo:
            raise StoreIncompleteError(
                f"{self.root} is not finished: {len(todo)} of {self.layout.n_shards} shards are not written. "
                "Run the command that makes it again; it goes on where it stopped."
            )

    def data_hash(self) -> str:
        """Return 16 hexadecimal digits that change when any committed latent or status changes."""
        digest = hashlib.sha256(self.space.id.encode())
        for shard in range(self.layout.n_shards):
            record = Record.read(self.root, shard)
            digest.update(f"{record and (record.rows, record.latents_crc32, record.status_crc32)}".encode())
        return digest.hexdigest()[:16]

    # --- rows ---------------------------------------------------------------------------------------

    def status(self) -> npt.NDArray[np.uint8]:
        """Return the (rows,) status codes; see :data:`~latentstore.schema.STATUS_NAMES`."""
        out = np.zeros(len(self), np.uint8)
        for shard in range(self.layout.n_shards):
            span = self.layout.span(shard)
            path = self.root / STATUS / "c" / str(shard)
            if path.exists():
                out[span.start : span.stop] = np.fromfile(path, np.uint8)[: len(span)]
        return out

    def counts(self) -> dict[str, int]:
        """Return how many rows have each status."""
        codes, counts = np.unique(self.status(), return_counts=True)
        return {STATUS_NAMES[c]: int(n) for c, n in zip(codes, counts, strict=True)}

    def manifest(self, columns: list[str] | None = None) -> pa.Table:
        """Return the manifest of the committed rows, in row order.

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
        write_atomic(self.root / "inputs" / f"part-{number:06d}.parquet", _parquet(new))
        return settle(self)


def settle(store: LatentStore) -> LatentStore:
    """Bring the arrays' shape to the committed input list (after a growth, or one that was killed)."""
    import zarr

    rows = store.inputs().num_rows
    parts = {f"inputs/{p.name}" for p in (store.root / "inputs").glob("part-*.parquet")}
    if rows == len(store):
        seal = read_seal(store.root)
        # A growth was killed just before its seal. A seal that is damaged is left for `verify` to tell.
        if not parts <= seal.keys() and (seal or not (store.root / SEAL).exists()):
            write_seal(store.root)
        return store
    with write_errors(store.root):
        group: Any = zarr.open_group(store.root, mode="r+")
        # The latents' shape comes last: it is what tells a later call that nothing is left to do.
        group[STATUS].resize((rows,))
        group[LATENTS].resize((rows, store.layout.dim))
    write_seal(store.root)
    return LatentStore(store.root)


def create(root: Path, spec: StoreSpec, inputs: pa.Table) -> LatentStore:
    """Create a store and commit its input list; the store appears whole or not at all.

    Raises
    ------
    UsageError
        Something that is no store lies at the path, or the list and the layout differ in length.
    StoreWriteError
        No permission, or not enough room.
    """
    import zarr

    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise UsageError(
            f"{root} exists and is not a latentstore store. Choose another --store, or move it away."
        )
    if inputs.num_rows != spec.layout.rows:
        raise UsageError(f"{inputs.num_rows} inputs for {spec.layout.rows} rows.")
    check_room(root, spec.layout.total_bytes)
    with write_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        _sweep_unfinished(root)
        fresh = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
        try:
            fresh.mkdir()
            layout = spec.layout
            attrs = {"schema": SCHEMA_VERSION, "kind": spec.kind, "origin": spec.origin}
            group = zarr.create_group(fresh, attributes={"latentstore": attrs})
            group.create_array(
                LATENTS,
                shape=(layout.rows, layout.dim),
                dtype=layout.dtype,
                chunks=(CHUNK_ROWS, layout.dim),
                shards=(layout.shard_rows, layout.dim),
                compressors=None,
                filters=None,
                fill_value=0,
                dimension_names=("row", f"{LATENTS}_dim"),
                attributes={
                    "latentstore": {
                        "space_id": spec.space.id,
                        "space": json.loads(canonical_json(_plain(spec.space))),
                        "provenance": spec.provenance,
                    }
                },
            )
            group.create_array(
                STATUS,
                shape=(layout.rows,),
                dtype="uint8",
                chunks=(layout.shard_rows,),
                compressors=None,
                filters=None,
                fill_value=0,
                dimension_names=("row",),
                attributes={
                    "flag_values": list(range(len(STATUS_NAMES))),
                    "flag_meanings": " ".join(STATUS_NAMES),
                },
            )
            for name in _FOLDERS:
                group.create_group(name)
            write_atomic(fresh / "inputs" / "part-000000.parquet", _parquet(inputs))
            write_seal(fresh)
            fsync_tree(fresh)
            if root.exists():
                root.rmdir()
            fresh.rename(root)
            fsync_dir(root.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return LatentStore(root)


def write_seal(root: Path) -> None:
    """Record the checksums of the files that only creating and growing a store write."""
    files = [*root.glob("zarr.json"), *root.glob("*/zarr.json"), *root.glob("inputs/part-*.parquet")]
    sums = {str(p.relative_to(root)): zlib.crc32(p.read_bytes()) for p in sorted(files)}
    body = {"files": sums, "crc32": zlib.crc32(canonical_json(sums).encode())}
    write_atomic(root / SEAL, (json.dumps(body, indent=1) + "\n").encode())


def read_seal(root: Path) -> dict[str, int]:
    """Return the sealed checksums by file; empty when there is no seal, or it fails its own checksum."""
    try:
        body = json.loads((root / SEAL).read_bytes())
        sums: dict[str, int] = body["files"]
        return sums if body["crc32"] == zlib.crc32(canonical_json(sums).encode()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _sweep_unfinished(root: Path) -> None:
    """Delete what a creation that was killed left beside the store; one under way is a second old at most."""
    for stale in root.parent.glob(f".{glob.escape(root.name)}.*.partial"):
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)


def open_store(root: Path | str) -> LatentStore:
    """Open a store for reading.

    Raises
    ------
    StoreNotFoundError, StoreFormatError
    """
    root = Path(root)
    if not root.exists():
        raise _no_store(root)
    return LatentStore(root)


def exists(root: Path) -> bool:
    """Tell whether something that may be a store lies at the path."""
    return (root / "zarr.json").exists()


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the store's writer lock; the system drops it when the process dies. Sweeps stale partials.

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
        sweep_partials(root)
        yield
    finally:
        os.close(fd)


def check_room(root: Path, needed: int) -> None:
    """Refuse before a byte is written what cannot fit.

    Parameters
    ----------
    root : Path
        Where the bytes will go (it need not exist yet).
    needed : int
        Bytes.
    """
    where = root.absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if needed > free:
        raise StoreWriteError(
            f"{root} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there. Make room, choose "
            "another disk with --store, or encode fewer images."
        )


def _no_store(root: Path) -> StoreNotFoundError:
    return StoreNotFoundError(
        f"There is no store at {root} (looked in {Path.cwd()}). Make one with "
        f"`latentstore encode FOLDER --store {root}`, or name another with --store."
    )


def _plain(space: Space) -> dict[str, Any]:
    return {**space.__dict__, "latent_shape": list(space.latent_shape)}


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data: bytes = sink.getvalue().to_pybytes()
    return data
