"""The demo: encode → simulate → solve with all four methods → four ranks → evaluate → one page."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cli import account, demo_world, failures, measure
from cli.collection import Collection, Queries
from cli.ranked import Asked, rankings
from cli.solving import SolveOptions, fit
from cli.workflows import run_encode, run_simulate
from latentstore import attacks, photos, results
from latentstore.encoders import DEFAULT
from latentstore.errors import ImageError, UsageError
from latentstore.images import decode, read_file
from latentstore.manifest import list_folder
from latentstore.report import write_html
from latentstore.results import Curve, Figure, Report
from latentstore.schema import split_of
from latentstore.simulate import Diffusion
from solvers.metrics import Ranking, average_precision
from solvers.projection import Projection

METHODS = ("svd", "gnull", "analytic", "cosface")
ATTACKS = (attacks.jpeg(5), attacks.crop(0.9), attacks.crop(0.8))
HEADLINE = "attacked pictures"
DIFFUSION = Diffusion(alpha_bar=0.2, prompt=0.3)
PER_ORIGIN = 4
MAX_QUERIES = 200
MATCHES = 8


@dataclass(frozen=True)
class DemoOptions:
    """What the demo was asked for; see ``latentstore demo --help``."""

    images: Path | None = None
    out: Path = Path("demo")
    rank: int = 512
    limit: int = 3000
    image_size: int = 256
    budget: float = 40.0
    translated: int = 30


@dataclass(frozen=True)
class DemoResult:
    """The report and where it lies."""

    report: Report
    html: Path
    json: Path
    headline_groups: list[str] = field(default_factory=list)


class Stages:
    """Times the stages and says what happens.

    Parameters
    ----------
    say : callable
        Takes one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.times = say, dict[str, float]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one stage and say so when it is done."""
        began = time.perf_counter()
        yield
        self.times[name] = time.perf_counter() - began
        self.say(f"{name:<34} {self.times[name]:6.1f} s")


def run_demo(options: DemoOptions, *, say: Callable[[str], None], command: str = "") -> DemoResult:
    """Run the whole way into a folder and write ``report.html`` and ``report.json`` there.

    Raises
    ------
    UsageError
        Too few images, or the folder holds another demo.
    """
    out = options.out
    stage = Stages(say)
    with stage("photographs"):
        root, manifest = _photographs(options)
    with stage("encode"):
        run_encode(
            root, out / "latents.zarr", encoder=DEFAULT, manifest=manifest, image_size=options.image_size
        )
    with stage("simulate translations"):
        run_simulate(out / "latents.zarr", out / "simulated.zarr", DIFFUSION, per_origin=PER_ORIGIN)
    gallery, pairs = Collection.open(out / "latents.zarr"), Collection.open(out / "simulated.zarr")
    with stage("attack the test pictures, encode"):
        attacked = _attacked(gallery, root, options)
    made: Collection | None = None
    if options.translated and demo_world.models():
        with stage("translate from prompts, encode"):
            made = demo_world.translated(
                out / "latents.zarr",
                out,
                count=options.translated,
                encoder=DEFAULT,
                image_size=options.image_size,
            )

    rank = min(options.rank, gallery.store.layout.dim)
    maps: dict[str, Projection] = {}
    facts: dict[str, dict[str, Any]] = {}
    curves: list[Curve] = []
    figures: list[Figure] = []
    for method in METHODS:
        with stage(f"solve --method {method}"):
            asked = SolveOptions(method=method, rank=rank, budget=options.budget)
            # The analytic map needs no pairs: it is given the bare collection, as its users have it.
            source = gallery if method == "analytic" else pairs
            maps[method], facts[method], choices = fit(source, asked)
            maps[method].save(out / f"W-{method}-{rank}.safetensors")
            figures += account.solver_figures(method, facts[method])
            curves += account.solver_curves(method, facts[method], choices)

    with stage("evaluate"):
        control_set = measure.fit_controls(gallery, rank)
        groups = _groups(attacked, pairs, made)
        evaluations = [measure.evaluate(gallery, q, maps, control_set) for q in groups]
        for evaluation in evaluations:
            figures += evaluation.figures
        for projection in maps.values():
            figures += measure.residuals(pairs, projection, control_set["random subspace"], "test")
    with stage("four ranks"):
        curves += _rank_curves(gallery, groups[0], maps, control_set, rank)

    judged = pairs.queries("validation")
    best = max(maps, key=lambda m: _rank(gallery, judged, maps[m]).map)
    headline = Asked.of(gallery, [groups[0]])
    ranking = rankings(gallery, headline, {best: maps[best]}, top=measure.TOP)[best]
    matches = failures.pictured(gallery, headline, ranking, MATCHES)
    report = Report(
        kind="demo",
        title="Finding origins: the demo",
        summary=_summary(evaluations[0], best, gallery, groups[0], options),
        data=_data(gallery, pairs, groups, options),
        settings={
            "methods": ", ".join(METHODS),
            "rank of W": rank,
            "encoder": DEFAULT,
            "image size": options.image_size,
            "simulated translations": f"{PER_ORIGIN} an origin, {DIFFUSION.name}",
            "attacks": ", ".join(a.name for a in ATTACKS),
            **(_translations(made) if made else {}),
            results.CHOSEN: best,
        },
        reproduce=[command or "latentstore demo", *_commands(out, rank)],
        figures=figures,
        curves=curves,
        matches=matches,
        caveats=_caveats(gallery, pairs, options, world=made is not None),
        timings=stage.times,
        **results.stamp(),
    )
    report.write(out / "report.json")
    write_html(report, out / "report.html")
    shown = list(dict.fromkeys([groups[0].group, HEADLINE, groups[-1].group]))
    return DemoResult(report, (out / "report.html").absolute(), (out / "report.json").absolute(), shown)


# --- pictures ---------------------------------------------------------------------------------------------


def _photographs(options: DemoOptions) -> tuple[Path, Path]:
    """Lay out the pictures; return (folder, manifest)."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out is {out}, which is a file; the demo needs a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"--out is {out}, and the folder cannot be made: {exc.strerror}.") from exc
    if options.images is None:
        return out / "tiles", photos.write_tiles(out / "tiles", photos.bundled())
    listed = [r["path"] for r in list_folder(options.images).to_pylist() if r["path_raw"] is None]
    if len(listed) < 20:
        raise UsageError(
            f"{options.images} holds {len(listed)} images; the demo fits, chooses and tests on different "
            "ones and needs at least 20. For a few images use latentstore encode and latentstore match."
        )
    chosen = np.sort(np.random.default_rng(0).permutation(len(listed))[: options.limit])
    manifest = out / "images.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "role", "split"])
        # A small folder needs more than one picture in ten to test on.
        cycle = ("train", "test", "train", "validation", "train")
        small = len(chosen) < 500
        for number, index in enumerate(chosen):
            path = listed[index]
            writer.writerow([path, path, "origin", cycle[number % 5] if small else split_of(path)])
    return options.images, manifest


