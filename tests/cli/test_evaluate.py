"""evaluate: groups that are what they say, leaks that are found, a bound that is one, failures shown."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import SPLITS, paragraph, picture
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from cli import (
    efficiency,
    evaluating,
    failures,
    grouping,
    leakage,
    measure,
    ranked,
    render_evaluate,
)
from cli.app import app
from cli.collection import Collection
from cli.evaluating import EvaluateOptions
from cli.ranked import Asked
from cli.workflows import run_encode
from latentstore import results
from latentstore.errors import UsageError
from solvers.closed import PairData
from solvers.generalised import GeneralisedNull
from solvers.metrics import average_precision, chance_micro
from solvers.projection import Projection

STRENGTHS = (0.5, 0.7)
KNOBS = ("--rank", "24", "--lam", "1")


def invoke(*words: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def translated(model: str, i: int, strength: float) -> Image.Image:
    own, other = picture(i, 32), picture(10_000 + i + len(model), 32)
    if model == "blurred":
        own = own.filter(ImageFilter.GaussianBlur(6 * strength))
    return Image.blend(own, other, strength + 0.15 * (model == "other"))


def encoded(folder: Path, name: str, rows: list[tuple[Any, ...]]) -> Path:
    """Encode listed pictures: (path, identity, group, role, split, model, strength, prompt)."""
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "group", "role", "split", "model", "strength", "prompt"])
        writer.writerows(rows)
    run_encode(
        folder, folder / f"{name}.zarr", manifest=folder / f"{name}.csv", encoder="patch", image_size=32
    )
    return folder / f"{name}.zarr"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with translations by model ``=seen``, and another store with those by two more models.

    The other store holds no origins. ``blurred`` has queries at both strengths, ``other`` at one, and
    training pairs as well.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    stores: dict[str, list[tuple[Any, ...]]] = {"gallery": [], "unseen": []}
    for split, numbers in SPLITS.items():
        for i in numbers:
            picture(i, 32).save(folder / f"{i}.png")
            stores["gallery"].append((f"{i}.png", i, f"photo {i}", "origin", split, "", "", ""))
            for model, store in (("=seen", "gallery"), ("blurred", "unseen"), ("other", "unseen")):
                for s in STRENGTHS[: 1 + (model != "other")]:
                    name = f"{i}-{model.strip('=')}-{s}.png"
                    translated(model, i, s).save(folder / name)
                    stores[store].append(
                        (name, i, f"photo {i}", "translation", split, model, s, f"a {model}")
                    )
    for name, rows in stores.items():
        encoded(folder, name, rows)
    invoke(
        "solve",
        "--method",
        "gnull",
        *KNOBS,
        "--store",
        folder / "gallery.zarr",
        "--out",
        folder / "W.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(world: Path) -> evaluating.Evaluated:
    return evaluating.evaluate(
        world / "gallery.zarr",
        [world / "W.safetensors"],
        EvaluateOptions(upper=True),
        queries=[world / "gallery.zarr", world / "unseen.zarr"],
    )


def by_hand(world: Path, W: Projection | None, chosen: Any) -> float:
    """mAP of the test queries that ``chosen`` takes (model, strength), from the latents alone, in float64."""
    gallery, other = (Collection.open(world / f"{n}.zarr") for n in ("gallery", "unseen"))
    rows = gallery.gallery
    references = gallery.read(rows).astype(float)
    embed = (lambda x, side: x) if W is None else (lambda x, side: np.asarray(W.coordinates(x, side), float))
    found = []
    for store in (gallery, other):
        for q in np.flatnonzero((store.role == "translation") & (store.split == "test")):
            if chosen(store.model[q], store.strength[q]):
                query = embed(store.read(np.array([q])).astype(float), "query")[0]
                refs = embed(references, "reference")
                scores = refs @ query / np.linalg.norm(refs, axis=1)
                own = gallery.identity[rows] == store.identity[q]
                found.append(1 / (1 + np.count_nonzero(scores[~own] >= scores[own].max())))
    return float(np.mean(found))


def figure(report: results.Report, name: str, subject: str, **axes: Any) -> results.Figure:
    found = [f for f in report.figures if (f.name, f.subject) == (name, subject) and f.axes == axes]
    assert len(found) == 1, (name, subject, axes, found)
    return found[0]


# --- groups -----------------------------------------------------------------------------------------------


def test_every_group_is_the_mean_of_its_queries_by_hand(world: Path, evaluated: evaluating.Evaluated) -> None:
    report, W = evaluated.report, Projection.load(world / "W.safetensors")
    for axes, chosen in (
        ({}, lambda m, s: True),
        ({"model": "blurred", "domain": "unseen"}, lambda m, s: m == "blurred"),
        ({"strength": 0.5}, lambda m, s: s < 0.6),
        ({"domain": "seen"}, lambda m, s: m == "=seen"),
        ({"model": "=seen", "strength": 0.7, "domain": "seen"}, lambda m, s: m == "=seen" and s > 0.6),
    ):
        for subject, projection in (("gnull", W), ("raw", None)):
            # Ranks are equal unless float32 and float64 differ in which of two near scores is larger.
            assert figure(report, "mAP", subject, **axes).value == pytest.approx(
                by_hand(world, projection, chosen), abs=1e-9
            ), (axes, subject)


def test_unseen_models_weigh_the_same_whatever_their_queries(evaluated: evaluating.Evaluated) -> None:
    """Table 3's mean is over models; the mean over queries is another number."""
    report = evaluated.report
    models = [figure(report, "mAP", "gnull", model=m, domain="unseen") for m in ("blurred", "other")]
    assert models[0].n == 2 * (models[1].n or 0)
    unseen = figure(report, "mAP", "gnull", domain="unseen")
    assert unseen.value == pytest.approx(np.mean([m.value for m in models]), abs=1e-12)
    assert abs(unseen.value - (2 * models[0].value + models[1].value) / 3) > 1e-3
    assert unseen.interval is not None
    assert unseen.interval[0] < unseen.value < unseen.interval[1]


