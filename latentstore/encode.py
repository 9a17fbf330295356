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

import numpy as np
import pyarrow as pa

from latentstore import images
from latentstore._version import __version__
from latentstore.changes import Changes, look
from latentstore.changes import retry_changed as discard_changed
from latentstore.create import add_array, create
from latentstore.encoders import Encoder
from latentstore.errors import CorruptStoreError, LatentStoreError, UsageError
from latentstore.isolation import Isolated, half_written
from latentstore.manifest import is_url, new_inputs
from latentstore.migrate import migrate
from latentstore.removal import finish
from latentstore.schema import LATENTS, OK, STATUS_CODE, Layout, StoreSpec, check_space
from latentstore.shards import drop_unnamed_parts, record_file
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
            return _make(source, path, encoder, source.list() if listed is None else listed, **layout)
        except LatentStoreError:
            # Another process may have made the same store in between: then its lock decides.
            if not exists(path):
                raise
    store = open_store(path)
    if store.kind != "images":
        raise UsageError(f"{path} holds simulated latents; images are encoded into a store of their own.")
    check_space(encoder.space.id, store.space.id, what=f"encoder {encoder.facts.get('name')!r}")
    check_source(store, source)
    return store


def _make(source: Source, path: Path, encoder: Encoder, inputs: pa.Table, **layout: Any) -> LatentStore:
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
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        origin=source.describe(),
    )
    if first is None:
        return create(root, spec, inputs)
    with writing(root):
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
    max_pixels: int = images.MAX_PIXELS,
    threads: int | None = None,
    retry_bad: bool = False,
    retry_changed: bool = False,
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
    max_pixels : int
        Larger images become rows of status ``too_large``.
    threads : int, optional
        That read and decode; by default one a core, more where files are behind URLs.
    retry_bad : bool
        Make the shards that hold bad rows anew: the files may have been mended.
    retry_changed : bool
        Make the shards anew that hold files of another content than they were read with; those of another
        time of modification are read to tell. Without it such files are only reported.
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
    listed = source.list()
    store = prepare(
        source, path, encoder, dtype=dtype, shard_rows=shard_rows, codec=codec, listed=listed
    )
    root = store.root
    suspects = half_written(root)
    with writing(root):
        migrate(root)
        store = settle(open_store(path))
        finish(root)
        summary = EncodeSummary(store=str(path))
        drop_unnamed_parts(root)
        # The first array decides the rows; others follow it.
        new = new_inputs(listed, store.inputs()) if store.array == LATENTS else None
        if new is not None and new.num_rows:
            store = store.extend(new)
            summary.appended = new.num_rows if len(store) > new.num_rows else 0
        if retry_bad:
            discard_bad_shards(store)
        if store.array == LATENTS:
            summary.add_changes(committed_changes(store, source, retry_changed, check_sources))
        elif retry_changed:
            raise UsageError(f"The rows are those of {root}: name it, not {path}, with --retry-changed.")
        todo = store.todo()
        if todo:
            summary.warnings = provenance_changes(store.provenance.get("encoder", {}), encoder.facts)
        if on_start is not None:
            on_start(sum(missing_rows(store, s) for s in todo), len(store))
        run = run or partial(run_here, threads=threads)
        apart = frozenset(todo) if isolate else suspects
        job = Job(store, todo, store.inputs(), source, encoder, max_pixels, on_rows, on_times, apart)
        for outcome in run(job):
            summary.add(outcome)
    summary.rows = len(store)
    summary.counts = store.counts()
    summary.seconds["total"] = time.perf_counter() - began
    return summary


@dataclass(frozen=True)
class Job:
    """The shards to make, and what making them takes; ``apart`` are those to decode in child processes."""

    store: LatentStore
    todo: list[int]
    inputs: pa.Table
    source: Source
    encoder: Encoder
    max_pixels: int
    on_rows: OnRows | None
    on_times: OnTimes | None = None
    apart: frozenset[int] = frozenset()

    def inputs_of(self, shard: int) -> pa.Table:
        """Return the input list of one shard's rows."""
        span = self.store.layout.span(shard)
        return self.inputs.slice(span.start, len(span))


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


def committed_changes(store: LatentStore, source: Source, retry: bool, content: bool) -> Changes:
    """Look at the files of committed rows; with ``retry`` take their shards' records back."""
    if retry:
        return discard_changed(store, source, content=content)
    try:
        # Files behind URLs are left to `verify --sources`: each costs a request.
        return Changes.of(look(store, source, "all" if content else "none", remote=content))
    except CorruptStoreError:
        return Changes()  # a damaged manifest is for `verify` to tell, and stops no encoding


def discard_bad_shards(store: LatentStore) -> None:
    """Take back the records of shards that hold rows which are not ok; needs the writer's lock."""
    status = store.status()
    fine = (OK, STATUS_CODE["removed"], STATUS_CODE["not_written"])
    for shard in np.unique(np.flatnonzero(~np.isin(status, fine)) // store.layout.shard_rows).tolist():
        record_file(store.root, shard, store.array).unlink(missing_ok=True)


def provenance_changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two encoders of one space; it may move last bits, and is only warned about."""
    out = []
    for key in ("dtype", "device", "batch", "compiled"):
        if key in recorded and recorded[key] != now.get(key):
            out.append(f"{key} was {recorded[key]}, now {now.get(key)}")
    before, after = recorded.get("versions", {}), now.get("versions", {})
    out += [f"{k} was {v}, now {after.get(k)}" for k, v in before.items() if after.get(k) != v]
    return out


def missing_rows(store: LatentStore, shard: int) -> int:
    """Return how many rows of a shard are to be encoded: an append's shard holds its first ones already."""
    record = store.record(shard)
    kept = record.rows if record is not None and record.rows < len(store.layout.span(shard)) else 0
    return len(store.layout.span(shard)) - kept
