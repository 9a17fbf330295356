"""The approximate part of a kept index: what FAISS's own factory string makes, with its recall measured."""

from __future__ import annotations

import os
import re
import time
import uuid
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.errors import CorruptStoreError, MissingExtraError, StoreWriteError, UsageError
from latentstore.files import PARTIAL, check_room, fsync_dir
from latentstore.index import BLOCK, Index, Rows
from latentstore.indexing import locked, settled, write_body
from latentstore.scan import exact_scores
from latentstore.search import Search, has_faiss

TRAINING = 262_144
"""References that FAISS is trained on at most, drawn with seed 0."""
_MORE = 4
"""Candidates for each place: codes that compress rank roughly, and are scored again."""
_PIECE = 1 << 20


@dataclass(frozen=True)
class Recall:
    """How an approximate part fares against exact search.

    Attributes
    ----------
    at_1, at_10 : float
        Share of queries whose best reference is found; mean share of the ten best (or all) that is.
    seconds, exact_seconds : float
        For one query, of a batch of ``n``.
    n : int
    of : str
        What the queries are.
    """

    at_1: float
    at_10: float
    seconds: float
    exact_seconds: float
    n: int
    of: str


def check_factory(factory: str, parameters: str, width: int) -> None:
    """Refuse before any work what FAISS cannot make of references of that width.

    Raises
    ------
    UsageError
    MissingExtraError
        FAISS is not installed.
    """
    if not has_faiss():
        raise MissingExtraError(
            "An approximate index is FAISS's, which is not installed: pip install 'latentstore[cpu]'."
        )
    try:
        _set_parameters(_untrained(factory, width), parameters)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(
            f"FAISS cannot make {factory!r}{f' with {parameters!r}' * bool(parameters)} of references of "
            f"{width} numbers: {_reason(exc)}. IVF256,Flat, IVF256,PQ64 and HNSW32 are factory strings; "
            "nprobe=16 is a parameter of the first two."
        ) from exc


def _untrained(factory: str, width: int) -> Any:
    import faiss

    return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)


def _reason(exc: Exception) -> str:
    """Return what FAISS means, without where in its source it says so."""
    text = str(exc).strip().splitlines()[-1]
    return re.split(r"\.(?:cpp|h):\d+: (?:.* failed: )?", text)[-1].rstrip(".")


