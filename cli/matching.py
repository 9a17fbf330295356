"""match: ranked origins of query pictures, each origin once, with the margin to the runner-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.asked import encode_files, query_files
from cli.collection import BLOCK, Collection
from cli.own_map import own_projection
from cli.solving import load_projection
from latentstore import encoders, search
from latentstore.errors import UsageError
from latentstore.features import SUFFIX, load_queries
from latentstore.importing import IMPORTED
from latentstore.results import Candidate, Match
from latentstore.store import exists, open_store


@dataclass(frozen=True)
class MatchResult:
    """Matches of every readable query, the queries that could not be read, and the map that was used."""

    matches: list[Match]
    unreadable: list[tuple[str, str]]
    projection: str
    method: str
    made: bool
    backend: str
    note: str = ""


def run_match(
    queries: list[Path],
    store: Path,
    *,
    projection: Path | None = None,
    top: int = 5,
    backend: search.Backend = "auto",
    device: str = "auto",
) -> MatchResult:
    """Rank the collection's images for query pictures (files or folders).

    Without a projection the collection's analytic map is made, kept in the store, and used again.
    """
    files = query_files(queries, exists(store) and open_store(store).kind == IMPORTED)
    if top < 1:
        raise UsageError(f"--top is {top}; at least 1 is needed.")
    chosen = search.select_backend(backend)
    given = None if projection is None else load_projection(projection)
    collection = Collection.open(store)
    collection.require_gallery()
    if given is not None:
        given.check_space(collection.store.space.id)
    present = collection.store
    if present.kind == IMPORTED and all(path.suffix.lower() == SUFFIX for path in files):
        names, latents, unreadable = load_queries(files, present.space)
    elif present.space.encoder == IMPORTED:
        named = present.provenance["encoder"]["named"]
        raise UsageError(
            f"{store} holds imported latents whose encoder is only named ({named}): its "
            f"queries are {SUFFIX} files of the same encoder, not pictures."
        )
    else:
        encoder = encoders.load_for(present.space, present.provenance["encoder"], device=device)
        names, latents, unreadable = encode_files(files, encoder)
    if not names:
        listed = "; ".join(f"{n}: {why}" for n, why in unreadable[:3])
        raise UsageError(f"None of the {len(files)} queries can be read ({listed}).")
    W, name, made = (given, str(projection), False) if given is not None else own_projection(collection)
    scores, rows = search.top_k(
        np.asarray(W.queries(latents)),
        (
            (
                collection.gallery[at : at + BLOCK],
                np.asarray(W.references(collection.read(collection.gallery[at : at + BLOCK]))),
            )
            for at in range(0, len(collection.gallery), BLOCK)
        ),
        max(top, 10) + _hidden(collection, max(top, 10)),
        backend=backend,
    )
    matches = [
        Match(
            query=name_,
            group="",
            margin=_margin(s, collection.labels(collection.identity[found])),
            candidates=_origins(collection, s, found)[:top],
        )
        for name_, s, found in zip(names, scores, rows, strict=True)
    ]
    return MatchResult(matches, unreadable, name, W.method, made, chosen, collection.near[1])


def _hidden(collection: Collection, top: int) -> int:
    """Return how many rows at most the copies and near-duplicates of ``top`` origins can take up."""
    sizes = sorted((len(rows) for row, rows in collection.twins.items() if row == rows[0]), reverse=True)
    return sum(sizes[:top]) - len(sizes[:top])


def _origins(collection: Collection, scores: Any, rows: Any) -> list[Candidate]:
    """Return ranked rows as candidates, each origin once: its best row, with the others' paths."""
    found: list[Candidate] = []
    seen: set[int] = set()
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        if row not in seen:
            others = [r for r in collection.twins.get(row, np.empty(0, np.int64)).tolist() if r != row]
            seen |= {row, *others}
            path, identity = str(collection.path[row]), str(collection.identity[row])
            found.append(Candidate(path, identity, score, near=[str(p) for p in collection.path[others]]))
    return found


def _margin(scores: Any, labels: Any) -> float | None:
    """Return the top score less the best of another origin, or None when no other is near the top."""
    others = np.flatnonzero(labels != labels[0])
    return float(scores[0] - scores[others[0]]) if len(others) else None
