"""Figures with their controls: every W beside raw, centred and PCA-whitened cosine, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cli.collection import Collection, Queries, Rows
from cli.ranked import Asked, rankings
from cli.ranked import used_names as used_names
from latentstore.errors import UsageError
from latentstore.results import Figure, Role
from solvers.gallery_maps import Centred, Identity, Pca
from solvers.methods import get
from solvers.metrics import (
    Ranking,
    balanced_mean,
    bootstrap,
    chance_map,
    chance_micro,
    micro_average_precision,
    micro_bootstrap,
    paired_bootstrap,
    quantile_bootstrap,
    recall_at,
    residual_of_blocks,
)
from solvers.metrics import refuse_leak as refuse_leak
from solvers.projection import Projection
from solvers.selection import controls
from solvers.weighted import NormWeighted

ROUGH = 10
"""Photos below which a bootstrap interval is too narrow to be trusted."""
LADDER = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Ranks of PCA-whitening as a control."""
THEMSELVES = frozenset({Identity.name, Centred.name, Pca.name, NormWeighted.name})
"""Methods that are controls."""
RANDOM = "random subspace"
"""The control that knows nothing: to be beaten, never the best of the controls."""
MEMORY = 4 << 30
"""Bytes that the projected references may take of which a judge ranks its sample."""
RECALLS = (1, 5, 10, 100)
QUARTILES = (0.25, 0.5, 0.75)
TOP = 10
"""Predictions of a query that µAP counts."""


@dataclass(frozen=True)
class Measured:
    """What one method reached on one group of queries, beside the best control.

    ``gain`` is None when there is no control; ``verdict`` is the plain sentence.
    """

    subject: str
    group: str
    ranking: Ranking
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    best_control: str = ""
    verdict: str = ""


@dataclass
class Evaluation:
    """Figures, in the results schema, and the measurements behind them.

    ``n_references`` rows were ranked; ``n_without_origin`` queries have no origin among them and are left
    out, as are ``n_copies`` of whose origin a copy or near-duplicate stands in a split that was fitted or
    chosen on.
    """

    figures: list[Figure] = field(default_factory=list)
    methods: list[Measured] = field(default_factory=list)
    rankings: dict[tuple[str, str], Ranking] = field(default_factory=dict)
    n_references: int = 0
    n_without_origin: int = 0
    n_copies: int = 0

    @property
    def verdicts(self) -> list[str]:
        """One plain sentence a method and group."""
        return [m.verdict for m in self.methods if m.verdict]


def evaluate(
    gallery: Collection,
    queries: Queries,
    methods: Mapping[str, Projection],
    control_set: Mapping[str, Projection],
    *,
    every_rank: bool = False,
) -> Evaluation:
    """Measure mAP and Acc of methods and controls on queries, against every valid origin and reference.

    Parameters
    ----------
    gallery : Collection
    queries : Queries
    methods, control_set : mapping of name to Projection
    every_rank : bool
        Keep all of ``A @8``, ``A @16`` ... of the controls, not the best alone.

    Returns
    -------
    Evaluation
        Intervals are 95 %, from 2,000 bootstrap samples of photos (the manifest's ``group``).

    Raises
    ------
    SpaceError, SpaceMismatchError
        Latents or projections of different spaces.
    LeakError
        A method was chosen on identities that are to be reported.
    """
    gallery.require_gallery()
    asked = Asked.of(gallery, [queries])
    out = Evaluation(
        n_references=len(gallery.gallery), n_without_origin=asked.n_without_origin, n_copies=asked.n_copies
    )
    if not len(asked):
        return out
    asked.check(gallery, methods)
    found = rankings(gallery, asked, {**control_set, **methods})
    out.rankings = {(name, queries.group): ranking for name, ranking in found.items()}
    names = [n for n in control_set if n not in methods]
    shown = names if every_rank else best_of_ladders(names, {n: found[n].map for n in names})
    group = Group(queries.group, asked.photos)
    out.figures, out.methods = compared(group, found, list(methods), shown)
    out.figures += chance(group, len(gallery.gallery), len(asked))
    return out


@dataclass(frozen=True)
class Group:
    """Queries that are reported together.

    Attributes
    ----------
    name : str
    photos : (q,) array
        The photo behind each query.
    axes : dict
        As of a :class:`~latentstore.results.Figure`.
    strata : (q,) array or None
        What weighs the same in a mean, whatever its number of queries: the models of Tables 3 and 10.
    full : bool
        Report recall, µAP and the margin, too.
    """

    name: str
    photos: npt.NDArray[Any]
    axes: dict[str, str | float] = field(default_factory=dict)
    strata: npt.NDArray[Any] | None = None
    full: bool = False

    @property
    def n_photos(self) -> int:
        """Independent photos behind the group."""
        return len(np.unique(self.photos))

    def mean(self, values: npt.NDArray[Any]) -> float:
        """Return the mean over queries, or over strata."""
        return balanced_mean(values, self.strata)

    def map(self, ranking: Ranking) -> float:
        """Return mAP as it is reported."""
        return self.mean(ranking.ap)


