"""sweep: every rank beside its controls, the rank chosen on validation, models apart."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import picture
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from cli import measure, sweeping
from cli.app import app
from cli.collection import Collection
from latentstore import results

RANKS = (4, 16, 40)
LEVELS, LADDERS = {"raw", "centred", "norm-weighted"}, {"PCA-whitened ¼", "PCA-whitened ½", "random subspace"}
CONTROLS = LEVELS | LADDERS
SPLITS = {"train": range(60), "validation": range(60, 90), "test": range(90, 120)}


def invoke(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def blended(image: Image.Image, seed: int, share: float) -> Image.Image:
    return Image.blend(image, picture(10_000 + seed, 64), share)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures, each translated by model A; test pictures also by model B, which nothing trains on.

    Validation translations are near their origins, test translations farther from them.
    """
    folder = tmp_path_factory.mktemp("sweep")
    lines = ["path,identity,role,split,model"]
    for split, numbers in SPLITS.items():
        for i in numbers:
            own = picture(i, 64)
            shown = {"o": own, "a": blended(own, i, 0.3 if split == "validation" else 0.55)}
            if split == "test":
                shown["b"] = blended(blurred(own, 4), i + 500, 0.45)
            for kind, image in shown.items():
                image.save(folder / f"{i}{kind}.png")
                role, model = {"o": ("origin", ""), "a": ("translation", "A"), "b": ("query", "B")}[kind]
                lines.append(f"{i}{kind}.png,{i},{role},{split},{model}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    made = folder / "pairs.zarr"
    invoke("encode", "--manifest", folder / "list.csv", "--store", made, "--encoder=patch", "--image-size=64")
    return made


@pytest.fixture(scope="module")
def svd(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a sweep of svd says, and its CSV; the plot lies beside."""
    out = tmp_path_factory.mktemp("out") / "sweep.csv"
    asked = ",".join(map(str, [*RANKS[::-1], RANKS[0], 999]))
    said = invoke(
        "sweep", "--ranks", asked, "--store", store, "--out", out, "--plot", out.with_suffix(".png")
    )
    return said, out


def test_the_csv_has_every_rank_and_control_of_every_group(svd: tuple[str, Path]) -> None:
    rows = read(svd[1])
    assert tuple(rows[0]) == sweeping.COLUMNS
    tested = [r for r in rows if r["split"] == "test"]
    groups = list(dict.fromkeys(r["group"] for r in tested))
    assert groups == ["translations", "model A, seen in training", "model B, unseen in training"]
    for group in groups:
        here = [r for r in tested if r["group"] == group]
        assert [int(r["rank"]) for r in here if r["method"] == "svd"] == list(RANKS)
        assert {r["method"] for r in here} == {"svd", "chance"} | CONTROLS
        for name in LADDERS:
            assert set(RANKS) <= {int(r["rank"]) for r in here if r["method"] == name}
        assert {r["rank"] for r in here if r["method"] in LEVELS} == {"256"}
        # The gallery of 120 origins: 1/k is as likely for every place k.
        (chance,) = (r for r in here if r["method"] == "chance")
        assert float(chance["mAP"]) == pytest.approx(sum(1 / k for k in range(1, 121)) / 120, rel=1e-12)
    assert {r["n"] for r in tested} == {"60", "30"}
    for r in (r for r in rows if r["method"] != "chance"):
        assert 0 <= float(r["lower"]) <= float(r["mAP"]) <= float(r["upper"]) <= 1
        assert 0 <= float(r["Acc"]) <= float(r["mAP"]) + 1e-12, "a first place alone gives so much mAP"


def test_models_together_are_the_mean_of_the_models_apart(svd: tuple[str, Path]) -> None:
    tested = [r for r in read(svd[1]) if r["split"] == "test"]
    for rank in RANKS:
        own = [
            (float(r["mAP"]), int(r["n"])) for r in tested if (r["method"], r["rank"]) == ("svd", str(rank))
        ]
        (together, n), *apart = own
        assert sum(k for _, k in apart) == n
        assert together == pytest.approx(sum(m * k for m, k in apart) / n, rel=1e-9)


def test_models_are_not_called_seen_by_a_method_that_learns_from_none(store: Path) -> None:
    said = invoke("sweep", "--method", "pca", "--ranks", "16", "--store", store)
    assert "model A:" in said
    assert "model B:" in said
    assert "seen" not in said


def test_text_table_plot_and_json_tell_the_same(svd: tuple[str, Path]) -> None:
    said, out = svd
    report = results.load(out.with_suffix(".results.json"))
    assert report.kind == "sweep"
    assert report.settings["ranks"] == list(RANKS)
    assert report.settings["dropped ranks"] == [999]
    assert "Dropped ranks: 999. These latents have 256 values" in said
    for group in ("translations", "model A, seen in training", "model B, unseen in training"):
        assert f"  {group}: " in said
        own = [c for c in report.curves if c.plot.endswith(group)]
        assert {c.label for c in own} == {"svd", "chance"} | CONTROLS
        wide = {x for c in own for x in c.x}
        for level in (c for c in own if c.label in LEVELS | {"chance"}):
            assert level.x == [min(wide), max(wide)], "a level is drawn over the whole width"
            assert len(set(level.y)) == 1
        curve = next(c for c in own if c.label == "svd")
        wanted = [
            float(r["mAP"])
            for r in read(out)
            if (r["method"], r["group"], r["split"]) == ("svd", group, "test")
        ]
        assert curve.y == wanted
        assert curve.x == list(RANKS)
    with Image.open(out.with_suffix(".png")) as image:
        colours = image.convert("RGB").getcolors(image.width * image.height)
        assert colours is not None
        assert len(colours) > 8, "eight lines are drawn"


def test_json_is_the_report(store: Path) -> None:
    raw: dict[str, Any] = json.loads(invoke("sweep", "--ranks", "8", "--store", store, "--json"))
    assert results.from_dict(raw).settings["chosen rank"] == 8


@pytest.mark.parametrize("method", ["svd", "gnull", "analytic", "pca", "plda"])
def test_every_row_is_what_solve_at_that_rank_reports(method: str, store: Path, tmp_path: Path) -> None:
    """One fit, cut: the same figures as a fit of each rank, its ridge chosen on validation included."""
    out = tmp_path / "cut.csv"
    invoke("sweep", "--method", method, "--ranks", "4,40", "--store", store, "--out", out)
    knobs = results.load(out.with_suffix(".results.json")).settings["knobs"]
    for r in read(out):
        if (r["method"], r["split"], r["group"]) == (method, "test", "translations"):
            W = tmp_path / f"{r['rank']}.safetensors"
            solved = json.loads(
                invoke(
                    "solve", "--method", method, "--rank", r["rank"], "--store", store, "--out", W, "--json"
                )
            )
            alone = results.from_dict(solved)
            for knob in ("lam", "score"):
                assert knobs[r["rank"]].get(knob) == alone.settings.get(knob)
            found = alone.find("mAP", subject=method)[0]
            # Two scores within rounding may change places: one place of one query at the most.
            assert found.value == pytest.approx(float(r["mAP"]), abs=0.5 / int(r["n"]))


def test_knobs_that_are_named_are_the_fits(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    for method, words, knobs in (
        ("gnull", ["--lam", "7"], {"lam": 7.0}),
        ("plda", ["--lam", "2", "--score", "bias"], {"lam": 2.0, "score": "bias"}),
        ("analytic", ["--alpha-bar", "0.05,0.4", "--score", "cosine"], {"alpha_bar": [0.05, 0.4]}),
        ("pca", ["--exponent", "0.4"], {"exponent": 0.4}),
    ):
        invoke("sweep", "--method", method, *words, "--ranks", "4,16", "--store", store, "--out", out)
        found = results.load(out.with_suffix(".results.json")).settings["knobs"]
        assert found.keys() == {"4", "16"}
        for each in found.values():
            assert {k: each[k] for k in knobs} == knobs
    said = invoke("sweep", "--method", "svd", "--lam", "1", "--ranks", "4", "--store", store, code=2)
    assert "--lam is a knob of" in said


def test_refit_gives_the_rows_of_one_fit(svd: tuple[str, Path], store: Path, tmp_path: Path) -> None:
    out = tmp_path / "refit.csv"
    invoke("sweep", "--ranks", "4,16,40", "--store", store, "--refit", "--out", out)
    for one, each in zip(read(svd[1]), read(out), strict=True):
        assert {k: one[k] for k in ("method", "rank", "group", "split", "n")} == {
            k: each[k] for k in ("method", "rank", "group", "split", "n")
        }
        assert float(one["mAP"]) == pytest.approx(float(each["mAP"]), abs=0.5 / int(one["n"]))


def test_the_rank_is_chosen_on_validation_and_not_on_test(store: Path) -> None:
    """Validation translations are milder, so test would have chosen another rank."""
    swept = sweeping.sweep(store, "pca", [2, 4, 8, 16, 32])
    validation = {p.rank: p.map for p in swept.points if p.split == "validation"}
    test = {
        p.rank: p.map for p in swept.points if (p.split, p.method, p.group) == ("test", "pca", "translations")
    }
    assert validation.keys() == test.keys()
    assert swept.best == max(validation, key=lambda k: (validation[k], -k))
    assert swept.best != max(test, key=lambda k: test[k]), "else this world cannot tell the two apart"
    assert f"Rank {swept.best} was chosen on validation" in swept.report.summary[0]
    assert len(swept.report.summary) == 4, "what was chosen, and a verdict for all and for each model"


def test_ranks_above_what_the_gallery_spans_are_dropped_and_said_to_be(store: Path) -> None:
    said = invoke("sweep", "--method", "pca", "--ranks", "16,200", "--store", store)
    assert "Dropped ranks: 200. pca finds fewer directions" in said
    assert "None of the ranks 200, 999" in invoke(
        "sweep", "--method", "pca", "--ranks", "200,999", "--store", store, code=2
    )


@pytest.mark.parametrize(("method", "top"), [("svd", 256), ("pca", 119)])
def test_default_ranks_end_with_the_largest_that_there_is(method: str, top: int, store: Path) -> None:
    """The dimension, or what 120 centred rows span; nothing that nobody asked for is called dropped."""
    swept = sweeping.sweep(store, method)
    powers = [k for k in (16, 32, 64, 128) if k < top]
    assert swept.report.settings["ranks"] == [*powers, top]
    assert not swept.report.settings["dropped ranks"]
    assert not any("Dropped" in caveat for caveat in swept.report.caveats)


def test_a_random_subspace_is_never_the_best_control(store: Path) -> None:
    """At any of its ranks: it is to be beaten, even where it is ahead of every other control."""
    collection = Collection.open(store)
    found = measure.fit_controls(collection, 40)
    poor, good = found["PCA-whitened ¼"].truncated(1), found["raw"]
    done = measure.evaluate(
        collection,
        collection.queries("test"),
        {"svd": good},
        {"raw": poor, "random subspace @256": good},
        every_rank=True,
    )
    assert (
        done.rankings["random subspace @256", "translations"].map > done.rankings["raw", "translations"].map
    )
    assert done.methods[0].best_control == "raw"


def test_default_ranks_double_up_to_the_dimension() -> None:
    assert sweeping.default_ranks(256) == (16, 32, 64, 128, 256)
    assert sweeping.default_ranks(300) == (16, 32, 64, 128, 256)
    assert sweeping.default_ranks(12) == (12,)


@pytest.mark.parametrize("text", ["", "64,", "a", "8,0", "-4", "8.5", "8 16"])
def test_ranks_that_are_none_end_with_2(text: str, store: Path) -> None:
    said = invoke("sweep", f"--ranks={text}", "--store", store, code=2)
    assert "--ranks is" in said


def test_methods_that_cannot_be_swept_are_refused(store: Path) -> None:
    said = invoke("sweep", "--method", "cosface", "--store", store, code=2)
    assert "not nested" in said
    assert "--refit" in said
    assert "no rank to sweep" in invoke("sweep", "--method", "centred", "--store", store, "--refit", code=2)
    assert "solve --method auto" in invoke("sweep", "--method", "auto", "--store", store, code=2)
    assert "'svd'" in invoke("sweep", "--method", "svt", "--store", store, code=2)


def test_a_collection_without_pairs_or_queries_is_told_what_to_do(here: Path) -> None:
    invoke("encode", "images", "--encoder=patch", "--image-size=64")
    for method in ("svd", "gnull"):
        said = invoke("sweep", "--method", method, code=1)
        assert f"--method {method} learns from pairs" in said
        assert "latentstore simulate" in said
    assert "no test queries" in invoke("sweep", "--method", "analytic", code=2)


def test_paths_that_cannot_be_written_are_found_before_any_work(store: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "sweep.csv"
    assert "no folder" in invoke("sweep", "--store", store, "--out", nowhere, code=2)
    assert "is a folder" in invoke("sweep", "--store", store, "--out", tmp_path, code=2)
    for plot in (nowhere.with_suffix(".png"), tmp_path):
        assert "--plot is" in invoke("sweep", "--store", store, "--plot", plot, code=2)
    assert not list(tmp_path.iterdir())