def test_chance_of_a_domain_is_the_mean_over_its_models(evaluated: evaluating.Evaluated) -> None:
    report = evaluated.report
    models = [figure(report, "µAP", "chance", model=m, domain="unseen") for m in ("blurred", "other")]
    mean = np.mean([f.value for f in models])
    assert figure(report, "µAP", "chance", domain="unseen").value == pytest.approx(mean, rel=1e-12)
    both = chance_micro(sum(f.n or 0 for f in models), 108, top=measure.TOP)
    assert abs(mean - both) > 1e-4 * mean, "one list of both models is another number"


def test_the_whole_is_what_solve_reports(world: Path) -> None:
    own = evaluating.evaluate(world / "gallery.zarr", [world / "W.safetensors"])
    solved = results.load(world / "W.results.json")
    wanted = [f for f in solved.figures if f.name in ("mAP", "Acc", "gain over best control")]
    taken = [
        f for f in own.report.figures if f.name in {w.name for w in wanted} and not f.axes.get("strength")
    ]
    assert [(f.name, f.subject, f.group, f.value, f.interval, f.n, f.note) for f in wanted] == [
        (f.name, f.subject, f.group, f.value, f.interval, f.n, f.note) for f in taken
    ]
    assert own.report.title == "gnull on translations (seen model)"
    assert own.report.summary == [s for s in solved.summary if "best control" in s]
    # Its one model was learned from, so that it has a domain and no group of its own.
    assert {f.axes.get("domain") for f in taken} == {"seen"}
    assert {c.kind for c in own.slices} == {"all", "strength"}


def test_every_figure_stands_beside_controls_and_chance(evaluated: evaluating.Evaluated) -> None:
    for cut in evaluated.slices:
        here = [f for f in evaluated.report.figures if f.group == cut.group.name]
        roles = {f.subject: f.role for f in here if f.name == "mAP"}
        assert {"gnull", "raw", "norm-weighted", "chance"} <= set(roles)
        assert any(s.startswith("PCA-whitened") for s in roles)
        names = {f.name for f in here if f.subject == "gnull"}
        wanted = {"mAP", "Acc", "gain over best control"}
        if cut.kind != "cell":
            wanted |= {"recall@1", "recall@5", "recall@10", "recall@100", "µAP", "margin"}
        assert wanted <= names
        for f in here:
            if f.name in ("mAP", "Acc") and f.role in ("method", "control"):
                assert f.interval is not None
                assert f.interval[0] <= f.value <= f.interval[1]
    recall = {f.group: f.value for f in evaluated.report.find("recall@1")}
    acc = {f.group: f.value for f in evaluated.report.find("Acc") if f.group in recall}
    assert recall == acc


