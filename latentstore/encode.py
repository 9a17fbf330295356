"""Encoding: read → decode → encode → write, one shard task after another. Running it again resumes it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import images
from latentstore._version import __version__
from latentstore.changes import Changes
from latentstore.create import add_array, create
from latentstore.encoders import Encoder
from latentstore.errors import LatentStoreError, UsageError
from latentstore.isolation import Isolated, half_written
from latentstore.manifest import is_url, new_inputs
from latentstore.migrate import migrate, record_origin
from latentstore.removal import finish
from latentstore.retries import bad_rows, committed_changes, forget_followers, rows_again
from latentstore.schema import LATENTS, Layout, StoreSpec, check_space
from latentstore.shards import record_file
from latentstore.sources import Source
from latentstore.store import LatentStore, exists, locate, open_store, settle, writing
from latentstore.tasks import NAMED, OnRows, OnTimes, ShardOutcome, ShardTask

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
        ``total`` on the clock; ``read`` and ``decode`` summed over threads; the main thread's ``encode``,
        ``write`` and ``wait`` (for reading and decoding). With several processes, summed over them.
    bad : list of (path, status, reason)
        The first bad rows of this run, at most 20.
    warnings : list of str
        What differs in provenance (versions, device, dtype) from the run that made the store.
    notes : list of str
        What the encoder did on its own (rows encoded again in float32, say).
    ran_on : str
        This process, local processes, or a cluster.
    changed : dict
        Files of committed rows that are not as they were read: how many by what changed
        (:class:`~latentstore.changes.Change`). Their rows were left as they are, unless asked otherwise.
    changed_first : list of (path, what)
        The first of them.
    """

    store: str
    rows: int = 0
    encoded: int = 0
    appended: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ran_on: str = "this process"
    changed: dict[str, int] = field(default_factory=dict)
    changed_first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, outcome: ShardOutcome) -> None:
        """Count what one task did."""
        self.notes += [note for note in outcome.notes if note not in self.notes]
        self.encoded += outcome.encoded
        self.bad += outcome.bad[: max(0, NAMED - len(self.bad))]
        for share, seconds in outcome.seconds.items():
            self.seconds[share] = self.seconds.get(share, 0.0) + seconds

    def add_changes(self, changes: Changes) -> None:
        """Note which committed files are not as they were read."""
        self.changed = changes.counts
        self.changed_first = [(change.path, change.what) for change in changes.first]


def prepare(
    source: Source,
    path: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
    codec: str | None = None,
    max_pixels: int = images.MAX_PIXELS,
    listed: pa.Table | None = None,
) -> LatentStore:
    """Create the store and commit the sorted input list, or open the one that is there.

    A path ``STORE/NAME`` adds an array of that name to a store whose first array is complete. ``listed`` is
    what the source lists, when that is known already.

    Raises
    ------
    UsageError
        The store was made from another folder, or by the simulator.
    SpaceMismatchError
        The store belongs to another space.
    """
    if not exists(path):
        try:
            layout = {"dtype": dtype, "shard_rows": shard_rows, "codec": codec}
            listed = source.list() if listed is None else listed
            return _make(source, path, encoder, listed, max_pixels, **layout)
        except LatentStoreError:
            # Another process may have made the same store in between: then its lock decides.
            if not exists(path):
                raise
    store = open_store(path)
    if store.kind != "images":
        raise UsageError(f"{path} holds {store.kind} latents; images are encoded into a store of their own.")
    check_space(encoder.space.id, store.space.id, what=f"encoder {encoder.facts.get('name')!r}")
    check_source(store, source)
    return store


