"""The miniature world's models: whether they can be told apart, what holds for both, what verdicts say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.world_maps import map_file, only
from benchmarks.world_pictures import Row, read_translations
from benchmarks.world_plan import BOTH, MODELS, SIZE, WITHOUT, WORLD, Plan
from cli import matching, measure, theory, theory_lemma
from cli.collection import Collection
from cli.measure import Group
from cli.translation_plan import draw
from latentstore import results
from latentstore.results import Figure, Report
from solvers.gallery_maps import RandomSubspace
from solvers.metrics import bootstrap
from solvers.projection import Projection

BANDS = 32
TOLD_APART, TABLE_4, RESIDUAL, VERDICTS = "telling a from b", "Table 4", "residual", "verdicts"
VAE = "the autoencoder of {}"
CALLED_MATCH, PROMISED = "called match", "promised false alarms"
ACCURACY, PERMUTED = "accuracy", "labels drawn for each photo"
HERE, GONE, BARE = "origin in the collection", "origin taken out", "originals, themselves taken out"
LOG_RATIO = "log residual over a random subspace's"


# --- telling them apart ------------------------------------------------------------------------------------


def features(paths: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return what a picture's noise looks like: its power in rings of frequencies, in decibels, (n, 32).

    Of the luminance, its mean taken off. No picture's content has a place in it.
    """
    return np.stack([_spectrum(np.asarray(Image.open(path).convert("L"), np.float64)) for path in paths])


