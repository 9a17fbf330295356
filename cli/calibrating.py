"""What a verdict is calibrated on: a collection's own photos, each searched for with itself left out.

Photos that are calibrated on and rows that a map is fitted on are never the same: the collection's own
pictures would score as no new picture does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cli import gallery, streams
from cli.collection import Collection, Rows
from latentstore import search
from latentstore.simulate import Diffusion, GaussianPrior, translate
from solvers.data import PairData
from solvers.errors import SolverUsageError
from solvers.methods import METHODS, build
from solvers.projection import Projection
from solvers.sums import RowSums
from solvers.verdict import (
    ALIKE,
    CANDIDATES,
    COMPARED,
    LEAST,
    PASSED,
    SAME,
    Calibration,
    alike,
    pair_scores,
    standing,
    verdict_map,
)

Block = tuple[Rows, npt.NDArray[np.floating[Any]]]
Blocks = Callable[[], Iterable[Block]]
"""Gives the gallery as (rows, projected rows)."""
OnRows = Callable[[int, int], None]
Asked = Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]
"""Kind of query -> latents (n, d), and the photo that each is of (n,)."""
AS_THEY_ARE, SIMULATED, OWN = "pictures as they are", "simulated translations", "the store's own translations"
MOST, FEW = 2000, 100
"""Photos to calibrate on at most; where fewer than the second are held out, others fill up to half of all."""
ALPHA_BAR, PROMPT, SEED = 0.1, 0.3, 0
"""Of the simulated translations, where the map has no noise level of its own."""
_PRIOR_ROWS, _NOISE_BLOCK = 8192, 256
_READ, _QUERIES = 1024, 256
"""Rows that are read at a time, and queries whose references are compared."""
_STEPPED = 255
"""Rows of one photo that a search can step over; photos of more are not calibrated on."""


def is_refitted(W: Projection) -> bool:
    """Tell whether W was fitted on the gallery, so that the score needs a map of its own."""
    return W.method in METHODS and not METHODS[W.method].needs_pairs


def passes(W: Projection) -> int:
    """Return how often a calibration goes through the gallery: to rank, to fit, to rank by its own map."""
    return 3 if is_refitted(W) else 2


@dataclass(frozen=True, eq=False)
class Photos:
    """Photos to calibrate on, and what of the gallery shows the same.

    Attributes
    ----------
    rows : (n,) array
        One gallery row a photo.
    mark : (gallery,) array
        Which photo each gallery row shows: copies, near-duplicates and what was cut from one photo count
        as one.
    own : (n,) array
        The marks of ``rows``.
    """

    rows: Rows
    mark: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]

    @classmethod
    def of(cls, collection: Collection, refitted: bool) -> Photos:
        """Draw from the photos that have no row in the training split: those a learned map has not seen.

        For a map that is fitted again, others are as good where these are few.
        """
        mark = _marks(collection)
        photos, first, count = np.unique(mark, return_index=True, return_counts=True)
        trained = np.zeros(len(photos), bool)
        trained[mark[collection.split[collection.gallery] == "train"]] = True
        order = np.random.default_rng(SEED).permutation(len(photos))
        order = order[count[order] <= _STEPPED]
        held_out, rest = order[~trained[order]], order[trained[order]]
        chosen = held_out
        if refitted and len(held_out) < FEW:
            chosen = np.concatenate([held_out, rest])[: len(order) // 2]
        chosen = np.sort(chosen[:MOST])
        return cls(collection.gallery[first[chosen]], mark, photos[chosen])

    def shown_by(self, collection: Collection, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the photo that each of some gallery rows shows, in the rows' shape."""
        return self.mark[np.searchsorted(collection.gallery, rows)]

    @property
    def fitted(self) -> npt.NDArray[np.bool_]:
        """Which gallery rows show none of them, (gallery,)."""
        return ~np.isin(self.mark, self.own)


def _marks(collection: Collection) -> npt.NDArray[np.int64]:
    """Return the number of each gallery row's photo: rows of one label or one group, or chained by such."""
    rows = collection.gallery
    label, group = (
        pa.array(names, pa.string()).dictionary_encode().indices.to_numpy()
        for names in (collection.labels(collection.identity[rows]), collection.group[rows])
    )
    n = int(label.max()) + 1
    links = coo_array((np.ones(len(rows), bool), (label, n + group)), shape=(n + len(rows), n + len(rows)))
    reached = connected_components(links, directed=False)[1][label]
    return np.asarray(np.unique(reached, return_inverse=True)[1], np.int64)


# --- the map and the scores ----------------------------------------------------------------------


