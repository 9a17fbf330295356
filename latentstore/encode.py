"""Encoding: read → decode → encode → write, one shard task after another. Running it again resumes it."""

from __future__ import annotations

import os
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentstore import images
from latentstore._version import __version__
from latentstore.encoders import Encoder
from latentstore.errors import ImageError, LatentStoreError, UsageError
from latentstore.manifest import list_folder, list_manifest, manifest_table, new_inputs
from latentstore.schema import OK, STATUS_CODE, Layout, StoreSpec, check_space
from latentstore.shards import Record, ShardWriter, drop_unnamed_parts, latents_file, record_file
from latentstore.store import LatentStore, create, exists, open_store, settle, writing

OnRows = Callable[[int, int], None]
"""Called with (rows done, bad rows among them) after each batch."""


@dataclass(frozen=True)
class Source:
    """Where the images come from.

    Attributes
    ----------
    root : Path
        Folder that the listed paths are relative to.
    manifest : Path or None
        The list, when it is not the folder's own contents.
    follow_links : bool
        Accept links that lead out of ``root``.
    """

    root: Path
    manifest: Path | None = None
    follow_links: bool = False

    @classmethod
    def of(cls, folder: Path | None, manifest: Path | None, *, follow_links: bool = False) -> Source:
        """Take a folder, or a manifest whose paths are relative to the folder (by default its own)."""
        if manifest is not None:
            return cls(folder or manifest.parent, manifest, follow_links)
        return cls(folder or Path("images"), None, follow_links)

    def list(self) -> pa.Table:
        """List the inputs, sorted."""
        if self.manifest is not None:
            return list_manifest(self.manifest)
        return list_folder(self.root, follow_links=self.follow_links)

    def require_some(self, inputs: pa.Table) -> None:
        """Refuse a list of which nothing is there: the folder it is relative to is likely another.

        Raises
        ------
        UsageError
        """
        if self.manifest is None:
            return
        paths = inputs["path"].to_pylist()
        if not any((self.root / p).exists() for p in paths):
            raise UsageError(
                f"None of the {len(paths)} files that {self.manifest} lists is there; its paths were taken "
                f"as relative to {self.root.absolute()} (the first: {paths[0]}). Name the folder they are "
                f"relative to: latentstore encode FOLDER --manifest {self.manifest}."
            )

    def describe(self) -> dict[str, Any]:
        """Return what the store records of its source."""
        return {
            "root": str(self.root.absolute()),
            "manifest": None if self.manifest is None else str(self.manifest.absolute()),
            "follow_links": self.follow_links,
        }


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
        times: dict[str, float] = defaultdict(float)
        inputs = store.inputs()
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="decode") as pool:
            task = ShardTask(source, encoder, pool, max_pixels, times, on_rows)
            try:
                for shard in todo:
                    task.run(store, shard, inputs, summary)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    summary.rows = len(store)
    summary.counts = store.counts()
    summary.seconds = {"total": time.perf_counter() - began, **times}
    return summary


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


class ShardTask:
    """Makes one shard at a time: the unit that a process, or a cluster, is given.

    Parameters
    ----------
    source, encoder
    pool : ThreadPoolExecutor
        Reads and decodes ahead of the encoder.
    max_pixels : int
    times : dict
        Seconds of waiting, encoding and writing are added here.
    on_rows : callable or None
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        pool: ThreadPoolExecutor,
        max_pixels: int,
        times: dict[str, float],
        on_rows: OnRows | None,
    ) -> None:
        self.source, self.encoder, self.pool = source, encoder, pool
        self.max_pixels, self.times, self.on_rows = max_pixels, times, on_rows

    def run(self, store: LatentStore, shard: int, inputs: pa.Table, summary: EncodeSummary) -> Record:
        """Write one shard; rows that an earlier, shorter shard held are copied, not encoded again."""
        span = store.layout.span(shard)
        with ShardWriter(store.root, store.layout, shard, store.space.id) as writer:
            kept = _kept_rows(store, shard)
            done: list[dict[str, Any]] = []
            if kept is not None:
                latents, table = kept
                done = table.to_pylist()
                writer.append(latents, np.array([STATUS_CODE[r["status"]] for r in done], np.uint8))
            rows = inputs.slice(span.start + len(done), len(span) - len(done)).to_pylist()
            for first, batch in self._decoded(rows):
                manifest, status = self._encode(batch, rows, span.start + len(done), first, writer)
                bad = [m for m in manifest if m["status"] != "ok"]
                room = max(0, 20 - len(summary.bad))
                summary.bad += [(m["path"], m["status"], m["reason"]) for m in bad[:room]]
                summary.encoded += len(manifest)
                rows[first : first + len(manifest)] = manifest
                if self.on_rows is not None:
                    self.on_rows(len(status), len(bad))
            start = time.perf_counter()
            record = writer.commit(manifest_table(done + rows))
            self.times["write"] += time.perf_counter() - start
        return record

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
        name = os.fsdecode(row["path_raw"]) if row["path_raw"] is not None else row["path"]
        root = self.source.root
        # An absolute path in a manifest is meant; a relative one stays in the folder.
        anywhere = self.source.follow_links or Path(name).is_absolute()
        try:
            return images.load(
                root / name,
                self.encoder.space.image_size,
                root=None if anywhere else root,
                max_pixels=self.max_pixels,
            )
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
