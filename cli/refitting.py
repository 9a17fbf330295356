"""compare --store: each model's map fitted again, on resampled identities or without one part of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import Collection, Rows
from cli.knobs import check_foreign
from cli.likeness import BY_CONSTRUCTION, PLACES, Found, band_figure, cosine, gap, spectrum_curves
from cli.refit_data import ModelPairs, mean_of
from cli.streams import OnRows
from cli.summing import OnStart
from latentstore.errors import UsageError
from latentstore.results import Figure, Role
from solvers.data import PairData
from solvers.gallery_maps import RandomSubspace
from solvers.methods import METHODS, build, check_rank, get
from solvers.metrics import residual_of_blocks
from solvers.projection import Projection
from solvers.spectra import MapSpectrum, cos_phi, is_flat, map_spectrum, random_band, singular_values

ORTHONORMAL = ("svd", "procrustes")
"""Methods whose maps have orthonormal columns, whatever they are fitted on."""
RANK = 512
"""Columns of the fits where none were named."""


@dataclass(frozen=True)
class RefitOptions:
    """What is fitted anew on a store of pairs.

    Attributes
    ----------
    method : str
        A closed form that learns from pairs.
    rank : int or None
        None is :data:`RANK`, or as many as the latents have dimensions.
    knobs : mapping
        Fields of the method; those not named are at their defaults.
    repeats : int
        Bootstrap resamples of each model's training identities, at least 2.
    seed : int
    jackknife : int or None
        Instead of resamples: parts of the identities, each left out once.
    """

    method: str = "gnull"
    rank: int | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 10
    seed: int = 0
    jackknife: int | None = None

    @classmethod
    def of(
        cls, store: Path | None, *, knobs: Mapping[str, Any] | None = None, **options: Any
    ) -> RefitOptions | None:
        """Take the options that were named (not None), and refuse them without a store.

        Raises
        ------
        SolverUsageError, UsageError
        """
        named = {k: v for k, v in options.items() if v is not None}
        own = {k: v for k, v in (knobs or {}).items() if v is not None}
        if store is None and (named or own):
            raise UsageError(
                f"--{next(iter({**named, **own}))} is about fits on resampled identities, and there is no "
                "store to fit on. Add --store PAIRS, or leave it out."
            )
        for other in ("repeats", "seed"):
            if "jackknife" in named and other in named:
                raise UsageError(
                    f"--{other} is about bootstrap resamples, and --jackknife {named['jackknife']} leaves "
                    "parts out instead. Give one of the two."
                )
        return None if store is None else cls(knobs=own, **named)

    def __post_init__(self) -> None:
        method = get(self.method)
        for name, count in (("repeats", self.repeats), ("jackknife", self.jackknife)):
            if count is not None and count < 2:
                what = "fits" if name == "repeats" else "parts"
                raise UsageError(f"--{name} is {count}; a spread needs at least 2 {what}.")
        if not method.needs_pairs or method.needs_torch:
            why = "is trained by gradients" if method.needs_torch else "reads no pairs"
            closed = [n for n, m in METHODS.items() if m.needs_pairs and not m.needs_torch]
            raise UsageError(
                f"--method is {self.method}, which {why}: compare refits closed forms that learn from pairs "
                f"({', '.join(closed)}). Fit it several times with solve, and give the files to compare."
            )
        check_foreign(self.method, list(self.knobs))

    def settled(self, dim: int) -> tuple[RefitOptions, list[str]]:
        """Return the options with a rank that latents of some length can have, and what is to be said of it.

        Raises
        ------
        SolverUsageError
            A rank was named, and is larger.
        """
        if self.rank is not None or dim >= RANK:
            rank = RANK if self.rank is None else self.rank
            check_rank(rank, dim)
            return replace(self, rank=rank), []
        note = f"The fits have rank {dim}, not the usual {RANK}: the latents have {dim} dimensions."
        return replace(self, rank=dim), [note]

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of the fits."""
        shown = {"method": self.method, "rank": self.rank, **self.knobs}
        if self.jackknife is not None:
            return {**shown, "jackknife parts": self.jackknife}
        return {**shown, "repeats": self.repeats, "seed": self.seed}


@dataclass
class _Refits:
    """The spectra of one model's fits.

    Attributes
    ----------
    whole : MapSpectrum
        Of the fit on all pairs.
    again : list of arrays
        Singular values of the fits on resamples, or without a part.
    """

    whole: MapSpectrum
    again: list[np.ndarray]