def calibrate(
    collection: Collection, W: Projection, photos: Photos, *, blocks: Blocks | None = None, count: OnRows
) -> tuple[Projection, Calibration]:
    """Return the map whose score is calibrated, and the calibration of W's matches by it.

    Positives are translations of the same photos, found among all with their own present. Most origins lie
    among the fitted rows and score higher: the detection that is stated errs on the low side.

    Parameters
    ----------
    blocks : callable, optional
        The gallery projected by W; by default it is projected here.
    count : callable
        Told (rows, 0) as rows of the passes are done.

    Raises
    ------
    SolverUsageError, UsageError
        The pictures that are left do not vary, or too few can be compared.
    """
    V, prior = _settled(collection, W, photos, count)
    diffusion = Diffusion(_alpha_bar(W), PROMPT, seed=SEED)
    pictures = collection.read(photos.rows)
    asked: Asked = {
        AS_THEY_ARE: (pictures, photos.own),
        SIMULATED: (_translated(pictures, prior, diffusion, photos.rows), photos.own),
        **_own_translations(collection, photos),
    }
    shown = OWN if OWN in asked else SIMULATED
    latents, own = asked[shown]
    queries = np.asarray(W.queries(latents), np.float32)
    first = search.top_k(queries, _counted(blocks() if blocks else collection.projected(W), count), 1)[1][
        :, 0
    ]
    ranked = _ranked(collection, V, asked, photos, _counted(collection.projected(V), count))
    company = _Company(collection, V, photos)
    mark = photos.shown_by(collection, first)
    positives = company.standing(pair_scores(V, latents, collection.read(first)), first, *ranked[shown])
    return V, Calibration(
        # W has seen these photos and ranks them otherwise than new ones (whitened, all are alike). No match
        # of a new one scores above its best under the map that has seen neither.
        {kind: company.without(asked[kind][1], *found) for kind, found in ranked.items()},
        positives,
        mark == own,
        shown if shown == OWN else f"{SIMULATED} (ᾱ {diffusion.alpha_bar:.2g})",
        {
            "map": V.fingerprint,
            "method": W.method,
            "fitted again without these photos": is_refitted(W),
            "photos": len(photos.rows),
            "simulated by": diffusion.name,
        },
    )


def _settled(
    collection: Collection, W: Projection, photos: Photos, count: OnRows
) -> tuple[Projection, GaussianPrior]:
    """Return the map whose score is calibrated, and the prior of simulated translations.

    Neither knows the photos that are calibrated on. A map of the collection is fitted again without them; one
    that was learned from pairs never saw them.
    """
    rows = collection.gallery[photos.fitted]
    if not is_refitted(W):
        if len(rows) < LEAST:
            raise SolverUsageError(
                "translations are simulated from references that are not calibrated on, and the collection "
                f"has {len(rows)} of them ({LEAST} needed). Encode more references, of the training split."
            )
        drawn = np.random.default_rng(SEED).permutation(rows)[:_PRIOR_ROWS]
        V, data = W, _unlabelled(collection, np.sort(drawn))
    else:
        data = replace(
            _unlabelled(collection, rows),
            gallery_sums_source=lambda: _sums_without(collection, photos, count),
        )
        knobs = {k: "all" if k == "rank" and v is None else v for k, v in W.knobs.items()}
        V = replace(build(W.method, **knobs).fit(data).projection(), space_id=W.space_id)
        if len(rows) < data.dim:
            count(len(collection.gallery), 0)
    spectrum = data.gallery_spectrum
    return verdict_map(V), GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)


def _unlabelled(collection: Collection, rows: Rows) -> PairData:
    return PairData(
        dim=collection.store.layout.dim,
        n_pairs=0,
        n_origins=0,
        n_gallery=len(rows),
        stored_eps=float(np.finfo(collection.store.layout.dtype).eps),
        gallery_source=lambda: collection.blocks(rows),
    )


def _sums_without(collection: Collection, photos: Photos, count: OnRows) -> RowSums | None:
    """Return the gallery's sums less those of some photos: the kept ones need no second pass."""
    out = collection.gallery[~photos.fitted]
    if int(photos.fitted.sum()) < collection.store.layout.dim:
        return None
    total = gallery.gallery_sums(collection.store, collection.gallery, on_rows=count)
    part = streams.sum_rows(collection.store.reader, out, total.precision, total.shift)
    total.n -= part.n
    total.sum -= part.sum
    square = total.xx
    square -= part.xx
    return total


def _ranked(
    collection: Collection, V: Projection, asked: Asked, photos: Photos, blocks: Iterable[Block]
) -> dict[str, tuple[npt.NDArray[np.float64], Rows]]:
    """Rank all kinds of queries in one pass: kind → scores (n, k), best first, and their rows.

    k leaves enough references beside those that show a query's own photo.
    """
    queries = np.concatenate([np.asarray(V.queries(x), np.float32) for x, _ in asked.values()])
    most = int(np.bincount(photos.mark)[photos.own].max())
    scores, rows = search.top_k(queries, blocks, CANDIDATES + most)
    ends = np.cumsum([len(x) for x, _ in asked.values()])[:-1]
    parts = zip(np.split(scores, ends), np.split(rows, ends), strict=True)
    return dict(zip(asked, parts, strict=True))