def make(index: Index, factory: str, parameters: str = "") -> Index:
    """Train a FAISS index on the references, add all of them, and keep it beside them.

    Parameters
    ----------
    index : Index
    factory : str
        FAISS's factory string: ``"IVF256,Flat"``, ``"HNSW32"``, ``"IVF256,PQ64"``.
    parameters : str
        FAISS's search parameters: ``"nprobe=16"``. By default a sixteenth of an IVF's cells is searched, and
        eight of few.

    Returns
    -------
    Index
        Opened anew.

    Raises
    ------
    UsageError
        FAISS cannot make it, or the index was changed meanwhile.
    MissingExtraError, StoreWriteError
    """
    check_factory(factory, parameters, index.references.shape[1])
    import faiss

    live = np.flatnonzero(index.rows >= 0)
    if not len(live):
        raise UsageError(f"The index in {index.folder} is empty: there is nothing to search.")
    try:
        inner = _untrained(factory, index.references.shape[1])
        if not inner.is_trained:
            some = np.sort(np.random.default_rng(0).permutation(live)[:TRAINING])
            inner.train(np.ascontiguousarray(index.references[some]))
        made = faiss.IndexIDMap(inner)
        for at in range(0, len(live), BLOCK):
            part = live[at : at + BLOCK]
            made.add_with_ids(np.ascontiguousarray(index.references[part]), part)
        _set_parameters(made, parameters)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(
            f"FAISS cannot train {factory!r} on {len(live):,} references: {_reason(exc)}. Fewer cells "
            "(IVF64,Flat) need fewer references."
        ) from exc
    facts = {"n": len(index.rows), "factory": factory, "parameters": parameters, "recall": None}
    partial = index.folder / f".approximate-{uuid.uuid4().hex}{PARTIAL}"
    try:
        check_room(index.folder, 4 * index.references.nbytes // 3)
        try:
            faiss.write_index(made, str(partial))
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        except (RuntimeError, OSError) as exc:
            raise StoreWriteError(f"{partial} could not be written: is the disk full? ({exc})") from exc
        with locked(index.folder):
            body = settled(index.folder)
            if body is None or body["version"] != index.body["version"] or not partial.exists():
                raise UsageError(
                    f"The index in {index.folder} was changed meanwhile: run the same command again."
                )
            name = f"approximate-{len(index.rows)}.faiss"
            size, crc = _checksum(partial)
            # A file of that name may be there: until the new one is named, there is none.
            write_body(index.folder, {**body, "approximate": None})
            partial.replace(index.folder / name)
            fsync_dir(index.folder)
            facts |= {"file": name, "bytes": size, "crc32": crc}
            write_body(index.folder, {**body, "approximate": facts})
    finally:
        partial.unlink(missing_ok=True)
    return Index.open(index.folder)


def _set_parameters(made: Any, parameters: str) -> None:
    import faiss

    if parameters:
        space: Any = faiss.ParameterSpace()
        space.set_index_parameters(made, parameters)
        return
    ivf = faiss.try_extract_index_ivf(made)
    if ivf is not None:
        ivf.nprobe = min(ivf.nlist, max(8, ivf.nlist // 16))


def measure(index: Index, queries: npt.NDArray[np.floating[Any]], of: str, k: int = 10) -> Index:
    """Measure the recall of the approximate part on projected queries, and keep it with the index."""
    k = min(k, len(index))
    # The first of everything is slower: memory is mapped, libraries are loaded.
    search(index, queries[:1], k)
    index.search(queries[:1], k)
    start = time.perf_counter()
    found = search(index, queries, k)[1]
    middle = time.perf_counter()
    exact = index.search(queries, k)[1]
    seconds, exact_seconds = middle - start, time.perf_counter() - middle
    shared = [len(np.intersect1d(a, b)) / k for a, b in zip(found, exact, strict=True)]
    recall = Recall(
        at_1=float((found[:, 0] == exact[:, 0]).mean()),
        at_10=float(np.mean(shared)),
        seconds=seconds / len(queries),
        exact_seconds=exact_seconds / len(queries),
        n=len(queries),
        of=of,
    )
    with locked(index.folder):
        body = settled(index.folder)
        if body is not None and body["approximate"] is not None:
            body["approximate"]["recall"] = asdict(recall)
            write_body(index.folder, body)
    return Index.open(index.folder)


def search(
    index: Index, queries: npt.NDArray[np.floating[Any]], k: int
) -> tuple[npt.NDArray[np.float64], Rows]:
    """Search by the approximate part; what came since is searched exactly, and all scores are exact.

    Returns
    -------
    scores : (q, k) float64 array
        Falling, exact; -inf where nothing was found.
    rows : (q, k) int64 array
        -1 where nothing was found; equal scores are ordered by row number.

    Raises
    ------
    UsageError
        The index has no approximate part.
    CorruptStoreError
        It is damaged.
    """
    if k < 1:
        raise UsageError(f"--top is {k}; at least 1 is needed.")
    facts = index.body["approximate"]
    if facts is None:
        raise UsageError(
            f"The index in {index.folder} has no approximate part. `latentstore index --factory IVF256,Flat` "
            "makes one and measures its recall."
        )
    made = _opened(index.folder / facts["file"], facts["bytes"])
    q = np.ascontiguousarray(queries, np.float32)
    place = _candidates(index, made, q, k)
    i, c = np.nonzero(place >= 0)
    score = np.full(place.shape, -np.inf)
    row = np.full(place.shape, -1, np.int64)
    positions = place[i, c]
    if len(i):
        unique, back = np.unique(positions, return_inverse=True)
        score[i, c] = exact_scores(q, np.asarray(index.references[unique]), i, back)
        row[i, c] = index.rows[positions]
    newer = Search(q, k, largest=index.body["largest"])
    for rows, block in index.blocks(facts["n"]):
        newer.add(rows, block)
    late_score, late_row = newer.best()
    pad = np.full((len(q), k), -np.inf), np.full((len(q), k), -1, np.int64)
    score, row = np.hstack([score, late_score, pad[0]]), np.hstack([row, late_row, pad[1]])
    order = np.lexsort((row, -score), axis=1)[:, :k]
    return np.take_along_axis(score, order, 1), np.take_along_axis(row, order, 1)


def _candidates(index: Index, made: Any, queries: npt.NDArray[np.float32], k: int) -> Rows:
    """Return positions, -1 where there are none; more are asked for where too many were taken out since."""
    ask = min(_MORE * k + 8, made.ntotal)
    while True:
        place = np.array(made.search(queries, ask)[1])
        came = (place >= 0).sum(axis=1)
        live = place >= 0
        live[live] = index.rows[place[live]] >= 0
        short = (live.sum(axis=1) < k) & (came == ask)
        if not short.any() or ask >= made.ntotal:
            return np.where(live, place, -1)
        ask = min(2 * ask, made.ntotal)


def check(index: Index) -> list[str]:
    """Compare the approximate part with its checksum; return what is wrong."""
    facts = index.body["approximate"]
    if facts is None:
        return []
    path = index.folder / facts["file"]
    if not path.exists() or _checksum(path) != (facts["bytes"], facts["crc32"]):
        again = f"`latentstore index --factory {facts['factory']}` makes it anew"
        return [f"{path.name} is missing or damaged; {again}."]
    return []


def _opened(path: Path, size: int) -> Any:
    import faiss

    try:
        if path.stat().st_size != size:
            raise OSError("its size is not as it was written")
        return faiss.read_index(str(path))
    except (OSError, RuntimeError) as exc:
        raise CorruptStoreError(
            f"{path} cannot be read ({str(exc).strip().splitlines()[-1]}). `latentstore index --factory` "
            "makes it anew."
        ) from exc


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return size, crc