def test_references_that_do_not_fit_give_the_same_figures(
    world: Path, evaluated: evaluating.Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranked, "HELD", 0)
    monkeypatch.setattr("cli.collection.BLOCK", 32)  # 108 origins: several blocks and a short one
    monkeypatch.setattr("cli.collection.HELD", 0)
    streamed = evaluating.evaluate(
        world / "gallery.zarr",
        [world / "W.safetensors"],
        EvaluateOptions(upper=True),
        queries=[world / "gallery.zarr", world / "unseen.zarr"],
    )
    for a, b in zip(evaluated.report.figures, streamed.report.figures, strict=True):
        assert (a.name, a.subject, a.group, a.n) == (b.name, b.subject, b.group, b.n)
        # Products in blocks of another size round otherwise: scores, and so margins, move by float32's eps.
        scale = 1e-5 * max(1.0, abs(a.value)) if a.name.startswith("margin") else 1e-9
        assert a.value == pytest.approx(b.value, abs=scale)


def test_a_row_is_projected_to_the_same_bits_wherever_it_stands(world: Path) -> None:
    gallery, W = Collection.open(world / "gallery.zarr"), Projection.load(world / "W.safetensors")
    rows = gallery.gallery
    whole = np.concatenate(list(gallery.reference_blocks(W, rows)))
    for some in (rows[5:6], rows[::-7], rows[40:]):
        alone = np.concatenate(list(gallery.reference_blocks(W, some)))
        assert np.array_equal(alone, whole[np.searchsorted(rows, some)])


def test_seen_models_are_told_by_the_map_its_data_or_the_identities_that_it_used(world: Path) -> None:
    stores = [Collection.open(world / f"{n}.zarr") for n in ("gallery", "unseen")]
    W = Projection.load(world / "W.safetensors")
    assert W.provenance["models"] == ["=seen"]
    used = {"method": "gnull", "used_identities": W.used_identities}
    told = Projection(W.query_map, W.query_map, provenance={"models": ["elsewhere"]}, **used)
    hashed = Projection(W.query_map, W.query_map, data_hash=W.data_hash, **used)
    bare = Projection(W.query_map, W.query_map, **used)
    pairless = Projection(W.query_map, W.query_map, method="analytic")
    assert grouping.seen_models(told, stores) == {"elsewhere"}
    assert grouping.seen_models(hashed, stores) == {"=seen"}
    assert grouping.seen_models(bare, stores) == {"=seen", "blurred", "other"}, "only identities are known"
    assert grouping.seen_models(pairless, stores) is None


def test_simulated_queries_are_an_oracle_in_every_group(world: Path, tmp_path: Path) -> None:
    invoke("simulate", "--store", world / "gallery.zarr", "--out", tmp_path / "a.zarr")
    queries = [world / "gallery.zarr", tmp_path / "a.zarr"]
    done = evaluating.evaluate(world / "gallery.zarr", [world / "W.safetensors"], queries=queries)
    groups = {f.axes.get("model"): f.group for f in done.report.figures if "model" in f.axes}
    for model, group in groups.items():
        assert group.startswith("oracle: ") == str(model).startswith("analytic diffusion")


# --- the upper bound --------------------------------------------------------------------------------------


def test_the_upper_bound_is_a_fit_on_that_model_alone(world: Path, evaluated: evaluating.Evaluated) -> None:
    gallery, other = (Collection.open(world / f"{n}.zarr") for n in ("gallery", "unseen"))
    origin = dict(zip(gallery.identity[gallery.gallery], gallery.gallery, strict=True))
    moved = False
    for model in ("blurred", "other"):
        own = (other.model == model) & (other.role == "translation")
        train, test = (np.flatnonzero(own & (other.split == s)) for s in ("train", "test"))
        origins = np.array([origin[i] for i in other.identity[train]])
        data = PairData.from_arrays(
            gallery.read(origins), other.read(train),
            origins=gallery.read(np.unique(origins)), gallery=gallery.read(gallery.gallery),
        )  # fmt: skip
        W = GeneralisedNull(24, 1.0).fit(data).projection()
        ranking = average_precision(
            W.queries(other.read(test)), other.identity[test],
            W.references(gallery.read(gallery.gallery)), gallery.identity[gallery.gallery],
        )  # fmt: skip
        bound = figure(evaluated.report, "mAP", "gnull", model=model, domain="upper")
        # The two sum their covariances in another order.
        assert bound.value == pytest.approx(ranking.map, abs=1e-6)
        moved |= bound.value != figure(evaluated.report, "mAP", "gnull", model=model, domain="unseen").value
    assert moved, "a fit on another model is another map"
    mean = figure(evaluated.report, "mAP", "gnull", domain="upper")
    each = [
        figure(evaluated.report, "mAP", "gnull", model=m, domain="upper").value for m in ("blurred", "other")
    ]
    assert mean.value == pytest.approx(np.mean(each), abs=1e-12)


