"""What an encode run will take, said before a byte of the store is written.

What was *measured* (a sample of the images through the real encoder, the disk) is kept apart from what is
*extrapolated* from it (bytes, hours, other sizes, more machines).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import images
from latentstore.create import refuse_occupied
from latentstore.encode import prepare
from latentstore.encoders import Encoder
from latentstore.errors import UsageError
from latentstore.files import check_room
from latentstore.manifest import new_inputs
from latentstore.schema import LATENTS, Layout
from latentstore.sources import Source
from latentstore.store import LatentStore, exists, locate, open_store
from latentstore.trial import Costs, measure, parquet_size

SIZES = (2_000_000, 100_000_000)
MACHINES = (1, 4, 16)
_RECORD_BYTES = 600
"""Of a shard's done-record."""
_LIST_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, and why.

    Attributes
    ----------
    seconds : float
        An image: the largest of the limits.
    bottleneck : str
        The name of that limit.
    limits : dict
        Seconds an image of ``"reading and decoding"`` (over its threads), ``"encoding and writing"`` (one
        thread does both) and ``"the cores"`` (CPU time of decoding, and of encoding unless a GPU does that,
        over the cores).
    padding : float
        Places in the encoder's batches over rows: the last batch of a shard is filled up.
    spread : float
        How much longer an image may take, as a fraction: each cost raised by twice its standard error.
    """

    seconds: float
    bottleneck: str
    limits: dict[str, float]
    padding: float
    spread: float = 0.0


@dataclass(frozen=True)
class Extent:
    """One size on so many machines: bytes, and hours where the pace is known."""

    what: str
    rows: int
    machines: int
    shards: int
    bytes: int
    fits: bool
    hours: float | None


@dataclass(frozen=True)
class Plan:
    """What encoding will take.

    Attributes
    ----------
    store : str
    new : bool
        The store (or the array in it) is to be made; else it goes on.
    rows, rows_left : int
        Of the finished store, and those still to be encoded.
    listed, list_seconds : int, float
        Files that the source lists now.
    dim, dtype, codec, shard_rows, batch, device, cores, threads
        What will run. ``threads`` read and decode.
    shards_left : int
    bytes_left : int
        Latents, statuses, manifest, records and input list that are still to be written; with a codec, the
        latents' bytes before it.
    free_bytes : int
    costs : Costs or None
        None when nothing was measured.
    pace : Pace or None
    hours : float or None
        For the rows that are left, on this machine.
    lost_seconds : float or None
        Work that a kill loses at most: one open shard a worker.
    extents : list of Extent
        Other sizes and numbers of machines.
    """

    store: str
    new: bool
    rows: int
    rows_left: int
    listed: int
    list_seconds: float
    dim: int
    dtype: str
    codec: str | None
    shard_rows: int
    batch: int
    device: str
    cores: int
    threads: int
    shards_left: int
    bytes_left: int
    free_bytes: int
    costs: Costs | None
    pace: Pace | None
    hours: float | None
    lost_seconds: float | None
    extents: list[Extent]


@dataclass(frozen=True)
class _Work:
    """What is left to do: the layout of the finished store, and what of it is there."""

    layout: Layout
    new: bool
    rows_left: int
    shards_left: int
    latent_bytes: int
    inputs: pa.Table


def plan(
    source: Source,
    path: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
    codec: str | None = None,
    max_pixels: int = images.MAX_PIXELS,
    threads: int | None = None,
    sample: int = 32,
    rows: Sequence[int] = (),
    machines: Sequence[int] = MACHINES,
    seed: int = 0,
) -> Plan:
    """Say what :func:`~latentstore.encode.encode` with these arguments will take. The store is not touched.

    Parameters
    ----------
    source, path, encoder, dtype, shard_rows, codec, max_pixels, threads
        As for :func:`~latentstore.encode.encode`.
    sample : int
        Images to read and encode at least, spread over the list; 0 measures nothing.
    rows : sequence of int
        Other sizes to extrapolate to; by default 2 and 100 million. When given, a list that does not fit on
        the disk is not refused.
    machines : sequence of int
        Numbers of machines like this one to extrapolate to.
    seed : int
        Of the sample.

    Raises
    ------
    StoreWriteError
        What is left does not fit on the disk.
    UsageError
        As :func:`~latentstore.encode.encode` would raise it; a size or a number of machines below 1.
    """
    if min([*rows, *machines], default=1) < 1:
        raise UsageError("Rows and machines to extrapolate to must be 1 or more.")
    began = time.perf_counter()
    listed = source.list()
    list_seconds = time.perf_counter() - began
    work = _what_is_left(source, path, encoder, listed, dtype=dtype, shard_rows=shard_rows, codec=codec)
    if not rows:
        check_room(path, work.latent_bytes)
    where = _folder_of(locate(path)[0])
    threads = threads or source.readers(listed) or os.cpu_count() or 1
    costs = None
    if sample:
        pool = work.inputs if work.inputs.num_rows else listed
        costs = measure(source, pool, encoder, where, sample=sample, max_pixels=max_pixels, seed=seed)
    machine = {"batch": encoder.batch, "threads": threads, "on_cpu": encoder.facts.get("device") == "cpu"}
    sizes = _Sizes(
        costs, machine, shutil.disk_usage(where).free, parquet_size(listed.slice(0, _LIST_SAMPLE))[1]
    )
    here, pace = sizes.extent("what is left", 1, work), sizes.pace(work.layout)
    if not rows:
        check_room(path, here.bytes)
    fresh = [_fresh(work, r, shard_rows if work.new else work.layout.shard_rows) for r in rows or SIZES]
    return Plan(
        store=str(path),
        new=work.new,
        rows=work.layout.rows,
        rows_left=work.rows_left,
        listed=listed.num_rows,
        list_seconds=list_seconds,
        dim=work.layout.dim,
        dtype=work.layout.dtype,
        codec=work.layout.codec,
        shard_rows=work.layout.shard_rows,
        batch=encoder.batch,
        device=str(encoder.facts.get("device")),
        cores=os.cpu_count() or 1,
        threads=threads,
        shards_left=work.shards_left,
        bytes_left=here.bytes,
        free_bytes=sizes.free,
        costs=costs,
        pace=pace,
        hours=here.hours,
        lost_seconds=None if pace is None else work.layout.shard_rows * pace.seconds,
        extents=[
            *(sizes.extent("what is left", n, work) for n in machines),
            *(sizes.extent("new store", n, other) for other in fresh for n in machines),
        ],
    )


def _what_is_left(source: Source, path: Path, encoder: Encoder, listed: pa.Table, **layout: Any) -> _Work:
    """Look at what is there, as :func:`~latentstore.encode.prepare` does, and make nothing."""
    if exists(path):
        store = prepare(source, path, encoder)  # opens and checks what exists
        rows = store.inputs()
        if store.array == LATENTS:
            rows = pa.concat_tables([rows, new_inputs(listed, rows)])
        grown = replace(store.layout, rows=rows.num_rows)
        spans = {shard: grown.span(shard) for shard in range(grown.n_shards)}
        todo = set(store.todo())
        for shard in range(store.layout.n_shards):
            # A full shard stays as it is; one that an append makes longer is written again.
            if shard not in todo and len(store.layout.span(shard)) == len(spans[shard]):
                del spans[shard]
        return _Work(
            layout=grown,
            new=False,
            rows_left=sum(len(span) - _kept_rows(store, shard, span) for shard, span in spans.items()),
            shards_left=len(spans),
            latent_bytes=sum(map(grown.shard_bytes, spans)),
            inputs=pa.concat_tables(
                [rows.slice(0, 0), *(rows.slice(s.start, len(s)) for s in spans.values())]
            ),
        )
    root, array = locate(path)
    if array == LATENTS:
        refuse_occupied(root)
        source.require_some(listed)
    else:  # a further array has the rows of the first
        first = open_store(root)
        listed = first.inputs()
        layout["shard_rows"] = layout["shard_rows"] or first.layout.shard_rows
    planned = Layout.plan(listed.num_rows, encoder.space.dim, **layout)
    return _Work(planned, True, planned.rows, planned.n_shards, planned.total_bytes, listed)


def _kept_rows(store: LatentStore, shard: int, span: range) -> int:
    """Return how many rows of a shard that has grown are there, and are copied."""
    record = store.record(shard)
    return record.rows if record is not None and record.rows < len(span) else 0


def _fresh(work: _Work, rows: int, shard_rows: int | None) -> _Work:
    """Return a new store of so many rows, otherwise as planned."""
    was = work.layout
    layout = Layout.plan(rows, was.dim, dtype=was.dtype, shard_rows=shard_rows, codec=was.codec)
    return _Work(layout, True, rows, layout.n_shards, layout.total_bytes, work.inputs)


@dataclass(frozen=True)
class _Sizes:
    """Extrapolates to a size and a number of machines."""

    costs: Costs | None
    machine: dict[str, Any]
    free: int
    list_row_bytes: float

    def pace(self, layout: Layout) -> Pace | None:
        """Return the pace, which the size of the shards bears on; None when nothing was measured."""
        return None if self.costs is None else pace_of(self.costs, layout, **self.machine)

    def extent(self, what: str, machines: int, work: _Work) -> Extent:
        """Return what so many rows take."""
        rows, shards, pace = work.rows_left, work.shards_left, self.pace(work.layout)
        around = rows * self.list_row_bytes + shards * (_RECORD_BYTES + work.layout.shard_rows)
        if self.costs is not None:
            around += rows * self.costs.manifest_row_bytes + shards * self.costs.manifest_shard_bytes
        total = work.latent_bytes + round(around)
        hours = None
        if pace is not None and self.costs is not None:
            # Whole shards are handed out; all machines write to one disk.
            longest = min(rows, -(-shards // machines) * work.layout.shard_rows)
            hours = max(longest * pace.seconds, total / self.costs.write_rate) / 3600
        return Extent(what, rows, machines, shards, total, total <= self.free, hours)


def pace_of(
    costs: Costs, layout: Layout, *, batch: int, threads: int, on_cpu: bool, cores: int | None = None
) -> Pace:
    """Return the pace that measured costs allow when everything overlaps.

    Decoding and an encoder on the CPU share the cores: their CPU times add up. A GPU works beside them.
    """
    cores = cores or os.cpu_count() or 1
    longest = min(layout.rows, layout.shard_rows)
    padding = -(-longest // batch) * batch / max(1, longest)
    at_most = 1 + costs.encode_spread_ms / costs.encode_ms if costs.encode_ms else 1.0

    def limits_of(more_ms: float, encode: float) -> dict[str, float]:
        on_cores = costs.decode_ms + more_ms + (encode * costs.encode_cpu_ms if on_cpu else 0.0)
        return {
            "reading and decoding": (costs.read_ms + costs.decode_ms + more_ms) / 1000 / threads,
            "encoding and writing": encode * costs.encode_ms / 1000 + layout.row_bytes / costs.write_rate,
            "the cores": on_cores / 1000 / cores,
        }

    limits = limits_of(0.0, padding)
    bottleneck = max(limits, key=lambda name: limits[name])
    slowest = max(limits_of(costs.spread_ms, padding * at_most).values())
    return Pace(limits[bottleneck], bottleneck, limits, padding, slowest / limits[bottleneck] - 1)


def _folder_of(path: Path) -> Path:
    """Return the nearest folder above a path that exists: it is on the disk that the store will be on."""
    where = path.absolute().parent
    while not where.is_dir():
        where = where.parent
    return where
