"""One shard, from files to commit: the task that runs in process, in local workers, or on a cluster."""

from __future__ import annotations

import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentstore import images
from latentstore.encoders import Encoder
from latentstore.errors import ImageError
from latentstore.manifest import manifest_table
from latentstore.schema import OK, STATUS_CODE
from latentstore.shards import Record, ShardWriter, latents_file
from latentstore.sources import Source
from latentstore.store import LatentStore

OnRows = Callable[[int, int], None]
"""Called with (rows done, bad rows among them) after each batch."""
NAMED = 20
"""Bad rows that are named in a summary; all of them are in the manifest."""


@dataclass
class ShardOutcome:
    """What one task did: rows encoded, bad ones (the first of them by name), seconds by share."""

    shard: int
    encoded: int = 0
    n_bad: int = 0
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class ShardTask:
    """Makes one shard at a time: the unit that a process, or a cluster, is given.

    Parameters
    ----------
    source, encoder
    pool : ThreadPoolExecutor
        Reads and decodes ahead of the encoder.
    max_pixels : int
    on_rows : callable or None
        Called with (rows, bad rows) after each batch.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        pool: ThreadPoolExecutor,
        max_pixels: int,
        on_rows: OnRows | None = None,
    ) -> None:
        self.source, self.encoder, self.pool = source, encoder, pool
        self.max_pixels, self.on_rows = max_pixels, on_rows
        self.times: dict[str, float] = defaultdict(float)

    def run(self, store: LatentStore, shard: int, inputs: pa.Table) -> ShardOutcome:
        """Write one shard; rows that an earlier, shorter shard held are copied, not encoded again.

        Parameters
        ----------
        store : LatentStore
        shard : int
        inputs : pyarrow.Table
            The input list of this shard's rows alone.
        """
        self.times = defaultdict(float)
        outcome = ShardOutcome(shard)
        span = store.layout.span(shard)
        with ShardWriter(store.root, store.layout, shard, store.space.id) as writer:
            kept = _kept_rows(store, shard)
            done: list[dict[str, Any]] = []
            if kept is not None:
                latents, table = kept
                done = table.to_pylist()
                writer.append(latents, np.array([STATUS_CODE[r["status"]] for r in done], np.uint8))
            rows = inputs.slice(len(done)).to_pylist()
            for first, batch in self._decoded(rows):
                manifest, status = self._encode(batch, rows, span.start + len(done), first, writer)
                bad = [m for m in manifest if m["status"] != "ok"]
                room = max(0, NAMED - len(outcome.bad))
                outcome.bad += [(m["path"], m["status"], m["reason"]) for m in bad[:room]]
                outcome.n_bad += len(bad)
                outcome.encoded += len(manifest)
                rows[first : first + len(manifest)] = manifest
                if self.on_rows is not None:
                    self.on_rows(len(status), len(bad))
            start = time.perf_counter()
            writer.commit(manifest_table(done + rows))
            self.times["write"] += time.perf_counter() - start
        outcome.seconds = dict(self.times)
        return outcome

    def _decoded(self, rows: list[dict[str, Any]]) -> Iterator[tuple[int, list[images.Pixels | ImageError]]]:
        """Yield (first row, decoded batch), reading two batches ahead."""
        size = self.encoder.batch
        ahead: deque[tuple[int, list[Future[images.Pixels | ImageError]]]] = deque()
        for first in range(0, len(rows), size):
            ahead.append((first, [self.pool.submit(self._load, r) for r in rows[first : first + size]]))
            if len(ahead) > 2:
                yield self._wait(*ahead.popleft())
        while ahead:
            yield self._wait(*ahead.popleft())

    def _wait(
        self, first: int, futures: list[Future[images.Pixels | ImageError]]
    ) -> tuple[int, list[images.Pixels | ImageError]]:
        start = time.perf_counter()
        batch = [f.result() for f in futures]
        self.times["wait"] += time.perf_counter() - start
        return first, batch

    def _load(self, row: dict[str, Any]) -> images.Pixels | ImageError:
        try:
            return self.source.load(row, self.encoder.space.image_size, max_pixels=self.max_pixels)
        except ImageError as exc:
            return exc

    def _encode(
        self,
        batch: list[images.Pixels | ImageError],
        inputs: list[dict[str, Any]],
        start_row: int,
        first: int,
        writer: ShardWriter,
    ) -> tuple[list[dict[str, Any]], npt.NDArray[np.uint8]]:
        """Encode one batch at the encoder's fixed shape, append it, and return its manifest rows."""
        size = self.encoder.space.image_size
        # Always the same shape: a network's last bits may depend on the number of pictures in a call.
        pixels = np.zeros((self.encoder.batch, size, size, 3), np.uint8)
        status = np.zeros(len(batch), np.uint8)
        for i, item in enumerate(batch):
            if isinstance(item, images.Pixels):
                pixels[i] = item.rgb
                status[i] = OK
            else:
                status[i] = STATUS_CODE[item.status]
        rows = np.arange(start_row + first, start_row + first + self.encoder.batch, dtype=np.int64)
        start = time.perf_counter()
        latents = self.encoder.encode(pixels, rows)[: len(batch)]
        encoded = time.perf_counter()
        stored = writer.append(latents, status)
        self.times["encode"] += encoded - start
        self.times["write"] += time.perf_counter() - encoded
        manifest = [
            _manifest_row(start_row + first + i, inputs[first + i], item, stored[i])
            for i, item in enumerate(batch)
        ]
        return manifest, stored


def _manifest_row(
    row: int, listed: dict[str, Any], item: images.Pixels | ImageError, stored: np.uint8
) -> dict[str, Any]:
    out: dict[str, Any] = {"row": row, **{k: v for k, v in listed.items() if k != "path_raw"}}
    facts = item if isinstance(item, images.Pixels) else item.facts
    if isinstance(facts, images.Pixels | images.FileFacts):
        out |= {"bytes": facts.bytes, "mtime": facts.mtime, "sha256": facts.sha256}
    if isinstance(item, ImageError):
        return out | {"status": item.status, "reason": item.reason}
    out |= {"width": item.width, "height": item.height}
    if stored != OK:
        return out | {
            "status": "not_finite",
            "reason": "the encoder's output is not finite in the stored dtype",
        }
    return out | {"status": "ok", "reason": item.note}


def _kept_rows(store: LatentStore, shard: int) -> tuple[npt.NDArray[Any], pa.Table] | None:
    """Return what a shorter, committed version of this shard holds, checked against its record.

    The record's checksum covers the payload of its rows alone, so it validates both the old file and a
    longer one that was renamed into place before its record (a kill between the two loses nothing).
    """
    record = Record.read(store.root, shard)
    if record is None or record.space_id != store.space.id or record.rows >= len(store.layout.span(shard)):
        return None
    part = store.root / "manifest" / record.manifest_part
    try:
        if zlib.crc32(part.read_bytes()) != record.manifest_crc32:
            return None
        latents = np.fromfile(
            latents_file(store.root, shard), store.layout.dtype, count=record.rows * store.layout.dim
        )
    except OSError:
        return None
    if latents.size != record.rows * store.layout.dim or zlib.crc32(latents.data) != record.latents_crc32:
        return None
    return latents.reshape(record.rows, -1), store.manifest_part(record)
