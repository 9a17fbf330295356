"""solve over the whole family: knobs read off the methods, some chosen on validation, simulated pairs."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import SPLITS, pair_store
from typer.testing import CliRunner

from cli import choosing, commands, knobs, measure, simulating
from cli.app import app
from cli.collection import Collection
from cli.workflows import run_encode
from latentstore.errors import UsageError
from latentstore.results import load
from latentstore.simulate import Diffusion, GaussianPrior, translate
from solvers.errors import SolverUsageError
from solvers.methods import METHODS, build
from solvers.metrics import average_precision
from solvers.projection import Projection
from solvers.spectrum import fit_spectrum

CLOSED = [name for name, method in METHODS.items() if not method.needs_torch]
ABOUT_THE_RUN = {"method", "rank", "store", "out", "queries", "simulated", "with_cosface", "json_"}
ABOUT_THE_RUN |= {"init", "latents", "log", "plot", "fresh", "checkpoint_every"}


def solve(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["solve", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_store(tmp_path_factory.mktemp("family"), 0.5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection without pairs."""
    return pair_store(tmp_path_factory.mktemp("alone"), 0.5, splits=())


def test_every_knob_is_an_option_and_every_option_a_knob() -> None:
    options = set(inspect.signature(commands.solve).parameters) - ABOUT_THE_RUN
    owned = {k for name in METHODS for k in knobs.fields(name)}
    assert options == {knobs.option(k).removeprefix("--").replace("-", "_") for k in owned}


def test_a_method_takes_its_own_knobs_and_refuses_all_others() -> None:
    every = {k for name in METHODS for k in knobs.fields(name)} - {"preset", "budget", "seed"}
    for method in CLOSED:
        for knob in every:
            default = getattr(METHODS[knobs.owners(knob)[0]], knob)
            value = (4, 4, 4) if knob == "latent_shape" else 0.5 if default is None else default
            if knob in knobs.fields(method):
                assert knobs.SolveOptions.of(method, **{knob: value}).knobs == {knob: value}
            else:
                with pytest.raises(UsageError, match=rf"{knobs.option(knob)} is a knob of .*{method}"):
                    knobs.SolveOptions.of(method, **{knob: value})


@pytest.mark.parametrize("method", CLOSED)
def test_every_method_is_fitted_measured_and_its_open_knobs_chosen(
    method: str, store: Path, tmp_path: Path
) -> None:
    W = tmp_path / "W.safetensors"
    rank = ["--rank", "12"] if knobs.has_rank(method) else []
    text = solve("--method", method, *rank, "--store", store, "--out", W)
    said = "is a control itself" if method in measure.THEMSELVES else "best control"
    for part in (method, "raw", "norm-weighted", "PCA-whitened ½", said):
        assert part in text
    projection, report = Projection.load(W), load(W.with_suffix(".results.json"))
    assert projection.method == method
    assert projection.rank == (12 if knobs.has_rank(method) else 64)
    grid = choosing.open_knobs(method)
    tried = report.data.get("tried", [])
    assert len(tried) == (np.prod([len(v) for v in grid.values()]) if grid else 0)
    assert ("chosen on validation" in text) == bool(grid)
    if grid:
        (best,) = (row for row in tried if row["chosen"])
        assert best["map"] == max(row["map"] for row in tried)
        assert all(projection.knobs[k] == best["knobs"][k] for k in grid)
        assert len({row["map"] for row in tried}) > 1, "else this world cannot tell settings apart"


def test_the_choice_is_what_validation_says_of_each_setting_alone(store: Path, tmp_path: Path) -> None:
    W = tmp_path / "W.safetensors"
    solve("--method", "plda", "--rank", "12", "--store", store, "--out", W)
    collection = Collection.open(store)
    queries, reached = collection.queries("validation"), {}
    for lam in choosing.LAMBDAS:
        for score in ("cosine", "bias"):
            p = build("plda", rank=12, lam=lam, score=score).fit(collection.data).projection()
            done = measure.evaluate(collection, queries, {"plda": p}, {})
            reached[lam, score] = done.methods[0].ranking.map
    tried = load(W.with_suffix(".results.json")).data["tried"]
    found = {(row["knobs"]["lam"], row["knobs"]["score"]): row["map"] for row in tried}
    # Equal maps, in the same arithmetic: only scores within rounding may change places.
    assert found == pytest.approx(reached, abs=0.5 / len(queries.rows))


