"""Takedown: a row becomes zeros in every array, its facts leave the manifest, and it never comes back.

The list of what was removed is written first; then each shard that holds such rows is replaced. A kill in
between leaves a list that the next writer (:func:`finish`) carries out.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latentstore import codecs
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.files import DERIVED, write_atomic
from latentstore.indexing import forget, tokens
from latentstore.manifest import MANIFEST_SCHEMA
from latentstore.migrate import migrate
from latentstore.schema import LATENTS, STATUS_CODE, canonical_json
from latentstore.shards import (
    Record,
    ShardWriter,
    drop_unnamed_parts,
    latents_file,
    parquet_bytes,
    status_file,
)
from latentstore.store import LatentStore, open_store, settle, writing

REMOVED = STATUS_CODE["removed"]
_FILE = Path("inputs") / "removed.json"
_FORGOTTEN = ("bytes", "mtime", "sha256", "width", "height")


@dataclass(frozen=True)
class Removed:
    """What was taken down.

    Attributes
    ----------
    rows : mapping
        Row → reason.
    sha256 : frozenset of str
        Contents that may not come back under another name.
    """

    rows: Mapping[int, str] = field(default_factory=dict)
    sha256: frozenset[str] = frozenset()

    @cached_property
    def _sorted(self) -> npt.NDArray[np.int64]:
        return np.array(sorted(self.rows), np.int64)

    def within(self, span: range) -> list[int]:
        """Return the removed rows of a span."""
        first, last = np.searchsorted(self._sorted, [span.start, span.stop])
        rows: list[int] = self._sorted[first:last].tolist()
        return rows


def read_removed(root: Path) -> Removed:
    """Return what was taken down from a store.

    Raises
    ------
    CorruptStoreError
        The list fails its checksum.
    """
    path = root / _FILE
    try:
        facts = path.stat()
    except FileNotFoundError:
        return Removed()
    return _read(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@lru_cache(maxsize=4)
def _read(path: Path, mtime: int, size: int, inode: int) -> Removed:
    """Read the list once for each version of it: every task asks for it."""
    del mtime, size, inode
    try:
        body = json.loads(path.read_bytes())
        crc = body.pop("crc32")
        if crc == zlib.crc32(canonical_json(body).encode()):
            return Removed({int(k): v for k, v in body["rows"].items()}, frozenset(body["sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CorruptStoreError(
        f"{path}, the list of removed images, is damaged. Restore it from a copy: without it, removed images "
        "could be encoded again."
    )


@dataclass
class Removal:
    """What a takedown did: rows by path, and whether derived files went with them."""

    store: str
    rows: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    shards: int = 0
    arrays: list[str] = field(default_factory=list)


def find_rows(store: LatentStore, *, paths: Iterable[str] = (), identities: Iterable[str] = ()) -> list[int]:
    """Return the rows of paths (as the input list spells them) or identities.

    Raises
    ------
    UsageError
        A path or identity is not in the store.
    """
    # The input list has every row, in order; the manifest only those that are committed.
    table = store.inputs().select(["path", "identity"])
    found: set[int] = set()
    for column, wanted in (("path", list(paths)), ("identity", list(identities))):
        for name in wanted:
            rows = np.flatnonzero(pc.equal(table[column], name).to_numpy(zero_copy_only=False))
            if not len(rows):
                raise UsageError(f"{store.root} has no row whose {column} is {name!r}; nothing was removed.")
            found.update(rows.tolist())
    return sorted(found)


def with_copies(store: LatentStore, rows: Iterable[int], contents: Iterable[str] = ()) -> list[int]:
    """Return rows with all copies of their contents, and of the contents named."""
    table = store.manifest(["row", "sha256"])
    wanted = set(rows)
    here = pc.is_in(table["row"], value_set=pa.array(sorted(wanted), pa.int64()))
    hashes = set(table["sha256"].filter(here).to_pylist()) | set(contents)
    same = pc.is_in(table["sha256"], value_set=pa.array(sorted(hashes - {None}), pa.string()))
    return sorted(wanted | set(table["row"].filter(same).to_pylist()))


def remove(root: Path, rows: Iterable[int], *, reason: str = "taken down") -> Removal:
    """Take rows down, in every array, with all copies of their contents.

    Their paths stay listed so that they are not encoded again. Maps, groups and whatever else was derived
    from the latents are deleted; kept indexes lose these rows at once.

    Parameters
    ----------
    root : Path
        The store's folder.
    rows : iterable of int
        None of them finishes what a removal that was interrupted left undone.
    reason : str
        Recorded in the manifest.

    Raises
    ------
    UsageError
        Rows outside the store, or a store of simulated latents.
    """
    with writing(root):
        migrate(root)
        store = settle(open_store(root))
        if store.kind == "simulated":
            raise UsageError(
                f"{root} holds simulated latents: remove the image from the store they were drawn from, and "
                "simulate again."
            )
        asked, known = sorted(set(rows)), read_removed(root)
        if asked and not 0 <= asked[0] <= asked[-1] < len(store):
            raise UsageError(f"rows {asked[0]} to {asked[-1]} were asked of a store of {len(store)}.")
        # Under the lock: a copy may have come since the rows were chosen.
        new = sorted(set(with_copies(store, asked, known.sha256)) - known.rows.keys())
        if new:
            contents = known.sha256 | _contents(store, new)
            _write(root, Removed({**known.rows, **dict.fromkeys(new, reason)}, frozenset(contents)))
        if new or asked:
            drop_derived(root)
            forget(root, new)
        shards = finish(root)
        paths = store.inputs()["path"].take(pa.array(new, pa.int64())).to_pylist()
    return Removal(str(root), new, paths, shards, store.arrays())


def _contents(store: LatentStore, rows: list[int]) -> set[str]:
    table = store.manifest(["row", "sha256"])
    here = pc.is_in(table["row"], value_set=pa.array(rows, pa.int64()))
    return set(table["sha256"].filter(here).to_pylist()) - {None}


def _write(root: Path, removed: Removed) -> None:
    rows = {str(row): reason for row, reason in sorted(removed.rows.items())}
    body: dict[str, Any] = {"rows": rows, "sha256": sorted(removed.sha256)}
    body["crc32"] = zlib.crc32(canonical_json(body).encode())
    write_atomic(root / _FILE, (json.dumps(body, indent=1) + "\n").encode())


def drop_derived(root: Path) -> None:
    """Delete maps, groups and whatever else was made from the latents."""
    for folder in DERIVED:
        for path in (root / folder).glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "zarr.json":
                path.unlink(missing_ok=True)


def finish(root: Path) -> int:
    """Carry out what the list of removed rows asks for and a kill may have left undone. Needs the lock.

    Returns
    -------
    int
        Shards that were replaced.
    """
    removed = read_removed(root)
    drop_unnamed_parts(root)
    if not removed.rows:
        return 0
    first = open_store(root)
    others = [LatentStore(root, name) for name in first.arrays()[1:]]
    size, shards = first.layout.shard_rows, 0
    touched = sorted({row // size for row in removed.rows if row < len(first)})
    before = [tokens(array, touched) for array in (first, *others)]
    for shard in touched:
        shards += _zero_everywhere(first, others, shard, removed)
    if shards:
        drop_derived(root)
    forget(
        root,
        removed.rows,
        {
            (array.array, shard): (was[shard], now)
            for array, was in zip((first, *others), before, strict=True)
            for shard, now in tokens(array, touched).items()
            if shard in was and was[shard] != now
        },
    )
    return shards


def _zero_everywhere(first: LatentStore, others: list[LatentStore], shard: int, removed: Removed) -> int:
    """Replace one shard of every array by one without the removed rows; return how many were replaced."""
    record, table = first.record(shard), None
    before = after = None if record is None else record.manifest_crc32
    if record is not None:
        gone = _gone(record, removed)
        if not (_whole_status(first, record)[gone] == REMOVED).all():
            part = (first.root / "manifest" / record.manifest_part).read_bytes()
            if zlib.crc32(part) != record.manifest_crc32:
                raise _damaged(first, shard)
            table = _forget(first.manifest_part(record), gone, removed, record.start)
            after = zlib.crc32(parquet_bytes(table))
    # The further arrays come first and name the part to come: a kill in between leaves none of them stale.
    replaced = 0
    for other in others:
        own = other.record(shard)
        kept = None if own is None else own.follows
        follows = after if kept == before else kept
        replaced += _zero(other, shard, removed, None, follows)
    if record is None or table is not None:
        replaced += _zero(first, shard, removed, table, None)
    return replaced


def _zero(
    store: LatentStore, shard: int, removed: Removed, table: pa.Table | None, follows: int | None
) -> int:
    """Replace one committed shard by one without the removed rows; return how many were replaced (0 or 1)."""
    record = store.record(shard)
    if record is None:
        # Not committed: the task that writes it reads the list. What lies there may hold removed rows.
        for place in (latents_file, status_file):
            place(store.root, shard, store.array).unlink(missing_ok=True)
        if store.array == LATENTS:
            for path in (store.root / "manifest").glob(f"part-{shard:06d}-*.parquet"):
                path.unlink()
        return 0
    gone, status = _gone(record, removed), _whole_status(store, record)
    if (status[gone] == REMOVED).all() and record.follows == follows:
        return 0
    if not payload_is_whole(store, record):
        raise _damaged(store, shard)
    status = status[: record.rows].copy()
    status[gone] = REMOVED
    layout = replace(store.layout, rows=record.start + record.rows)  # the shard may be about to grow
    with ShardWriter(store.root, layout, shard, store.space.id, array=store.array) as writer:
        writer.append(stored_rows(store, record), status)
        writer.commit(table, removed=len(gone), replacing=True, follows=follows)
    return 1


def _gone(record: Record, removed: Removed) -> list[int]:
    """Return the places in a shard of the rows that were removed."""
    span = range(record.start, record.start + record.rows)
    return [row - record.start for row in removed.within(span)]


def _whole_status(store: LatentStore, record: Record) -> npt.NDArray[np.uint8]:
    """Return the statuses that a record covers; a growth that was killed may have left a longer file."""
    status = np.fromfile(status_file(store.root, record.shard, store.array), np.uint8)
    status[record.rows :] = 0
    if zlib.crc32(status.data) != record.status_crc32:
        raise _damaged(store, record.shard)
    return status


def _damaged(store: LatentStore, shard: int) -> CorruptStoreError:
    return CorruptStoreError(
        f"shard {shard} of {store.path} does not match its checksums, so its other rows cannot be kept. Run "
        f"`latentstore verify {store.root} --repair`: it makes the shard anew, without those removed."
    )


def payload_is_whole(store: LatentStore, record: Record) -> bool:
    """Tell whether a shard's file holds the rows that its record covers."""
    size = record.latents_bytes or record.rows * store.layout.row_bytes
    try:
        with latents_file(store.root, record.shard, store.array).open("rb") as file:
            data = file.read(size)
    except OSError:
        return False
    return len(data) == size and zlib.crc32(data) == record.latents_crc32


def stored_rows(store: LatentStore, record: Record) -> npt.NDArray[Any]:
    """Return the (rows, dim) latents of a record, not of the present layout (the shard may have to grow)."""
    if store.layout.codec:
        rows = slice(record.start, record.start + record.rows)
        return np.asarray(codecs.open_array(store.root / store.array)[rows])
    path = latents_file(store.root, record.shard, store.array)
    flat = np.fromfile(path, store.layout.dtype, count=record.rows * store.layout.dim)
    return flat.reshape(record.rows, -1)


def _forget(table: pa.Table, gone: list[int], removed: Removed, start: int) -> pa.Table:
    rows = table.to_pylist()
    for i in gone:
        rows[i] |= dict.fromkeys(_FORGOTTEN) | {"status": "removed", "reason": removed.rows[start + i]}
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
