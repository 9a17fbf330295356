"""Which of the files that a store was made from are no longer as they were read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from latentstore.errors import ImageError, UsageError
from latentstore.sources import Source
from latentstore.sources.urls import READERS
from latentstore.store import LatentStore

What = Literal["missing", "size", "mtime", "touched", "content"]
Read = Literal["none", "moved", "all"]
NAMED = 5
"""Changed files that a summary names."""
_BATCH = 256


@dataclass(frozen=True)
class Change:
    """A committed file that is not as it was read.

    Attributes
    ----------
    row : int
    path : str
    what : {"missing", "size", "mtime", "touched", "content"}
        ``missing``: it is gone, or cannot be read any more. ``size``: it has another size, and so another
        content. ``mtime``: it was modified, and may hold the same. After its content was read: ``content``,
        it holds something else, or ``touched``, only its time of modification is another.
    """

    row: int
    path: str
    what: What


@dataclass
class Changes:
    """Changed files in short: counts by what changed, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: list[Change] = field(default_factory=list)

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Changes:
        """Count changes and keep the first few; files that were only touched are as they were."""
        out = cls()
        for change in changes:
            if change.what != "touched":
                out.counts[change.what] = out.counts.get(change.what, 0) + 1
                if len(out.first) < NAMED:
                    out.first.append(change)
        return out


def changed_sources(
    store: LatentStore,
    *,
    content: bool = False,
    on_rows: Callable[[int, int], None] | None = None,
) -> list[Change]:
    """Return the committed files that are no longer as they were read, in row order.

    Rows whose file could not be read in the first place are passed over, and those that were removed.

    Parameters
    ----------
    store : LatentStore
        The first array of a store of images; only its manifest is read.
    content : bool
        Read and hash every file. Otherwise sizes and times of modification are compared, as far as there are
        any: of some URLs neither is known.
    on_rows : callable, optional
        Called with (rows, changed ones) as they are looked at.

    Raises
    ------
    UsageError
        The store was not made from files.
    SourceError
        A URL does not answer.
    """
    if store.kind == "simulated":
        raise UsageError(f"{store.root} holds simulated latents; it was made from no files.")
    read: Read = "all" if content else "none"
    return list(look(store, Source.recorded(store.origin), read, on_rows=on_rows))


def look(
    store: LatentStore,
    source: Source,
    read: Read,
    *,
    remote: bool = True,
    on_rows: Callable[[int, int], None] | None = None,
) -> Iterator[Change]:
    """Yield changes as :func:`changed_sources` returns them.

    Parameters
    ----------
    store, source
    read : {"none", "moved", "all"}
        Which files are read and hashed: ``moved`` are those of the same size with another time.
    remote : bool
        Also look at files behind URLs: a request for each.
    on_rows : callable, optional
    """
    source.refresh()
    with ThreadPoolExecutor(READERS, thread_name_prefix="look") as pool:
        for rows in _committed(store):
            asked = rows if remote else [r for r in rows if not source.is_remote(r["path"])]
            batches = [asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH)]
            for batch, found in zip(batches, pool.map(partial(_look, source, read), batches), strict=True):
                if on_rows is not None:
                    on_rows(len(batch), len(found))
                yield from found


def _committed(store: LatentStore) -> Iterator[list[dict[str, Any]]]:
    """Yield, shard by shard, what was recorded of the files that were read."""
    raw = store.inputs()["path_raw"]
    for shard in range(store.layout.n_shards):
        record = store.record(shard)
        # A shard that has yet to grow is committed as far as it goes.
        if record is None or not (record.rows < len(store.layout.span(shard)) or store.is_done(shard)):
            continue
        table = store.manifest_part(record, ["row", "path", "bytes", "mtime", "sha256"])
        names = raw.slice(record.start, table.num_rows)
        rows = table.append_column("path_raw", names).to_pylist()
        yield [row for row in rows if row["sha256"] is not None]


def _look(source: Source, read: Read, rows: list[dict[str, Any]]) -> list[Change]:
    found = ((row, _changed(source, read, row)) for row in rows)
    return [Change(row["row"], row["path"], what) for row, what in found if what is not None]


def _changed(source: Source, read: Read, was: Mapping[str, Any]) -> What | None:
    try:
        now = source.stat(was)
        if now.size not in (None, was["bytes"]):
            return "size"
        moved = None not in (now.mtime, was["mtime"]) and now.mtime != was["mtime"]
        if read == "none" or (read == "moved" and not moved):
            return "mtime" if moved else None
        if source.read(was).sha256 != was["sha256"]:
            return "content"
        return "touched" if moved else None
    except ImageError:
        return "missing"


def changed_rows(store: LatentStore, source: Source, *, content: bool = False) -> tuple[list[int], Changes]:
    """Return the rows whose files hold another content now, and what else is not as it was read.

    Parameters
    ----------
    store : LatentStore
        The first array.
    source : Source
    content : bool
        Read every file to find other contents, not only those of another size or time.
    """
    found = list(look(store, source, "all" if content else "moved"))
    rows = {change.row for change in found if change.what in ("size", "content")}
    return sorted(rows), Changes.of(change for change in found if change.row not in rows)