def test_maps_of_different_models_have_no_common_domain_and_each_its_own_bound(
    world: Path, tmp_path: Path, evaluated: evaluating.Evaluated
) -> None:
    W = Projection.load(world / "W.safetensors")
    every = {**W.provenance, "models": ["=seen", "blurred", "other"]}
    replace(W, provenance=every).save(tmp_path / "all.safetensors")
    replace(W, provenance={**every, "models": ["=seen", "other"]}).save(tmp_path / "two.safetensors")
    both = evaluating.evaluate(
        world / "gallery.zarr",
        [world / "W.safetensors", tmp_path / "all.safetensors", tmp_path / "two.safetensors"],
        EvaluateOptions(upper=True, pictures=0),
        queries=[world / "gallery.zarr", world / "unseen.zarr"],
    )
    assert {f.axes.get("domain") for f in both.report.figures} == {None, "upper"}
    assert both.report.data["seen models"] == {
        "W": ["=seen"],
        "all": every["models"],
        "two": ["=seen", "other"],
    }
    said = "\n".join(both.report.caveats)
    assert "learned from different models (W: =seen; all: =seen, blurred, other; two: =seen, other)" in said
    assert "different models (W: blurred, other; two: blurred) and cannot be compared" in said
    assert "Upper bound of all: it learned from every model" in said
    bounds = {
        (f.subject, f.axes.get("model")) for f in both.report.figures if f.axes.get("domain") == "upper"
    }
    assert bounds == {*(("W", m) for m in ("blurred", "other", None)), ("two", "blurred"), ("two", None)}
    for model in ("blurred", "other"):
        bound = figure(both.report, "mAP", "W", model=model, domain="upper")
        assert bound.value == figure(evaluated.report, "mAP", "gnull", model=model, domain="upper").value


def test_the_bound_stands_beside_what_the_map_reached(evaluated: evaluating.Evaluated) -> None:
    def bound(shown: evaluating.Evaluated) -> dict[str, str]:
        text = render_evaluate.said(shown)
        lines = text[text.index("Upper bound") :].split("\n\n")[0].splitlines()[3:]
        return {line.strip().split("  ")[0]: line.split()[-1] for line in lines}

    report = evaluated.report
    own = {
        m: 100 * figure(report, "mAP", "gnull", model=m, domain="unseen").value for m in ("blurred", "other")
    }
    unseen = 100 * figure(report, "mAP", "gnull", domain="unseen").value
    assert bound(evaluated) == {
        **{model: f"{value:.1f}" for model, value in own.items()},
        "mean over models": f"{unseen:.1f}",
    }
    less = [f for f in report.figures if f.axes != {"model": "other", "domain": "upper"}]
    alone = bound(replace(evaluated, report=replace(report, figures=less)))
    assert alone == {"blurred": f"{own['blurred']:.1f}"}, "a mean of one is no row"


def test_where_there_is_no_upper_bound_a_sentence_says_why(world: Path, tmp_path: Path) -> None:
    gallery, W = world / "gallery.zarr", world / "W.safetensors"
    options = EvaluateOptions(upper=True, pictures=0)

    def said(projection: Path, *queries: Path) -> str:
        return "\n".join(evaluating.evaluate(gallery, [projection], options, queries=queries).report.caveats)

    assert "W is its own upper bound" in said(W)
    lines = [
        (f"{i}-other-0.5.png", i, f"photo {i}", "query", "test", "strange", "", "") for i in SPLITS["test"]
    ]
    lone = shutil.copytree(world, tmp_path / "w")
    assert "no store here has a training pair" in said(W, encoded(lone, "lone", lines))
    invoke(
        "solve",
        "--method",
        "analytic",
        "--rank",
        "24",
        "--store",
        gallery,
        "--out",
        tmp_path / "A.safetensors",
    )
    assert "learned from pairs" in said(tmp_path / "A.safetensors")


# --- leaks ------------------------------------------------------------------------------------------------


