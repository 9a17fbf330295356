"""match: ranked origins of queries, each origin once, with a verdict and what speaks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.asked import Asked, OnRows, OnStart, ask
from cli.collection import Collection
from cli.indexing import own_index, usable_index
from cli.own_map import own_projection
from cli.solving import check_writable, load_projection
from cli.verdicts import Judge, judge_for
from latentstore import heat, results, search
from latentstore.errors import LatentStoreError, UsageError
from latentstore.index import Index
from latentstore.pictures import SIDE, Pictures, thumbnail_uri
from latentstore.results import Candidate, Match, Report
from solvers.explain import contributions, grid
from solvers.projection import Projection
from solvers.verdict import CANDIDATES

Block = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
Phases = Callable[[str, str], tuple[OnStart, OnRows]]
"""Told what begins, and of what; returns what is told how much there is to do, and what counts it."""
SHOWN = 100
"""Queries that get pictures; a page shows no more."""


@dataclass(frozen=True)
class MatchOptions:
    """How to match; see ``latentstore match --help``."""

    projection: Path | None = None
    top: int = 5
    backend: search.Backend = "auto"
    device: str = "auto"
    verdicts: bool = True
    approximate: bool = False


@dataclass(frozen=True)
class MatchResult:
    """Matches of every readable query, the queries that could not be read, and the map that was used.

    Attributes
    ----------
    searched : str
        What was searched: a kept index, or the collection projected for the occasion.
    backend : str
        What searched it.
    note : str
        Why near-duplicates are not grouped, or empty.
    no_verdict : str
        Why there are no verdicts, or empty.
    """

    matches: list[Match]
    unreadable: list[tuple[str, str]]
    projection: str
    method: str
    made: bool
    searched: str
    backend: str
    note: str = ""
    no_verdict: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Searched:
    """The collection, the map and what was found.

    Rows are (q, k), best first; -1 behind what an approximate index found.
    """

    collection: Collection
    W: Projection
    name: str
    made: bool
    index: Index | None
    asked: Asked
    scores: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    how: str
    notes: list[str]
    backend: str = "faiss"


def run_match(
    queries: list[Path],
    store: Path,
    options: MatchOptions | None = None,
    *,
    html: Path | None = None,
    out: Path | None = None,
    phases: Phases | None = None,
    command: str = "",
) -> MatchResult:
    """Rank the collection's images for queries (pictures, folders, latents or stores).

    Without a projection the map of the collection's own index is used; without one the collection's
    analytic map is made, kept in the store, and used again.

    Parameters
    ----------
    html, out : Path, optional
        Write a page with pictures, or the results as JSON, here.
    """
    options = options or MatchOptions()
    began = time.perf_counter()
    if options.top < 1:
        raise UsageError(f"--top is {options.top}; at least 1 is needed.")
    for path in (html, out):
        if path is not None:
            check_writable(path)
    phases = phases or (lambda label, unit: (lambda todo, total: None, lambda rows, bad: None))
    found = _search(queries, store, options, phases)
    collection, asked = found.collection, found.asked
    judge, why = None, ""
    if options.verdicts:
        on_start, on_rows = phases("calibrate the verdict", "rows")
        judge, why = judge_for(
            collection, found.W, blocks=lambda: _blocks(found), on_start=on_start, on_rows=on_rows
        )
    # As many rows whatever --top is: they are what the first one's lead is told by.
    judged = found.rows[:, : CANDIDATES + _hidden(collection, CANDIDATES)]
    verdicts = [None] * len(asked.names) if judge is None else judge.verdicts(asked.latents, judged)
    matches = [
        Match(
            query=name,
            group="",
            margin=_margin(s[rows >= 0], collection.labels(collection.identity[rows[rows >= 0]])),
            candidates=_origins(collection, s, rows)[: options.top],
            verdict=verdict,
        )
        for name, s, rows, verdict in zip(asked.names, found.scores, found.rows, verdicts, strict=True)
    ]
    result = MatchResult(
        matches,
        asked.unreadable,
        found.name,
        found.W.method,
        found.made,
        found.how,
        found.backend,
        collection.near[1],
        why,
        found.notes,
    )
    if html is not None or out is not None:
        report = _report(found, result, judge, options, command, time.perf_counter() - began)
        if out is not None:
            report.write(out)
        if html is not None:
            from latentstore.report import write_html

            write_html(report, html)
    return result


def _search(queries: list[Path], store: Path, options: MatchOptions, phases: Phases) -> _Searched:
    given = None if options.projection is None else load_projection(options.projection)
    collection = Collection.open(store)
    collection.require_gallery()
    if given is not None:
        given.check_space(collection.store.space.id)
    on_start, on_rows = phases("read the queries", "queries")
    asked = ask(queries, collection.store, device=options.device, on_start=on_start, on_rows=on_rows)
    notes: list[str] = []
    index: Index | None
    if given is not None:
        W, name, made = given, str(options.projection), False
        index, why = usable_index(collection, W)
    elif (own := own_index(collection)) is not None:
        (W, index), name, made = own, f"{store}'s index", False
        why = ""
    else:
        W, name, made = own_projection(collection)
        index, why = usable_index(collection, W)
    if why:
        notes.append(why)
    if options.approximate and index is None:
        raise UsageError(
            f"--approximate needs an index of {store} that is current: latentstore index --store {store} "
            "--factory IVF256,Flat makes one."
        )
    projected = _projected(W, asked)
    held = _Searched(collection, W, name, made, index, asked, np.empty(0), np.empty(0, np.int64), "", notes)
    try:
        return _ranked(held, projected, options, phases)
    except LatentStoreError:
        if index is None or not index.changed():
            raise
    notes.append(
        f"The index of {store} was changed while it was searched, so all images were projected for this "
        "search."
    )
    # Opened anew: what was removed meanwhile must not be found.
    again = replace(held, collection=Collection.open(store), index=None)
    return _ranked(again, projected, options, phases)


def _projected(W: Projection, asked: Asked) -> npt.NDArray[np.float32]:
    """Project the queries; those whose projection is not finite become unreadable."""
    latents = asked.latents
    with np.errstate(over="ignore", invalid="ignore"):
        projected = np.asarray(W.queries(latents), np.float32)
        finite = np.asarray(np.isfinite(projected).all(axis=1))
        # A row of NaN has no length: normalised, it is all zeros, as the centre is.
        zero = np.flatnonzero(~projected.any(axis=1))
        if len(zero):
            finite[zero] = np.isfinite(W.coordinates(latents[zero])).all(axis=1)
    asked.keep(finite, "not_finite: the map takes it out of float32's range")
    return projected[finite]


def _ranked(
    held: _Searched, projected: npt.NDArray[np.float32], options: MatchOptions, phases: Phases
) -> _Searched:
    """Search the index, or the gallery projected now where there is none."""
    collection, index = held.collection, held.index
    k = max(options.top, CANDIDATES if options.verdicts else 10)
    k += _hidden(collection, k)
    if options.approximate and index is not None:
        scores, rows = index.approximate(projected, k)
        _require_unchanged(index)
        return replace(held, scores=scores, rows=rows, how="an approximate index")
    on_start, on_rows = phases("search", "rows")
    on_start(len(collection.gallery), len(collection.gallery))
    largest = None if index is None else index.body["largest"]
    scan = search.Search(projected, k, backend=options.backend, device=options.device, largest=largest)
    for rows, block in _blocks(held):
        scan.add(rows, block)
        on_rows(len(rows), 0)
    scores, rows = scan.best()
    how = "its kept index" if index is not None else "projected for this search"
    # Too small a job to time the two ways is done by NumPy.
    backend = "numpy" if scan.backend == "auto" else scan.backend
    return replace(held, scores=scores, rows=rows, how=how, backend=backend)


def _require_unchanged(index: Index) -> None:
    if index.changed():
        raise UsageError(f"The index in {index.folder} was changed while it was read. Run the command again.")


def _blocks(found: _Searched) -> Iterator[Block]:
    """Yield the gallery as (rows, projected rows): from the index, or mapped now.

    Raises
    ------
    UsageError
        The index was changed meanwhile: what was yielded may be of before or after.
    """
    if found.index is not None:
        yield from found.index.blocks()
        _require_unchanged(found.index)
        return
    yield from found.collection.projected(found.W)


def _hidden(collection: Collection, top: int) -> int:
    """Return how many rows at most the copies and near-duplicates of ``top`` origins can take up."""
    sizes = sorted((len(rows) for row, rows in collection.twins.items() if row == rows[0]), reverse=True)
    return sum(sizes[:top]) - len(sizes[:top])


def _origins(collection: Collection, scores: Any, rows: Any) -> list[Candidate]:
    """Return ranked rows as candidates, each origin once: its best row, with the others' paths."""
    return [
        Candidate(
            str(collection.path[row]),
            str(collection.identity[row]),
            score,
            near=[str(p) for p in collection.path[others]],
        )
        for score, row, others in _once(collection, scores, rows)
    ]


