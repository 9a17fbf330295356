"""What is known of a shard's rows before any image is read: rows to keep, to leave out, contents expected."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.errors import ImageError, StoreIncompleteError
from latentstore.removal import Removed, payload_is_whole, read_removed, stored_rows
from latentstore.schema import LATENTS, OK, STATUS_CODE
from latentstore.shards import Record, status_file
from latentstore.store import LatentStore


@dataclass(frozen=True)
class Kept:
    """The rows of a shorter, committed version of a shard; ``manifest`` is None but for the first array."""

    latents: npt.NDArray[Any]
    status: npt.NDArray[np.uint8]
    manifest: list[dict[str, Any]] | None


def kept_rows(store: LatentStore, shard: int) -> Kept | None:
    """Return what a shorter, committed version of this shard holds, checked against its record.

    The record's checksum covers the payload of its rows alone, so it validates both the old file and a
    longer one that was renamed into place before its record (a kill between the two loses nothing).
    """
    record = store.record(shard)
    if record is None or record.rows >= len(store.layout.span(shard)):
        return None
    return _held(store, record)


def _held(store: LatentStore, record: Record) -> Kept | None:
    """Return the rows of a record, or None where anything fails its checksum but the statuses.

    The statuses of the first array are in its manifest, too.
    """
    if record.space_id != store.space.id or not payload_is_whole(store, record):
        return None
    try:
        latents = stored_rows(store, record)
        if store.array == LATENTS:
            part = (store.root / "manifest" / record.manifest_part).read_bytes()
            if zlib.crc32(part) != record.manifest_crc32:
                return None
            manifest = store.manifest_part(record).to_pylist()
            return Kept(latents, np.array([STATUS_CODE[r["status"]] for r in manifest], np.uint8), manifest)
        # A longer status file may be in place already; the record speaks of the shorter one.
        status = np.fromfile(status_file(store.root, record.shard, store.array), np.uint8)
        status[record.rows :] = 0
        if zlib.crc32(status.tobytes()) != record.status_crc32:
            return None
    except OSError:
        return None
    return Kept(latents, status[: record.rows], None)


def is_held(store: LatentStore, shard: int) -> bool:
    """Tell whether all rows of a committed shard can be kept as they are."""
    record = store.record(shard)
    return (
        record is not None
        and record.rows == len(store.layout.span(shard))
        and _held(store, record) is not None
    )


@dataclass(frozen=True)
class Held:
    """A row that stands in the committed shard, and stays."""

    latent: npt.NDArray[Any]
    manifest: dict[str, Any] | None


class Known:
    """What may be read of the rows of one shard, and what the files must hold.

    Removed rows are not read, nor is any file with removed content stored. Rows of a further array follow the
    first one's manifest: an image that was bad then is not tried again, and one that has changed since is not
    the row's image any more. Of a shard that is made again for some of its rows, the others are held.

    Parameters
    ----------
    store : LatentStore
    shard : int
    again : sequence of bool, optional
        Which rows of a committed shard are to be read again.

    Raises
    ------
    StoreIncompleteError
        The first array's shard is not written yet.
    """

    def __init__(self, store: LatentStore, shard: int, again: Sequence[bool] | None = None) -> None:
        self._start = store.layout.span(shard).start
        self._removed: Removed = read_removed(store.root)
        self._first: list[dict[str, Any]] | None = None
        self.follows: int | None = None
        if store.array != LATENTS:
            first = store.first
            record = first.record(shard)
            if record is None or not first.is_done(shard):
                raise StoreIncompleteError(
                    f"shard {shard} of {store.root} is not written yet; {store.array!r} follows its first "
                    f"array. Finish that first: latentstore encode --store {store.root}."
                )
            columns = ["status", "reason", "sha256"]
            self._first = first.manifest_part(record, columns).to_pylist()
            self.follows = record.manifest_crc32
        self._again = again
        committed = store.record(shard) if again is not None else None
        self._held = None if committed is None else _held(store, committed)

    def removed_in(self, span: range) -> int:
        """Return how many rows of a span were removed."""
        return len(self._removed.within(span))

    def of(self, row: int) -> Held | ImageError | None:
        """Return the row that is held, or why it is not to be read, or None."""
        if row in self._removed.rows:
            return ImageError("removed", self._removed.rows[row])
        first = self._first_row(row)
        if first is not None and first["status"] not in ("ok", "not_finite"):
            return ImageError(first["status"], first["reason"])
        at, held = row - self._start, self._held
        if held is None or self._again is None or self._again[at] or held.status[at] != OK:
            return None
        return Held(held.latents[at], None if held.manifest is None else held.manifest[at])

    def refuse(self, row: int, sha256: str) -> ImageError | None:
        """Return why a file of this content cannot be the row, or None."""
        if sha256 in self._removed.sha256:
            return ImageError("removed", "this content was removed from the store")
        first = self._first_row(row)
        if first is not None and first["sha256"] != sha256:
            return ImageError("changed", "the file is not the one that the row was made of")
        return None

    def _first_row(self, row: int) -> dict[str, Any] | None:
        return None if self._first is None else self._first[row - self._start]