def compared(
    group: Group, found: Mapping[str, Ranking], methods: Sequence[str], controls: Sequence[str]
) -> tuple[list[Figure], list[Measured]]:
    """Return the figures of methods and controls on one group, each method beside its best control.

    Parameters
    ----------
    group : Group
    found : mapping of name to Ranking
        Of the group's queries alone.
    methods, controls : sequences of str
        Whose figures are returned; the best control is the best of these.
    """
    best = max(
        (n for n in controls if not n.startswith(RANDOM)), key=lambda n: group.map(found[n]), default=None
    )
    figures: list[Figure] = []
    measured: list[Measured] = []
    for name in methods:
        ranking = found[name]
        figures += _figures(name, "method", group, ranking)
        if name in THEMSELVES:
            sentence = f"{name} is a control itself: every W is to beat it, and it has nothing to beat."
            measured.append(Measured(name, group.name, ranking, verdict=sentence))
            continue
        against = _against(name, group, ranking, best, found)
        measured.append(against)
        if against.gain is not None:
            figures.append(
                Figure(
                    "gain over best control",
                    against.gain,
                    name,
                    "method",
                    group.name,
                    "fraction",
                    against.gain_interval,
                    len(ranking.ap),
                    against.verdict,
                    axes=group.axes,
                )
            )
    for name in controls:
        figures += _figures(name, "control", group, found[name])
    return figures, measured


def chance(group: Group, n_references: int, n: int) -> list[Figure]:
    """Return what a random order of the references would reach, with one positive a query."""
    values = {"mAP": chance_map(n_references), "Acc": 1 / n_references}
    if group.full:
        values |= {f"recall@{k}": k / n_references for k in RECALLS if k < n_references}
        # As the figures beside it: of each stratum's own list of predictions, then the mean.
        sizes = [n] if group.strata is None else np.unique(group.strata, return_counts=True)[1].tolist()
        values["µAP"] = float(np.mean([chance_micro(size, n_references, top=TOP) for size in sizes]))
    return [
        Figure(name, value, "chance", "chance", group.name, "fraction", None, n, axes=group.axes)
        for name, value in values.items()
    ]


def affordable(gallery: Collection, queries: Queries, columns: int) -> Rows:
    """Return the gallery rows; where they do not fit memory, all queried identities and seeded others."""
    room = MEMORY // (4 * columns)
    rows = gallery.gallery
    if len(rows) <= room:
        return rows
    asked = set(gallery.labels(queries.identity).tolist())
    wanted = np.array([label in asked for label in gallery.labels(gallery.identity[rows])], bool)
    others = np.random.default_rng(0).permutation(rows[~wanted])
    return np.sort(np.concatenate([rows[wanted], others[: max(0, room - int(wanted.sum()))]]))


def figure(
    what: str, values: npt.NDArray[Any], name: str, role: Role, group: Group, note: str = ""
) -> Figure:
    """Return the mean of a measure that every query has, as a figure with its interval over photos."""
    interval = bootstrap(values, group.photos, strata=group.strata) if group.n_photos > 1 else None
    value, n = group.mean(values), len(values)
    return Figure(what, value, name, role, group.name, "fraction", interval, n, note, axes=group.axes)


def _figures(name: str, role: Role, group: Group, ranking: Ranking) -> list[Figure]:
    ties = f"{ranking.ties} ties, counted against it" if ranking.ties else ""
    out = [
        figure("mAP", ranking.ap, name, role, group, ties),
        figure("Acc", ranking.hit1, name, role, group),
    ]
    if group.full:
        recalls = [k for k in RECALLS if k < ranking.n_references]
        out += [figure(f"recall@{k}", recall_at(ranking, k), name, role, group) for k in recalls]
        out += _over_scores(name, role, group, ranking)
    return out


def _over_scores(name: str, role: Role, group: Group, ranking: Ranking) -> list[Figure]:
    """Return µAP and the margin's quartiles: what a ranking query by query does not tell."""
    n, several = len(ranking.ap), group.n_photos > 1
    strata = np.zeros(n) if group.strata is None else group.strata
    each = [micro_average_precision(ranking.subset(strata == s), top=TOP) for s in np.unique(strata)]
    interval = micro_bootstrap(ranking, group.photos, strata=strata, top=TOP) if several else None
    note = f"over the {TOP} best references of each query, all in one list by score; ties in the worst order"
    value = float(np.mean(each))
    out = [Figure("µAP", value, name, role, group.name, "fraction", interval, n, note, axes=group.axes)]
    margin = ranking.margin
    told = np.isfinite(margin)
    if not told.any():
        return out
    note = (
        "the best origin's score less that of the best other image; below 0 is a miss; maps differ in scale"
    )
    values = np.quantile(margin[told], QUARTILES)
    spans = quantile_bootstrap(margin[told], group.photos[told], QUARTILES) if several else [None] * 3
    names = ("margin, lower quartile", "margin", "margin, upper quartile")
    return out + [
        Figure(what, float(value), name, role, group.name, "", span, n, note, axes=group.axes)
        for what, value, span in zip(names, values, spans, strict=True)
    ]