def _attacked(gallery: Collection, root: Path, options: DemoOptions) -> Collection:
    """Attack the test pictures, encode them into a store of queries, and open it."""
    folder = options.out / "attacked"
    folder.mkdir(exist_ok=True)
    rows = gallery.gallery[gallery.split[gallery.gallery] == "test"]
    rows = np.sort(np.random.default_rng(1).permutation(rows)[:MAX_QUERIES])
    if not len(rows):
        raise UsageError("None of the images is in the test split; the demo needs more of them.")
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "group", "role", "split", "model"])
        for row in rows:
            try:
                image, _ = decode(read_file(root / gallery.path[row]).data)
            except ImageError:
                continue  # vanished since it was encoded
            # Full photographs would take minutes to store, and are resized by the encoder anyhow.
            image.thumbnail((1024, 1024))
            for number, attack in enumerate(ATTACKS):
                name = f"{row:06d}-{number}.png"
                attack(image, seed=int(row)).save(folder / name)
                writer.writerow(
                    [name, gallery.identity[row], gallery.group[row], "query", "test", attack.name]
                )
    run_encode(
        folder,
        options.out / "attacked.zarr",
        manifest=manifest,
        encoder=DEFAULT,
        image_size=options.image_size,
    )
    return Collection.open(options.out / "attacked.zarr")


