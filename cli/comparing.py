"""compare: do two W agree, in spectrum and in column space, beside what random matrices give."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import BLOCK, Collection, Rows
from cli.solving import check_writable
from latentstore import results
from latentstore.errors import SpaceMismatchError, UsageError
from latentstore.results import Curve, Figure, Report, Role
from solvers.data import PairData
from solvers.gallery_maps import RandomSubspace
from solvers.methods import build, check_rank, get
from solvers.metrics import residual_ratio
from solvers.projection import Projection
from solvers.spectra import (
    Band,
    MapSpectrum,
    chance_overlap,
    cos_phi,
    draws_for,
    gaussian_sigmas,
    is_flat,
    map_spectrum,
    overlap,
    principal_angles,
    random_band,
    untrained_band,
)

FIRST = (
    "cos φ of two sorted spectra does not tell a trained W from a random one, unless it lies outside the "
    "random band: the 95 % interval of two independent Gaussian matrices of the same shapes."
)
BY_CONSTRUCTION = "1 by construction: both have equal singular values (orthonormal columns)"
ONE_FLAT = "one of the two has orthonormal columns, so this measures the spread of the other alone"
_PLACES = {
    "below": "below the random band: the spectra differ more than those of two random matrices",
    "inside": "inside the random band: two random matrices agree as closely",
    "above": "above the random band: the spectra agree more closely than those of two random matrices",
}


@dataclass(frozen=True)
class RefitOptions:
    """What is fitted anew on resampled identities of a store of pairs.

    Attributes
    ----------
    method : str
        A closed form that learns from pairs, with its default knobs.
    rank : int
    repeats : int
        Bootstrap resamples of each model's training identities, at least 2.
    seed : int
    """

    method: str = "gnull"
    rank: int = 512
    repeats: int = 10
    seed: int = 0

    @classmethod
    def of(cls, store: Path | None, **options: Any) -> RefitOptions | None:
        """Take the options that were named (not None), and refuse them without a store.

        Raises
        ------
        SolverUsageError, UsageError
        """
        named = {k: v for k, v in options.items() if v is not None}
        if store is None and named:
            raise UsageError(
                f"--{next(iter(named))} is about fits on resampled identities, and there is no store to fit "
                "on. Add --store PAIRS, or leave it out."
            )
        return None if store is None else cls(**named)

    def __post_init__(self) -> None:
        method = get(self.method)
        if self.repeats < 2:
            raise UsageError(f"--repeats is {self.repeats}; a spread needs at least 2 fits.")
        if not method.needs_pairs or method.needs_torch:
            why = "is trained by gradients" if method.needs_torch else "reads no pairs"
            raise UsageError(
                f"--method is {self.method}, which {why}: compare refits closed forms that learn from pairs "
                "(svd, gnull). Fit it several times with solve, and give the files to compare."
            )


@dataclass
class _Found:
    """What has been measured so far."""

    summary: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)


def compare(
    files: list[Path],
    *,
    store: Path | None = None,
    refit: RefitOptions | None = None,
    out: Path | None = None,
    command: str = "",
) -> Report:
    """Compare every pair of projections, and the models of a store of pairs through refits.

    Parameters
    ----------
    files : list of Path
        Projections, two or more; none with a store.
    store : Path, optional
        A store of pairs; each of its translation models is fitted on resampled identities.
    refit : RefitOptions, optional
    out : Path, optional
        Where the report goes, too.

    Raises
    ------
    UsageError
        One file alone, a file that is not there, or maps of latents of different lengths.
    SpaceMismatchError
        Maps, or maps and the store, of different spaces.
    """
    began = time.perf_counter()
    if len(files) == 1 or not (files or store):
        raise UsageError(
            f"compare needs at least two projections and was given {len(files)}. Name another, or give "
            "--store PAIRS alone to compare its models."
        )
    if out is not None:
        check_writable(out)
    maps = load_maps(files)
    found = _Found([FIRST])
    if maps:
        _compare_files(maps, found)
    if store is not None:
        _compare_models(Collection.open(store), refit or RefitOptions(), maps, found)
    found.summary.insert(1, _counted(found.figures))
    report = Report(
        kind="compare",
        title=f"Comparison of {' and '.join(maps)}" if 0 < len(maps) < 4 else "Comparison of maps W",
        summary=found.summary,
        data={
            "maps": {n: {"method": p.method, "shape": list(p.query_map.shape)} for n, p in maps.items()},
            "store": None if store is None else str(store),
        },
        settings={} if store is None else dict((refit or RefitOptions()).__dict__),
        reproduce=[command] if command else [],
        figures=found.figures,
        curves=found.curves,
        caveats=found.caveats,
        timings={"compare": time.perf_counter() - began},
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    return report


def _counted(figures: list[Figure]) -> str:
    notes = [f.note for f in figures if f.name == "cos φ" and f.role == "method"]
    built = sum(note.startswith(BY_CONSTRUCTION) for note in notes)
    inside = sum(note.startswith("inside") for note in notes)
    return (
        f"Of {len(notes)} comparisons, {len(notes) - built - inside} lie outside the random band, {inside} "
        f"inside, and {built} are 1 by construction."
    )


def load_maps(files: list[Path]) -> dict[str, Projection]:
    """Load projections under short names, and refuse those that cannot be compared.

    Raises
    ------
    UsageError, SpaceMismatchError, ProjectionFormatError
    """
    found: dict[str, Projection] = {}
    stems = [f.stem for f in files]
    for number, file in enumerate(files, 1):
        if not file.is_file():
            raise UsageError(f"There is no projection {file} (looked in {Path.cwd()}). Make one with solve.")
        name = file.stem if stems.count(file.stem) == 1 else str(file)
        found[name if name not in found else f"{name} (file {number})"] = Projection.load(file)
    for (a, p), (b, q) in itertools.combinations(found.items(), 2):
        if p.dim != q.dim:
            raise UsageError(
                f"{a} maps latents of {p.dim} values, {b} of {q.dim}: they belong to different encoders and "
                "have no common space. Compare maps of one encoder."
            )
        if p.space_id and q.space_id and p.space_id != q.space_id:
            raise SpaceMismatchError(
                f"{a} is of the space {p.space_id}, {b} of {q.space_id}: their columns mean different "
                "things. Compare maps of one encoder and its settings."
            )
    return found


def _compare_files(maps: dict[str, Projection], found: _Found) -> None:
    spectra = {name: map_spectrum(p.query_map) for name, p in maps.items()}
    for name, s in spectra.items():
        found.figures += _map_figures(name, s)
        found.curves.append(_spectrum_curve(name, s.sigma))
    found.curves += [_random_curve(shape) for shape in sorted({s.shape for s in spectra.values()})]
    bands: dict[tuple[tuple[int, int], tuple[int, int]], Band] = {}
    for a, b in itertools.combinations(maps, 2):
        shapes = (spectra[a].shape, spectra[b].shape)
        bands[shapes] = bands.get(shapes) or random_band(*shapes)
        group = f"{a} × {b}"
        figure = _cos_figure(group, spectra[a], spectra[b], bands[shapes])
        found.figures += [figure, _band_figure(group, bands[shapes])]
        found.summary.append(f"{group}: cos φ = {figure.value:.8f}, {figure.note}.")
        angles = principal_angles(spectra[a], spectra[b])
        found.figures += _angle_figures(group, angles, chance_overlap(spectra[a], spectra[b]))
        found.curves.append(
            _curve("principal angles", group, np.degrees(angles), "angle, smallest first", "degrees")
        )
    found.caveats.append("Two bare files hold one fit each: cos φ carries no ± of its own here.")
    if not all(p.symmetric for p in maps.values()):
        found.caveats.append(
            "Where queries and references are mapped differently, the query map is compared."
        )
    unknown = [name for name, p in maps.items() if not p.space_id]
    if unknown:
        found.caveats.append(
            f"The space of {', '.join(unknown)} is unknown: that the maps are of one encoder was not checked."
        )


def _map_figures(name: str, s: MapSpectrum) -> list[Figure]:
    d, m = s.shape
    out = [Figure("columns", m, name, note=f"{d} × {m}, numerical rank {s.rank}")]
    if s.rank == m:
        out.append(Figure("σ max / σ min", float(s.sigma[0] / s.sigma[-1]), name))
    band = untrained_band(s)
    note = "against Gaussian matrices of its shape" + ("; its own spectrum is flat" if s.flat else "")
    out.append(
        Figure(
            "cos φ, untrained W", band.mean, name, "control", "", "", (band.low, band.high), band.draws, note
        )
    )
    return out


def _cos_figure(group: str, a: MapSpectrum, b: MapSpectrum, band: Band) -> Figure:
    value, k = cos_phi(a.sigma, b.sigma), min(len(a.sigma), len(b.sigma))
    flat = is_flat(a.sigma[:k]), is_flat(b.sigma[:k])
    note = BY_CONSTRUCTION if all(flat) else _PLACES[band.place(value)]
    if any(flat) and not all(flat):
        note += f"; {ONE_FLAT}"
    if len(a.sigma) != len(b.sigma):
        note += f"; the {k} largest singular values of each"
    return Figure("cos φ", value, group, "method", group, n=k, note=note)


def _band_figure(group: str, band: Band) -> Figure:
    return Figure(
        *(
            "cos φ",
            band.mean,
            "two Gaussian matrices",
            "control",
            group,
            "",
            (band.low, band.high),
            band.draws,
        ),
        note="random band: 95 % of independent pairs of these shapes",
    )


def _angle_figures(group: str, angles: np.ndarray, chance: float) -> list[Figure]:
    out = [
        Figure(
            f"principal angle, {what}", float(np.degrees(np.quantile(angles, q))), group, "note", group, "°"
        )
        for what, q in (("smallest", 0.0), ("quarter", 0.25), ("median", 0.5), ("largest", 1.0))
    ]
    note = "‖QaᵀQb‖²/m: 1 where the column spaces are one, 0 where they are orthogonal"
    return [
        *out,
        Figure("overlap", overlap(angles), group, "method", group, n=len(angles), note=note),
        Figure("overlap", chance, "random subspaces", "control", group, n=len(angles)),
    ]


def _spectrum_curve(name: str, sigma: np.ndarray) -> Curve:
    return _curve("spectrum", name, sigma / sigma[0], "singular value, largest first", "share of the largest")


def _random_curve(shape: tuple[int, int]) -> Curve:
    drawn = gaussian_sigmas(shape, draws_for(shape), seed=0)
    drawn /= drawn[:, :1]
    line = _spectrum_curve(f"Gaussian {shape[0]} × {shape[1]}", drawn.mean(axis=0))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return replace(line, role="control", low=low.tolist(), high=high.tolist())


def _curve(plot: str, label: str, y: np.ndarray, x_label: str, y_label: str) -> Curve:
    return Curve(plot, label, list(range(1, len(y) + 1)), y.tolist(), x_label, y_label)


# --- refits on resampled identities ------------------------------------------------------------------------


def _compare_models(
    collection: Collection, options: RefitOptions, maps: dict[str, Projection], found: _Found
) -> None:
    """Fit every model of a store on resampled identities; add cos φ ± and the cross residuals."""
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
    # A stream for each model: two models' fits must not share their draws.
    streams = dict(zip(train, np.random.default_rng(options.seed).spawn(len(train)), strict=True))
    again: dict[str, list[MapSpectrum]] = {
        model: [
            map_spectrum(_fit(_pair_data(collection, *drawn), options).query_map)
            for drawn in _resamples(collection, *rows, options.repeats, streams[model])
        ]
        for model, rows in train.items()
    }
    for a, b in itertools.combinations_with_replacement(fits, 2):
        group = f"{a} × {b}, resampled" if a != b else f"{a} × its resamples"
        against = again[b] if a != b else [spectra[a]] * options.repeats
        found.figures += _repeated(group, again[a], against, found)
    found.figures += _cross_residuals(collection, fits, found)
    found.caveats.append(
        f"± is the standard deviation over {options.repeats} fits on bootstrap resamples of the training "
        "identities: the spread under resampling, not a standard error of independent trainings (resamples "
        "of one model share most of its identities)."
    )


def _by_model(collection: Collection, origins: Rows, translated: Rows) -> dict[str, tuple[Rows, Rows]]:
    names = np.array([str(m or "unnamed model") for m in collection.model[translated]], dtype=object)
    return {m: (origins[names == m], translated[names == m]) for m in sorted(set(names))}


def _labels(collection: Collection, rows: Rows) -> list[str]:
    return [str(x) for x in collection.labels(collection.identity[rows])]


def _resamples(
    collection: Collection, origins: Rows, translated: Rows, repeats: int, rng: np.random.Generator
) -> Iterator[tuple[Rows, Rows]]:
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
    )


def _fit(data: PairData, options: RefitOptions) -> Projection:
    fitted: Projection = build(options.method, rank=options.rank).fit(data).projection()
    return fitted


def _repeated(group: str, ones: list[MapSpectrum], others: list[MapSpectrum], found: _Found) -> list[Figure]:
    values = np.array([cos_phi(a.sigma, b.sigma) for a, b in zip(ones, others, strict=True)])
    mean, std, band = (
        float(values.mean()),
        float(values.std(ddof=1)),
        random_band(ones[0].shape, others[0].shape),
    )
    flat = all(s.flat for s in (*ones, *others))
    note = BY_CONSTRUCTION if flat else _PLACES[band.place(mean)]
    # The spread of what is 1 by construction is rounding.
    spread = "" if flat else f" ± {std:.2g}"
    found.summary.append(f"{group}: cos φ = {mean:.8f}{spread} over {len(values)} fits, {note}.")
    out = [Figure("cos φ", mean, group, "method", group, n=len(values), note=note), _band_figure(group, band)]
    if not flat:
        out.append(Figure("cos φ, standard deviation over fits", std, group, "method", group, n=len(values)))
    return out


def _cross_residuals(collection: Collection, fits: dict[str, Projection], found: _Found) -> list[Figure]:
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
