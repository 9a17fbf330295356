"""Figures with their controls: every W beside raw, centred and PCA-whitened cosine, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cli.collection import Collection, Queries, Rows
from latentstore.errors import UsageError
from latentstore.results import Figure
from solvers.gallery_maps import Centred, Identity, Pca
from solvers.methods import get
from solvers.metrics import (
    Ranking,
    average_precision,
    bootstrap,
    chance_map,
    paired_bootstrap,
    refuse_leak,
    residual_of_blocks,
)
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
"""Bytes that projected references may take at a time."""


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
    out = Evaluation()
    gallery.require_gallery()
    widest = max(p.rank for p in (*methods.values(), *control_set.values()))
    rows = affordable(gallery, queries, widest)
    reference_labels = gallery.labels(gallery.identity[rows])
    labels, known = gallery.labels(queries.identity), set(reference_labels.tolist())
    findable = np.array([x in known for x in labels], bool)
    clean = gallery.is_clean(queries.identity, queries.collection.split[queries.rows])
    asked = Queries(queries.collection, queries.rows[findable & clean], queries.group)
    labels = labels[findable & clean]
    out.n_references, out.n_without_origin = len(rows), int((~findable).sum())
    out.n_copies = int((findable & ~clean).sum())
    if not len(asked.rows):
        return out
    for projection in methods.values():
        refuse_leak(projection, used_names(asked.collection, asked.rows))
    groups = asked.collection.group[asked.rows]
    for name, projection in {**control_set, **methods}.items():
        projection.check_space(gallery.store.space.id)
        projection.check_space(asked.collection.store.space.id)
        out.rankings[name, asked.group] = average_precision(
            asked.collection.project_queries(projection, asked.rows),
            labels,
            gallery.references(projection, rows),
            reference_labels,
        )
    shown = [n for n in control_set if n not in methods]
    if not every_rank:
        shown = _best_of_ladders(shown, {n: out.rankings[n, asked.group].map for n in shown})
    best = max(
        (n for n in shown if not n.startswith(RANDOM)),
        key=lambda n: out.rankings[n, asked.group].map,
        default=None,
    )
    for name in methods:
        ranking = out.rankings[name, asked.group]
        out.figures += _figures(name, "method", asked.group, ranking, groups)
        if name in THEMSELVES:
            sentence = f"{name} is a control itself: every W is to beat it, and it has nothing to beat."
            out.methods.append(Measured(name, asked.group, ranking, verdict=sentence))
            continue
        measured = _against(name, asked.group, ranking, best, out, groups)
        out.methods.append(measured)
        if measured.gain is not None:
            out.figures.append(
                Figure(
                    "gain over best control",
                    measured.gain,
                    name,
                    "method",
                    asked.group,
                    "fraction",
                    measured.gain_interval,
                    len(ranking.ap),
                    measured.verdict,
                )
            )
    for name in shown:
        out.figures += _figures(name, "control", asked.group, out.rankings[name, asked.group], groups)
    n = len(asked.rows)
    chance = chance_map(len(rows))
    out.figures.append(Figure("mAP", chance, "chance", "chance", asked.group, "fraction", None, n))
    out.figures.append(Figure("Acc", 1 / len(rows), "chance", "chance", asked.group, "fraction", None, n))
    return out


def used_names(collection: Collection, rows: Rows) -> list[str]:
    """Return the names by which rows count as used or reported: identities, and the photos behind them."""
    photos = {f"group {g}" for g in collection.group[rows].tolist()}
    return sorted(photos | set(collection.identity[rows].tolist()))


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


def _figures(name: str, role: Any, group: str, ranking: Ranking, groups: np.ndarray) -> list[Figure]:
    kept = groups[ranking.queries]
    out = []
    for what, values in (("mAP", ranking.ap), ("Acc", ranking.hit1.astype(float))):
        interval = bootstrap(values, kept) if len(np.unique(kept)) > 1 else None
        note = f"{ranking.ties} ties, counted against it" if ranking.ties and what == "mAP" else ""
        out.append(
            Figure(what, float(values.mean()), name, role, group, "fraction", interval, len(values), note)
        )
    return out


def _against(
    name: str, group: str, ranking: Ranking, best: str | None, out: Evaluation, groups: np.ndarray
) -> Measured:
    if best is None:
        return Measured(name, group, ranking)
    control = out.rankings[best, group]
    gain = ranking.map - control.map
    kept = groups[ranking.queries]
    interval = paired_bootstrap(ranking.ap, control.ap, kept) if len(np.unique(kept)) > 1 else None
    sentence = verdict(name, group, gain, interval, best, n_groups=len(np.unique(kept)))
    return Measured(name, group, ranking, gain, interval, best, sentence)


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


def _best_of_ladders(names: list[str], score: Mapping[str, float]) -> list[str]:
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
