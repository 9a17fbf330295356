"""compare --store: each model's map fitted again, on resampled identities or without one part of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import BLOCK, Collection, Rows
from cli.knobs import check_foreign
from cli.likeness import BY_CONSTRUCTION, PLACES, Found, band_figure, cosine, spectrum_curves
from latentstore.errors import UsageError
from latentstore.results import Figure, Role
from solvers.data import PairData
from solvers.gallery_maps import RandomSubspace
from solvers.methods import METHODS, build, check_rank, get
from solvers.metrics import residual_ratio
from solvers.projection import Projection
from solvers.spectra import MapSpectrum, cos_phi, map_spectrum, random_band

Pairs = tuple[Rows, Rows]
"""Origin rows and translation rows, pair by pair."""


@dataclass(frozen=True)
class RefitOptions:
    """What is fitted anew on a store of pairs.

    Attributes
    ----------
    method : str
        A closed form that learns from pairs.
    rank : int
    knobs : mapping
        Fields of the method; those not named are at their defaults.
    repeats : int
        Bootstrap resamples of each model's training identities, at least 2.
    seed : int
    jackknife : int or None
        Instead of resamples: parts of the identities, each left out once.
    """

    method: str = "gnull"
    rank: int = 512
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

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of the fits."""
        shown = {"method": self.method, "rank": self.rank, **self.knobs}
        if self.jackknife is not None:
            return {**shown, "jackknife parts": self.jackknife}
        return {**shown, "repeats": self.repeats, "seed": self.seed}


def compare_models(
    collection: Collection, options: RefitOptions, maps: dict[str, Projection], found: Found
) -> None:
    """Fit every model of a store again and again; add cos φ ± and the cross residuals.

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
    check_rank(options.rank, collection.store.layout.dim)
    train = _by_model(collection, *collection.pairs("train"))
    few = [m for m, (_, g) in train.items() if len(set(_labels(collection, g))) < 2]
    if not train or few:
        what = f"{few[0]} has 1 training identity" if few else "it holds no training pairs"
        raise UsageError(
            f"{collection.store.path} cannot be resampled by identity: {what}, and at least 2 are needed. "
            "Encode more pairs, or make some with latentstore simulate."
        )
    fits = {model: _fit(_pair_data(collection, *rows), options) for model, rows in train.items()}
    spectra = {model: map_spectrum(p.query_map) for model, p in fits.items()}
    found.curves += spectrum_curves({f"W of {model}": s for model, s in spectra.items()})
    if options.jackknife is None:
        _resampled(collection, options, train, spectra, found)
    else:
        _jackknifed(collection, options, train, spectra, found)
    found.figures += _cross_residuals(collection, fits, found)


def _resampled(
    collection: Collection,
    options: RefitOptions,
    train: dict[str, Pairs],
    spectra: dict[str, MapSpectrum],
    found: Found,
) -> None:
    # A stream for each model: two models' fits must not share their draws.
    streams = dict(zip(train, np.random.default_rng(options.seed).spawn(len(train)), strict=True))
    again: dict[str, list[MapSpectrum]] = {
        model: [
            map_spectrum(_fit(_pair_data(collection, *drawn), options).query_map)
            for drawn in _resamples(collection, *rows, options.repeats, streams[model])
        ]
        for model, rows in train.items()
    }
    for a, b in itertools.combinations_with_replacement(train, 2):
        group = f"{a} × {b}, resampled" if a != b else f"{a} × its resamples"
        against = again[b] if a != b else [spectra[a]] * options.repeats
        values = _cosines(again[a], against)
        spread = ("cos φ, standard deviation over fits", float(values.std(ddof=1)))
        _add(group, float(values.mean()), len(values), spread, [*again[a], *against], found)
    found.caveats.append(
        f"± is the standard deviation over {options.repeats} fits on bootstrap resamples of the training "
        "identities: the spread under resampling, not a standard error of independent trainings (resamples "
        "of one model share most of its identities)."
    )


def _jackknifed(
    collection: Collection,
    options: RefitOptions,
    train: dict[str, Pairs],
    spectra: dict[str, MapSpectrum],
    found: Found,
) -> None:
    """Leave each part of the photos out once, the same one for every model."""
    assert options.jackknife is not None  # noqa: S101 - asked by the caller
    part_of = _parts(collection, options.jackknife)
    present = sorted(set(part_of.values()))
    if len(present) < 2:
        raise UsageError(
            f"--jackknife {options.jackknife} leaves parts of the training photos out, and all of "
            f"{collection.store.path} fall into {len(present)} part. Give more parts, or use --repeats."
        )
    left: dict[str, list[MapSpectrum]] = {}
    for model, (origins, translated) in train.items():
        part = np.array([part_of[r] for r in translated.tolist()])
        kept = [part != number for number in present]
        if not all(k.any() for k in kept):
            raise UsageError(
                f"All pairs of {model} fall into one of the {options.jackknife} parts: without it nothing is "
                "left to fit. Give a larger --jackknife, or use --repeats."
            )
        left[model] = [
            map_spectrum(_fit(_pair_data(collection, origins[k], translated[k]), options).query_map)
            for k in kept
        ]
    n = len(present)
    for a, b in itertools.combinations_with_replacement(train, 2):
        if a == b:
            # cos φ with itself is 1: what is told is how far one part moves it, and that has no ±.
            values = _cosines(left[a], [spectra[a]] * n)
            _add(f"{a} × without a part", float(values.mean()), n, None, [*left[a], spectra[a]], found)
            continue
        values = _cosines(left[a], left[b])
        spread = ("cos φ, jackknife standard error", jackknife_error(values))
        whole = cos_phi(spectra[a].sigma, spectra[b].sigma)
        _add(f"{a} × {b}, jackknife", whole, n, spread, [*left[a], *left[b]], found)
    if len(train) < 2:
        found.caveats.append(
            f"Without a part is the mean over {n} fits, each without one part of the training photos "
            "(hashed). With one model there are no two spectra to compare, and no ±."
        )
        return
    found.caveats.append(
        f"± is the delete-one-group jackknife over {n} parts of the training photos (hashed, the same for "
        "every model): √((n−1)/n Σ(θᵢ−θ̄)²), with θᵢ taken without part i. cos φ itself is that of all pairs."
    )


def jackknife_error(values: np.ndarray) -> float:
    """Return the delete-one-group jackknife's standard error √((n−1)/n Σ(θᵢ−θ̄)²) of n values."""
    n = len(values)
    return math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum()))


