"""The commit protocol of one shard: stream to a partial, fsync, rename, then write the done-record.

A shard file is what zarr-python itself would write for an uncompressed sharded array (plain rows, then
a 16-byte index entry a chunk, then a crc32c), so every Zarr v3 reader opens it, and row ``r`` lies at
``(r mod shard_rows)·row_bytes``. A shard without a valid record is not done, whatever files exist.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentstore import codecs
from latentstore.errors import CorruptStoreError
from latentstore.files import Staged, fsync_dir, write_all, write_atomic, write_errors
from latentstore.schema import (
    CHUNK_ROWS,
    LATENTS,
    OK,
    STATUS_CODE,
    Layout,
    canonical_json,
    index_bytes,
    status_name,
)

PENDING = ".pending"
_EMPTY = 2**64 - 1


def latents_file(root: Path, shard: int, array: str = LATENTS) -> Path:
    """Return the path of a shard's latents."""
    return root / array / "c" / str(shard) / "0"


def status_file(root: Path, shard: int, array: str = LATENTS) -> Path:
    """Return the path of a shard's status chunk."""
    return root / status_name(array) / "c" / str(shard)


def record_file(root: Path, shard: int, array: str = LATENTS) -> Path:
    """Return the path of a shard's done-record."""
    folder = root / "done" if array == LATENTS else root / "done" / array
    return folder / f"{shard:06d}.json"


def pending_file(root: Path, shard: int, array: str = LATENTS) -> Path:
    """Return where a replaced shard's new record waits until its files are in place."""
    path = record_file(root, shard, array)
    return path.with_name(path.name + PENDING)


def manifest_file(root: Path, shard: int, rows: int, removed: int = 0) -> Path:
    """Return the path of a shard's manifest part; named by rows and removals, so that parts never change."""
    return root / "manifest" / f"part-{shard:06d}-{rows}{f'-{removed}' if removed else ''}.parquet"


def drop_unnamed_parts(root: Path) -> None:
    """Delete the manifest parts of committed shards that their records do not name; needs the lock.

    A kill just after an append's record leaves the shorter part, which would give a reader of the folder
    rows twice.
    """
    for name in unnamed_parts(root):
        (root / "manifest" / name).unlink(missing_ok=True)


def unnamed_parts(root: Path) -> list[str]:
    """Return the manifest parts that stand beside the one their shard's record names."""
    parts: dict[int, list[str]] = {}
    for name in os.listdir(root / "manifest"):  # noqa: PTH208 (one a shard)
        if name.startswith("part-") and name.endswith(".parquet"):
            parts.setdefault(int(name.split("-")[1]), []).append(name)
    out = []
    for shard, names in parts.items():
        record = Record.read(root, shard) if len(names) > 1 else None
        out += [name for name in names if record is not None and record.manifest_part != name]
    return out


@dataclass(frozen=True)
class Record:
    """A shard's done-record: the commit marker, and what its files must hold.

    ``latents_crc32`` covers the payload of the valid rows alone, so it also checks the prefix of a
    shard that has grown by an append. Where the rows are coded it covers the whole file, of
    ``latents_bytes``. The manifest belongs to the first array alone: records of others name no part, and say
    which one they follow (``follows``, its checksum).
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
    latents_bytes: int | None = None
    follows: int | None = None

    def write(self, root: Path, array: str = LATENTS) -> None:
        """Commit the shard."""
        write_atomic(record_file(root, self.shard, array), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the file's contents: JSON with a checksum of its own."""
        body = {k: v for k, v in asdict(self).items() if v is not None}
        body["crc32"] = zlib.crc32(canonical_json(body).encode())
        return (json.dumps(body, indent=1) + "\n").encode()

    @classmethod
    def read(cls, root: Path, shard: int, array: str = LATENTS) -> Record | None:
        """Return the record, or None when there is none or its own checksum fails."""
        folder = "done" if array == LATENTS else f"done/{array}"
        try:
            # No pathlib: this is read for every shard at every start.
            with open(f"{root}/{folder}/{shard:06d}.json", "rb", buffering=0) as file:  # noqa: PTH123
                body = json.loads(file.read())
            crc = body.pop("crc32")
            return cls(**body) if crc == zlib.crc32(canonical_json(body).encode()) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def is_done(root: Path, layout: Layout, shard: int, space_id: str, array: str = LATENTS) -> bool:
    """Tell whether a shard is committed for the present layout: record, space, rows and file sizes agree."""
    record = Record.read(root, shard, array)
    if record is None or record.space_id != space_id or record.rows != len(layout.span(shard)):
        return False
    # Strings: pathlib alone would take longer than the checks, and this runs for every shard at every start.
    statuses = status_name(array)
    sizes = [
        (f"{root}/{array}/c/{shard}/0", record.latents_bytes or layout.shard_bytes(shard)),
        (f"{root}/{statuses}/c/{shard}", layout.shard_rows),
    ]
    if record.manifest_part:
        sizes.append((f"{root}/manifest/{record.manifest_part}", record.manifest_bytes))
    try:
        return all(os.stat(path).st_size == size for path, size in sizes)  # noqa: PTH116
    except OSError:
        return False


