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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latentstore import codecs
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.files import DERIVED, write_atomic
from latentstore.manifest import MANIFEST_SCHEMA
from latentstore.schema import LATENTS, STATUS_CODE, canonical_json
from latentstore.shards import PENDING, Record, ShardWriter, latents_file, pending_file, status_file
from latentstore.store import LatentStore, open_store, writing

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


def read_removed(root: Path) -> Removed:
    """Return what was taken down from a store.

    Raises
    ------
    CorruptStoreError
        The list fails its checksum.
    """
    try:
        body = json.loads((root / _FILE).read_bytes())
        crc = body.pop("crc32")
        if crc == zlib.crc32(canonical_json(body).encode()):
            return Removed({int(k): v for k, v in body["rows"].items()}, frozenset(body["sha256"]))
    except FileNotFoundError:
        return Removed()
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CorruptStoreError(
        f"{root / _FILE}, the list of removed images, is damaged. Restore it from a copy: without it, "
        "removed images could be encoded again."
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
    """Return the rows of paths (as the manifest spells them) or identities, and all copies of their contents.

    Raises
    ------
    UsageError
        A path or identity is not in the store.
    """
    table = store.manifest(["path", "identity", "sha256"])
    found: set[int] = set()
    for column, wanted in (("path", list(paths)), ("identity", list(identities))):
        for name in wanted:
            rows = np.flatnonzero(pc.equal(table[column], name).to_numpy(zero_copy_only=False))
            if not len(rows):
                raise UsageError(f"{store.root} has no row whose {column} is {name!r}; nothing was removed.")
            found.update(rows.tolist())
    return sorted(found | set(_copies(table, {table["sha256"][r].as_py() for r in found} - {None})))


def find_content(store: LatentStore, sha256: str) -> list[int]:
    """Return the rows whose file had this content."""
    return _copies(store.manifest(["sha256"]), {sha256})


def _copies(table: pa.Table, contents: set[str]) -> list[int]:
    same = pc.is_in(table["sha256"], value_set=pa.array(sorted(contents), pa.string()))
    rows: list[int] = np.flatnonzero(same.to_numpy(zero_copy_only=False)).tolist()
    return rows


def remove(root: Path, rows: Iterable[int], *, reason: str = "taken down") -> Removal:
    """Take rows down, in every array; their paths stay listed so that they are not encoded again.

    Maps, groups and whatever else was derived from the latents are deleted with them.

    Parameters
    ----------
    root : Path
        The store's folder.
    rows : iterable of int
    reason : str
        Recorded in the manifest.

    Raises
    ------
    UsageError
        Rows outside the store, or a store of simulated latents.
    """
    with writing(root):
        store = open_store(root)
        if store.kind != "images":
            raise UsageError(
                f"{root} holds simulated latents: remove the image from the store they were drawn from, and "
                "simulate again."
            )
        known = read_removed(root)
        new = sorted(set(rows) - known.rows.keys())
        if new and not 0 <= new[0] <= new[-1] < len(store):
            raise UsageError(f"rows {new[0]} to {new[-1]} were asked of a store of {len(store)}.")
        table = store.manifest(["path", "sha256"]).take(pa.array(new, pa.int64()))
        if new:
            contents = known.sha256 | (set(table["sha256"].to_pylist()) - {None})
            _write(root, Removed({**known.rows, **dict.fromkeys(new, reason)}, frozenset(contents)))
        shards = finish(root)
    return Removal(str(root), new, table["path"].to_pylist(), shards, store.arrays())


def _write(root: Path, removed: Removed) -> None:
    rows = {str(row): reason for row, reason in sorted(removed.rows.items())}
    body: dict[str, Any] = {"rows": rows, "sha256": sorted(removed.sha256)}
    body["crc32"] = zlib.crc32(canonical_json(body).encode())
    write_atomic(root / _FILE, (json.dumps(body, indent=1) + "\n").encode())


def finish(root: Path) -> int:
    """Carry out what the list of removed rows asks for and a kill may have left undone. Needs the lock.

    Returns
    -------
    int
        Shards that were replaced.
    """
    removed = read_removed(root)
    if not removed.rows:
        return 0
    shards = 0
    for name in open_store(root).arrays():
        store = LatentStore(root, name)
        _settle_pending(store)
        rows = np.array([r for r in removed.rows if r < len(store)])
        for shard in np.unique(rows // store.layout.shard_rows).tolist():
            shards += _zero(store, shard, removed)
    if shards:
        for folder in DERIVED:
            for path in (root / folder).glob("*"):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "zarr.json":
                    path.unlink(missing_ok=True)
    return shards


def _settle_pending(store: LatentStore) -> None:
    """Finish or drop replacements that a kill interrupted: the latents, renamed last, tell which."""
    folder = pending_file(store.root, 0, store.array).parent
    for path in folder.glob(f"*{PENDING}"):
        shard = int(path.name.split(".")[0])
        waiting = Record.read(store.root, shard, store.array, suffix=PENDING)
        if waiting is not None and _checksum(store, waiting) == waiting.latents_crc32:
            waiting.write(store.root, store.array)
        path.unlink()


def _checksum(store: LatentStore, record: Record) -> int:
    """Return the checksum, as a record states it, of the shard file that is in place."""
    with latents_file(store.root, record.shard, store.array).open("rb") as file:
        size = -1 if store.layout.codec else record.rows * store.layout.row_bytes
        return zlib.crc32(file.read(size))


def _zero(store: LatentStore, shard: int, removed: Removed) -> int:
    """Replace one committed shard by one without the removed rows; return how many were replaced (0 or 1)."""
    record = store.record(shard)
    if record is None:
        return 0  # not written yet: the task that writes it reads the list
    span = range(record.start, record.start + record.rows)
    gone = [r - span.start for r in removed.rows if r in span]
    status = np.fromfile(status_file(store.root, shard, store.array), np.uint8)
    # The statuses alone do not tell: they are renamed into place before the latents.
    if zlib.crc32(status.data) == record.status_crc32 and (status[gone] == REMOVED).all():
        return 0
    status = status[: record.rows]
    if _checksum(store, record) != record.latents_crc32:
        raise CorruptStoreError(
            f"shard {shard} of {store.path} does not match its checksum, so its other rows cannot be kept. "
            f"Run `latentstore verify {store.root} --repair`: it makes the shard anew, without those removed."
        )
    status[gone] = REMOVED
    table = None
    if store.array == LATENTS:
        table = _forget(store.manifest_part(record), gone, removed, span.start)
    layout = replace(store.layout, rows=span.stop)  # the shard may be about to grow
    with ShardWriter(store.root, layout, shard, store.space.id, array=store.array) as writer:
        writer.append(stored_rows(store, record), status)
        writer.commit(table, removed=len(gone), replacing=True)
    return 1


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
