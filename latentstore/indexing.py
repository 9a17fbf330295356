"""Making and changing a kept index (:mod:`latentstore.index`), safely at any point.

What is gone is made empty before what is new is written, so that no row is ever there twice; vectors come
before their rows, and ``index.json`` last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.errors import CorruptStoreError, StoreFormatError, UsageError
from latentstore.files import PARTIAL, check_room, write_atomic, write_errors
from latentstore.index import BLOCK, SCHEMA, Index, Rows, Vectors, read_body, sizes_of, sums_of
from latentstore.reader import Reader
from latentstore.schema import OK, canonical_json
from latentstore.shards import Record, status_file
from latentstore.store import LatentStore

PIECE = 1024
"""Rows that are projected at once, always so many: a vector then depends on its row alone."""
Project = Callable[[npt.NDArray[np.floating[Any]]], Any]
Token = tuple[int, int, int]
"""Of a shard: rows, crc32 of the latents, crc32 of the statuses."""
_PAUSE = 0.01
"""Seconds between two blocks in which a removal that waits for the lock can take it."""
STALE = 3600
"""Seconds after which an unfinished approximate part is nobody's."""


@dataclass(frozen=True)
class Updated:
    """What an update did, in images: added (or made again), taken out, left alone."""

    added: int
    removed: int
    kept: int


def prepare(store: LatentStore, folder: Path) -> None:
    """Make the folder of an index; inside the store it is a group, so that Zarr's readers know it.

    Raises
    ------
    StoreWriteError
    """
    import zarr

    with write_errors(folder):
        if store.root / "index" in folder.parents:
            for group in (store.root / "index", folder):
                with suppress(zarr.errors.ContainsGroupError):  # another process was quicker
                    zarr.open_group(group, mode="a")
        folder.mkdir(parents=True, exist_ok=True)


def tokens(store: LatentStore, shards: Iterable[int] | None = None) -> dict[int, Token]:
    """Return what tells each committed shard of a store (or some) from what it was before."""
    asked = range(store.layout.n_shards) if shards is None else shards
    return {shard: token for shard in asked if (token := _token(store.record(shard))) is not None}


def _token(record: Record | None) -> Token | None:
    return None if record is None else (record.rows, record.latents_crc32, record.status_crc32)


