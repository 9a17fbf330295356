"""What is known of a shard's rows before any image is read: rows to keep, to leave out, contents expected."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.errors import ImageError, StoreIncompleteError
from latentstore.images import Pixels
from latentstore.removal import Removed, read_removed, stored_rows
from latentstore.schema import LATENTS, STATUS_CODE
from latentstore.shards import Record, latents_file, status_file
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
    if record is None or record.space_id != store.space.id or record.rows >= len(store.layout.span(shard)):
        return None
    try:
        if not _payload_is_whole(store, record):
            return None
        latents = stored_rows(store, record)
        if store.array == LATENTS:
            part = (store.root / "manifest" / record.manifest_part).read_bytes()
            if zlib.crc32(part) != record.manifest_crc32:
                return None
            manifest = store.manifest_part(record).to_pylist()
            return Kept(latents, np.array([STATUS_CODE[r["status"]] for r in manifest], np.uint8), manifest)
        # A longer status file may be in place already; the record speaks of the shorter one.
        status = np.fromfile(status_file(store.root, shard, store.array), np.uint8)
        status[record.rows :] = 0
        if zlib.crc32(status.tobytes()) != record.status_crc32:
            return None
    except OSError:
        return None
    return Kept(latents, status[: record.rows], None)


def _payload_is_whole(store: LatentStore, record: Record) -> bool:
    size = record.latents_bytes or record.rows * store.layout.row_bytes
    with latents_file(store.root, record.shard, store.array).open("rb") as file:
        data = file.read(size)
        return len(data) == size and zlib.crc32(data) == record.latents_crc32


class Known:
    """What may be read of the rows of one shard, and what the files must hold.

    Removed rows are not read, nor is any file with removed content stored. Rows of a further array follow the
    first one's manifest: an image that was bad then is not tried again, and one that has changed since is not
    the row's image any more.
    """

    def __init__(self, store: LatentStore, shard: int) -> None:
        self._start = store.layout.span(shard).start
        self._removed: Removed = read_removed(store.root)
        self._first: list[dict[str, Any]] | None = None
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

    def removed_in(self, span: range) -> int:
        """Return how many rows of a span were removed."""
        return sum(row in span for row in self._removed.rows)

    def of(self, row: int) -> ImageError | None:
        """Return why a row is not to be read, or None."""
        if row in self._removed.rows:
            return ImageError("removed", self._removed.rows[row])
        first = self._first_row(row)
        if first is not None and first["status"] not in ("ok", "not_finite"):
            return ImageError(first["status"], first["reason"])
        return None

    def refuse(self, row: int, facts: Pixels) -> ImageError | None:
        """Return why what was read cannot be the row, or None."""
        if facts.sha256 in self._removed.sha256:
            return ImageError("removed", "this content was removed from the store")
        first = self._first_row(row)
        if first is not None and first["sha256"] != facts.sha256:
            return ImageError("changed", "the file is not the one that the row was made of")
        return None

    def _first_row(self, row: int) -> dict[str, Any] | None:
        return None if self._first is None else self._first[row - self._start]
