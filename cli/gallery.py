"""The sums over a collection's gallery, kept in blocks named by what they hold.

A collection that grew sums its new end alone; a block whose shards changed is summed again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cli.kept import ROW_MATRICES, check_memory, check_unchanged, folder_of, forget, prepare_folder
from cli.streams import OnRows, Rows, sum_rows
from latentstore.errors import StoreWriteError
from latentstore.store import LatentStore, open_store
from solvers.errors import ProjectionFormatError, SolverWriteError
from solvers.moments import products_for, row_bytes
from solvers.products import Precision
from solvers.sums import RowSums

SHARDS = 16
"""Of a block: its sums are then an eighth of its bytes, or less, at any dimension."""
SHARE = 0.5
"""Of the bytes of the latents: sums that take more are not kept unasked, they cost less to make."""


def gallery_sums(
    store: LatentStore, rows: Rows, *, keep: bool | None = None, on_rows: OnRows | None = None
) -> RowSums:
    """Sum gallery rows block by block, taking up the blocks that are kept and still true.

    Parameters
    ----------
    store : LatentStore
    rows : (n,) sorted array
    keep : bool, optional
        By default where it pays (see :data:`SHARE`) and can be.

    Raises
    ------
    UsageError
        The rows were changed while they were summed.
    StoreWriteError, SolverWriteError
        They were to be kept, and could not be.
    """
    dim, size = store.layout.dim, SHARDS * store.layout.shard_rows
    check_memory(dim, ROW_MATRICES)
    precision = products_for(float(np.finfo(store.layout.dtype).eps))
    blocks = np.split(rows, np.flatnonzero(np.diff(rows // size)) + 1)
    each = row_bytes(dim)
    unasked = keep is None
    if keep is None:
        keep = each * len(blocks) <= SHARE * len(rows) * store.layout.row_bytes
    folder, known = folder_of(store) / "gallery", []
    total: RowSums | None = None
    for block in blocks:
        path = folder / f"{_block_key(store, block, precision)}.safetensors"
        known.append(path)
        sums = _kept_rows(path)
        if sums is None:
            sums = sum_rows(store.reader, block, precision, on_rows=on_rows)
            if _block_key(open_store(store.path), block, precision) != path.stem:
                check_unchanged(store.path, "")
            if keep:
                with suppress(*((StoreWriteError, SolverWriteError) if unasked else ())):
                    prepare_folder(folder, store, each)
                    sums.save(path)
        elif on_rows is not None:
            on_rows(len(block), 0)
        if total is None:
            total = sums
        else:
            total.merge(sums)
    assert total is not None  # noqa: S101 - a gallery without rows was refused before
    if keep:
        for old in set(folder.glob("*.safetensors")) - set(known):
            forget(old)
    return total


def _kept_rows(path: Path) -> RowSums | None:
    try:
        return RowSums.load(path)
    except (OSError, ProjectionFormatError):
        return None  # not there, or damaged: it is ours to make again


def _block_key(store: LatentStore, rows: Rows, precision: Precision) -> str:
    """Name a block by its rows and by the checksums of the shards that hold them."""
    said: list[Any] = [store.space.id, precision]
    for shard in np.unique(rows // store.layout.shard_rows).tolist():
        record = store.record(shard)
        said.append(record and [record.latents_crc32, record.status_crc32])
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=12)
    digest.update(rows.tobytes())
    return digest.hexdigest()
