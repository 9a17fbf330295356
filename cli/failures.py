"""Misses and finds with their pictures: what a ranking looks like, and where it goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from cli.collection import Collection
from cli.ranked import Asked
from latentstore.errors import LatentStoreError
from latentstore.pictures import Pictures
from latentstore.results import Candidate, Match
from latentstore.store import open_store
from solvers.metrics import Ranking

CANDIDATES = 4
_PROMPT = 120
Thumbnail = Callable[[int], str]


def pictured(gallery: Collection, asked: Asked, ranking: Ranking, n: int) -> list[Match]:
    """Return the narrowest misses, the widest, and some finds, with pictures where there are any.

    Parameters
    ----------
    gallery : Collection
    asked : Asked
    ranking : Ranking
        Of these queries, with at least :data:`CANDIDATES` negatives for each.
    n : int
        Matches at most.

    Returns
    -------
    list of Match
        Where the origin is not among the first candidates it is the last one, with ``correct=True``;
        ``rank`` is its true rank.
    """
    rows = np.concatenate([p.rows for p in asked.parts])
    of = np.repeat(np.arange(len(asked.parts)), [len(p.rows) for p in asked.parts])
    shown = _thumbnails(gallery)
    views = {id(gallery): shown}
    out = []
    for i in pick(ranking, n):
        q = int(ranking.queries[i])
        collection = asked.parts[of[q]].collection
        view = views.setdefault(id(collection), _thumbnails(collection))
        row = int(rows[q])
        candidates, margin = _candidates(gallery, ranking, i, shown)
        out.append(
            Match(
                query=str(collection.path[row]),
                group=_where(collection, row),
                margin=margin,
                candidates=candidates,
                thumbnail=view(row),
                rank=int(ranking.rank[i]),
            )
        )
    return out


def pick(ranking: Ranking, n: int) -> list[int]:
    """Return the narrowest misses first, then the widest, then finds from the narrowest to the clearest.

    Half of them are misses, half of those narrow, where there are so many of each.
    """
    margin = ranking.margin
    missed, found = (np.flatnonzero(ranking.hit1 == hit) for hit in (False, True))
    missed = missed[np.argsort(-margin[missed], kind="stable")]
    found = found[np.argsort(margin[found], kind="stable")]
    n_missed = min(len(missed), max(n // 2, n - len(found)))
    narrow = n_missed - n_missed // 2
    widest = missed[len(missed) - n_missed // 2 :][::-1]
    n_found = min(len(found), n - n_missed)
    even = found[np.unique(np.linspace(0, len(found) - 1, n_found).round().astype(int))] if n_found else []
    return [int(i) for part in (missed[:narrow], widest, even) for i in part]


def _candidates(
    gallery: Collection, ranking: Ranking, i: int, view: Thumbnail
) -> tuple[list[Candidate], float | None]:
    """Return the first candidates of a query, each picture once, and the top score less the runner-up's."""
    p, negatives = ranking.positives, ranking.negatives
    own = np.flatnonzero(p.of == i)
    held = negatives.position[i] >= 0
    position = np.concatenate([negatives.position[i][held], p.position[own]])
    score = np.concatenate([negatives.score[i][held], p.score[own]])
    correct = np.repeat([False, True], [held.sum(), len(own)])
    seen: set[int] = set()
    listed: list[tuple[int, float, bool]] = []
    # Negatives first among equals: they stand before the origin.
    for at in np.lexsort((position, correct, -score)):
        row = int(gallery.gallery[position[at]])
        if row not in seen:
            seen |= {row, *gallery.twins.get(row, np.empty(0, np.int64)).tolist()}
            listed.append((row, float(score[at]), bool(correct[at])))
    first = listed[:CANDIDATES]
    if not any(right for _, _, right in first):
        first.append(next(c for c in listed if c[2]))
    candidates = [
        Candidate(str(gallery.path[row]), str(gallery.identity[row]), value, right, view(row))
        for row, value, right in first
    ]
    # Of two origins: two rows of the right one are no rivals.
    others = [value for _, value, right in listed[1:] if not (right and listed[0][2])]
    return candidates, listed[0][1] - others[0] if others else None


def _where(collection: Collection, row: int) -> str:
    """Return what is known of a translation: model, strength and prompt."""
    strength, prompt = collection.strength[row], str(collection.prompt[row] or "")
    known = [
        str(collection.model[row] or ""),
        "" if np.isnan(strength) else f"strength {strength:g}",
        prompt if len(prompt) <= _PROMPT else f"{prompt[:_PROMPT]}…",
    ]
    return ", ".join(filter(None, known))


def _thumbnails(collection: Collection) -> Thumbnail:
    """Return what gives the thumbnail of a row, each read once; empty where there is no picture."""
    store = collection.store
    if store.kind == "images":
        return cache(Pictures(store.first).thumbnail)
    made = store.origin.get("simulated")
    if store.kind != "simulated" or not isinstance(made, dict):
        return lambda row: ""
    # The origins of a simulated store are those of the store that it was drawn from.
    try:
        source = open_store(made["store"])
        paths = source.manifest(["path"])["path"].to_pylist()
    except (LatentStoreError, OSError):
        return lambda row: ""
    pictures = Pictures(source.first)
    rows = {path: at for at, path in enumerate(paths)}
    origin: npt.NDArray[np.bool_] = collection.source != "simulated"
    known = {row: rows.get(collection.path[row], -1) for row in np.flatnonzero(origin).tolist()}
    return cache(lambda row: pictures.thumbnail(known[row]) if known.get(row, -1) >= 0 else "")