def compare_models(
    collection: Collection,
    options: RefitOptions,
    maps: dict[str, Projection],
    found: Found,
    *,
    on_start: OnStart | None = None,
    on_fit: OnRows | None = None,
) -> RefitOptions:
    """Fit every model of a store again and again; add cos φ ± and the cross residuals.

    Returns the options as they were settled.

    Raises
    ------
    UsageError, SpaceError
        Maps of other latents than the store's, or pairs of a single identity.
    """
    for name, p in maps.items():
        if p.dim != collection.store.layout.dim:
            raise UsageError(
                f"{name} maps latents of {p.dim} values, {collection.store.path} holds latents of "
                f"{collection.store.layout.dim}. Give the store that the maps were fitted on."
            )
        p.check_space(collection.store.space.id)
    options, notes = options.settled(collection.store.layout.dim)
    found.caveats += notes
    models = ModelPairs.by_model(collection, options.jackknife)
    few = [m for m, pairs in models.items() if pairs.identities.max() < 1]
    if not models or few:
        what = f"{few[0]} has 1 training identity" if few else "it holds no training pairs"
        raise UsageError(
            f"{collection.store.path} cannot be resampled by identity: {what}, and at least 2 are needed. "
            "Encode more pairs, or make some with latentstore simulate."
        )
    flat = options.method in ORTHONORMAL
    parts = [] if options.jackknife is None else _parts(collection, models, options.jackknife)
    if on_start is not None:
        each = 1 if flat else 1 + (len(parts) or options.repeats)
        on_start(len(models) * each, len(models) * each)
    fits: dict[str, Projection] = {}
    refits: dict[str, _Refits] = {}
    # A stream for each model: two models' fits must not share their draws.
    streams = np.random.default_rng(options.seed).spawn(len(models))
    for (model, rng), pairs in zip(zip(models, streams, strict=True), list(models.values()), strict=True):
        again: Iterator[PairData] = (pairs.without(number) for number in parts)
        if flat:
            again = iter(())
        elif not parts:
            again = (pairs.drawn(rng) for _ in range(options.repeats))
        fits[model] = _fit(pairs.whole, options, on_fit)
        refits[model] = _Refits(
            map_spectrum(fits[model].query_map),
            [singular_values(_fit(data, options, on_fit).query_map) for data in again],
        )
        pairs.forget()
    found.models = list(refits)
    found.curves += spectrum_curves({f"W of {model}": r.whole for model, r in refits.items()})
    if flat:
        _by_construction(options, refits, found)
    elif parts:
        _jackknifed(len(parts), refits, found)
    else:
        _resampled(options, refits, found)
    found.figures += _cross_residuals(collection, fits, found)
    return options


def _parts(collection: Collection, models: Mapping[str, ModelPairs], asked: int) -> list[int]:
    """Return the parts to leave out, the same ones for every model.

    Raises
    ------
    UsageError
        All photos, or all of a model's, are in one.
    """
    present = sorted({part for pairs in models.values() for part in pairs.parts})
    if len(present) < 2:
        raise UsageError(
            f"--jackknife {asked} leaves parts of the training photos out, and all of "
            f"{collection.store.path} fall into 1 part. Give more parts, or use --repeats."
        )
    for model, pairs in models.items():
        if len(pairs.parts) < 2:
            raise UsageError(
                f"All pairs of {model} fall into one of the {asked} parts: without it nothing is left to "
                "fit. Give a larger --jackknife, or use --repeats."
            )
    return present


def _by_construction(options: RefitOptions, refits: dict[str, _Refits], found: Found) -> None:
    """Add what no refit can change: every W of the method has equal singular values."""
    for a, b in itertools.combinations_with_replacement(refits, 2):
        if a == b and len(refits) > 1:
            continue
        one, other = refits[a].whole, refits[b].whole
        _add(f"{a} × {b}", cos_phi(one.sigma, other.sigma), None, [one.sigma, other.sigma], found)
    found.spread = (
        f"± is left out: every W of {options.method} has orthonormal columns, so that cos φ is 1 on whatever "
        "pairs it is fitted, and nothing was fitted again."
    )


def _resampled(options: RefitOptions, refits: dict[str, _Refits], found: Found) -> None:
    for a, b in itertools.combinations_with_replacement(refits, 2):
        group = f"{a} × {b}, resampled" if a != b else f"{a} × its resamples"
        one, other = refits[a].again, refits[b].again
        if a == b:
            other = [refits[a].whole.sigma] * len(one)
        values = _cosines(one, other)
        spread = ("cos φ, standard deviation over fits", float(values.std(ddof=1)))
        _add(group, float(values.mean()), spread, [*one, *other], found)
    found.spread = (
        f"± is the standard deviation over {options.repeats} fits on bootstrap resamples of the training "
        "identities (each draw of one brings its pairs and its origin once): the spread under resampling, "
        "not a standard error of independent trainings (resamples of one model share most of its identities)."
    )


