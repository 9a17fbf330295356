"""The commit protocol of one shard: stream to a partial, fsync, rename, then write the done-record.

A shard file is what zarr-python itself would write for an uncompressed sharded array (plain rows, then
a 16-byte index entry a chunk, then a crc32c), so every Zarr v3 reader opens it, and row ``r`` lies at
``(r mod shard_rows)·row_bytes``. A shard without a valid record is not done, whatever files exist.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentstore.errors import CorruptStoreError, StoreWriteError
from latentstore.schema import (
    CHUNK_ROWS,
    LATENTS,
    OK,
    STATUS,
    STATUS_CODE,
    Layout,
    canonical_json,
    index_bytes,
)

PARTIAL = ".partial"
_EMPTY = 2**64 - 1
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def latents_file(root: Path, shard: int) -> Path:
    """Return the path of a shard's latents."""
    return root / LATENTS / "c" / str(shard) / "0"


def status_file(root: Path, shard: int) -> Path:
    """Return the path of a shard's status chunk."""
    return root / STATUS / "c" / str(shard)


def record_file(root: Path, shard: int) -> Path:
    """Return the path of a shard's done-record."""
    return root / "done" / f"{shard:06d}.json"


def manifest_file(root: Path, shard: int, rows: int) -> Path:
    """Return the path of a shard's manifest part; its name holds the row count, so parts never change."""
    return root / "manifest" / f"part-{shard:06d}-{rows}.parquet"


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StoreWriteError` that says what to do."""
    try:
        yield
    except StoreWriteError:
        raise
    except OSError as exc:
        if exc.errno in _DISK_FULL:
            advice = "The disk is full. Finished shards are kept: make room and run the same command again."
        else:
            advice = "Finished shards are kept: mend the cause and run the same command again."
        raise StoreWriteError(f"Could not write {path}: {exc.strerror or exc}. {advice}") from exc


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make every file and folder below a folder durable."""
    for path in [*root.rglob("*"), root]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that it is seen whole or not at all, also after a crash."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def partial_of(path: Path) -> Path:
    """Return a unique sibling name that sweeping recognises."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def sweep_partials(root: Path) -> int:
    """Delete what killed writers left behind; return how many files. Call it only under the writer's lock."""
    # Only where writers under the lock write: `projections/` is written without it.
    folders = (root / name for name in (LATENTS, STATUS, "manifest", "inputs", "done"))
    stale = [path for folder in folders for path in folder.rglob(f"*{PARTIAL}")]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def drop_unnamed_parts(root: Path) -> None:
    """Delete the manifest parts of committed shards that their records do not name; needs the lock.

    A kill just after an append's record leaves the shorter part, which would give a reader of the folder
    rows twice.
    """
    for part in (root / "manifest").glob("part-*.parquet"):
        record = Record.read(root, int(part.name.split("-")[1]))
        if record is not None and record.manifest_part != part.name:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Record:
    """A shard's done-record: the commit marker, and what its files must hold.

    ``latents_crc32`` covers the payload of the valid rows alone, so it also checks the prefix of a
    shard that has grown by an append.
    """

    shard: int
    start: int
    rows: int
    ok: int
    space_id: str
    latents_crc32: int
    status_crc32: int
    manifest_part: str
    manifest_bytes: int
    manifest_crc32: int

    def write(self, root: Path) -> None:
        """Commit the shard."""
        body = asdict(self)
        body["crc32"] = zlib.crc32(canonical_json(asdict(self)).encode())
        write_atomic(record_file(root, self.shard), (json.dumps(body, indent=1) + "\n").encode())

    @classmethod
    def read(cls, root: Path, shard: int) -> Record | None:
        """Return the record, or None when there is none or its own checksum fails."""
        try:
            body = json.loads(record_file(root, shard).read_bytes())
            crc = body.pop("crc32")
            record = cls(**body)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return record if crc == zlib.crc32(canonical_json(asdict(record)).encode()) else None


def is_done(root: Path, layout: Layout, shard: int, space_id: str) -> bool:
    """Tell whether a shard is committed for the present layout: record, space, rows and file sizes agree."""
    record = Record.read(root, shard)
    if record is None or record.space_id != space_id or record.rows != len(layout.span(shard)):
        return False
    sizes = {
        latents_file(root, shard): layout.shard_bytes(shard),
        status_file(root, shard): layout.shard_rows,
        root / "manifest" / record.manifest_part: record.manifest_bytes,
    }
    try:
        return all(path.stat().st_size == size for path, size in sizes.items())
    except OSError:
        return False


class ShardWriter:
    """Streams the rows of one shard to disk; memory is one batch, whatever the shard's size.

    Use it as a context manager: leaving with an exception drops the partial files.

    Parameters
    ----------
    root : Path
        The store.
    layout : Layout
    shard : int
    space_id : str
        Written into the record.
    """

    def __init__(self, root: Path, layout: Layout, shard: int, space_id: str) -> None:
        self.root, self.layout, self.shard, self.space_id = root, layout, shard, space_id
        self._target = latents_file(root, shard)
        self._status: list[npt.NDArray[np.uint8]] = []
        self._crc = 0
        self._rows = 0
        with write_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._partial = partial_of(self._target)
            # Unbuffered: batches are large, and a full disk must show at the write, not at the close.
            self._file = self._partial.open("wb", buffering=0)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def append(
        self, latents: npt.NDArray[np.floating[Any]], status: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        """Append rows.

        Parameters
        ----------
        latents : (b, dim) array
            Cast to the stored dtype. Rows that are not ok, or not finite in that dtype, become zeros.
        status : (b,) uint8 array

        Returns
        -------
        (b,) uint8 array
            The statuses as stored (``not_finite`` where the cast overflowed).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.array(latents, dtype=f"<f{np.dtype(self.layout.dtype).itemsize}", order="C")
        status = np.array(status, dtype=np.uint8)
        status[(status == OK) & ~_finite_rows(block)] = STATUS_CODE["not_finite"]
        block[status != OK] = 0
        self._write(block)
        self._crc = zlib.crc32(block.data, self._crc)
        self._rows += len(block)
        self._status.append(status)
        return status

    def commit(self, manifest: pa.Table) -> Record:
        """Finish the shard: index, fsync, renames, manifest part, and last the record.

        Raises
        ------
        CorruptStoreError
            Rows were given twice or left out (a programming error caught before it costs data).
        StoreWriteError
        """
        span = self.layout.span(self.shard)
        if self._rows != len(span) or manifest.num_rows != len(span):
            raise CorruptStoreError(
                f"shard {self.shard} got {self._rows} latents and {manifest.num_rows} manifest rows "
                f"for {len(span)} places; nothing was committed."
            )
        chunks = -(-len(span) // CHUNK_ROWS)
        self._write(np.zeros((chunks * CHUNK_ROWS - len(span)) * self.layout.row_bytes, np.uint8))
        self._write(np.frombuffer(shard_index(self.layout, chunks), np.uint8))
        status = np.zeros(self.layout.shard_rows, np.uint8)
        status[: len(span)] = np.concatenate(self._status) if self._status else 0

        sink = pa.BufferOutputStream()
        pq.write_table(manifest, sink, compression="zstd", store_schema=False)
        part_bytes = sink.getvalue().to_pybytes()
        part = manifest_file(self.root, self.shard, len(span))
        with write_errors(self._target):
            os.fsync(self._file.fileno())
            self._partial.replace(self._target)
            fsync_dir(self._target.parent)
            fsync_dir(self._target.parent.parent)
        write_atomic(status_file(self.root, self.shard), status.tobytes())
        write_atomic(part, part_bytes)
        record = Record(
            shard=self.shard,
            start=span.start,
            rows=len(span),
            ok=int((status == OK).sum()),
            space_id=self.space_id,
            latents_crc32=self._crc,
            status_crc32=zlib.crc32(status.tobytes()),
            manifest_part=part.name,
            manifest_bytes=len(part_bytes),
            manifest_crc32=zlib.crc32(part_bytes),
        )
        record.write(self.root)
        self._drop_older_parts(part)
        return record

    def _drop_older_parts(self, keep: Path) -> None:
        """Delete the parts of this shard that an append replaced, now that the record names the new one."""
        for part in keep.parent.glob(f"part-{self.shard:06d}-*.parquet"):
            if part != keep:
                part.unlink(missing_ok=True)

    def _write(self, block: npt.NDArray[Any]) -> None:
        view = block.data.cast("B") if block.size else memoryview(b"")
        with write_errors(self._target):
            while view:
                view = view[self._file.write(view) :]


def _finite_rows(block: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return ``isfinite(block).all(axis=1)``, read off the bits: several times quicker, float16 above all.

    Infinities and NaNs have the largest exponent: as integers they are at least +inf's bits, or, with the
    sign bit, as unsigned integers at least -inf's.
    """
    size = block.dtype.itemsize
    limit = np.array([np.inf, -np.inf], block.dtype)
    signed, unsigned = f"<i{size}", f"<u{size}"
    if not block.size:
        return np.ones(len(block), bool)
    below = block.view(signed).max(axis=1) < limit.view(signed)[0]
    above = block.view(unsigned).max(axis=1) < limit.view(unsigned)[1]
    finite: npt.NDArray[np.bool_] = below & above
    return finite


def shard_index(layout: Layout, chunks: int) -> bytes:
    """Return the index of a contiguous shard: (offset, length) a chunk, empty entries, crc32c."""
    table = np.full((layout.chunks_per_shard, 2), _EMPTY, dtype="<u8")
    size = CHUNK_ROWS * layout.row_bytes
    table[:chunks, 0] = np.arange(chunks, dtype=np.uint64) * size
    table[:chunks, 1] = size
    raw = table.tobytes()
    return raw + int(google_crc32c.value(raw)).to_bytes(4, "little")


def read_index_is_plain(path: Path, layout: Layout, shard: int) -> bool:
    """Tell whether a shard file's index says contiguous rows from byte 0, with a valid crc32c."""
    size = index_bytes(layout.chunks_per_shard)
    expected = layout.shard_bytes(shard)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != expected:
            return False
        file.seek(expected - size)
        return file.read() == shard_index(layout, -(-len(layout.span(shard)) // CHUNK_ROWS))