def _make(
    source: Source, path: Path, encoder: Encoder, inputs: pa.Table, max_pixels: int, **layout: Any
) -> LatentStore:
    """Create the store, or the array in a store that is there."""
    root, array = locate(path)
    first = None if array == LATENTS else open_store(root)
    if first is None:
        source.require_some(inputs)
        rows = inputs.num_rows
    else:
        check_source(first, source)
        first.require_complete()
        for name in first.arrays():
            if LatentStore(root, name).space.id == encoder.space.id:
                raise UsageError(
                    f"{root} has this encoder's latents already, in {name!r}. Name another with --encoder."
                )
        rows = len(first)
        layout["shard_rows"] = layout["shard_rows"] or first.layout.shard_rows
    spec = StoreSpec(
        kind="images",
        space=encoder.space,
        layout=Layout.plan(rows, encoder.space.dim, **layout),
        provenance={
            "encoder": encoder.facts,
            "latentstore": __version__,
            "max_pixels": max_pixels,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        origin=source.describe(),
    )
    if first is None:
        return create(root, spec, inputs)
    with writing(root):
        migrate(root)
        return add_array(root, array, spec)


def check_source(store: LatentStore, source: Source) -> None:
    """Refuse another list or folder than the store's own.

    Raises
    ------
    UsageError
    """
    recorded, now = store.origin.get("manifest"), source.describe()["manifest"]
    if recorded != now:
        raise UsageError(
            f"{store.root} was listed by {recorded or 'its folder'}, not by {now or 'the folder'}. A store "
            f"has one list: {'name it with --manifest' if recorded else 'leave --manifest out'}, or choose "
            "another --store."
        )
    made_from, root = store.origin["root"], source.describe()["root"]
    # A folder that was moved may go on under its new name.
    if made_from != root and (is_url(made_from) or Path(made_from).exists()):
        raise UsageError(
            f"{store.root} was made from {made_from}, not from {root}. A store has one "
            "source: choose another --store, or name the folder it was made from."
        )


def encode(
    source: Source,
    path: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    shard_rows: int | None = None,
    codec: str | None = None,
    max_pixels: int | None = None,
    threads: int | None = None,
    retry_bad: bool = False,
    retry_changed: bool = False,
    repair: Mapping[int, frozenset[int] | None] | None = None,
    check_sources: bool = False,
    isolate: bool = False,
    run: Callable[[Job], Iterable[ShardOutcome]] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
    on_times: OnTimes | None = None,
) -> EncodeSummary:
    """Encode every listed image that is not in the store yet; new files are appended behind the others.

    Parameters
    ----------
    source : Source
    path : Path
        The store, or ``STORE/NAME`` for a further encoder's array in it.
    encoder : Encoder
    dtype : {"float16", "float32"}
        Of a new store.
    shard_rows : int, optional
        Of a new store.
    codec : str, optional
        Of a new array; see :mod:`latentstore.codecs`.
    max_pixels : int, optional
        Larger images become rows of status ``too_large``; by default what the store was made with.
    threads : int, optional
        That read and decode; by default one a core, more where files are behind URLs.
    retry_bad : bool
        Read bad rows again: the files may have been mended. Rows that are ok stay as they are.
    retry_changed : bool
        Read the files again that hold another content than they were read with; those of another time of
        modification are read to tell. Without it such files are only reported.
    repair : mapping, optional
        Make these committed shards again, and nothing else: list no files, append none. For each shard the
        rows to read again, the others being kept; or None for all of them.
    check_sources : bool
        Read all committed files to find those of another content, not only sizes and times of modification.
    isolate : bool
        Decode in processes of their own (:mod:`latentstore.isolation`). The shards in which an earlier run's
        process ended are decoded so in any case: one of their images may have ended it.
    run : callable, optional
        Makes the shards of a :class:`Job`; by default in this process (see :mod:`latentstore.cluster`).
    on_start : callable, optional
        Called once with (rows to encode, rows of the store).
    on_rows, on_times : callable, optional
        See :data:`~latentstore.tasks.OnRows` and :data:`~latentstore.tasks.OnTimes`.

    Returns
    -------
    EncodeSummary
    """
    began = time.perf_counter()
    listed = source.list() if repair is None else None
    max_pixels = max_pixels or recorded_max_pixels(path)
    layout: dict[str, Any] = {"dtype": dtype, "shard_rows": shard_rows, "codec": codec}
    store = prepare(source, path, encoder, listed=listed, max_pixels=max_pixels, **layout)
    root = store.root
    suspects = half_written(root)
    with writing(root):
        migrate(root)
        store = settle(open_store(path))
        if repair is None:
            finish(root)  # it refuses damaged shards, which a repair is about to mend
        summary = EncodeSummary(store=str(path))
        source = settle_links(store, source)
        if listed is not None:
            store, todo, again = _what_to_make(
                store, source, listed, summary, retry_bad, retry_changed, check_sources
            )
        else:
            todo, again = _to_repair(store, repair or {})
        if todo:
            summary.warnings = provenance_changes(store.provenance.get("encoder", {}), encoder.facts)
        apart = frozenset(todo) if isolate else suspects
        job = Job(store, todo, store.inputs(), source, encoder, max_pixels, on_rows, on_times, apart, again)
        if on_start is not None:
            on_start(sum(map(job.missing_rows, todo)), len(store))
        run = run or partial(run_here, threads=threads)
        for outcome in run(job):
            summary.add(outcome)
    summary.rows = len(store)
    summary.counts = store.counts()
    summary.seconds["total"] = time.perf_counter() - began
    return summary


def _what_to_make(
    store: LatentStore,
    source: Source,
    listed: pa.Table,
    summary: EncodeSummary,
    retry_bad: bool,
    retry_changed: bool,
    check_sources: bool,
) -> tuple[LatentStore, list[int], dict[int, frozenset[int]]]:
    """Append new inputs; return the store, the shards to make, and the rows to read again of others."""
    # Before the list grows: a last shard that has more places than rows is not committed any more.
    rows = bad_rows(store) if retry_bad else []
    if store.array == LATENTS:
        changed, changes = committed_changes(store, source, retry_changed, check_sources)
        rows += changed
        summary.add_changes(changes)
        # The first array decides the rows; others follow it.
        new = new_inputs(listed, store.inputs())
        if new.num_rows:
            forget_followers(store, rows)
            store = store.extend(new)
            summary.appended = new.num_rows if len(store) > new.num_rows else 0
    elif retry_changed:
        raise UsageError(
            f"The rows are those of {store.root}: name it, not {store.path}, with --retry-changed."
        )
    again = rows_again(store, rows)
    return store, sorted({*store.todo(), *again}), again


def _to_repair(
    store: LatentStore, repair: Mapping[int, frozenset[int] | None]
) -> tuple[list[int], dict[int, frozenset[int]]]:
    """Take back the records of the shards to be made wholly anew; return all shards, and the others' rows."""
    again = {shard: rows for shard, rows in repair.items() if rows is not None}
    for shard in repair.keys() - again.keys():
        record_file(store.root, shard, store.array).unlink(missing_ok=True)
    return sorted(repair), again


@dataclass(frozen=True)
class Job:
    """The shards to make, and what making them takes.

    ``apart`` are those to decode in child processes; of those in ``again`` only the rows named are read.
    """

    store: LatentStore
    todo: list[int]
    inputs: pa.Table
    source: Source
    encoder: Encoder
    max_pixels: int
    on_rows: OnRows | None
    on_times: OnTimes | None = None
    apart: frozenset[int] = frozenset()
    again: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def inputs_of(self, shard: int) -> pa.Table:
        """Return the input list of one shard's rows, and which of them are to be read again."""
        span = self.store.layout.span(shard)
        table = self.inputs.slice(span.start, len(span))
        if shard not in self.again:
            return table
        return table.append_column("again", pa.array([row in self.again[shard] for row in span]))

    def missing_rows(self, shard: int) -> int:
        """Return how many rows of a shard are to be encoded: others are copied from its committed version."""
        if shard in self.again:
            return len(self.again[shard])
        record, rows = self.store.record(shard), len(self.store.layout.span(shard))
        return rows - record.rows if record is not None and record.rows < rows else rows


def run_here(job: Job, *, threads: int | None = None) -> Iterator[ShardOutcome]:
    """Make the shards one after another in this process."""
    threads = threads or job.source.readers(job.inputs) or os.cpu_count() or 1
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        Isolated(job.source) as isolated,
    ):
        rest = (job.encoder, pool, job.max_pixels, job.on_rows, job.on_times)
        task, apart = ShardTask(job.source, *rest), ShardTask(isolated, *rest)
        try:
            for shard in job.todo:
                made_by = apart if shard in job.apart else task
                yield made_by.run(job.store, shard, job.inputs_of(shard))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def provenance_changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two encoders of one space; it may move last bits, and is only warned about."""
    out = []
    for key in ("dtype", "device", "batch", "compiled"):
        if key in recorded and recorded[key] != now.get(key):
            out.append(f"{key} was {recorded[key]}, now {now.get(key)}")
    before, after = recorded.get("versions", {}), now.get("versions", {})
    out += [f"{k} was {v}, now {after.get(k)}" for k, v in before.items() if after.get(k) != v]
    return out


def recorded_max_pixels(path: Path) -> int:
    """Return the bound that a store was made with, or the default one."""
    found = open_store(path).provenance.get("max_pixels") if exists(path) else None
    return int(found or images.MAX_PIXELS)


def settle_links(store: LatentStore, source: Source) -> Source:
    """Follow links for good once they were: a repair must read what was read. Needs the lock."""
    if source.follow_links and not store.origin.get("follow_links"):
        record_origin(store.root, {**store.origin, "follow_links": True})
    return replace(source, follow_links=source.follow_links or bool(store.origin.get("follow_links")))