def _jackknifed(n: int, refits: dict[str, _Refits], found: Found) -> None:
    """Leave each part of the photos out once, the same one for every model."""
    for a, b in itertools.combinations_with_replacement(refits, 2):
        one, other = refits[a], refits[b]
        if a == b:
            # cos φ with itself is 1: what is told is how far one part moves it, and that has no ±.
            values = _cosines(one.again, [one.whole.sigma] * n)
            sigmas = [*one.again, one.whole.sigma]
            _add(f"{a} × without a part", float(values.mean()), None, sigmas, found, n)
            continue
        values = _cosines(one.again, other.again)
        spread = ("cos φ, jackknife standard error", jackknife_error(values))
        whole = cos_phi(one.whole.sigma, other.whole.sigma)
        _add(f"{a} × {b}, jackknife", whole, spread, [*one.again, *other.again], found)
    if len(refits) < 2:
        found.spread = (
            f"± is left out: with one model there are no two spectra to compare. Without a part is the mean "
            f"over {n} fits, each without one part of the training photos (hashed)."
        )
        return
    found.spread = (
        f"± is the delete-one-group jackknife over {n} parts of the training photos (hashed, the same for "
        "every model): √((n−1)/n Σ(θᵢ−θ̄)²), with θᵢ taken without part i. cos φ itself is that of all pairs. "
        "A model beside itself is the mean over its fits without a part, and has no ±."
    )


def jackknife_error(values: np.ndarray) -> float:
    """Return the delete-one-group jackknife's standard error √((n−1)/n Σ(θᵢ−θ̄)²) of n values."""
    n = len(values)
    return math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum()))


def _fit(data: PairData, options: RefitOptions, on_fit: OnRows | None) -> Projection:
    fitted: Projection = build(options.method, rank=options.rank, **options.knobs).fit(data).projection()
    if on_fit is not None:
        on_fit(1, 0)
    return fitted


def _cosines(ones: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    return np.array([cos_phi(a, b) for a, b in zip(ones, others, strict=True)])


def _add(
    group: str,
    value: float,
    spread: tuple[str, float] | None,
    sigmas: list[np.ndarray],
    found: Found,
    n: int | None = None,
) -> None:
    """Add cos φ of a group of fits, its band, and its ± under the name of what it is."""
    dim, flat = found.dim, all(is_flat(s) for s in sigmas)
    band = random_band((dim, len(sigmas[0])), (dim, len(sigmas[-1])))
    note = BY_CONSTRUCTION if flat else PLACES[band.place(value)]
    n = len(sigmas) // 2 if spread is not None else n
    # The spread of what is 1 by construction is rounding.
    told = "" if flat or spread is None else f" ± {spread[1]:.2g}"
    fits = "" if n is None else f" over {n} fits"
    found.summary.append(f"{group}: cos φ = {cosine(value)}{told} (1 − cos φ = {gap(value)}){fits}, {note}.")
    found.figures += [
        Figure("cos φ", value, group, "method", group, n=n, note=note),
        band_figure(group, band),
    ]
    if spread is not None and not flat:
        found.figures.append(Figure(spread[0], spread[1], group, "method", group, n=n))


def _cross_residuals(collection: Collection, fits: dict[str, Projection], found: Found) -> list[Figure]:
    """Return held-out ‖T_b W_a‖/‖(O_b−μ)W_a‖ of every two models, beside a random subspace."""
    origins, translated = collection.pairs("test")
    clean = collection.is_clean(collection.identity[translated], collection.split[translated])
    test = _by_model(collection, origins[clean], translated[clean])
    if not test:
        found.caveats.append("The store holds no test pairs: cross residuals were not taken.")
        return []
    mean = mean_of(collection.blocks(collection.gallery), collection.store.layout.dim)
    sides: dict[tuple[str, Role], Projection] = {}
    for a, p in fits.items():
        sides[f"W of {a}", "method"] = p
        control: tuple[str, Role] = (f"random subspace of rank {p.rank}", "control")
        sides[control] = sides.get(control) or RandomSubspace(p.rank).fit(collection.data).projection()
    out = []
    note = "‖TW‖/‖(O−μ)W‖ on test pairs; lower moves less under translation"
    for b, (o_rows, g_rows) in test.items():
        for (subject, role), side in sides.items():
            one_map = replace(side, reference_map=side.query_map, center=mean)
            blocks = zip(collection.blocks(o_rows), collection.blocks(g_rows), strict=True)
            ratio = residual_of_blocks(one_map, blocks)
            if math.isfinite(ratio):
                out.append(
                    Figure("cross residual", ratio, subject, role, f"T of {b}", n=len(o_rows), note=note)
                )
    return out


def _by_model(collection: Collection, origins: Rows, translated: Rows) -> dict[str, tuple[Rows, Rows]]:
    names = np.array([m or "unnamed" for m in collection.model[translated]], dtype=object)
    return {m: (origins[names == m], translated[names == m]) for m in sorted(set(names))}
