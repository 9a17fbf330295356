"""The kept index: a collection's projected references on disk, memory-mapped, changed in place.

A folder holds ``references.f32`` (n x m, plain float32), ``rows.i64`` (the store's row at each position, -1
where it is empty), ``sums.u32`` (a crc32 of each position's vector and row), a copy of the map, and
``index.json``, written last: which shards of the store the references were made from, by their checksums.

What is gone is made empty before what is new is written, so that no row is ever there twice. A kill at any
point leaves an index whose shards differ from the store's, which is not used, and the next update finishes.
Empty positions hold zeros, and are used again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore import search
from latentstore.errors import CorruptStoreError, StoreFormatError, UsageError
from latentstore.schema import LATENTS, canonical_json
from latentstore.store import LatentStore

SCHEMA = "latentstore.index/1"
MAP = "W.safetensors"
BLOCK = 65_536
"""References of a block: what is searched at once, and written between two commits."""
Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Index:
    """An index on disk, as it was when it was opened.

    Attributes
    ----------
    folder : Path
    body : dict
        ``index.json``: space, array, map (its fingerprint), width, n, largest (norm), shards, data (hash of
        the store's latents it is current with, or empty), facts (of whoever made it), approximate, and
        version (another one each time that it is written).
    references : (n, m) float32 memory map
    rows : (n,) int64 memory map
        -1 where the position is empty.
    """

    folder: Path
    body: dict[str, Any]
    references: Vectors
    rows: Rows

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Map an index; nothing but its ``index.json`` is read.

        Raises
        ------
        UsageError
            There is none.
        StoreFormatError, CorruptStoreError
            It is of another version, or damaged.
        """
        body = read_body(folder)
        if body is None:
            raise UsageError(f"There is no index in {folder}. Make one with `latentstore index`.")
        n, width = body["n"], body["width"]
        for name, size in sizes_of(n, width).items():
            path = folder / name
            held = path.stat().st_size if path.exists() else 0
            if held < size:
                raise CorruptStoreError(
                    f"{path} has {held:,} bytes, and {n:,} references need {size:,}: it was cut off. "
                    "`latentstore index --rebuild` makes the index anew."
                )
        if not n:
            return cls(folder, body, np.empty((0, width), np.float32), np.empty(0, np.int64))
        return cls(
            folder,
            body,
            np.memmap(folder / "references.f32", "<f4", "r", shape=(n, width)),
            np.memmap(folder / "rows.i64", "<i8", "r", shape=(n,)),
        )

    @cached_property
    def count(self) -> int:
        """References that can be found."""
        return int(np.count_nonzero(self.rows >= 0))

    def __len__(self) -> int:
        return self.count

    @property
    def map(self) -> str:
        """Fingerprint of the map."""
        return str(self.body["map"])

    @property
    def data_hash(self) -> str:
        """Hash of the store's latents that the index is current with; empty while it is not finished."""
        return str(self.body["data"])

    @property
    def facts(self) -> dict[str, Any]:
        """What its maker said of it."""
        return dict(self.body["facts"])

    def changed(self) -> bool:
        """Tell whether the index was changed, or deleted, since it was opened.

        Every change begins with another ``index.json``: where that is still the one that was opened, so is
        whatever was read before.
        """
        try:
            body = read_body(self.folder)
        except (CorruptStoreError, StoreFormatError):
            return True
        return body is None or body["version"] != self.body["version"]

    def blocks(self, first: int = 0, *, size: int = BLOCK) -> Iterator[tuple[Rows, Vectors]]:
        """Yield (rows, references) from a position on, block by block; views where no position is empty."""
        for at in range(first, len(self.rows), size):
            rows, block = self._piece(at, size)
            live = rows >= 0
            yield (rows, block) if live.all() else (rows[live], block[live])

    def _piece(self, at: int, size: int) -> tuple[Rows, Vectors]:
        return np.asarray(self.rows[at : at + size]), np.asarray(self.references[at : at + size])

    def search(
        self, queries: npt.NDArray[np.floating[Any]], k: int, **options: Any
    ) -> tuple[npt.NDArray[np.float64], Rows]:
        """Search exactly; see :func:`latentstore.search.top_k`."""
        return search.top_k(queries, self.blocks(), k, largest=self.body["largest"], **options)

    def approximate(
        self, queries: npt.NDArray[np.floating[Any]], k: int
    ) -> tuple[npt.NDArray[np.float64], Rows]:
        """Search by the index's approximate part; see :func:`latentstore.approximate.search`."""
        from latentstore import approximate

        return approximate.search(self, queries, k)

    def check(self, on_rows: Callable[[int, int], None] | None = None) -> list[str]:
        """Compare every vector with its checksum; return what is wrong, a sentence each."""
        from latentstore import approximate

        sums = np.fromfile(self.folder / "sums.u32", "<u4", count=len(self.rows))
        damaged: list[int] = []
        left = 0
        for at in range(0, len(self.rows), BLOCK):
            rows, block = self._piece(at, BLOCK)
            live, bad = rows >= 0, len(damaged)
            damaged += (at + np.flatnonzero(live & (sums_of(rows, block) != sums[at : at + BLOCK]))).tolist()
            left += int(np.count_nonzero(block[~live].any(axis=1)))
            if on_rows is not None:
                on_rows(len(rows), len(damaged) - bad)
        out = []
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            out.append(
                f"{len(damaged):,} of {len(self.rows):,} references differ from their checksums (positions "
                f"{shown}); `latentstore index --rebuild` makes the index anew."
            )
        if left:
            out.append(
                f"{left:,} references that were taken out are not zeroed yet: a change was interrupted. "
                "`latentstore index` finishes it."
            )
        return out + approximate.check(self)


# --- where indexes are ------------------------------------------------------------------------------------


def folder_of(store: LatentStore, fingerprint: str) -> Path:
    """Return where a store keeps the index of its array under a map."""
    name = fingerprint if store.array == LATENTS else f"{store.array}-{fingerprint}"
    return store.root / "index" / name


def kept(root: Path) -> list[Path]:
    """Return the folders of a store's indexes, of all arrays."""
    return sorted(path.parent for path in (root / "index").glob("*/index.json"))


def sizes_of(n: int, width: int) -> dict[str, int]:
    """Return the bytes of each file of n positions."""
    return {"references.f32": 4 * n * width, "rows.i64": 8 * n, "sums.u32": 4 * n}


def read_body(folder: Path) -> dict[str, Any] | None:
    """Return ``index.json``, or None where there is none."""
    try:
        body = json.loads((folder / "index.json").read_bytes())
        crc = body.pop("crc32")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError):
        body, crc = {}, None
    if body and body.get("schema") != SCHEMA:
        raise StoreFormatError(
            f"{folder} is an index of schema {body.get('schema')!r}, this version reads {SCHEMA!r}. "
            "`latentstore index --rebuild` makes it anew."
        )
    if not body or crc != zlib.crc32(canonical_json(body).encode()):
        raise CorruptStoreError(
            f"{folder / 'index.json'} is damaged. `latentstore index --rebuild` makes the index anew."
        )
    return dict(body)


def sums_of(rows: Rows, block: Vectors) -> npt.NDArray[np.uint32]:
    """Return the crc32 of each vector and its row number."""
    whole = np.ascontiguousarray(block)
    return np.array(
        [zlib.crc32(r.data, zlib.crc32(v.data)) for r, v in zip(rows[:, None], whole, strict=True)], np.uint32
    )