class ShardWriter:
    """Streams the rows of one shard to disk; memory is one batch, whatever the shard's size.

    Use it as a context manager: leaving with an exception drops the partial files. With a codec the rows
    are held until the commit (a shard at most).

    Parameters
    ----------
    root : Path
        The store.
    layout : Layout
    shard : int
    space_id : str
        Written into the record.
    array : str
        Of the store.
    """

    def __init__(
        self, root: Path, layout: Layout, shard: int, space_id: str, *, array: str = LATENTS
    ) -> None:
        self.root, self.layout, self.shard, self.space_id = root, layout, shard, space_id
        self.array = array
        self._target = latents_file(root, shard, array)
        self._status: list[npt.NDArray[np.uint8]] = []
        self._held: list[npt.NDArray[Any]] = []
        self._crc = 0
        self._rows = 0
        self._staged = Staged()
        with write_errors(self._target):
            self._file = self._staged.open(self._target)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()
        self._staged.__exit__()

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
        # A lossy codec rounds, and may round the largest numbers to infinity.
        stored = codecs.rounded(self.layout.codec, block)
        status[(status == OK) & ~_finite_rows(stored)] = STATUS_CODE["not_finite"]
        block[status != OK] = 0
        if self.layout.codec is None:
            self._write(block.data.cast("B") if block.size else memoryview(b""))
            self._crc = zlib.crc32(block.data, self._crc)
        else:
            self._held.append(block)
        self._rows += len(block)
        self._status.append(status)
        return status

    def commit(
        self,
        manifest: pa.Table | None = None,
        *,
        removed: int = 0,
        replacing: bool = False,
        follows: int | None = None,
    ) -> Record:
        """Finish the shard: everything durable under partial names, then renames, and last the record.

        Parameters
        ----------
        manifest : pyarrow.Table or None
            The rows' manifest; of the first array, and only of that.
        removed : int
            Rows of the shard that were taken down (they name the manifest part).
        replacing : bool
            A committed shard is replaced by one whose rows its record does not cover: the renames to come are
            written down first, so that :func:`recover` can finish them after a kill.
        follows : int, optional
            Of a further array: the checksum of the manifest part that its rows follow.

        Raises
        ------
        CorruptStoreError
            Rows were given twice or left out (a programming error caught before it costs data).
        StoreWriteError
        """
        span = self.layout.span(self.shard)
        n_manifest = len(span) if manifest is None else manifest.num_rows
        if self._rows != len(span) or n_manifest != len(span):
            raise CorruptStoreError(
                f"shard {self.shard} got {self._rows} latents and {n_manifest} manifest rows "
                f"for {len(span)} places; nothing was committed."
            )
        if (manifest is None) == (self.array == LATENTS):
            raise CorruptStoreError(f"shard {self.shard} of {self.array}: the first array has the manifest.")
        coded_bytes = self._finish(span)
        status = np.zeros(self.layout.shard_rows, np.uint8)
        status[: len(span)] = np.concatenate(self._status) if self._status else 0
        part_bytes = b"" if manifest is None else parquet_bytes(manifest)
        part = manifest_file(self.root, self.shard, len(span), removed)
        record = Record(
            shard=self.shard,
            start=span.start,
            rows=len(span),
            ok=int((status == OK).sum()),
            space_id=self.space_id,
            latents_crc32=self._crc,
            status_crc32=zlib.crc32(status.tobytes()),
            manifest_part="" if manifest is None else part.name,
            manifest_bytes=len(part_bytes),
            manifest_crc32=zlib.crc32(part_bytes),
            latents_bytes=coded_bytes,
            follows=follows,
        )
        before = Record.read(self.root, self.shard, self.array)
        with write_errors(self._target):
            self._staged.add(status_file(self.root, self.shard, self.array), status.tobytes())
            if manifest is not None:
                self._staged.add(part, part_bytes)
            if replacing:
                self._staged.sync()
                self._write_down(record)
            self._staged.publish()
            # The shard's own folder is new; its name must last too.
            fsync_dir(self._target.parent.parent)
        record.write(self.root, self.array)
        if replacing:
            pending_file(self.root, self.shard, self.array).unlink(missing_ok=True)
        _drop_replaced(self.root, before, record)
        return record

    def _finish(self, span: range) -> int | None:
        """Write what follows the rows, or the coded rows; return the file's size in the second case."""
        if self.layout.codec is not None:
            rows = np.concatenate(self._held) if self._held else np.empty((0, self.layout.dim))
            data = codecs.encode_shard(self.root / self.array, self.layout, self.shard, rows)
            self._held.clear()
            self._write(memoryview(data))
            self._crc = zlib.crc32(data)
            return len(data)
        chunks = -(-len(span) // CHUNK_ROWS)
        self._write(memoryview(bytes((chunks * CHUNK_ROWS - len(span)) * self.layout.row_bytes)))
        self._write(memoryview(shard_index(self.layout, chunks)))
        return None

    def _write_down(self, record: Record) -> None:
        """Write the renames to come, and the record that follows them."""
        places = self._staged.places
        for partial in places:
            fsync_dir(partial.parent)
        body: dict[str, Any] = {
            "array": self.array,
            "record": record.to_bytes().decode(),
            "renames": {
                str(a.relative_to(self.root)): str(b.relative_to(self.root)) for a, b in places.items()
            },
        }
        body["crc32"] = zlib.crc32(canonical_json(body).encode())
        write_atomic(pending_file(self.root, self.shard, self.array), json.dumps(body, indent=1).encode())

    def _write(self, data: memoryview) -> None:
        with write_errors(self._target):
            write_all(self._file, data)


def _drop_replaced(root: Path, before: Record | None, now: Record) -> None:
    """Delete the manifest part that a new record no longer names."""
    if before is not None and before.manifest_part not in ("", now.manifest_part):
        (root / "manifest" / before.manifest_part).unlink(missing_ok=True)


def recover(root: Path) -> int:
    """Finish the replacements that a kill interrupted; return how many. Under the lock, before sweeping.

    Raises
    ------
    CorruptStoreError
        What was written down fails its checksum.
    """
    waiting = [*(root / "done").glob(f"*{PENDING}"), *(root / "done").glob(f"*/*{PENDING}")]
    for path in waiting:
        try:
            body = json.loads(path.read_bytes())
            crc = body.pop("crc32")
            if crc != zlib.crc32(canonical_json(body).encode()):
                raise ValueError
        except (ValueError, KeyError, AttributeError) as exc:
            raise CorruptStoreError(
                f"{path} should tell how to finish a replaced shard, and is damaged. Delete it, and run "
                f"`latentstore verify {root} --repair`."
            ) from exc
        shard = int(path.name.split(".")[0])
        before = Record.read(root, shard, body["array"])
        with write_errors(path):
            for partial, place in body["renames"].items():
                if (root / partial).exists():
                    (root / partial).replace(root / place)
                fsync_dir((root / place).parent)
            write_atomic(record_file(root, shard, body["array"]), body["record"].encode())
        record = Record.read(root, shard, body["array"])
        if record is not None:
            _drop_replaced(root, before, record)
        path.unlink()
    return len(waiting)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    data: bytes = sink.getvalue().to_pybytes()
    return data


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