def _groups(attacked: Collection, pairs: Collection, made: Collection | None) -> list[Queries]:
    """Return the query groups: translations, if any (the headline), attacks, each attack, and the oracle."""
    rows = attacked.queries("test").rows
    each = [Queries(attacked, rows[attacked.model[rows] == a.name], a.name) for a in ATTACKS]
    first = demo_world.groups(made) if made else []
    return [*first, Queries(attacked, rows, HEADLINE), *each, pairs.queries("test")]


# --- figures ----------------------------------------------------------------------------------------------


def _rank_curves(
    gallery: Collection,
    queries: Queries,
    maps: dict[str, Projection],
    control_set: dict[str, Projection],
    rank: int,
) -> list[Curve]:
    """Return mAP of every method at four ranks, beside the flat line of raw cosine."""
    ranks = sorted({max(1, rank // k) for k in (8, 4, 2, 1)})
    out = []
    for method, projection in maps.items():
        nested = projection if method != "cosface" else _by_singular_value(projection)
        kept = [r for r in ranks if r <= nested.rank] or [nested.rank]
        scores = [100 * _rank(gallery, queries, nested.truncated(r)).map for r in kept]
        label = method if method != "cosface" else "cosface, leading directions of W"
        out.append(Curve("mAP by rank of W", label, [float(r) for r in kept], scores, "rank of W", "mAP, %"))
    raw = 100 * _rank(gallery, queries, control_set["raw"]).map
    flat = [float(ranks[0]), float(ranks[-1])]
    label = f"raw, {gallery.store.layout.dim:,}-d"
    out.append(Curve("mAP by rank of W", label, flat, [raw, raw], "rank of W", "mAP, %", role="control"))
    return out


def _by_singular_value(projection: Projection) -> Projection:
    """Return the same W in its singular basis: under cosine only W·Wᵀ counts, so scores do not change."""
    u, s, _ = np.linalg.svd(projection.query_map.astype(np.float64), full_matrices=False)
    W = np.ascontiguousarray(u * s)
    return Projection(W, W, center=projection.center, method=projection.method)


def _rank(gallery: Collection, queries: Queries, projection: Projection) -> Ranking:
    return average_precision(
        queries.collection.project_queries(projection, queries.rows),
        gallery.labels(queries.identity),
        gallery.references(projection, gallery.gallery),
        gallery.labels(gallery.identity[gallery.gallery]),
    )


# --- words ------------------------------------------------------------------------------------------------


def _summary(
    evaluation: measure.Evaluation, best: str, gallery: Collection, queries: Queries, options: DemoOptions
) -> list[str]:
    ranking = evaluation.rankings[best, queries.group]
    n, found = len(ranking.ap), int(ranking.hit1.sum())
    test_photos = len(set(queries.collection.group[queries.rows].tolist()))
    what = "tiles of photographs" if options.images is None else "pictures"
    lead = (
        f"{n} {queries.group} were searched among {len(gallery.gallery)} {what}; with the W of "
        f"method {best} (chosen on validation) the origin came first for {found} of them ({found / n:.0%}). "
        f"They come from {test_photos} photograph{'s' * (test_photos != 1)} kept out of every pair and "
        "every choice."
    )
    said = [lead, *(m.verdict for m in evaluation.methods)]
    hindsight = {m.best_control for m in evaluation.methods if " @" in m.best_control}
    if hindsight:
        said.append(
            f"{', '.join(sorted(hindsight))} had the number of its directions chosen by these very queries: "
            "an advantage that no W has, and that no user would have."
        )
    return said


def _data(
    gallery: Collection, pairs: Collection, groups: list[Queries], options: DemoOptions
) -> dict[str, Any]:
    def count(split: str) -> str:
        rows = gallery.gallery[gallery.split[gallery.gallery] == split]
        return f"{len(rows)} pictures of {len(set(gallery.group[rows].tolist()))} photographs"

    source = "photographs bundled with scikit-image and scikit-learn, in tiles of 128 pixels"
    return {
        "images": source if options.images is None else str(options.images),
        "photographs": len(set(gallery.group.tolist())),
        "gallery": len(gallery.gallery),
        "train": count("train"),
        "validation": count("validation"),
        "test": count("test"),
        "simulated training pairs": len(pairs.pairs("train")[1]),
        **{f"queries, {q.group}": len(q.rows) for q in groups if q.group in (HEADLINE, demo_world.HEADLINE)},
        "dimension": gallery.store.layout.dim,
        "space": gallery.store.space.id,
    }


def _translations(made: Collection) -> dict[str, str]:
    """Return how the prompted translations were made."""
    count = len(set(made.identity.tolist()))
    return {
        demo_world.HEADLINE: f"{count} test pictures by each of {', '.join(demo_world.models())}, strength "
        f"{demo_world.STRENGTH}, {demo_world.STEPS} steps, guidance {demo_world.GUIDANCE}"
    }


def _caveats(gallery: Collection, pairs: Collection, options: DemoOptions, *, world: bool) -> list[str]:
    n = len(set(gallery.group.tolist()))
    tests = len(set(gallery.group[gallery.split == "test"].tolist()))
    out = []
    if options.images is None:
        out.append(
            f"Only {n} photographs stand behind this page, {tests} of them behind the test figures, cut into "
            "non-overlapping tiles: a smoke test of the way, not an accuracy. Drawings, charts, blank tiles "
            "and one of two stereo views were left out."
        )
    n_pairs, dim = len(pairs.pairs("train")[1]), gallery.store.layout.dim
    if world:
        out.append(
            "The translations are made from text prompts by two small diffusion models, trained from scratch "
            "on some thousand photographs (latentstore/data/world): what they do is what published models "
            "do, and their pictures are much worse. No W was fitted on translations by them."
        )
    out.append(
        "Attacked pictures are no translations by a diffusion model. They are real pixels, encoded for real; "
        "JPEG and crop only stand in for what happens to pictures on their way."
    )
    out.append(
        "The oracle's queries come from the analytic diffusion on latents: a diffusion model with a known "
        "answer, but no text-guided network. The analytic map assumes a model of that kind."
    )
    out.append(
        f"The encoder {DEFAULT} is a small autoencoder, trained on some thousand photographs; with that of a "
        "published diffusion model (latentstore encode --encoder) the figures differ."
    )
    if n_pairs < dim:
        out.append(
            f"There are fewer training pairs ({n_pairs}) than dimensions ({dim}): the exact null space that "
            "svd finds is arithmetic, not learned."
        )
    out.append(
        "PCA-whitening and the analytic map read the covariance of the whole gallery, without labels. "
        "PCA-whitened @k is the best of its ranks by these very queries: an advantage that a control may "
        "have."
    )
    out.append("Intervals resample photographs, not pictures; with few of them they are rough.")
    return out


def _commands(out: Path, rank: int) -> list[str]:
    pairs = f"--store {out}/simulated.zarr"
    lines = [f"solve --method {m} --rank {rank} {pairs}" for m in METHODS if m != "analytic"]
    lines.append(f"solve --method analytic --rank {rank} --store {out}/latents.zarr")
    name = f"{out}/W-analytic-{rank}.safetensors"
    lines.append(
        f"latentstore evaluate --projection {name} --store {out}/latents.zarr --queries {out}/attacked.zarr"
    )
    return lines