def test_what_is_named_is_not_chosen(store: Path, tmp_path: Path) -> None:
    W = tmp_path / "W.safetensors"
    words = ["--method", "cca", "--rank", "8", "--store", store, "--out", W]
    text = solve(*words, "--lam", "3")
    assert "score = " in text
    assert "λ = " not in text
    assert Projection.load(W).knobs["lam"] == 3
    assert "chosen on validation" not in solve(*words, "--lam", "3", "--score", "bias")
    assert Projection.load(W).score == "bias"
    # A map on which nothing was chosen has not used validation's identities.
    whole, test = Collection.open(store), len(SPLITS["train"])
    used = measure.used_names(whole, whole.pairs("train")[1])
    assert len(Projection.load(W).used_identities) == len(used) == 2 * test


def test_a_score_is_how_the_same_maps_are_read() -> None:
    """Settings that differ in their score share one fit; that rests on this."""
    rng = np.random.default_rng(0)
    o = rng.normal(size=(200, 12)) * np.geomspace(1, 5, 12)
    from solvers.data import PairData

    data = PairData.from_arrays(o, o + rng.normal(size=o.shape))
    for method in CLOSED:
        if "score" in knobs.fields(method):
            one, other = (build(method, rank=6, score=s).fit(data).projection() for s in ("cosine", "bias"))
            read = one.with_score("bias")
            assert np.array_equal(read.references(o), other.references(o)), method
            assert dict(read.knobs) == dict(other.knobs)


@pytest.mark.parametrize(
    ("method", "knob"), [("gnull", {}), ("plda", {"score": "bias"}), ("norm-weighted", {})]
)
def test_prefixes_are_the_maps_that_are_cut(method: str, knob: dict[str, Any], store: Path) -> None:
    collection = Collection.open(store)
    judge = choosing.Judge.of(collection, collection.queries("validation"), 64)
    assert judge is not None
    p = build(method, rank=16 if knobs.has_rank(method) else None, **knob).fit(collection.data).projection()
    ranks = [2, 7, 16] if knobs.has_rank(method) else [p.rank]
    for k, found in judge.prefixes(p, ranks).items():
        cut = p if k == p.rank else p.truncated(k)
        alone = average_precision(
            cut.queries(judge.latents), judge.labels, collection.references(cut, judge.rows), judge.ids
        )
        assert np.abs(found.ap - alone.ap).mean() < 0.5 / judge.n  # scores within rounding may change places
        if k < p.rank:
            assert not np.array_equal(found.ap, judge.ranking(p).ap)


def test_nothing_is_chosen_on_a_query_whose_origin_has_a_copy_in_training(store: Path) -> None:
    collection = Collection.open(store)
    queries = collection.queries("validation")
    whole = choosing.Judge.of(collection, queries, 64)
    assert whole is not None
    assert whole.n == len(queries.rows)
    own, other = (
        collection.gallery[collection.split[collection.gallery] == s][0] for s in ("validation", "train")
    )
    collection = Collection.open(store)
    collection.sha256[other] = collection.sha256[own]
    judge = choosing.Judge.of(collection, collection.queries("validation"), 64)
    assert judge is not None
    assert judge.n == whole.n - 1
    assert collection.identity[own] not in judge.labels