def checks(gallery: Path, *queries: Path, W: Projection | None = None) -> dict[str, leakage.Check]:
    collection = Collection.open(gallery)
    parts = [Collection.open(q).queries("test", origins_elsewhere=True) for q in queries]
    asked = Asked.of(collection, parts)
    return {c.name: c for c in leakage.look(collection, asked, {} if W is None else {"W": W})}


def test_leaks_are_found_and_clean_stores_have_none(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("*.zarr"))
    clean = checks(world / "gallery.zarr", world / "unseen.zarr")
    assert [c.name for c in clean.values() if c.finding] == ["groups of near-duplicates in the gallery"]
    test = list(SPLITS["test"])
    origins = [(f"{i}.png", i, f"photo {i}", "origin", "test", "", "", "") for i in test]
    shutil.copy(folder / f"{test[0]}.png", folder / "copy.png")
    # A copy of the first in another split, under other names.
    gallery = encoded(
        folder, "leaky", [*origins, ("copy.png", "alias", "elsewhere", "origin", "train", "", "", "")]
    )

    def asked(path: str, i: int, split: str = "test", role: str = "query") -> tuple[Any, ...]:
        return path, i, f"photo {i}", role, split, "m", "", ""

    queries = encoded(
        folder,
        "asked",
        [
            *(asked(f"{i}-other-0.5.png", i) for i in test[:4] if i != test[1]),
            asked(f"{test[1]}-other-0.5.png", test[1], "train", "translation"),
            asked(f"{test[4]}.png", test[4]),  # is its origin
            asked(f"{test[6]}.png", test[5]),  # is another's
        ],
    )
    found = {name: c for name, c in checks(gallery, queries).items() if c.finding}
    counts = {name: c.count for name, c in found.items()}
    assert counts == {
        "identities in more than one split": 1,
        "photos in more than one split": 1,
        "queries left out, a copy of whose origin stands in an earlier split": 1,
        "queries that are their origin's file": 1,
        "queries that are another image's file": 1,
        "groups of near-duplicates in the gallery": 0,
    }
    assert f"({test[1]})" in found["identities in more than one split"].said


def test_strict_ends_with_3_until_near_duplicates_were_looked_for(world: Path, tmp_path: Path) -> None:
    gallery = shutil.copytree(world / "gallery.zarr", tmp_path / "g.zarr")
    words = ("evaluate", "--projection", world / "W.safetensors", "--store", gallery, "--pictures", "0")
    text = invoke(*words, "--strict", code=3).stdout
    assert "Leakage check: 1 finding" in text
    assert "! Near-duplicate origins were not looked for" in text
    invoke("duplicates", gallery)
    text = invoke(*words, "--strict").stdout
    assert "Leakage check: nothing found" in text
    assert text.index("Leakage check") < text.index("mAP")


def test_what_a_map_was_fitted_on_is_told_refused_or_said_to_be_unknown(world: Path) -> None:
    W = Projection.load(world / "W.safetensors")
    other = world / "unseen.zarr"
    known = checks(world / "gallery.zarr", other, W=W)
    told = next(c for c in known.values() if "fitted or chosen on" in c.name)
    assert (told.count, told.finding) == (len(W.used_identities), False)
    strange = Projection(W.query_map, W.query_map, method="torch weight")
    elsewhere = replace(W, data_hash="0" * 64, provenance={**W.provenance, "store": "far.zarr"})
    far = next(
        c
        for c in checks(world / "gallery.zarr", other, W=elsewhere).values()
        if "fitted or chosen on" in c.name
    )
    assert far.finding
    assert "by name none of them is asked, but they are of data that is not given here (far.zarr)" in far.said
    unknown = next(
        c
        for c in checks(world / "gallery.zarr", other, W=strange).values()
        if "fitted or chosen on" in c.name
    )
    assert unknown.finding
    assert "not recorded" in unknown.sentence
    seen = W.using([f"{SPLITS['test'][0]}"])
    seen.save(world / "leaking.safetensors")
    done = invoke(
        "evaluate", "--projection", world / "leaking.safetensors", "--store", world / "gallery.zarr", code=1
    )
    assert "1 of the" in paragraph(done)


# --- pictures, costs, files -------------------------------------------------------------------------------