def _once(collection: Collection, scores: Any, rows: Any) -> Iterator[tuple[float, int, list[int]]]:
    """Yield (score, best row, its other rows) of each origin."""
    seen: set[int] = set()
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        if row >= 0 and row not in seen:
            others = [r for r in collection.twins.get(row, np.empty(0, np.int64)).tolist() if r != row]
            seen |= {row, *others}
            yield score, row, others


def _margin(scores: Any, labels: Any) -> float | None:
    """Return the top score less the best of another origin, or None when no other is near the top."""
    others = np.flatnonzero(labels != labels[:1])
    return float(scores[0] - scores[others[0]]) if len(others) else None


# --- the report ----------------------------------------------------------------------------------


def _report(
    found: _Searched,
    result: MatchResult,
    judge: Judge | None,
    options: MatchOptions,
    command: str,
    seconds: float,
) -> Report:
    collection, store = found.collection, found.collection.store
    return Report(
        kind="match",
        title="Where do these pictures come from?",
        summary=summary(result, len(collection.gallery)),
        data={
            "queries": len(result.matches),
            "unreadable": len(result.unreadable),
            "store": str(store.path),
            "gallery": len(collection.gallery),
            "encoder": store.provenance.get("encoder", {}).get("name", ""),
            "dimension": store.layout.dim,
            "space": store.space.id,
        },
        settings={
            "map": result.method,
            "file": result.projection,
            "rank": found.W.rank,
            "searched": f"{result.searched}, by {result.backend}",
            "origins shown": options.top,
        },
        reproduce=[command] if command else [],
        curves=[] if judge is None else judge.curves(),
        matches=_with_pictures(found, result.matches),
        caveats=_caveats(result),
        timings={"match": seconds},
        **results.stamp(),
    )


