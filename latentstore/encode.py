"""Encoding: read → decode → encode → write, one shard task after another. Running it again resumes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import images
from latentstore._version import __version__
from latentstore.encoders import Encoder
from latentstore.errors import LatentStoreError, UsageError
from latentstore.manifest import new_inputs
from latentstore.schema import Layout, StoreSpec, check_space
from latentstore.shards import Record, drop_unnamed_parts, record_file
from latentstore.sources import Source
from latentstore.store import LatentStore, create, exists, open_store, settle, writing
from latentstore.tasks import NAMED, OnRows, ShardOutcome, ShardTask

__all__ = ["EncodeSummary", "Job", "Source", "encode", "prepare", "run_here"]


@dataclass
class EncodeSummary:
    """What an encode run did.

    Attributes
    ----------
    rows : int
        Rows of the store.
    encoded : int
        Rows written by this run; the rest were there.
    appended : int
        Rows that this run added behind the committed list.
    counts : dict
        Rows of each status, over the whole store.
    seconds : dict
        ``total``, and the main thread's shares ``wait`` (for reading and decoding), ``encode``, ``write``.
    bad : list of (path, status, reason)
        The first bad rows of this run, at most 20.
    warnings : list of str
        What differs in provenance (versions, device, dtype) from the run that made the store.
    """

    store: str
    rows: int = 0
    encoded: int = 0
    appended: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, outcome: ShardOutcome) -> None:
        """Count what one task did."""
        self.encoded += outcome.encoded
        self.bad += outcome.bad[: max(0, NAMED - len(self.bad))]
        for share, seconds in outcome.seconds.items():
            self.seconds[share] = self.seconds.get(share, 0.0) + seconds


def prepare(
    source: Source,
    root: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
) -> LatentStore:
    """Create the store and commit the sorted input list, or open the one that is there.

    Raises
    ------
    UsageError
        The store was made from another folder, or by the simulator.
    SpaceMismatchError
        The store belongs to another space.
    """
    if not exists(root):
        inputs = source.list()
        source.require_some(inputs)
        spec = StoreSpec(
            kind="images",
            space=encoder.space,
            layout=Layout.plan(inputs.num_rows, encoder.space.dim, dtype=dtype, shard_rows=shard_rows),
            provenance={
                "encoder": encoder.facts,
                "latentstore": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            origin=source.describe(),
        )
        try:
            return create(root, spec, inputs)
        except LatentStoreError:
            # Another process may have made the same store in between: then its lock decides.
            if not exists(root):
                raise
    store = open_store(root)
    if store.kind != "images":
        raise UsageError(f"{root} holds simulated latents; images are encoded into a store of their own.")
    check_space(encoder.space.id, store.space.id, what=f"encoder {encoder.facts.get('name')!r}")
    recorded, now = store.origin.get("manifest"), source.describe()["manifest"]
    if recorded != now:
        raise UsageError(
            f"{root} was listed by {recorded or 'its folder'}, not by {now or 'the folder'}. A store has "
            f"one list: {'name it with --manifest' if recorded else 'leave --manifest out'}, or choose "
            "another --store."
        )
    made_from = store.origin["root"]
    if made_from != str(source.root.absolute()) and Path(made_from).exists():
        raise UsageError(
            f"{root} was made from {made_from}, not from {source.root.absolute()}. A store has one source: "
            "choose another --store, or name the folder it was made from."
        )
    return store


def encode(
    source: Source,
    root: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
    max_pixels: int = images.MAX_PIXELS,
    threads: int | None = None,
    retry_bad: bool = False,
    run: Callable[[Job], Iterable[ShardOutcome]] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
) -> EncodeSummary:
    """Encode every listed image that is not in the store yet; new files are appended behind the others.

    Parameters
    ----------
    source, root, encoder
    dtype : {"float16", "float32"}
        Of a new store.
    shard_rows : int, optional
        Of a new store.
    max_pixels : int
        Larger images become rows of status ``too_large``.
    threads : int, optional
        That read and decode; by default one a core.
    retry_bad : bool
        Make the shards that hold bad rows anew: the files may have been mended.
    run : callable, optional
        Makes the shards of a :class:`Job`; by default in this process (see :mod:`latentstore.cluster`).
    on_start : callable, optional
        Called once with (rows to encode, rows of the store).
    on_rows : callable, optional

    Returns
    -------
    EncodeSummary
    """
    began = time.perf_counter()
    store = prepare(source, root, encoder, dtype=dtype, shard_rows=shard_rows)
    with writing(root):
        store = settle(open_store(root))
        summary = EncodeSummary(store=str(root))
        drop_unnamed_parts(root)
        new = new_inputs(source.list(), store.inputs())
        if new.num_rows:
            store = store.extend(new)
            summary.appended = new.num_rows if len(store) > new.num_rows else 0
        if retry_bad:
            discard_bad_shards(store)
        todo = store.todo()
        if todo:
            summary.warnings = provenance_changes(store.provenance.get("encoder", {}), encoder.facts)
        if on_start is not None:
            on_start(sum(_missing_rows(store, s) for s in todo), len(store))
        run = run or partial(run_here, threads=threads)
        job = Job(store, todo, store.inputs(), source, encoder, max_pixels, on_rows)
        for outcome in run(job):
            summary.add(outcome)
    summary.rows = len(store)
    summary.counts = store.counts()
    summary.seconds["total"] = time.perf_counter() - began
    return summary


@dataclass(frozen=True)
class Job:
    """The shards to make, and what making them takes."""

    store: LatentStore
    todo: list[int]
    inputs: pa.Table
    source: Source
    encoder: Encoder
    max_pixels: int
    on_rows: OnRows | None

    def inputs_of(self, shard: int) -> pa.Table:
        """Return the input list of one shard's rows."""
        span = self.store.layout.span(shard)
        return self.inputs.slice(span.start, len(span))


def run_here(job: Job, *, threads: int | None = None) -> Iterator[ShardOutcome]:
    """Make the shards one after another in this process."""
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="decode") as pool:
        task = ShardTask(job.source, job.encoder, pool, job.max_pixels, job.on_rows)
        try:
            for shard in job.todo:
                yield task.run(job.store, shard, job.inputs_of(shard))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def discard_bad_shards(store: LatentStore) -> None:
    """Take back the records of shards that hold rows which are not ok; needs the writer's lock."""
    for shard in range(store.layout.n_shards):
        record = Record.read(store.root, shard)
        if record is not None and record.ok < record.rows:
            record_file(store.root, shard).unlink()


def provenance_changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two encoders of one space; it may move last bits, and is only warned about."""
    out = []
    for key in ("dtype", "device"):
        if key in recorded and recorded[key] != now.get(key):
            out.append(f"{key} was {recorded[key]}, now {now.get(key)}")
    before, after = recorded.get("versions", {}), now.get("versions", {})
    out += [f"{k} was {v}, now {after.get(k)}" for k, v in before.items() if after.get(k) != v]
    return out


def _missing_rows(store: LatentStore, shard: int) -> int:
    record = Record.read(store.root, shard)
    kept = record.rows if record is not None and record.rows < len(store.layout.span(shard)) else 0
    return len(store.layout.span(shard)) - kept