def test_failures_are_the_narrowest_and_the_widest_and_show_the_origin(world: Path) -> None:
    gallery, other = (Collection.open(world / f"{n}.zarr") for n in ("gallery", "unseen"))
    asked = Asked.of(gallery, [gallery.queries("test"), other.queries("test", origins_elsewhere=True)])
    raw = measure.fit_controls(gallery, 8)["raw"]
    ranking = ranked.rankings(gallery, asked, {"raw": raw}, top=measure.TOP)["raw"]
    missed = np.sort(ranking.margin[~ranking.hit1])
    assert len(missed) >= 8
    picked = failures.pick(ranking, 8)
    margins = ranking.margin[picked]
    assert margins[:4].tolist() == [*missed[::-1][:2], *missed[:2]]
    assert (ranking.hit1[picked[4:]]).all()
    assert len(set(picked)) == 8
    everything = failures.pick(ranking, 10_000)
    assert sorted(everything) == list(range(len(ranking.ap)))
    shown = failures.pictured(gallery, asked, ranking, 8)
    for i, match in zip(picked, shown, strict=True):
        assert match.rank == ranking.rank[i]
        assert match.thumbnail.startswith("data:image/jpeg")
        right = [c for c in match.candidates if c.correct]
        assert len(right) == 1
        assert match.query.startswith(f"{right[0].identity}-"), "its own origin"
        at = match.candidates.index(right[0])
        assert at == min(match.rank - 1, failures.CANDIDATES)
        scores = [c.score for c in match.candidates]
        assert scores == sorted(scores, reverse=True)
        assert match.margin == pytest.approx(scores[0] - scores[1])
        assert all(c.thumbnail.startswith("data:image/jpeg") for c in match.candidates)
    assert "strength 0." in shown[0].group


def test_efficiency_is_timed_and_what_is_not_known_is_said(world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "W.safetensors", tmp_path / "moved.safetensors")
    options = EvaluateOptions(efficiency=True, pictures=0)
    W, moved = world / "W.safetensors", tmp_path / "moved.safetensors"
    report = evaluating.evaluate(world / "gallery.zarr", [W, moved], options).report
    costs = {(f.name, f.subject): f for f in report.figures if f.group == "efficiency"}
    units = {"training": "h", "decoding": "s/img", "extraction": "s/img", "matching": "s/pair"}
    assert {(f.name, f.unit) for f in costs.values()} == set(units.items())
    assert all(f.value > 0 for f in costs.values())
    solved = results.load(world / "W.results.json").timings["fit"]
    assert costs["training", "W"].value == pytest.approx(solved / 3600)
    assert ("training", "moved") not in costs
    assert {s for n, s in costs if n == "matching"} == {"W", "moved", "raw"}
    assert any("Training of moved is not told" in c for c in report.caveats)
    assert any("this machine" in c for c in report.caveats)