def _spectrum(grey: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    rows, columns = np.fft.fftfreq(grey.shape[0])[:, None], np.fft.rfftfreq(grey.shape[1])[None, :]
    ring = np.minimum((np.hypot(rows, columns) / 0.5 * BANDS).astype(int), BANDS - 1)
    mean = np.bincount(ring.ravel(), power.ravel(), BANDS) / np.bincount(ring.ravel(), minlength=BANDS)
    return np.asarray(10 * np.log10(mean + 1e-3))


def tell_apart() -> Report:
    """Train a classifier on both models' pictures of training originals; test it on those of test originals.

    Both have the same originals, class words and strengths, as many of each, and JPEG files of one quality.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = matched(read_translations())
    trained = [r for r in rows if r["split"] == "train"]
    tested = [r for r in rows if r["split"] == "test"]
    x, y = features([r["path"] for r in trained]), _labels(trained)
    asked, truth = features([r["path"] for r in tested]), _labels(tested)
    photos = np.array([r["identity"] for r in tested], object)
    strengths = np.array([r["strength"] for r in tested])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    right = (model.fit(x, y).predict(asked) == truth).astype(float)
    name, whole = "logistic regression on spectra", Group(TOLD_APART, photos)
    figures = [measure.figure(ACCURACY, right, name, "method", whole)]
    for strength in np.unique(strengths):
        here = strengths == strength
        own = Group(f"{TOLD_APART}, strength {strength:g}", photos[here])
        figures.append(measure.figure(ACCURACY, right[here], name, "method", own))
    # Labels permuted picture by picture would favour one model by chance, and be told by that.
    mixed, drawn = (np.array([draw("label", r["identity"]) % 2 for r in part]) for part in (trained, tested))
    right = (model.fit(x, mixed).predict(asked) == drawn).astype(float)
    figures.append(measure.figure(ACCURACY, right, PERMUTED, "control", whole))
    figures.append(Figure(ACCURACY, 0.5, "chance", "chance", TOLD_APART, "fraction"))
    return _report("Telling the two models apart", figures)


def matched(rows: Sequence[Row]) -> list[Row]:
    """Leave out translations of one model that the other has no counterpart of."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["identity"], row["strength"], Path(row["path"]).stem

    sides = [{key(r) for r in rows if r["model"] == model} for model in MODELS]
    return [r for r in rows if key(r) in sides[0] & sides[1]]


def _labels(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    return np.array([MODELS.index(r["model"]) for r in rows])


# --- autoencoders and the theorems -------------------------------------------------------------------------


def table_4(models: dict[str, Path], encoder: str) -> Report:
    """Compare the models' autoencoders with each other and with the encoder, on the world's photos."""
    vaes = {name: str(folder / "vae") for name, folder in models.items()}
    pairs = ((vaes["a"], vaes["b"]), (encoder, vaes["a"]), (encoder, vaes["b"]))
    called = {path: VAE.format(name) for name, path in vaes.items()}
    figures: list[Figure] = []
    said: list[str] = []
    for pair in pairs:
        made, notes = theory_lemma.vae_figures(pair, Path("photos"), SIZE, "cpu", 0)
        names = " × ".join(called.get(one, one) for one in pair)
        for figure in made:
            subject = figure.subject
            for path, name in called.items():
                subject = subject.replace(path, name)
            figures.append(replace(figure, subject=subject, group=f"{TABLE_4}: {names}"))
        for note in notes:
            for path, name in called.items():
                note = note.replace(path, name)
            said.append(note)
    return replace(_report("Table 4", figures), caveats=list(dict.fromkeys(said)))


def check_theory(models: dict[str, Path], plan: Plan) -> Report:
    """Check the paper's lemmas and theorems on the world's pairs, and on model a itself."""
    options = theory.TheoryOptions(
        rank=plan.rank, pipeline=models["a"], images=Path("photos"), image_size=SIZE, device="cpu"
    )
    report = theory.check(BOTH, options)
    named = {**report.settings, "pipeline": "model a"}
    return replace(report, settings=named)


def residuals(names: list[str]) -> Report:
    """Return what a W that learned from model a leaves of translations by each model, on test pairs."""
    figures = []
    for model in MODELS:
        pairs, group = only(WORLD, model), f"{RESIDUAL}, test pairs of {model}"
        for name in names:
            W = Projection.load(map_file(name))
            random = RandomSubspace(W.rank).fit(pairs.data).projection()
            for f in measure.residuals(pairs, W, random, "test"):
                if f.subject == measure.RANDOM:
                    subject = f"{measure.RANDOM} of rank {W.rank}"
                    figures.append(replace(f, group=group, subject=subject, role="control"))
                else:
                    figures.append(replace(f, group=group, subject=name, role="method"))
            figures.append(_log_ratio(pairs, W, random, name, group))
    # Maps of one rank have one random subspace beside them.
    return _report("Residuals", list({(f.name, f.subject, f.group): f for f in figures}.values()))


def _log_ratio(pairs: Any, W: Projection, random: Projection, name: str, group: str) -> Figure:
    """Return the mean over pairs of log(‖tW‖/‖(o−μ)W‖) less the same of a random subspace.

    A ratio of sums has no interval over photos; its logarithm, pair by pair, has.
    """
    origins, translated = pairs.pairs("test")
    o, g = (pairs.read(rows).astype(np.float64) for rows in (origins, translated))
    mean = pairs.data.gallery_spectrum.mean
    logs = []
    for p in (W, random):
        A = p.query_map.astype(np.float64)
        moved, base = np.linalg.norm((g - o) @ A, axis=1), np.linalg.norm((o - mean) @ A, axis=1)
        logs.append(np.log(moved / base))
    values, photos = logs[0] - logs[1], pairs.group[translated]
    note = "mean over test pairs of log(‖tW‖/‖(o−μ)W‖) less a random subspace's; below 0 it moves less"
    interval = bootstrap(values, photos)
    return Figure(LOG_RATIO, float(values.mean()), name, "method", group, "", interval, len(values), note)


# --- verdicts ----------------------------------------------------------------------------------------------


def verdicts(first: str, photos: Sequence[tuple[str, str]]) -> Report:
    """Return what ``match`` says of translations whose original is there, and of those whose is not.

    Parameters
    ----------
    first : str
        The W to match by beside the collection's own analytic map.
    photos : sequence of (name, path)
        The test originals.
    """
    tested = {f"{WORLD}: {r['path']}": r for r in read_translations() if r["split"] == "test"}
    bare = {path: {"identity": name, "model": "", "strength": 0.0} for name, path in photos}
    alone = [Path(path) for path in bare]
    figures: list[Figure] = []
    for name, W in (("analytic", None), (first, map_file(first))):
        options = matching.MatchOptions(projection=W, top=1, device="cpu")
        for what, store, queries, rows in (
            (HERE, WORLD, [WORLD], tested),
            (GONE, WITHOUT, [WORLD], tested),
            (BARE, WITHOUT, alone, bare),
        ):
            found = matching.run_match(queries, store, options)
            if found.no_verdict:
                return replace(_report("Verdicts", figures), caveats=[found.no_verdict])
            figures += _shares(name, what, rows, found)
    return _report("Verdicts", figures)


def _shares(name: str, what: str, rows: Mapping[str, Row], found: matching.MatchResult) -> list[Figure]:
    """Return the share of each decision: of all, and by model and strength."""
    matches = [m for m in found.matches if m.query in rows]
    asked = [rows[m.query] for m in matches]
    decided = np.array([m.verdict.decision if m.verdict else "" for m in matches], object)
    photos = np.array([r["identity"] for r in asked], object)
    labels = Collection.open(WORLD).labels  # near-duplicates count as one original
    right = labels(m.candidates[0].identity for m in matches) == labels(photos)
    where = np.array([f"model {r['model']}, strength {r['strength']:g}" for r in asked], object)
    cuts = {what: np.ones(len(asked), bool)}
    if what != BARE:
        cuts |= {f"{what}: {place}": where == place for place in sorted(set(where.tolist()))}
    calls = [m.verdict for m in matches if m.verdict and m.verdict.decision == "match"]
    out = []
    for group, chosen in cuts.items():
        own = Group(f"{VERDICTS}, {group}", photos[chosen])
        for decision in ("match", "doubtful", "no origin here"):
            values = (decided[chosen] == decision).astype(float)
            out.append(measure.figure(f"called {decision}", values, name, "method", own))
        if what == HERE:
            values = ((decided[chosen] == "match") & right[chosen]).astype(float)
            out.append(measure.figure(f"{CALLED_MATCH}, and the original first", values, name, "method", own))
    if calls and what != HERE:
        note = "share of pictures without an origin here that the calibration expects to be called a match"
        group = f"{VERDICTS}, {what}"
        rates = calls[0].false_alarm, calls[0].false_alarm_interval
        out.append(Figure(PROMISED, rates[0], name, "note", group, "fraction", rates[1], calls[0].n, note))
    return out


def _report(title: str, figures: list[Figure]) -> Report:
    return Report("benchmark", title, [], {}, figures=figures, **results.stamp())
