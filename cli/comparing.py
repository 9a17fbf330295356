"""compare: do two W agree, in spectrum and in column space, beside what random matrices give."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from cli.collection import Collection
from cli.likeness import (
    BY_CONSTRUCTION,
    PAPER_TABLE,
    Found,
    band_figure,
    cos_figure,
    cosine,
    curve,
    gap,
    spectrum_curves,
)
from cli.refitting import RefitOptions, compare_models
from cli.render_compare import draw
from cli.solving import check_writable
from cli.streams import OnRows
from cli.summing import OnStart
from cli.sweeping import check_plot
from latentstore import results
from latentstore.errors import SpaceMismatchError, UsageError
from latentstore.results import Figure, Report
from solvers.projection import Projection
from solvers.spectra import (
    Band,
    MapSpectrum,
    chance_overlap,
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
ONE_FIT = (
    "± is left out: each file holds one fit. --store PAIRS fits each model of a store again, and has it."
)
PRINTED = {
    "SDXL": "0.995790 ± 0.000037",
    "OpenDalle": "0.996532 ± 0.000016",
    "ColorfulXL": "0.998436 ± 0.000015",
    "Kandinsky-3": "0.999788 ± 0.000009",
    "SD3": "0.993256 ± 0.000035",
    "Kolors": "0.991808 ± 0.000042",
}
"""The paper's Table 1: cos φ of Stable Diffusion 2 beside each, over ten trainings by gradients."""


def compare(
    files: list[Path],
    *,
    store: Path | None = None,
    refit: RefitOptions | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    command: str = "",
    on_start: OnStart | None = None,
    on_fit: OnRows | None = None,
) -> Report:
    """Compare every pair of projections, and the models of a store of pairs through refits.

    Parameters
    ----------
    files : list of Path
        Projections, two or more; none with a store.
    store : Path, optional
        A store of pairs; each of its translation models is fitted again on resampled identities.
    refit : RefitOptions, optional
    out : Path, optional
        Where the report goes, too.
    plot : Path, optional
        PNG to write: the spectra, each beside Gaussian matrices of its shape.
    on_start, on_fit : callable, optional
        Called with (fits to make, the same), and with (1, 0) after each fit on the store.

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
    if plot is not None:
        check_plot(plot)
    maps = load_maps(files)
    collection = None if store is None else Collection.open(store)
    dim = next(iter(maps.values())).dim if collection is None else collection.store.layout.dim
    found = Found(dim, [FIRST])
    if maps:
        _compare_files(maps, found)
    settings: dict[str, Any] = {}
    if collection is not None:
        asked = refit or RefitOptions()
        settings = compare_models(collection, asked, maps, found, on_start=on_start, on_fit=on_fit).settings
    found.summary.insert(1, _counted(found.figures))
    found.caveats.insert(0, found.spread)
    report = Report(
        kind="compare",
        title=f"Comparison of {' and '.join(maps)}" if 0 < len(maps) < 4 else "Comparison of maps W",
        summary=found.summary,
        data={
            "maps": {n: {"method": p.method, "shape": list(p.query_map.shape)} for n, p in maps.items()},
            "store": None if store is None else str(store),
            "±": found.spread,
            "models": found.models,
            **({} if store is None else {PAPER_TABLE: PRINTED}),
        },
        settings=settings,
        reproduce=[command] if command else [],
        figures=found.figures,
        curves=found.curves,
        caveats=found.caveats,
        timings={"compare": time.perf_counter() - began},
        **results.stamp(),
    )
    if out is not None:
        report.write(out)
    if plot is not None:
        draw(report.curves, plot)
    return report


def _counted(figures: list[Figure]) -> str:
    notes = [f.note for f in figures if f.name == "cos φ" and f.role == "method"]
    built = sum(note.startswith(BY_CONSTRUCTION) for note in notes)
    inside = sum(note.startswith("inside") for note in notes)
    return (
        f"Of {len(notes)} comparison{'s' * (len(notes) != 1)}: {len(notes) - built - inside} outside the "
        f"random band, {inside} inside, {built} at 1 by construction."
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


def _compare_files(maps: dict[str, Projection], found: Found) -> None:
    spectra = {name: map_spectrum(p.query_map) for name, p in maps.items()}
    for name, s in spectra.items():
        found.figures += _map_figures(name, s)
    found.curves += spectrum_curves(spectra)
    bands: dict[tuple[tuple[int, int], tuple[int, int]], Band] = {}
    for a, b in itertools.combinations(maps, 2):
        shapes = (spectra[a].shape, spectra[b].shape)
        bands[shapes] = bands.get(shapes) or random_band(*shapes)
        group = f"{a} × {b}"
        figure = cos_figure(group, spectra[a], spectra[b], bands[shapes])
        found.figures += [figure, band_figure(group, bands[shapes])]
        value = figure.value
        found.summary.append(f"{group}: cos φ = {cosine(value)} (1 − cos φ = {gap(value)}), {figure.note}.")
        angles = principal_angles(spectra[a], spectra[b])
        found.figures += _angle_figures(group, angles, chance_overlap(spectra[a], spectra[b]))
        found.curves.append(
            curve("principal angles", group, np.degrees(angles), "angle, smallest first", "degrees")
        )
    found.spread = ONE_FIT
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
