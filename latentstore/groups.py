"""Groups of near-duplicates as a store keeps them: a table of rows, and beside it how they were found."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentstore.files import write_atomic
from latentstore.schema import LATENTS, canonical_json
from latentstore.shards import parquet_bytes
from latentstore.store import LatentStore

SCHEMA = "latentstore.duplicates/1"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows that have a near-duplicate.

    Attributes
    ----------
    row, group : (k,) int64 arrays
        Rows by group, the first member in front; a group is named by its first member's row. Every member
        scores at least the threshold against the first. A group of one is what chaining alone held.
    component : (k,) int64 array
        Lowest row that is reached through any chain of pairs: no split of a collection may cut one.
    score : (k,) float64 array
        Against the first member; 1 for itself and for equal latents.
    settings : dict
        Score, threshold, how it was set, space, data hash, what was compared.
    """

    row: Rows
    group: Rows
    component: Rows
    score: npt.NDArray[np.float64]
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """First member's row → all rows of the group, largest groups first; groups of one are left out."""
        found: dict[int, list[int]] = {}
        for row, group in zip(self.row.tolist(), self.group.tolist(), strict=True):
            found.setdefault(group, []).append(row)
        return {g: m for g, m in sorted(found.items(), key=lambda item: -len(item[1])) if len(m) > 1}

    def of(self, relation: Literal["group", "component"]) -> dict[int, int]:
        """Return row → its group or component."""
        return dict(zip(self.row.tolist(), getattr(self, relation).tolist(), strict=True))


def folder(store: LatentStore) -> Path:
    """Return where the groups of an array are kept."""
    root = store.root / "duplicates"
    return root if store.array == LATENTS else root / store.array


def write(store: LatentStore, found: Groups, data_hash: str) -> None:
    """Keep groups in the store: ``duplicates/groups.parquet``, then ``duplicates/groups.json``.

    Parameters
    ----------
    store : LatentStore
    found : Groups
    data_hash : str
        The store's, from before its latents were read.

    Raises
    ------
    StoreWriteError
    """
    import zarr

    table = pa.table(
        {"row": found.row, "group": found.group, "component": found.component, "score": found.score}
    )
    data = parquet_bytes(table)
    body = {
        "schema": SCHEMA,
        "space id": store.space.id,
        "data hash": data_hash,
        **found.settings,
        "groups": len(found.members),
        "parquet crc32": zlib.crc32(data),
    }
    body["crc32"] = zlib.crc32(canonical_json(body).encode())
    place = folder(store)
    # Zarr's readers warn of folders that are no group. A store has this one since it was created, and its
    # bytes are sealed: it is only made where it is missing.
    zarr.open_group(store.root / "duplicates", mode="a")
    write_atomic(place / "groups.parquet", data)
    write_atomic(place / "groups.json", (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())


def load(store: LatentStore) -> tuple[Groups | None, str]:
    """Return the groups kept in a store, or None and a sentence that says why there are none to use."""
    again = f"run `latentstore duplicates {store.path}`"
    place = folder(store)
    try:
        body = json.loads((place / "groups.json").read_bytes())
        data = (place / "groups.parquet").read_bytes()
    except FileNotFoundError:
        return None, f"Near-duplicate origins were not looked for; {again} to find and group them."
    except (OSError, ValueError):
        body, data = {}, b""
    if not _is_whole(body, data):
        return None, f"The near-duplicate groups of {store.path} are damaged and are not used; {again} again."
    if body["data hash"] != store.data_hash():
        return None, (
            f"The near-duplicate groups of {store.path} were made before its latents changed and are not "
            f"used; {again} again."
        )
    table = pq.read_table(pa.BufferReader(data))
    columns = {name: table[name].to_numpy() for name in ("row", "group", "component", "score")}
    return Groups(**columns, settings=body), ""


def _is_whole(body: Any, data: bytes) -> bool:
    if not isinstance(body, Mapping) or body.get("schema") != SCHEMA:
        return False
    rest = {name: value for name, value in body.items() if name != "crc32"}
    return body.get("parquet crc32") == zlib.crc32(data) and body.get("crc32") == zlib.crc32(
        canonical_json(rest).encode()
    )