def update(
    store: LatentStore,
    folder: Path,
    project: Project,
    rows: Rows,
    *,
    fingerprint: str,
    facts: Mapping[str, Any] | None = None,
    rebuild: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> Updated:
    """Bring an index to the present rows of a store, or make it.

    Only shards whose checksums changed, or that miss a row, are read and projected.

    Parameters
    ----------
    store : LatentStore
    folder : Path
        Of the index; see :func:`prepare`.
    project : callable
        (1024, d) latents in the stored dtype → (1024, m) references.
    rows : (r,) int64 array
        Rising; what is to be found.
    fingerprint : str
        Of the map.
    facts : mapping, optional
        Kept with the index; JSON.
    rebuild : bool
        Make all of it anew.
    on_start, on_rows : callable, optional
        Called with (rows to project, all rows), and with (rows projected, 0).

    Raises
    ------
    UsageError
        The store was changed meanwhile, or the folder holds an index of another map, space or array.
    StoreWriteError
    """
    with locked(folder):
        if rebuild:
            _wipe(folder)
        body = settled(folder) or _fresh(store, fingerprint)
        _require_same(folder, body, store, fingerprint)
        body["facts"] = dict(facts if facts is not None else body["facts"])
        held = _held_rows(folder, body["n"])
        live = held[held >= 0]
        now, before = tokens(store), {int(s): tuple(t) for s, t in body["shards"].items()}
        size = store.layout.shard_rows
        changed = [s for s in now.keys() | before.keys() if now.get(s) != before.get(s)]
        todo = set(changed) | set((np.setdiff1d(rows, live) // size).tolist())
        gone = np.flatnonzero((held >= 0) & ~np.isin(held, rows))
        # From here on it is not current, and stays so until the last of these shards is as it is wanted.
        left = {s: token for s, token in body["shards"].items() if int(s) not in todo}
        losing = set((held[gone] // size).tolist())
        body |= {"data": "", "shards": {s: token for s, token in left.items() if int(s) not in losing}}
        write_body(folder, body)
        _empty(folder, body, gone)
        if len(gone):
            write_body(folder, body | {"shards": left})
    edges = np.searchsorted(rows, np.arange(store.layout.n_shards + 1) * size)
    spans = {s: rows[edges[s] : edges[s + 1]] for s in sorted(todo) if s < store.layout.n_shards}
    count = sum(map(len, spans.values()))
    if on_start is not None:
        on_start(count, len(rows))
    for group in _groups(spans):
        with locked(folder):
            _redo(store, folder, group, project, on_rows)
        time.sleep(_PAUSE)
    with locked(folder):
        _finish(store, folder)
    return Updated(count, len(gone), len(rows) - count)


def forget(
    root: Path, rows: Iterable[int], renewed: Mapping[tuple[str, int], tuple[Token, Token]] | None = None
) -> int:
    """Take rows out of all indexes that a store keeps: their vectors become zeros. Needs no map.

    Approximate parts that could hold them are deleted.

    Parameters
    ----------
    root : Path
    rows : iterable of int
    renewed : mapping, optional
        (array, shard) → its token before and after the rows were removed from it: an index of the former is
        one of the latter. None where the store still holds the rows: until it is called again, without them,
        the index is not current.

    Returns
    -------
    int
        References that were taken out.
    """
    unwanted, count = np.fromiter(rows, np.int64), 0
    for folder in [path for path in (root / "index").glob("*") if path.is_dir()]:
        with locked(folder):
            try:
                body = settled(folder)
            except (CorruptStoreError, StoreFormatError):
                body = None
            if body is None:
                vectors = folder / "references.f32"
                if vectors.exists() and vectors.stat().st_size:
                    drop(folder)  # nobody knows what it holds, and it can be made anew
                continue
            for unfinished in folder.glob(f".approximate-*{PARTIAL}"):
                unfinished.unlink(missing_ok=True)
            held = _held_rows(folder, body["n"])
            gone = np.flatnonzero((held >= 0) & np.isin(held, unwanted))
            if len(gone):
                body |= {"approximate": None, "data": ""}
                write_body(folder, body)
                _drop_unnamed(folder, body)
                _empty(folder, body, gone)
                count += len(gone)
            for (array, shard), (before, after) in (renewed or {}).items():
                if array == body["array"] and tuple(body["shards"].get(str(shard), ())) == before:
                    body["shards"][str(shard)] = after
            if renewed:
                body["data"] = ""
                write_body(folder, body)
            if renewed is not None and not body["data"]:
                _finish(LatentStore(root, body["array"]), folder)
    return count


def _redo(
    store: LatentStore,
    folder: Path,
    group: Mapping[int, Rows],
    project: Project,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    """Empty the positions of some shards' rows, write these shards' present rows, commit."""
    body = settled(folder)
    if body is None:
        raise _changed(store)
    held, size = _held_rows(folder, body["n"]), store.layout.shard_rows
    shards = np.array(sorted(group))
    _empty(folder, body, np.flatnonzero((held >= 0) & np.isin(held // size, shards)))
    before = {s: _token(store.record(s)) for s in group}
    rows = np.concatenate(list(group.values()))
    vectors = [_projected(store, shard, own, project, on_rows) for shard, own in group.items()]
    if before != {s: _token(store.record(s)) for s in group}:
        raise _changed(store)
    if len(rows):
        whole = np.concatenate([v for v in vectors if len(v)])
        body["width"] = body["width"] or whole.shape[1]
        norms = np.linalg.norm(whole.astype(np.float64), axis=1)
        if not np.isfinite(norms).all() or whole.shape[1] != body["width"]:
            raise UsageError(
                f"The map gives {whole.shape[1]} numbers a row (the index has {body['width']}), "
                f"{int((~np.isfinite(norms)).sum())} rows of them not finite. Solve the map again."
            )
        body["largest"] = max(body["largest"], float(norms.max()) * (1 + 2.0**-40))
        _write(folder, body, rows, whole)
    for shard, token in before.items():
        if token is None:
            body["shards"].pop(str(shard), None)
        else:
            body["shards"][str(shard)] = token
    write_body(folder, body)


def _projected(
    store: LatentStore,
    shard: int,
    rows: Rows,
    project: Project,
    on_rows: Callable[[int, int], None] | None,
) -> Vectors:
    if not len(rows):
        return np.empty((0, 0), np.float32)
    # A reader of its own: one that was used before may still read what the shard was then.
    reader = Reader(store.root, store.layout, store.array)
    status = np.fromfile(status_file(store.root, shard, store.array), np.uint8)
    if (status[rows - store.layout.span(shard).start] != OK).any():
        raise _changed(store)
    out = []
    block = np.zeros((PIECE, store.layout.dim), store.layout.dtype)
    for at in range(0, len(rows), PIECE):
        n = len(rows[at : at + PIECE])
        reader.gather(rows[at : at + PIECE], block[:n])
        block[n:] = 0
        out.append(np.asarray(project(block), np.float32)[:n])
        if on_rows is not None:
            on_rows(n, 0)
    return np.concatenate(out)


def _changed(store: LatentStore) -> UsageError:
    return UsageError(
        f"{store.path} was changed (images added, mended or removed) while it was indexed. Run the same "
        "command again: what is done is kept."
    )


def _groups(spans: Mapping[int, Rows]) -> Iterator[dict[int, Rows]]:
    """Cut shards into groups of about a block: what a kill costs at most."""
    group: dict[int, Rows] = {}
    for shard, rows in spans.items():
        group[shard] = rows
        if sum(map(len, group.values())) >= BLOCK:
            yield group
            group = {}
    if group:
        yield group


def _finish(store: LatentStore, folder: Path) -> None:
    """Record that the index is current, if every shard of the store is in it as it is now."""
    body = read_body(folder)
    if body is None:
        return
    now = tokens(store)
    for shard in [s for s in body["shards"] if int(s) not in now]:
        del body["shards"][shard]
    current = {int(s): tuple(t) for s, t in body["shards"].items()} == now
    write_body(folder, {**body, "data": store.data_hash() if current else ""})


def _fresh(store: LatentStore, fingerprint: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "array": store.array,
        "space": store.space.id,
        "map": fingerprint,
        "width": 0,
        "n": 0,
        "largest": 0.0,
        "shards": {},
        "data": "",
        "facts": {},
        "approximate": None,
    }


def _require_same(folder: Path, body: dict[str, Any], store: LatentStore, fingerprint: str) -> None:
    for what, held, wanted in (
        ("array", body["array"], store.array),
        ("space", body["space"], store.space.id),
        ("map", body["map"], fingerprint),
    ):
        if held != wanted:
            raise UsageError(
                f"{folder} holds an index of the {what} {held}, not {wanted}. Name another folder, or "
                "delete it."
            )


# --- files ------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the index's lock; who waits for it waits for a block at most."""
    with write_errors(folder):
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write_body(folder: Path, body: Mapping[str, Any]) -> None:
    """Write ``index.json``, with the time, a version of its own and a checksum. Under the lock."""
    made = datetime.now(UTC).isoformat(timespec="seconds")
    whole = json.loads(json.dumps({**body, "made": made, "version": uuid.uuid4().hex}))
    whole["crc32"] = zlib.crc32(canonical_json(whole).encode())
    write_atomic(folder / "index.json", (json.dumps(whole, indent=1) + "\n").encode())


def settled(folder: Path) -> dict[str, Any] | None:
    """Return ``index.json`` after whatever a kill left behind was cleared; None where there is none yet."""
    body = read_body(folder)
    n, width = (0, 0) if body is None else (body["n"], body["width"])
    with write_errors(folder):
        for left in folder.glob(f"index.json.*{PARTIAL}"):
            left.unlink(missing_ok=True)
        _drop_unnamed(folder, body or {})
        for name, size in sizes_of(n, width).items():
            path = folder / name
            if not path.exists():
                path.touch()
            if path.stat().st_size > size:
                os.truncate(path, size)
    if body is None:
        return None
    index = Index.open(folder)
    empty = np.flatnonzero(index.rows < 0)
    for at in range(0, len(empty), BLOCK):
        part = empty[at : at + BLOCK]
        _zero(folder, width, part[index.references[part].any(axis=1)])
    return body


def _drop_unnamed(folder: Path, body: Mapping[str, Any]) -> None:
    """Delete approximate parts that ``index.json`` does not name (any more)."""
    named = (body.get("approximate") or {}).get("file")
    for path in folder.glob("approximate-*"):
        if path.name != named:
            path.unlink(missing_ok=True)
    for path in folder.glob(f".approximate-*{PARTIAL}"):
        if time.time() - path.stat().st_mtime > STALE:
            path.unlink(missing_ok=True)


def _wipe(folder: Path) -> None:
    for name in ("index.json", *sizes_of(0, 0)):
        (folder / name).unlink(missing_ok=True)


def _held_rows(folder: Path, n: int) -> Rows:
    return np.fromfile(folder / "rows.i64", "<i8", count=n)


def _write(folder: Path, body: dict[str, Any], rows: Rows, vectors: Vectors) -> None:
    """Write references into empty positions, then behind the last; the caller commits."""
    first = (body["approximate"] or {}).get("n", 0)  # what the approximate part knows must stay what it is
    free = np.flatnonzero(_held_rows(folder, body["n"])[first:] < 0)[: len(rows)] + first
    end = body["n"] + len(rows) - len(free)
    positions = np.concatenate([free, np.arange(body["n"], end)])
    check_room(folder, (end - body["n"]) * (vectors.shape[1] * 4 + 12))
    _put(folder / "references.f32", positions, vectors)
    _put(folder / "sums.u32", positions, sums_of(rows, vectors))
    _put(folder / "rows.i64", positions, rows)
    body["n"] = end


def _empty(folder: Path, body: Mapping[str, Any], positions: Rows) -> None:
    """Take references out: their rows first, then their vectors."""
    _put(folder / "rows.i64", positions, np.full(len(positions), -1, np.int64))
    _zero(folder, body["width"], positions)


def _zero(folder: Path, width: int, positions: Rows) -> None:
    for at in range(0, len(positions), BLOCK):
        part = positions[at : at + BLOCK]
        _put(folder / "references.f32", part, np.zeros((len(part), width), np.float32))


def _put(path: Path, positions: Rows, values: npt.NDArray[Any]) -> None:
    """Write values at positions of a file, and make them durable. No memory map: a full disk must show."""
    if not len(positions):
        return
    values = np.ascontiguousarray(values)
    size = values.nbytes // len(values)
    with write_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) != 1) + 1):
                view = values[run[0] : run[-1] + 1].data.cast("B")
                offset = int(positions[run[0]]) * size
                while view:
                    done = os.pwrite(fd, view, offset)
                    view, offset = view[done:], offset + done
            os.fsync(fd)
        finally:
            os.close(fd)


def drop(folder: Path) -> None:
    """Delete an index."""
    shutil.rmtree(folder)