def _parts(collection: Collection, parts: int) -> dict[int, int]:
    """Return the part that each training translation is in, by its photo's hash."""
    tasks = collection.pair_pass("train", parts=parts).tasks
    return {int(row): task.part for task in tasks for row in task.translations}


def _by_model(collection: Collection, origins: Rows, translated: Rows) -> dict[str, Pairs]:
    names = np.array([str(m or "unnamed model") for m in collection.model[translated]], dtype=object)
    return {m: (origins[names == m], translated[names == m]) for m in sorted(set(names))}


def _labels(collection: Collection, rows: Rows) -> list[str]:
    return [str(x) for x in collection.labels(collection.identity[rows])]


def _resamples(
    collection: Collection, origins: Rows, translated: Rows, repeats: int, rng: np.random.Generator
) -> Iterator[Pairs]:
    """Yield the pairs of as many identities as there are, drawn with replacement."""
    identity = np.unique(_labels(collection, translated), return_inverse=True)[1]
    own = np.split(np.argsort(identity, kind="stable"), np.cumsum(np.bincount(identity))[:-1])
    for _ in range(repeats):
        drawn = np.concatenate([own[i] for i in rng.integers(len(own), size=len(own))])
        yield origins[drawn], translated[drawn]


def _pair_data(collection: Collection, origins: Rows, translated: Rows) -> PairData:
    """Return pairs as the fits read them; an origin counts once for each of its pairs."""

    def pairs() -> Iterator[tuple[Any, Any]]:
        for at in range(0, len(origins), BLOCK):
            yield collection.read(origins[at : at + BLOCK]), collection.read(translated[at : at + BLOCK])

    return replace(
        collection.data,
        n_pairs=len(origins),
        n_origins=len(origins),
        pairs_source=pairs,
        origins_source=lambda: collection.blocks(origins),
        moments_source=lambda: None,  # those kept are of all pairs
    )


def _fit(data: PairData, options: RefitOptions) -> Projection:
    fitted: Projection = build(options.method, rank=options.rank, **options.knobs).fit(data).projection()
    return fitted


def _cosines(ones: list[MapSpectrum], others: list[MapSpectrum]) -> np.ndarray:
    return np.array([cos_phi(a.sigma, b.sigma) for a, b in zip(ones, others, strict=True)])


def _add(
    group: str,
    value: float,
    n: int,
    spread: tuple[str, float] | None,
    spectra: list[MapSpectrum],
    found: Found,
) -> None:
    """Add cos φ of a group of fits, its band, and its ± under the name of what it is."""
    band, flat = random_band(spectra[0].shape, spectra[-1].shape), all(s.flat for s in spectra)
    note = BY_CONSTRUCTION if flat else PLACES[band.place(value)]
    # The spread of what is 1 by construction is rounding.
    told = "" if flat or spread is None else f" ± {spread[1]:.2g}"
    found.summary.append(f"{group}: cos φ = {cosine(value)}{told} over {n} fits, {note}.")
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
    mean = collection.data.gallery_spectrum.mean
    out = []
    for b, (o_rows, g_rows) in test.items():
        o, g = collection.read(o_rows).astype(np.float64), collection.read(g_rows).astype(np.float64)
        for a, p in fits.items():
            random = RandomSubspace(p.rank).fit(collection.data).projection()
            sides: tuple[tuple[str, Role, Projection], ...] = (
                (f"W of {a}", "method", p),
                (f"random subspace of rank {p.rank}", "control", random),
            )
            for subject, role, side in sides:
                ratio = residual_ratio(replace(side, reference_map=side.query_map, center=mean), o, g)
                if math.isfinite(ratio):
                    note = "‖TW‖/‖(O−μ)W‖ on test pairs; lower moves less under translation"
                    figure = Figure("cross residual", ratio, subject, role, f"T of {b}", n=len(o), note=note)
                    out += [figure] * (figure not in out)
    if not out:
        found.caveats.append("The store holds no test pairs: cross residuals were not taken.")
    return out