def test_times_are_medians_of_warm_runs_by_item(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted clock: a first run of 100 s is never counted, and then 1, 9 and 2 s are a median of 2 s."""
    now, script = [0.0], list[float]()
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(efficiency, "SECONDS", 10.0)

    def run(*args: Any, **more: Any) -> None:
        now[0] += script.pop(0)

    for repeat in range(2):
        script[:] = [100.0, 1.0, 9.0, 2.0]
        assert efficiency._median(run) == (2.0, 3), repeat
        assert script == []
    script[:] = [100.0, 1.0, 1.0, 1.0, 2.0, 3.0, 7.0]
    assert efficiency._median(run) == (1.0, efficiency.REPEATS)
    assert script == [7.0], "one run before those that count, and no more than are wanted"

    gallery = Collection.open(world / "gallery.zarr")
    asked = Asked.of(gallery, [gallery.queries("test")])
    raw = measure.fit_controls(gallery, 8)["raw"]
    monkeypatch.setattr(efficiency.search, "top_k", run)
    script[:] = [100.0, 1.0, 9.0, 2.0]
    seconds, note = efficiency._matching(gallery, asked, raw, "cpu")
    pairs = len(asked) * len(gallery.gallery)
    assert seconds == pytest.approx(2.0 / pairs, rel=1e-15)
    assert f"{len(asked)} queries × {len(gallery.gallery)} references" in note

    encoder = efficiency.encoders.load_for(gallery.store.space, gallery.store.provenance["encoder"])
    monkeypatch.setattr(efficiency.encoders, "load_for", lambda *args, **more: encoder)
    monkeypatch.setattr(encoder, "encode", run, raising=False)
    # Reading costs nothing by this clock: decoding is timed apart from extraction.
    script[:] = [100.0, 1.0, 9.0, 2.0]
    found = {name: seconds for name, seconds, *_ in efficiency._extraction(gallery, "cpu", [])}
    assert found == {"decoding": 0.0, "extraction": pytest.approx(2.0 / encoder.batch, rel=1e-15)}


def test_costs_and_margins_fit_eighty_columns(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = EvaluateOptions(efficiency=True, pictures=0)
    done = evaluating.evaluate(world / "gallery.zarr", [world / "W.safetensors"], options)
    text = render_evaluate.said(done)
    head = text[: text.index(done.report.summary[0])].splitlines()
    after = head.index("") + 2 + len(done.checks)  # what was looked at is told in sentences
    assert max(map(len, head[after:])) <= 80
    assert "cannot be compared): gnull " in " ".join(text.split())
    assert "matching (gnull): exact search" in " ".join(text.split())


def test_a_device_that_is_not_there_is_told_first(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: str) -> str:
        raise UsageError(f"no {device}")

    monkeypatch.setattr(evaluating.search, "find_device", none)
    with pytest.raises(UsageError, match="no cuda"):
        evaluating.evaluate(world / "no.zarr", [world / "no.safetensors"], EvaluateOptions(device="cuda"))


def test_one_image_is_no_gallery(world: Path, tmp_path: Path) -> None:
    i = SPLITS["test"][0]
    folder = shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("*.zarr"))
    rows = [(f"{i}.png", i, "p", "origin", "test", "", "", "")]
    lone = encoded(folder, "lone", [*rows, (f"{i}-other-0.5.png", i, "p", "query", "test", "", "", "")])
    for name in ("evaluate", "attack"):
        told = paragraph(invoke(name, "--projection", world / "W.safetensors", "--store", lone, code=2))
        assert "holds 1 image to search" in told


def test_the_command_writes_what_it_says(world: Path, tmp_path: Path) -> None:
    out, table, page = (tmp_path / f"r.{kind}" for kind in ("json", "csv", "html"))
    text = invoke(
        "evaluate", "--projection", world / "W.safetensors", "--store", world / "gallery.zarr",
        "--queries", world / "gallery.zarr", "--queries", world / "unseen.zarr", "--upper",
        "--out", out, "--csv", table, "--html", page,
    ).stdout  # fmt: skip
    for part in (
        "Leakage check",
        "seen",
        "By model",
        "By strength",
        "by strength and model",
        "Upper bound",
        "µAP",
    ):
        assert part in text
    tables = [line for line in text.splitlines() if line.startswith("  ") and "  " in line.strip()]
    assert max(map(len, tables)) <= 120
    report = results.load(out)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.figures)
    assert {r["model"] for r in rows} == {"", "'=seen", "blurred", "other"}, "no formula"
    assert [float(r["value"]) for r in rows] == [f.value for f in report.figures]
    held = page.read_text(encoding="utf-8")
    assert "data:image/jpeg" in held
    assert "<script" not in held


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--projection", "no.safetensors"], 2, ["no.safetensors", "solve"]),
        (["--store", "nowhere.zarr"], 2, ["nowhere.zarr"]),
        (["--queries", "nowhere.zarr"], 2, ["nowhere.zarr"]),
        (["--out", "no/where/r.json"], 2, ["--out", "no/where"]),
        (["--html", "."], 2, ["--html", "folder"]),
        (["--projection", "W.safetensors", "--projection", "W.safetensors"], 2, ["W", "once"]),
        (["--store", "unseen.zarr"], 2, ["no valid origin"]),
        (["--queries", "unseen.zarr", "--queries", "../{}/unseen.zarr"], 2, ["--queries", "twice"]),
    ],
)
def test_bad_input_is_told_in_one_paragraph(
    world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, parts: list[str]
) -> None:
    monkeypatch.chdir(world)
    defaults = {"--projection": "W.safetensors", "--store": "gallery.zarr"}
    rest = [w for k, v in defaults.items() if k not in words for w in (k, v)]
    told = paragraph(invoke("evaluate", *(w.format(world.name) for w in words), *rest, code=code))
    for part in parts:
        assert part in told


def test_json_is_the_report_and_nothing_else(world: Path) -> None:
    words = ("evaluate", "--projection", world / "W.safetensors", "--store", world / "gallery.zarr", "--json")
    report = json.loads(invoke(*words).stdout)
    assert results.from_dict(report).kind == "evaluation"