def summary(result: MatchResult, references: int) -> list[str]:
    """Return what was found, in plain words."""
    n = len(result.matches)
    of = f"{n:,} {'query was' if n == 1 else 'queries were'} compared with {references:,} pictures"
    decided: list[str] = [m.verdict.decision for m in result.matches if m.verdict is not None]
    lost = len(result.unreadable)
    unread = f" {lost:,} further {'query' if lost == 1 else 'queries'} could not be read." if lost else ""
    if not decided:
        return [f"{of}.{unread} {result.no_verdict}".strip()]
    told = []
    for decision, one, more in (
        (
            "match",
            "very probably has its origin here (match)",
            "very probably have their origin here (match)",
        ),
        ("doubtful", "is doubtful", "are doubtful"),
        ("no origin here", "has no origin here", "have no origin here"),
    ):
        if count := decided.count(decision):
            told.append(f"{count:,} {one if count == 1 else more}")
    return [f"{of}: {', '.join(told)}.{unread}"]


def _caveats(result: MatchResult) -> list[str]:
    out = [*result.notes, result.note, result.no_verdict]
    out += [f"{name} could not be read: {why}" for name, why in result.unreadable[:20]]
    if len(result.unreadable) > 20:
        out.append(f"{len(result.unreadable) - 20:,} further queries could not be read.")
    if result.method == "analytic":
        out.append(
            "The analytic map assumes one diffusion step from the origin; it learned nothing of the model "
            "that may have made these pictures."
        )
    out.append("A high score says that two pictures agree in what an autoencoder keeps, not who copied whom.")
    return [text for text in out if text]


def _with_pictures(found: _Searched, matches: list[Match]) -> list[Match]:
    """Add thumbnails, and the heat map of the first candidates."""
    collection = found.collection
    pictures, shape = Pictures(collection.store), collection.store.space.latent_shape
    shown = []
    for number, match in enumerate(matches[:SHOWN]):
        image = found.asked.picture(number)
        ranked = list(_once(collection, found.scores[number], found.rows[number]))[: len(match.candidates)]
        latents = collection.read(np.array([row for _, row, _ in ranked], np.int64))
        candidates: list[Candidate] = []
        scale = None  # the first candidate's, so that a wrong one does not look as strong
        for candidate, (_, row, _), latent in zip(match.candidates, ranked, latents, strict=True):
            agreed = grid(contributions(found.W, found.asked.latents[number], latent), shape)
            scale = heat.strength(agreed) if scale is None else scale
            drawn = heat.overlay(agreed, image, SIDE, scale=scale)
            candidates.append(replace(candidate, thumbnail=pictures.thumbnail(row), heat=drawn))
        shown.append(
            replace(match, thumbnail="" if image is None else thumbnail_uri(image), candidates=candidates)
        )
    return [*shown, *matches[SHOWN:]]
