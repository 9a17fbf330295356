"""What is left open is chosen on validation: the settings to try, and the judge that ranks each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cli import measure
from cli.collection import Collection, Queries
from cli.knobs import fields
from cli.render import counted
from solvers.data import PairData
from solvers.fitted import Fitted
from solvers.generalised import GeneralisedNull, fit_path
from solvers.methods import build, get
from solvers.metrics import Ranking, average_precision
from solvers.projection import SCORES, Projection

LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Ridges λ from which validation chooses, in the units of each method."""
SIGNS = {"lam": "λ", "alpha_bar": "ᾱ", "latent_shape": "shape"}
"""What some knobs are called in words."""
REFERENCES, QUERIES = 20_000, 1_000
"""What a judge ranks at most: among more, choices are the same and take longer."""
SMALLEST = 16
"""First of the default ranks, which double."""


def open_knobs(method: str) -> dict[str, tuple[Any, ...]]:
    """Return the knobs that validation chooses unless they are named, with what is tried; simplest first."""
    grid: dict[str, tuple[Any, ...]] = {"lam": LAMBDAS, "score": SCORES}
    return {knob: values for knob, values in grid.items() if knob in fields(method)}


def settings(named: Mapping[str, Any], grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return every setting of the knobs: those named as they are, the others over their grid."""
    free = {k: values for k, values in grid.items() if k not in named}
    return [{**named, **dict(zip(free, point, strict=True))} for point in itertools.product(*free.values())]


def fits(
    data: PairData, method: str, rank: int | str | None, asked: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Projection, dict[str, Any]]]:
    """Yield the map of each of several settings of a closed form, and its fit's account.

    Settings that differ in their score alone share one fit: a score is how the same maps are read.
    """
    ridges = [knobs["lam"] for knobs in asked if set(knobs) == {"lam"}]
    if method == GeneralisedNull.name and len(ridges) == len(asked):
        # It reduces the covariances once for all ridges.
        for fitted in fit_path(data, ridges, int(rank or data.dim)):
            yield fitted.projection(), dict(fitted.report)
        return
    known: tuple[dict[str, Any], Fitted] | None = None
    for knobs in asked:
        rest = {k: v for k, v in knobs.items() if k != "score"}
        if known is None or known[0] != rest:
            known = rest, build(method, rank=rank, **knobs).fit(data)
        made = known[1].projection()
        yield made.with_score(knobs.get("score", made.score)), dict(known[1].report)


def default_ranks(top: int) -> tuple[int, ...]:
    """Return the powers of two from 16 up to ``top``; ``top`` itself where that is smaller."""
    return tuple(2**k for k in range(SMALLEST.bit_length() - 1, top.bit_length())) or (top,)


class Judge:
    """Ranks validation queries by any map. A map is applied once, whatever the number of its prefixes.

    Queries without an origin, and those of whose origin a copy stands in the training split, are left out.

    Parameters
    ----------
    gallery : Collection
    queries : Queries
    columns : int
        Of the widest map to be judged.

    Attributes
    ----------
    labels, groups : (n,) arrays of str
        What counts as the origin of each query that is ranked, and the photo that it stands or falls with.
    n, n_references : int
        Queries that are ranked, and references that they are ranked among.
    """

    def __init__(self, gallery: Collection, queries: Queries, columns: int) -> None:
        self.gallery = gallery
        if len(queries.rows) > QUERIES:
            drawn = np.random.default_rng(0).permutation(queries.rows)[:QUERIES]
            queries = Queries(queries.collection, np.sort(drawn), queries.group)
        self.chosen_on = queries
        # Prefixes are copies: twice the room.
        widest = max(2 * columns, measure.MEMORY // (4 * REFERENCES))
        self.rows = measure.affordable(gallery, queries, widest)
        self.ids = gallery.labels(gallery.identity[self.rows])
        known, labels = set(self.ids.tolist()), gallery.labels(queries.identity)
        kept = np.array([label in known for label in labels], bool)
        kept &= gallery.is_clean(queries.identity, queries.collection.split[queries.rows])
        self.labels, rows = labels[kept], queries.rows[kept]
        self.groups = queries.collection.group[rows]
        self.latents = queries.collection.read(rows)
        self.n, self.n_references = len(rows), len(self.rows)

    @classmethod
    def of(cls, gallery: Collection, queries: Queries, columns: int) -> Judge | None:
        """Return a judge, or None where no query can be ranked."""
        if not len(queries.rows):
            return None
        judge = cls(gallery, queries, columns)
        return judge if judge.n else None

    def ranking(self, projection: Projection) -> Ranking:
        """Rank the queries by one map."""
        references = self.gallery.references(projection, self.rows)
        return average_precision(projection.queries(self.latents), self.labels, references, self.ids)

    def prefixes(self, projection: Projection, ranks: Sequence[int]) -> dict[int, Ranking]:
        """Rank the queries by each prefix of a map whose ranks are nested.

        Coordinates of all columns are taken once; the first k of them, normalised again (or with their own
        bias), are what the map cut to k columns gives.
        """
        if list(ranks) == [projection.rank] or projection.norm_map is not None:
            return {k: self.ranking(_cut(projection, k)) for k in ranks}
        wide = _cut(projection, max(ranks))
        asked = np.asarray(wide.coordinates(self.latents, "query"), np.float32)
        references = np.concatenate(
            [np.asarray(wide.coordinates(b, "reference"), np.float32) for b in self.gallery.blocks(self.rows)]
        )
        found = {}
        for k in ranks:
            eye = np.eye(k, dtype=np.float32)
            plain = Projection(eye, eye, score=projection.score)  # it alone knows how rows become scores
            found[k] = average_precision(
                plain.queries(asked[:, :k]), self.labels, plain.references(references[:, :k]), self.ids
            )
        return found


def row(label: str, projection: Projection, rank: int, ranking: Ranking, *, control: bool) -> dict[str, Any]:
    """Return what validation found of a map's first ``rank`` columns, as a row of the table of choices."""
    return {
        "label": label,
        "method": projection.method,
        "knobs": {k: v for k, v in projection.knobs.items() if k != "rank"},
        "rank": rank,
        "control": control,
        "map": ranking.map,
        "acc": ranking.acc,
        "n": len(ranking.ap),
        "chosen": False,
    }


def settled(method: str, named: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> str:
    """Say in a sentence which knobs validation chose; empty where it chose none."""
    best = next((c for c in choices if c.get("chosen")), None)
    if best is None:
        return ""
    free = [f"{SIGNS.get(k, k)} = {number(best['knobs'][k])}" for k in open_knobs(method) if k not in named]
    judged = counted(best["n"], "query", "queries")
    return f"{' and '.join(free)}, chosen on validation among {len(choices)} ({judged})."


def number(value: Any) -> str:
    """Return a knob's value in words: levels as ``0.1+0.4`` or ``0.02+…+0.7``, a shape as ``4×32×32``."""
    if isinstance(value, tuple | list):
        value = [value[0], "…", value[-1]] if len(value) > 3 else value
        return ("×" if all(isinstance(v, int) for v in value) else "+").join(map(number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(projection: Projection, k: int) -> Projection:
    return projection if k == projection.rank else projection.truncated(k)


def nested(method: str) -> bool:
    """Tell whether a method's W of a smaller rank is a prefix of its W of a larger one."""
    return bool(get(method).nested_ranks)