@dataclass(frozen=True, eq=False)
class _Company:
    """What the references that rank first stand out from: ranked others that show another photo."""

    collection: Collection
    V: Projection
    photos: Photos

    def without(
        self, own: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], rows: Rows
    ) -> npt.NDArray[np.float64]:
        """Return the standing of the best reference that does not show the query's own photo.

        A re-save of the photo that nobody grouped is its origin, too. Of a query that has no other reference
        nothing is returned.
        """
        scores = np.where(self.photos.shown_by(self.collection, rows) == own[:, None], np.nan, scores)
        self._leave_out(scores, self.photos.rows[np.searchsorted(self.photos.own, own)], rows, SAME)
        some = ~np.isnan(scores).all(axis=1)
        scores, rows = scores[some], rows[some]
        at = np.nanargmax(scores, axis=1)[:, None]
        first, row = np.take_along_axis(scores, at, 1)[:, 0], np.take_along_axis(rows, at, 1)[:, 0]
        return self.standing(first, row, scores, rows)

    def standing(
        self, first: npt.NDArray[np.float64], row: Rows, scores: npt.NDArray[np.float64], rows: Rows
    ) -> npt.NDArray[np.float64]:
        """Return the standing of the references ``row``, which score ``first``, among those of others."""
        shown, mark = (self.photos.shown_by(self.collection, r) for r in (rows, row))
        others = np.where(shown == mark[:, None], np.nan, scores)
        self._leave_out(others, row, rows, ALIKE)
        return standing(first, others)

    def _leave_out(self, scores: npt.NDArray[np.float64], row: Rows, rows: Rows, least: float) -> None:
        """Set the scores of references to NaN, in place, that have such a cosine with ``row``."""
        # Most have nobody alike: the best few are enough to see it.
        todo, most = np.arange(len(scores)), PASSED + COMPARED
        for width in (2 * most, scores.shape[1]):
            for at in range(0, len(todo), _QUERIES):
                here = todo[at : at + _QUERIES]
                ranked = np.column_stack([row[here], rows[here, :width]])
                references, places = references_of(self.collection, self.V, ranked)
                for i, place in zip(here, places, strict=True):
                    like = alike(references[place[0]], references[place[1:]], least)
                    scores[i, :width][like] = np.nan
            todo = todo[(~np.isnan(scores[todo, :width])).sum(axis=1) < most]


def references_of(
    collection: Collection, V: Projection, rows: Rows
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return some rows mapped by V, each once (u, m), and which of them each of ``rows`` is."""
    unique, at = np.unique(rows, return_inverse=True)
    parts = (collection.read(unique[i : i + _READ]) for i in range(0, len(unique), _READ))
    # In float64: a verdict is the same in any company.
    references = np.concatenate([V.references(x.astype(np.float64)) for x in parts])
    return references, at.reshape(rows.shape)  # NumPy 2.0 and 2.1 differ in what they return


def _counted(blocks: Iterable[Block], count: OnRows) -> Iterator[Block]:
    for rows, block in blocks:
        yield rows, block
        count(len(rows), 0)


def _translated(
    latents: npt.NDArray[Any], prior: GaussianPrior, diffusion: Diffusion, rows: Rows
) -> npt.NDArray[np.float32]:
    out = np.empty(latents.shape, np.float32)
    for at in range(0, len(rows), _NOISE_BLOCK):
        here = slice(at, at + _NOISE_BLOCK)
        out[here] = translate(latents[here], prior, diffusion, rows[here])
    return out


def _own_translations(collection: Collection, photos: Photos) -> Asked:
    """Return the validation split's translations of these photos, one drawn each; none where they are few."""
    origins, translated = collection.pairs("validation")
    if not len(origins):
        return {}
    mark = photos.shown_by(collection, origins)
    order = np.random.default_rng(SEED).permutation(len(mark))
    order = order[np.isin(mark[order], photos.own)]
    own, first = np.unique(mark[order], return_index=True)
    if len(own) < LEAST:
        return {}
    return {OWN: (collection.read(translated[order[first]]), own)}


def _alpha_bar(W: Projection) -> float:
    """Return W's own noise level; of several the (geometric) middle."""
    levels = np.atleast_1d(np.asarray(W.knobs.get("alpha_bar", ALPHA_BAR), np.float64))
    return float(np.exp(np.log(levels).mean()))