def test_ranks_that_are_none(store: Path) -> None:
    words = ["--store", store]
    assert "--rank is 'many'" in solve("--rank", "many", *words, code=2)
    assert "needs a number" in solve("--method", "svd", "--rank", "all", *words, code=2)
    assert "has no rank" in solve("--method", "identity", "--rank", "8", *words, code=2)
    assert "--alpha-bar is '0.1,x'" in solve("--method", "analytic", "--alpha-bar", "0.1,x", *words, code=2)
    assert "between 0 and 1" in solve(
        "--method", "analytic", "--rank", "8", "--alpha-bar", "0.1,1.5", *words, code=2
    )
    for text in ("4,4", "a", "0,8,8"):
        assert "--latent-shape is" in solve("--method", "analytic", "--latent-shape", text, *words, code=2)


def test_rank_all_keeps_every_direction(store: Path, tmp_path: Path) -> None:
    W = tmp_path / "W.safetensors"
    for method, extra in (("analytic", ["--latent-shape", "store"]), ("pca", ["--exponent", "0.3"])):
        solve("--method", method, "--rank", "all", *extra, "--store", store, "--out", W)
        assert Projection.load(W).rank > 40
    assert Projection.load(W).knobs["exponent"] == 0.3


def test_queries_of_another_store_choose_and_measure(alone: Path, store: Path, tmp_path: Path) -> None:
    W = tmp_path / "W.safetensors"
    words = ["--method", "analytic", "--rank", "16", "--store", alone, "--out", W]
    assert "Not measured" in solve(*words)
    text = solve(*words, "--queries", store)
    assert "score = " in text
    assert "36 queries" in text
    folder = tmp_path / "wide"
    folder.mkdir()
    run_encode(
        alone.parent,
        folder / "w.zarr",
        manifest=alone.parent / "pairs.zarr.csv",
        encoder="patch",
        image_size=64,
    )
    assert "space" in solve(*words, "--queries", folder / "w.zarr", code=1)
    assert "nowhere" in solve(*words, "--queries", tmp_path / "nowhere.zarr", code=2)


# --- simulated pairs ---------------------------------------------------------------------------------------


def test_pairs_are_drawn_from_training_images_at_every_strength(alone: Path) -> None:
    collection = Collection.open(alone)
    strengths = knobs.Strengths((0.1, 0.6), 0.3, seed=4)
    made = simulating.SimulatedPairs.of(collection, strengths)
    assert set(collection.split[made.rows]) == {"train"}
    ((o, g),) = made.pairs()
    assert np.array_equal(o, collection.read(made.rows))
    rows = collection.read(made.rows).astype(np.float64)
    spectrum = fit_spectrum([rows], 64, len(rows))
    prior = GaussianPrior.from_spectrum(spectrum.mean, spectrum.values, spectrum.vectors)
    each = [translate(o, prior, Diffusion(a, 0.3, seed=4), made.rows) for a in (0.1, 0.6)]
    # Rounded to the stored float16.
    near = np.array([[np.allclose(g[i], t[i], rtol=2e-3, atol=2e-3) for t in each] for i in range(len(g))])
    assert (near.sum(axis=1) == 1).all(), "each row has one strength, and it is one of the two"
    assert (near.sum(axis=0) == len(g) / 2).all()
    again = simulating.SimulatedPairs.of(collection, strengths)
    assert np.array_equal(next(again.pairs())[1], g)
    other = simulating.SimulatedPairs.of(collection, replace(strengths, seed=5))
    assert not np.array_equal(next(other.pairs())[1], g)


