"""index: a collection's projected references, kept beside it; which index a search may use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.collection import Collection
from cli.own_map import own_projection
from cli.solving import load_projection
from latentstore import approximate, indexing
from latentstore.errors import LatentStoreError, UsageError
from latentstore.index import MAP, Index, folder_of, kept
from latentstore.simulate import Diffusion, GaussianPrior, translate
from latentstore.store import open_store
from solvers.errors import SolverError
from solvers.projection import Projection
from solvers.spectrum import fit_spectrum

OnStart = Callable[[int, int], None]
OnRows = Callable[[int, int], None]
QUERIES, SIMULATED = 1000, 500
"""Real queries, and simulated ones, by which the recall of an approximate part is measured at most."""
WORTH = 20_000
"""Images from which a search says that an index would spare it projecting them all."""


@dataclass(frozen=True)
class IndexOptions:
    """How to index; see ``latentstore index --help``."""

    projection: Path | None = None
    refit: bool = False
    rebuild: bool = False
    factory: str | None = None
    parameters: str = ""
    out: Path | None = None


@dataclass(frozen=True)
class Indexed:
    """An index that was made or brought up to date.

    Attributes
    ----------
    images, width, bytes : int
        References that can be found, numbers of each, and what they take on disk.
    added, removed, kept : int
        Images projected, taken out as they are gone, and left alone.
    map : dict
        Method, fingerprint and source of W; of the collection's own also on how many images it was fitted.
    approximate : dict or None
        Factory, parameters and measured recall of the approximate part.
    """

    store: str
    folder: str
    images: int
    width: int
    bytes: int
    added: int
    removed: int
    kept: int
    seconds: float
    map: dict[str, Any]
    approximate: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checked:
    """What a check of kept indexes found: findings by folder."""

    store: str
    indexes: dict[str, list[str]]
    images: int

    @property
    def findings(self) -> bool:
        """Whether anything is not as it was written."""
        return any(self.indexes.values())


def run_index(
    store: Path,
    options: IndexOptions,
    *,
    on_start: OnStart | None = None,
    on_rows: OnRows | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Indexed:
    """Make the index of a collection under a map, or bring it up to date.

    Without a map it is that of the collection's own index, however many images came since; where there is
    none, the collection's analytic map.

    Raises
    ------
    UsageError
        Nothing to index, another map's or space's index in the folder, or a factory that FAISS refuses.
    """
    if options.parameters and options.factory is None:
        raise UsageError("--parameters are FAISS's, for --factory: name one, for example IVF256,Flat.")
    given = None if options.projection is None else load_projection(options.projection)
    collection = Collection.open(store)
    collection.require_gallery()
    if given is not None:
        given.check_space(collection.store.space.id)
    began, notes = time.perf_counter(), []
    if options.rebuild and given is None:
        notes = _drop_damaged(collection)
    W, facts = _map_of(collection, options, given, say)
    if options.factory is not None:
        approximate.check_factory(options.factory, options.parameters, W.rank + (W.score == "bias"))
    folder = options.out or folder_of(collection.store, W.fingerprint)
    indexing.prepare(collection.store, folder)
    if not (folder / MAP).exists():
        W.save(folder / MAP)
    done = indexing.update(
        collection.store,
        folder,
        lambda latents: W.references(latents),
        collection.gallery,
        fingerprint=W.fingerprint,
        facts=facts,
        rebuild=options.rebuild,
        on_start=on_start,
        on_rows=on_rows,
    )
    # After the index was accepted as this map's: another one's must keep its own.
    if _map_in(folder, W.fingerprint) is None:
        W.save(folder / MAP)
    if facts["own"] and options.out is None:
        for other in _own_folders(collection):
            if other != folder:
                indexing.drop(other)
    index = Index.open(folder)
    if options.factory is not None:
        say(f"training {options.factory} on the references, measuring its recall")
        index = approximate.make(index, options.factory, options.parameters)
        index = approximate.measure(index, *_recall_queries(collection, W))
    return Indexed(
        store=str(store),
        folder=str(folder),
        images=len(index),
        width=index.references.shape[1],
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        **asdict(done),
        seconds=time.perf_counter() - began,
        map={"method": W.method, "rank": W.rank, "fingerprint": W.fingerprint, **facts},
        approximate=index.body["approximate"],
        notes=notes + _notes(collection, index),
    )


def _map_of(
    collection: Collection, options: IndexOptions, given: Projection | None, say: Callable[[str], None]
) -> tuple[Projection, dict[str, Any]]:
    """Return the map to index by, and what the index keeps of it."""
    if given is not None:
        return given, {"own": False, "source": str(options.projection)}
    if not options.refit:
        for folder in _own_folders(collection):
            index = Index.open(folder)
            W = _map_in(folder, index.map)
            if W is not None:
                return W, index.facts
    say("W is the collection's analytic map: fitted on all of its images, unless it is kept")
    W, path, _ = own_projection(collection)
    return W, {"own": True, "source": path, "fitted on": len(collection.gallery)}


def _drop_damaged(collection: Collection) -> list[str]:
    """Delete indexes that nobody can read; return what was deleted, a sentence each."""
    out = []
    for folder in kept(collection.store.root):
        try:
            Index.open(folder)
        except LatentStoreError:
            indexing.drop(folder)
            out.append(f"{folder} was damaged and was deleted.")
    return out


def _notes(collection: Collection, index: Index) -> list[str]:
    fitted, now = index.facts.get("fitted on"), len(collection.gallery)
    out = []
    if fitted is not None and fitted != now:
        out.append(
            f"W was fitted on {fitted:,} images; the collection has {now:,} now. --refit fits it anew, and "
            "projects all of them again."
        )
    part = index.body["approximate"]
    newer = len(index.rows) - part["n"] if part is not None else 0
    if part is not None and newer:
        out.append(
            f"{newer:,} of {len(index):,} images came after the approximate part was made and are searched "
            f"exactly; --factory {part['factory']} makes it anew."
        )
    return out


def check_indexes(
    store: Path, folder: Path | None = None, *, on_start: OnStart | None = None, on_rows: OnRows | None = None
) -> Checked:
    """Compare every reference of a store's indexes, of all arrays, with its checksum.

    Raises
    ------
    UsageError
        The store has no index.
    """
    root = open_store(store).root
    folders = kept(root) if folder is None else [folder]
    if not folders:
        raise UsageError(f"{store} has no index to check. Make one with `latentstore index --store {store}`.")
    found: dict[str, list[str]] = {}
    indexes = []
    for path in folders:
        try:
            indexes.append(Index.open(path))
        except UsageError:
            raise
        except LatentStoreError as exc:
            found[str(path)] = [str(exc)]
    if on_start is not None:
        total = sum(len(index.rows) for index in indexes)
        on_start(total, total)
    for index in indexes:
        found[str(index.folder)] = _map_findings(index) + index.check(on_rows)
    return Checked(str(store), found, sum(map(len, indexes)))


def _map_findings(index: Index) -> list[str]:
    if _map_in(index.folder, index.map) is not None:
        return []
    again = "`latentstore index --rebuild` with that map as --projection, or --refit, makes the index anew"
    return [f"{MAP} is missing, damaged, or not the map that the references were made by; {again}."]


# --- which index a search may use -------------------------------------------------------------------------


def usable_index(
    collection: Collection, W: Projection, folder: Path | None = None
) -> tuple[Index | None, str]:
    """Return the index of a collection under a map, or None and a sentence that says why not.

    The sentence is empty where there is none and few images: a search projects them in a moment.
    """
    folder = folder or folder_of(collection.store, W.fingerprint)
    again = f"`latentstore index --store {collection.store.path}`"
    if not (folder / "index.json").exists():
        own = [Index.open(path) for path in _own_folders(collection)]
        if W.method == "analytic" and any(index.data_hash != collection.data_hash for index in own):
            return None, (
                f"The index of {collection.store.path} was made before its images changed and is not used; "
                f"{again} brings it up to date."
            )
        few = len(collection.gallery) < WORTH
        return None, "" if few else (
            f"No index of {collection.store.path} is kept for this map, so all of its "
            f"{len(collection.gallery):,} images were projected for this search; {again} keeps one."
        )
    try:
        index = Index.open(folder)
    except LatentStoreError as exc:
        return None, f"The index is not used: {exc}"
    if (index.map, index.body["space"]) != (W.fingerprint, collection.store.space.id):
        return None, f"The index in {folder} is of another map or space, and is not used."
    if index.data_hash != collection.data_hash or len(index) != len(collection.gallery):
        state = "is not finished" if not index.data_hash else "was made before the images changed"
        return None, f"The index in {folder} {state} and is not used; {again} brings it up to date."
    return index, ""


def own_index(collection: Collection) -> tuple[Projection, Index] | None:
    """Return the map and the index that the collection keeps by itself, or None where none is current."""
    for folder in _own_folders(collection):
        W = _map_in(folder, Index.open(folder).map)
        if W is not None:
            index, _ = usable_index(collection, W, folder)
            if index is not None:
                return W, index
    return None


def _own_folders(collection: Collection) -> list[Path]:
    """Return the folders of indexes under a map of the collection's own, the newest first."""
    found = []
    for folder in kept(collection.store.root):
        try:
            index = Index.open(folder)
        except LatentStoreError:
            continue
        if index.facts.get("own") and index.body["array"] == collection.store.array:
            found.append((index.body["made"], folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _map_in(folder: Path, fingerprint: str) -> Projection | None:
    """Return the map of that fingerprint beside an index; None where it is missing, damaged or another."""
    try:
        W = Projection.load(folder / MAP)
    except (SolverError, OSError):
        return None
    return W if W.fingerprint == fingerprint else None


# --- recall -----------------------------------------------------------------------------------------------


def _recall_queries(collection: Collection, W: Projection) -> tuple[npt.NDArray[np.float32], str]:
    """Return projected queries, and what they are: the test split's own, or simulated translations."""
    queries = collection.queries("test")
    rng = np.random.default_rng(0)
    if len(queries.rows):
        some = np.sort(rng.permutation(queries.rows)[:QUERIES])
        return collection.project_queries(W, some), f"{queries.group} of the test split"
    some = np.sort(rng.permutation(collection.gallery)[:SIMULATED])
    spectrum = fit_spectrum(collection.blocks(some), collection.store.layout.dim, len(some))
    prior = GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)
    made = translate(collection.read(some), prior, Diffusion(), some)
    return np.asarray(W.queries(made.astype(np.float32)), np.float32), "simulated translations"