def _against(
    name: str, group: Group, ranking: Ranking, best: str | None, found: Mapping[str, Ranking]
) -> Measured:
    if best is None:
        return Measured(name, group.name, ranking)
    control = found[best]
    gain = group.map(ranking) - group.map(control)
    interval = None
    if group.n_photos > 1:
        interval = paired_bootstrap(ranking.ap, control.ap, group.photos, strata=group.strata)
    sentence = verdict(name, group.name, gain, interval, best, n_groups=group.n_photos)
    return Measured(name, group.name, ranking, gain, interval, best, sentence)


def verdict(
    name: str,
    group: str,
    gain: float,
    interval: tuple[float, float] | None,
    best: str,
    *,
    n_groups: int,
) -> str:
    """Say in one plain sentence whether a W beat the best control.

    Parameters
    ----------
    n_groups : int
        Independent photos behind the interval; with fewer than 10 the sentence says so.
    """
    where = f" on {group}" if group else ""
    points = f"{100 * gain:+.1f} points of mAP"
    if interval is None:
        return f"{name}{where}: {points} against the best control ({best}); too few photos for an interval."
    low, high = (100 * v for v in interval)
    span = f"95 % interval {low:+.1f} to {high:+.1f}"
    if n_groups < ROUGH:
        span += f", rough with {n_groups} photographs"
    if low > 0:
        return f"{name} beat the best control ({best}){where}: {points}, {span}."
    if high < 0:
        return f"{name} lost to the best control ({best}){where}: {points}, {span}."
    return f"{name} did not beat the best control ({best}){where}: {points}, {span} (zero is inside)."


def fit_controls(collection: Collection, rank: int) -> dict[str, Projection]:
    """Fit raw, centred, norm-weighted, PCA-whitened and a random subspace.

    PCA-whitening comes with both exponents: at W's rank, over the gallery's whole span, and (``@k``) at every
    rank of :data:`LADDER` below it, of which :func:`evaluate` keeps the best by its own queries: a control
    may have that advantage, and the verdict then does not depend on W's rank.
    """
    found = controls(collection.data, min(rank, collection.store.layout.dim))
    own: dict[str, Projection] = {}
    for name, projection in found.items():
        # At or above the span both ranks are one control.
        twin = name.removesuffix(", all")
        if name == twin or own[twin].rank != projection.rank:
            own[name] = projection
            if name.startswith("PCA") and name == twin:
                full = found.get(f"{name}, all", projection)
                for k in LADDER:
                    if k < full.rank and k != projection.rank:
                        own[f"{name} @{k}"] = full.truncated(k)
    return own


def best_of_ladders(names: list[str], score: Mapping[str, float]) -> list[str]:
    """Leave out of ``A @8``, ``A @16`` ... all but the best; the lower rank of equals."""
    best: dict[str, str] = {}
    for name in names:
        ladder, at, _ = name.partition(" @")
        if at and (ladder not in best or score[name] > score[best[ladder]]):
            best[ladder] = name
    return [n for n in names if " @" not in n or n in best.values()]


def residuals(collection: Collection, projection: Projection, random: Projection, split: str) -> list[Figure]:
    """Return held-out ‖TW‖/‖(O−μ)W‖ of a W and of a random subspace of the same rank.

    μ is the gallery's mean for both, so that the two can be compared; W is the query map where queries
    and references are mapped differently.
    A map that learned from no pairs has none: T is no part of it.
    """
    origins, translated = collection.pairs(split)
    if not len(origins) or not get(projection.method).needs_pairs:
        return []
    mean = collection.data.gallery_spectrum.mean
    same_rank = random.truncated(min(random.rank, projection.rank))
    out = []
    for subject, p in ((projection.method, projection), (RANDOM, same_rank)):
        one_map = replace(p, reference_map=p.query_map, center=mean)
        out.append(
            Figure(
                "held-out residual",
                residual_of_blocks(
                    one_map, zip(collection.blocks(origins), collection.blocks(translated), strict=True)
                ),
                subject,
                "note",
                split,
                n=len(origins),
                note=f"‖TW‖/‖(O−μ)W‖ at rank {p.rank}; lower moves less under translation, 0 is exact",
            )
        )
    return out


def require_gallery(gallery: Collection) -> None:
    """Refuse to rank a single image, or none.

    Raises
    ------
    UsageError
    """
    gallery.require_gallery()
    if len(gallery.gallery) < 2:
        raise UsageError(
            f"{gallery.store.path} holds 1 image to search: every map finds it, whatever is asked. Encode "
            "more originals into the store."
        )


def require_queries(queries: Queries, where: str) -> None:
    """Refuse to evaluate nothing.

    Raises
    ------
    UsageError
    """
    if not len(queries.rows):
        raise UsageError(
            f"{where} holds no test queries: rows of role translation or query whose identity has an origin "
            "and is in the test split (one identity in ten, by hash). Make pairs with latentstore simulate, "
            "or encode your translations with a manifest."
        )
