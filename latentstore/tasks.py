"""One shard, from files to commit: the task that runs in process, in local workers, or on a cluster."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentstore import images
from latentstore.encoders import Encoder, begin, blank_batch
from latentstore.errors import ImageError
from latentstore.isolation import Isolated
from latentstore.known import Held, Known, kept_rows
from latentstore.manifest import manifest_table
from latentstore.schema import LATENTS, OK, STATUS_CODE
from latentstore.shards import ShardWriter
from latentstore.sources import Source
from latentstore.store import LatentStore

OnRows = Callable[[int, int], None]
"""Called with (rows done, bad rows among them) after each batch."""
OnTimes = Callable[[dict[str, float]], None]
"""Called with the seconds that each share took since the last call."""
NAMED = 20
"""Bad rows that are named in a summary; all of them are in the manifest."""
Item = images.Pixels | ImageError | Held
Batch = list[Item]
_AHEAD = 16
"""Images read ahead, at least: a network on a CPU takes one at a time, and the pool has many threads."""


@dataclass
class ShardOutcome:
    """What one task did: rows encoded, bad ones (the first of them by name), seconds by share, notes.

    ``read`` and ``decode`` (with resizing) are summed over the pool's threads; ``encode``, ``write`` and
    ``wait`` (for the pool) are the main thread's.
    """

    shard: int
    encoded: int = 0
    n_bad: int = 0
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ShardTask:
    """Makes one shard at a time: the unit that a process, or a cluster, is given.

    Parameters
    ----------
    source : Source or Isolated
    encoder : Encoder
    pool : ThreadPoolExecutor
        Reads and decodes ahead of the encoder.
    max_pixels : int
    on_rows : callable or None
        Called with (rows, bad rows) after each batch.
    on_times : callable or None
        Called with the seconds by share after each batch, and after the commit.
    """

    def __init__(
        self,
        source: Source | Isolated,
        encoder: Encoder,
        pool: ThreadPoolExecutor,
        max_pixels: int,
        on_rows: OnRows | None = None,
        on_times: OnTimes | None = None,
    ) -> None:
        self.source, self.encoder, self.pool = source, encoder, pool
        self.max_pixels, self.on_rows, self.on_times = max_pixels, on_rows, on_times
        self.times: dict[str, float] = defaultdict(float)
        self._told: dict[str, float] = {}
        self._pool_times = Lock()

    def run(self, store: LatentStore, shard: int, inputs: pa.Table) -> ShardOutcome:
        """Write one shard; rows that an earlier, shorter shard held are copied, not encoded again.

        Parameters
        ----------
        store : LatentStore
        shard : int
        inputs : pyarrow.Table
            The input list of this shard's rows alone.
        """
        self.times, self._told = defaultdict(float), {}
        outcome = ShardOutcome(shard)
        span = store.layout.span(shard)
        again = inputs["again"].to_pylist() if "again" in inputs.column_names else None
        # Of rows to be read again the others are held one by one, not copied as a whole.
        known, kept = Known(store, shard, again), None if again is not None else kept_rows(store, shard)
        with ShardWriter(store.root, store.layout, shard, store.space.id, array=store.array) as writer:
            start_row, done = span.start, []
            if kept is not None:
                start_row, done = span.start + len(kept.latents), kept.manifest or []
                writer.append(kept.latents, kept.status)
            rows = inputs.slice(start_row - span.start).to_pylist()
            for first, batch, latents in self._under_way(self._decoded(rows, start_row, known), start_row):
                manifest = self._write(batch, latents, rows, start_row, first, writer)
                bad = [m for m in manifest if m["status"] != "ok"]
                room = max(0, NAMED - len(outcome.bad))
                outcome.bad += [(m["path"], m["status"], m["reason"]) for m in bad[:room]]
                outcome.n_bad += len(bad)
                made = sum(not isinstance(item, Held) for item in batch)
                outcome.encoded += made
                rows[first : first + len(manifest)] = manifest
                if self.on_rows is not None:
                    self.on_rows(made, len(bad))
                self._tell_times()
            start = time.perf_counter()
            table = manifest_table(done + rows) if store.array == LATENTS else None
            # What replaces committed rows that its record will not cover must be finished after a kill.
            replacing = again is not None or (kept is not None and store.layout.codec is not None)
            writer.commit(table, removed=known.removed_in(span), replacing=replacing, follows=known.follows)
            self.times["write"] += time.perf_counter() - start
            self._tell_times()
        outcome.seconds = dict(self.times)
        outcome.notes = list(getattr(self.encoder, "notes", ()))
        return outcome

    def _decoded(
        self, rows: list[dict[str, Any]], start_row: int, known: Known
    ) -> Iterator[tuple[int, Batch]]:
        """Yield (first row, decoded batch), reading two batches, or 16 images, ahead."""
        size = self.encoder.batch
        depth = max(2, _AHEAD // size)
        ahead: deque[tuple[int, list[Future[Item]]]] = deque()
        for first in range(0, len(rows), size):
            batch = enumerate(rows[first : first + size], start_row + first)
            ahead.append((first, [self.pool.submit(self._load, row, i, known) for i, row in batch]))
            if len(ahead) > depth:
                yield self._wait(*ahead.popleft())
        while ahead:
            yield self._wait(*ahead.popleft())

    def _wait(self, first: int, futures: list[Future[Item]]) -> tuple[int, Batch]:
        start = time.perf_counter()
        batch = [f.result() for f in futures]
        self.times["wait"] += time.perf_counter() - start
        return first, batch

    def _load(self, listed: dict[str, Any], row: int, known: Known) -> Item:
        item: Item | None = known.of(row)
        if item is not None:
            return item
        start = time.perf_counter()
        try:
            item = self.source.load(listed, self.encoder.space.image_size, max_pixels=self.max_pixels)
        except ImageError as exc:
            item = exc
        spent = time.perf_counter() - start
        decode = 0.0
        if isinstance(item, images.Pixels):
            decode, item = item.decode_seconds, known.refuse(row, item.sha256) or item
        elif isinstance(item, ImageError) and isinstance(item.facts, images.FileFacts):
            item = known.refuse(row, item.facts.sha256) or item
        with self._pool_times:
            self.times["read"] += spent - decode
            self.times["decode"] += decode
        return item

    def _tell_times(self) -> None:
        if self.on_times is not None:
            now = dict(self.times)
            self.on_times({share: seconds - self._told.get(share, 0.0) for share, seconds in now.items()})
            self._told = now

    def _under_way(
        self, decoded: Iterator[tuple[int, Batch]], start_row: int
    ) -> Iterator[tuple[int, Batch, Callable[[], npt.NDArray[np.float32]]]]:
        """Yield each batch with what waits for its latents, when the next one has begun.

        So a GPU has work while the batch before is written.
        """
        before: tuple[int, Batch, Callable[[], npt.NDArray[np.float32]]] | None = None
        for first, batch in decoded:
            begun = first, batch, self._begin(batch, start_row + first)
            if before is not None:
                yield before
            before = begun
        if before is not None:
            yield before

    def _begin(self, batch: Batch, row: int) -> Callable[[], npt.NDArray[np.float32]]:
        """Hand one batch to the encoder at its fixed shape."""
        if not any(isinstance(item, images.Pixels) for item in batch):
            nothing = np.zeros((self.encoder.batch, self.encoder.space.dim), np.float32)
            return lambda: nothing
        pixels = blank_batch(self.encoder)
        for i, item in enumerate(batch):
            if isinstance(item, images.Pixels):
                pixels[i] = item.rgb
        start = time.perf_counter()
        latents = begin(self.encoder, pixels, np.arange(row, row + self.encoder.batch, dtype=np.int64))
        self.times["encode"] += time.perf_counter() - start
        return latents

    def _write(
        self,
        batch: Batch,
        latents: Callable[[], npt.NDArray[np.float32]],
        inputs: list[dict[str, Any]],
        start_row: int,
        first: int,
        writer: ShardWriter,
    ) -> list[dict[str, Any]]:
        """Wait for the latents of one batch, append them, and return its manifest rows."""
        status = np.array(
            [STATUS_CODE[i.status] if isinstance(i, ImageError) else OK for i in batch], np.uint8
        )
        start = time.perf_counter()
        ready = latents()[: len(batch)]
        encoded = time.perf_counter()
        for i, item in enumerate(batch):
            if isinstance(item, Held):
                ready[i] = item.latent
        stored = writer.append(ready, status)
        self.times["encode"] += encoded - start
        self.times["write"] += time.perf_counter() - encoded
        return [
            _manifest_row(start_row + first + i, inputs[first + i], item, stored[i])
            for i, item in enumerate(batch)
        ]


def _manifest_row(row: int, listed: dict[str, Any], item: Item, stored: np.uint8) -> dict[str, Any]:
    if isinstance(item, Held) and item.manifest is not None:
        return item.manifest
    out: dict[str, Any] = {"row": row, **{k: v for k, v in listed.items() if k != "path_raw"}}
    if isinstance(item, Held):
        return out | {"status": "ok", "reason": ""}  # of a further array, which has no manifest
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
