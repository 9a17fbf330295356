"""A store seen as rows to fit on, to choose on, to report on: where the data side meets the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cli import gallery, passes, streams
from latentstore.errors import UsageError
from latentstore.groups import Groups, load
from latentstore.schema import OK, SPLITS
from latentstore.store import LatentStore, open_store
from solvers.data import PairData
from solvers.moments import Moments
from solvers.projection import Projection
from solvers.sums import RowSums

Rows = npt.NDArray[np.int64]
OnPass = Callable[[int], streams.OnRows]
"""Told how many rows a pass will read; returns what counts them."""
UNNAMED = "unnamed"
"""What a model is called that the manifest does not name."""
BLOCK = 1024
HELD = 128 << 20
"""Bytes of latents that are kept in memory because many maps are applied to them one after the other."""


@dataclass(frozen=True)
class Queries:
    """Rows to search for, with what each is allowed to be found as.

    Attributes
    ----------
    collection : Collection
        Whose rows they are (another store than the gallery's, for attacked pictures).
    rows : (q,) array
    group : str
        What the figures on them are called (``"oracle: simulated"``, ``"JPEG 10"``).
    """

    collection: Collection
    rows: Rows
    group: str = ""

    @property
    def identity(self) -> npt.NDArray[Any]:
        """The (q,) identities."""
        return self.collection.identity[self.rows]


class Collection:
    """A complete store with its manifest in memory.

    Parameters
    ----------
    store : LatentStore

    Raises
    ------
    StoreIncompleteError
    """

    def __init__(self, store: LatentStore) -> None:
        store.require_complete()
        self.store = store
        names = ["path", "identity", "group", "role", "split", "source", "model", "sha256"]
        table = store.manifest(names)
        for name in names:
            setattr(self, name, np.asarray(table[name].to_pylist(), dtype=object))
        self.ok = store.status() == OK
        self.on_pass: OnPass | None = None
        self._held: dict[bytes, npt.NDArray[np.floating[Any]]] = {}

    path: npt.NDArray[Any]
    identity: npt.NDArray[Any]
    group: npt.NDArray[Any]
    role: npt.NDArray[Any]
    split: npt.NDArray[Any]
    source: npt.NDArray[Any]
    model: npt.NDArray[Any]
    sha256: npt.NDArray[Any]

    @classmethod
    def open(cls, path: Path) -> Collection:
        """Open the store at a path."""
        return cls(open_store(path))

    @cached_property
    def named_model(self) -> npt.NDArray[Any]:
        """Model of each row, :data:`UNNAMED` where the manifest names none."""
        return np.array([m or UNNAMED for m in self.model], dtype=object)

    @cached_property
    def strength(self) -> npt.NDArray[np.float64]:
        """Editing strength of each row; NaN where it is not known."""
        held = self.store.manifest(["strength"])["strength"].to_pylist()
        # A strength is stored in float32: 0.9, not 0.899999976.
        return np.array([np.nan if s is None else round(s, 6) for s in held], np.float64)

    @cached_property
    def prompt(self) -> npt.NDArray[Any]:
        """Prompt of each row; None or empty where there is none."""
        return np.asarray(self.store.manifest(["prompt"])["prompt"].to_pylist(), dtype=object)

    @cached_property
    def data_hash(self) -> str:
        """Hash of the store's latents."""
        return self.store.data_hash()

    @cached_property
    def gallery(self) -> Rows:
        """Every valid origin and reference row, of every split."""
        return np.flatnonzero(self.ok & np.isin(self.role, ("origin", "reference")))

    @cached_property
    def near(self) -> tuple[Groups | None, str]:
        """The kept groups of near-duplicates, or None and why there are none to use."""
        return load(self.store)

    def near_of(self, relation: Literal["group", "component"]) -> dict[int, int]:
        """Return row → group (or component) of near-duplicates; empty when none are known."""
        return {} if self.near[0] is None else self.near[0].of(relation)

    def _merge(self, near: Mapping[int, int]) -> dict[str, str]:
        """Return identity → the one name of all that share a file's content or a near-duplicate."""
        parent: dict[str, str] = {}

        def name(identity: str) -> str:
            while identity in parent:
                identity = parent[identity]
            return identity

        first: dict[Any, str] = {}
        for row in self.gallery.tolist():
            identity = self.identity[row]
            for shared in (self.sha256[row] or None, near.get(row)):
                if shared is not None:
                    one, other = name(identity), name(first.setdefault(shared, identity))
                    if one != other:
                        parent[max(one, other)] = min(one, other)
        return {identity: name(identity) for identity in parent}

    @cached_property
    def _one_origin(self) -> dict[str, str]:
        return self._merge(self.near_of("group"))

    @cached_property
    def _one_chain(self) -> dict[str, str]:
        return self._merge(self.near_of("component"))

    def labels(self, identities: Any) -> npt.NDArray[Any]:
        """Return what counts as one origin: copies and near-duplicates do, or none of them could be right."""
        return np.array([self._one_origin.get(i, i) for i in identities], dtype=object)

    @cached_property
    def twins(self) -> dict[int, Rows]:
        """Gallery row → all rows that show the same picture, where there is more than one."""
        near, shown = self.near_of("group"), dict[Any, list[int]]()
        for row in self.gallery.tolist():
            shown.setdefault(near.get(row, self.sha256[row] or row), []).append(row)
        return {row: np.array(rows) for rows in shown.values() if len(rows) > 1 for row in rows}

    @cached_property
    def _earliest_split(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for identity, split in zip(self.identity[self.gallery], self.split[self.gallery], strict=True):
            chain = self._one_chain.get(identity, identity)
            found[chain] = min(found.get(chain, len(SPLITS)), SPLITS.index(split))
        return found

    def is_clean(self, identities: Any, splits: Any) -> npt.NDArray[np.bool_]:
        """Tell of which queries no copy of the origin stands in an earlier split (train, then validation).

        A near-duplicate counts, also one that is reached only through others: it may still leak.
        """
        earliest, chains = self._earliest_split, self._one_chain
        pairs = zip(identities, splits, strict=True)
        return np.array(
            [earliest.get(chains.get(i, i), len(SPLITS)) >= SPLITS.index(s) for i, s in pairs], bool
        )

    @cached_property
    def translations(self) -> Rows:
        """Every valid translation whose identity has a valid origin or reference."""
        rows = np.flatnonzero(self.ok & (self.role == "translation"))
        return rows[[self.identity[r] in self._origin_of for r in rows]]

    @cached_property
    def _origin_of(self) -> dict[str, int]:
        found: dict[str, int] = {}
        # Origins last, so that they win over references of the same identity.
        for role in ("reference", "origin"):
            for row in self.gallery[self.role[self.gallery] == role][::-1]:
                found[self.identity[row]] = int(row)
        return found

    def origin_rows(self, identities: Any) -> Rows:
        """Return the row of each identity's origin (or reference), -1 where the store has none."""
        return np.array([self._origin_of.get(i, -1) for i in identities], np.int64)

    def pairs(self, split: str) -> tuple[Rows, Rows]:
        """Return (origin rows, translation rows) of a split, pair by pair."""
        translated = self.translations[self.split[self.translations] == split]
        origins = np.array([self._origin_of[i] for i in self.identity[translated]], np.int64)
        return origins, translated

    def queries(self, split: str, group: str = "", *, origins_elsewhere: bool = False) -> Queries:
        """Return the queries of a split: its translations, and rows of role ``query``.

        Translations need an origin in this store, unless origins lie elsewhere: in the gallery to search.
        """
        asked = np.flatnonzero(self.ok & (self.role == "query") & (self.split == split))
        mine = self.translations
        if origins_elsewhere:
            mine = np.flatnonzero(self.ok & (self.role == "translation"))
        rows = np.union1d(mine[self.split[mine] == split], asked)
        return Queries(self, rows, group or self._group_name(rows))

    def _group_name(self, rows: Rows) -> str:
        simulated = len(rows) > 0 and bool((self.source[rows] == "simulated").all())
        return "oracle: simulated translations" if simulated else "translations"

    @cached_property
    def data(self) -> PairData:
        """The training pairs, their origins and the whole gallery, as re-iterable blocks.

        One object, so that the gallery's spectrum is computed once for every method and control.
        """
        origins, translated = self.pairs("train")
        own, dim = np.unique(origins), self.store.layout.dim

        def moments() -> Moments | None:
            # Fewer rows than dimensions: their span is cheaper, and read at once.
            if len(own) + len(origins) < dim:
                return None
            kept = self._kept_pass("train")
            return kept.settled(self._counted(sum(len(t.translations) for t in kept.todo())))

        def sums() -> RowSums | None:
            if len(self.gallery) < dim:
                return None
            return gallery.gallery_sums(self.store, self.gallery, on_rows=self._counted(len(self.gallery)))

        return PairData(
            dim=dim,
            n_pairs=len(origins),
            n_origins=len(own),
            n_gallery=len(self.gallery),
            stored_eps=float(np.finfo(self.store.layout.dtype).eps),
            pairs_source=lambda: streams.pair_blocks(self.store.reader, origins, translated),
            origins_source=lambda: self.blocks(own),
            gallery_source=lambda: self.blocks(self.gallery),
            moments_source=moments,
            gallery_sums_source=sums,
        )

    def _counted(self, rows: int) -> streams.OnRows | None:
        """Return what counts the rows of a pass, where somebody watches."""
        return None if self.on_pass is None or not rows else self.on_pass(rows)

    def _kept_pass(self, split: str) -> passes.PairPass:
        """Return the pass that is kept complete, in whatever parts; else the default one."""
        first = self.pair_pass(split)
        if not first.done():
            for asked in passes.known_plans(first.folder):
                other = self.pair_pass(split, **asked)
                if other.done():
                    return other
        return first

    def pair_pass(self, split: str, *, models: bool = False, parts: int = passes.PARTS) -> passes.PairPass:
        """Return the pass over the pairs of a split, in parts hashed from the photo; see `PairPass.of`."""
        origins, translated = self.pairs(split)
        return passes.PairPass.of(
            self.store,
            origins,
            translated,
            self.group[origins],  # the origin's: it may count in one part alone
            np.array([m or "unnamed" for m in self.model[translated]], object) if models else None,
            parts=parts,
        )

    def read(self, rows: Rows) -> npt.NDArray[np.floating[Any]]:
        """Return the latents of rows, (n, d), in the stored dtype."""
        return self.store.reader.gather(rows)

    def blocks(self, rows: Rows) -> Iterator[npt.NDArray[np.floating[Any]]]:
        """Yield the latents of rows block by block: read ahead, or from memory where they are few."""
        if len(rows) * self.store.layout.row_bytes <= HELD:
            few = self._few(rows)
            yield from (few[at : at + BLOCK] for at in range(0, len(rows), BLOCK))
            return
        yield from streams.ahead(self.read, (rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK)))

    def _few(self, rows: Rows) -> npt.NDArray[np.floating[Any]]:
        """Return the latents of rows, kept for the next map that is applied to them."""
        key = rows.tobytes()
        if key not in self._held:
            while len(self._held) >= 2:  # references and queries
                self._held.pop(next(iter(self._held)))
            self._held[key] = self.read(rows)
        return self._held[key]

    def references(self, projection: Projection, rows: Rows) -> npt.NDArray[np.float32]:
        """Return rows projected as references, (n, m)."""
        return _stack([projection.references(b) for b in self.blocks(rows)])

    def reference_blocks(self, projection: Projection, rows: Rows) -> Iterator[npt.NDArray[np.float32]]:
        """Yield rows projected as references, block by block, however many there are.

        The last block is filled up with zeros for the product: what comes of a row then depends on the row
        alone, wherever it stands, so that equal rows are equal in every bit.
        """
        for block in self.blocks(rows):
            missing = BLOCK - len(block)
            whole = np.pad(block, ((0, missing), (0, 0))) if missing else block
            yield np.asarray(projection.references(whole), np.float32)[: len(block)]

    def projected(self, projection: Projection) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        """Yield the gallery as (rows, rows projected as references), block by block."""
        at = 0
        for block in self.reference_blocks(projection, self.gallery):
            yield self.gallery[at : at + len(block)], block
            at += len(block)

    def project_queries(self, projection: Projection, rows: Rows) -> npt.NDArray[np.float32]:
        """Return rows projected as queries, (n, m)."""
        return _stack([projection.queries(b) for b in self.blocks(rows)])

    def require_gallery(self) -> None:
        """Refuse a store in which nothing can be found.

        Raises
        ------
        UsageError
        """
        if not len(self.gallery):
            raise UsageError(
                f"{self.store.path} holds no valid origin or reference image among its {len(self.ok)} rows: "
                "there is nothing to search in."
            )


def _stack(blocks: list[Any]) -> npt.NDArray[np.float32]:
    return (
        np.concatenate([np.asarray(b, np.float32) for b in blocks])
        if blocks
        else np.empty((0, 0), np.float32)
    )
