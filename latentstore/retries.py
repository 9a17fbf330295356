"""Which committed rows a run reads again: bad ones, and those whose files hold another content now."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from latentstore.changes import Changes, changed_rows, look
from latentstore.errors import CorruptStoreError
from latentstore.schema import LATENTS, OK, STATUS_CODE
from latentstore.shards import record_file
from latentstore.sources import Source
from latentstore.store import LatentStore

LOOK_ROWS = 200_000
"""Rows up to which every run looks at the files of committed rows; beyond, `verify --sources` does."""


def committed_changes(
    store: LatentStore, source: Source, retry: bool, content: bool
) -> tuple[list[int], Changes]:
    """Look at the files of committed rows; return those to be made again, and what else has changed."""
    if retry:
        return changed_rows(store, source, content=content)
    if len(store) > LOOK_ROWS and not content:
        return [], Changes()
    try:
        # Files behind URLs are left to `verify --sources`: each costs a request.
        return [], Changes.of(look(store, source, "all" if content else "none", remote=content))
    except CorruptStoreError:
        return [], Changes()  # a damaged manifest is for `verify` to tell, and stops no encoding


def bad_rows(store: LatentStore) -> list[int]:
    """Return the committed rows that are not ok, and were not removed."""
    fine = (OK, STATUS_CODE["removed"], STATUS_CODE["not_written"])
    rows: list[int] = np.flatnonzero(~np.isin(store.status(), fine)).tolist()
    return rows


def rows_again(store: LatentStore, rows: Iterable[int]) -> dict[int, frozenset[int]]:
    """Return rows by the committed shard that holds them; others are made anyway.

    Of a shard that has grown since its commit the new rows are named, too: they are to be read as well.
    """
    found: dict[int, set[int]] = {}
    for row in rows:
        found.setdefault(row // store.layout.shard_rows, set()).add(row)
    again = {}
    for shard, own in found.items():
        record, span = store.record(shard), store.layout.span(shard)
        if record is not None and record.space_id == store.space.id and record.rows < len(span):
            again[shard] = frozenset(own).union(range(record.start + record.rows, span.stop))
        elif store.is_done(shard):
            again[shard] = frozenset(own)
    return again


def forget_followers(store: LatentStore, rows: Iterable[int]) -> None:
    """Have further arrays make the last shard wholly anew where the first one's rows of it are others.

    A shorter shard's rows are kept when it grows, and no record tells afterwards which pictures they were of.
    """
    last = store.layout.n_shards - 1
    read_again = any(row // store.layout.shard_rows == last for row in rows)
    for name in store.arrays():
        if name != LATENTS and (read_again or not LatentStore(store.root, name).is_done(last)):
            record_file(store.root, last, name).unlink(missing_ok=True)