def test_who_has_no_pairs_solves_on_simulated_ones(alone: Path, store: Path, tmp_path: Path) -> None:
    W = tmp_path / "W.safetensors"
    before = sorted(p.name for p in alone.rglob("*"))
    words = ["--method", "gnull", "--rank", "16", "--store", alone, "--out", W]
    assert "holds no pairs" in solve(*words, code=1)
    text = solve(*words, "--simulate")
    assert "fitted on simulated translations" in text
    assert "Not measured" in text
    assert "not a text-guided network" in text
    projection = Projection.load(W)
    assert projection.provenance["fitted on"].startswith("simulated translations (analytic diffusion, alpha")
    assert projection.knobs["lam"] == 1.0, "nothing to choose on leaves the default"
    assert sorted(p.name for p in alone.rglob("*")) == before, "no pair is written"
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    solve(*words[:-1], again, "--simulate")
    solve(*words[:-1], other, "--simulate", "--alpha-bar", "0.3", "--prompt-strength", "0", "--seed", "1")
    assert np.array_equal(Projection.load(again).query_map, projection.query_map)
    assert not np.array_equal(Projection.load(other).query_map, projection.query_map)
    assert "alpha_bar 0.3, prompt 0, seed 1" in Projection.load(other).provenance["fitted on"]
    # Measured on real queries where there are some, and never on what it was fitted on.
    measured = json.loads(solve(*words, "--simulate", "--queries", store, "--json"))
    assert any(f["name"] == "mAP" and f["subject"] == "gnull" for f in measured["figures"])
    assert measured["data"]["training pairs"] == len(SPLITS["train"])
    done = CliRunner().invoke(
        app, ["evaluate", "--projection", str(W), "--store", str(alone), "--queries", str(store)]
    )
    assert done.exit_code == 0, done.output


def test_simulating_what_cannot_be_is_refused(alone: Path, here: Path) -> None:
    words = ["--simulate", "--store", alone]
    assert "learns from none" in solve("--method", "analytic", *words, code=2)
    assert "between 0 and 1" in solve("--method", "gnull", "--rank", "8", "--alpha-bar", "2", *words, code=2)
    assert "--alpha-bar is a knob of analytic" in solve(
        "--method", "gnull", "--alpha-bar", "0.1", "--store", alone, code=2
    )
    few = here / "few"
    few.mkdir()
    (few / "one.png").write_bytes((alone.parent / "0.png").read_bytes())
    run_encode(few, here / "few.zarr", encoder="patch", image_size=32)
    said = solve("--method", "svd", "--rank", "4", "--simulate", "--store", here / "few.zarr", code=2)
    assert "at least 2" in said


def test_names_that_are_near(store: Path) -> None:
    assert "'auto'" in solve("--method", "autos", "--store", store, code=2)
    with pytest.raises(SolverUsageError, match="gnull"):
        knobs.check_name("wccn")


def test_the_controls_do_not_depend_on_the_rank_of_w(store: Path, tmp_path: Path) -> None:
    """PCA-whitening stands at the best of a ladder of ranks, by the very queries: no rank of W hides it."""
    best, ladder = {}, {}
    for rank in (5, 40):
        out = tmp_path / f"{rank}.safetensors"
        solve("--method", "gnull", "--rank", str(rank), "--lam", "1", "--store", store, "--out", out)
        figures = load(out.with_suffix(".results.json")).figures
        found = {f.subject: f.value for f in figures if (f.name, f.role) == ("mAP", "control")}
        ladder[rank] = {n: v for n, v in found.items() if " @" in n}
        best[rank] = max(v for n, v in found.items() if n.startswith("PCA"))
        assert sorted(n.partition(" @")[0] for n in ladder[rank]) == ["PCA-whitened ¼", "PCA-whitened ½"]
    assert ladder[5] == ladder[40]
    collection = Collection.open(store)
    queries = collection.queries("test")
    every = measure.fit_controls(collection, 40)
    steps = {n: p for n, p in every.items() if " @" in n}
    assert len(steps) > 4
    for name, value in ladder[40].items():
        own = [p for n, p in steps.items() if n.partition(" @")[0] == name.partition(" @")[0]]
        alone = [
            measure.evaluate(collection, queries, {"x": p}, {}).rankings["x", queries.group].map for p in own
        ]
        assert value == max(alone)


def test_a_control_has_nothing_to_beat(store: Path, tmp_path: Path) -> None:
    text = solve("--method", "norm-weighted", "--store", store, "--out", tmp_path / "W.safetensors")
    assert "norm-weighted is a control itself" in text
    assert text.count("\n  norm-weighted ") == 1
    assert "best control" not in text
