"""--method auto: the whole table on validation, the answer on test, and never a W that a control beats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import SPLITS, pair_store, picture
from typer.testing import CliRunner

from cli import auto, choosing, knobs, measure, render_auto, solving
from cli.app import app
from cli.collection import Collection
from cli.render import percent
from latentstore.results import load
from solvers.methods import METHODS
from solvers.projection import Projection

CONTROLS = {"identity", "centred", "norm-weighted", "pca"}


def solve(*words: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["solve", "--method", "auto", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that raw latents do not always match: each is more another picture than its own."""
    return pair_store(tmp_path_factory.mktemp("auto"), 0.6)


@pytest.fixture(scope="module")
def answer(store: Path) -> tuple[Any, Path]:
    W = store.parent / "W-auto.safetensors"
    return solve("--store", store, "--rank", "32", "--out", W), W


def test_everything_is_tried_and_the_best_of_it_kept(answer: tuple[Any, Path]) -> None:
    report = load(answer[1].with_suffix(".results.json"))
    tried = report.data["tried"]
    shape_of_store = Collection.open(answer[1].parent / "pairs.zarr").store.space.latent_shape
    assert {row["method"] for row in tried} == set(METHODS) - {"cosface"}
    assert {row["method"] for row in tried if row["control"]} == CONTROLS
    for method in METHODS:
        own = [row for row in tried if row["method"] == method]
        if method not in CONTROLS | {"cosface"}:
            grid = choosing.open_knobs(method)
            levels = {tuple(np.atleast_1d(row["knobs"].get("alpha_bar", 0))) for row in own}
            each = np.prod([len(v) for v in grid.values()], initial=1) * len(levels)
            if "latent_shape" in knobs.fields(method) and method != "analytic":
                # Fewer pairs than dimensions: a covariance that is the same everywhere, too.
                each += each * len(auto.SHAPED) // len(choosing.LAMBDAS)
                shapes = {str(row["knobs"]["latent_shape"]) for row in own}
                assert shapes == {"None", str(list(shape_of_store))}
            settings = {json.dumps(row["knobs"], sort_keys=True) for row in own}
            assert len(settings) == each
            assert len(levels) == (len(auto.ALPHA_BARS) + 1 if method == "analytic" else 1)
            assert {16, 32} <= {row["rank"] for row in own}
    (best,) = (row for row in tried if row["chosen"])
    assert best["map"] == max(row["map"] for row in tried)
    W = Projection.load(answer[1])
    assert (W.method, W.rank) == (best["method"], best["rank"])
    assert {k: v for k, v in W.knobs.items() if k != "rank"} == best["knobs"]
    assert {row["n"] for row in tried} == {len(SPLITS["validation"])}


def test_the_margin_over_the_best_control_is_on_test_with_an_interval(
    answer: tuple[Any, Path], store: Path
) -> None:
    report = load(answer[1].with_suffix(".results.json"))
    (gain,) = report.find("gain over best control")
    assert gain.interval is not None
    assert gain.n == len(SPLITS["test"])
    assert gain.interval[1] >= 0, "auto is never worse than the best control by more than the interval"
    done = CliRunner().invoke(
        app, ["evaluate", "--projection", str(answer[1]), "--store", str(store), "--json"]
    )
    again = {f["name"]: f["value"] for f in json.loads(done.stdout)["figures"] if f["role"] == "method"}
    (own,) = (f for f in report.find("mAP") if f.role == "method")
    assert again["mAP"] == own.value
    # The control that validation would have taken is in the table, too.
    best = max((r for r in report.data["tried"] if r["control"]), key=lambda r: r["map"])
    stand = {f.subject for f in report.find("mAP") if f.role == "control"}
    assert any(s.startswith(best["label"]) for s in stand)


def test_the_text_holds_the_table_and_a_line_for_each_method(answer: tuple[Any, Path]) -> None:
    report = load(answer[1].with_suffix(".results.json"))
    tried, text = report.data["tried"], answer[0].stdout
    assert f"{len(tried)} maps were tried on 24 validation queries" in text
    for row in tried:
        assert f"{100 * row['map']:.1f}" in text
    assert text.count(" *") == 1
    lines = [line for line in answer[0].stderr.splitlines() if line.startswith("auto: ")]
    fits = {(row["label"], json.dumps(row["knobs"])) for row in tried}
    assert len(lines) == len({row["label"] for row in tried})
    assert lines[0].startswith(f"auto: 1 of {len(fits)} fits, raw: validation mAP ")
    assert lines[-1].startswith(f"auto: {len(fits)} of {len(fits)} fits, ")
    assert all("s left" in line for line in lines)


def test_where_raw_cannot_be_beaten_the_answer_is_raw(tmp_path: Path) -> None:
    """Translations that hardly differ: every map finds all of them, and equals go to the simplest."""
    easy = pair_store(tmp_path, 0.02)
    said = solve("--store", easy, "--rank", "16", "--out", tmp_path / "W.safetensors")
    assert "no W was better than the controls: the answer is the control raw" in said.stdout
    assert "numerical rank" not in said.stdout, "raw learned nothing from T"
    assert "‖TW‖" not in said.stdout
    W = Projection.load(tmp_path / "W.safetensors")
    assert W.method == "identity"
    assert np.array_equal(W.query_map, np.eye(64))


def test_wrong_pairs_give_no_gain(store: Path) -> None:
    fresh = Collection.open(store)
    for split in ("train", "validation"):
        rows = fresh.translations[fresh.split[fresh.translations] == split]
        fresh.identity[rows] = np.roll(fresh.identity[rows], 1)  # no pair is left right
    W, _, choices = solving.fit(fresh, knobs.SolveOptions("auto", 16))
    assert choices
    whole = Collection.open(store)
    done = measure.evaluate(whole, whole.queries("test"), {"auto": W}, measure.fit_controls(whole, W.rank))
    assert done.methods[0].gain_interval is not None
    assert done.methods[0].gain_interval[0] <= 0, done.verdicts


def test_a_collection_without_pairs_tries_what_needs_none(tmp_path: Path) -> None:
    bare = pair_store(tmp_path, 0.6, role="query", splits=("validation", "test"))
    report = json.loads(
        solve("--store", bare, "--rank", "16", "--out", tmp_path / "W.safetensors", "--json").stdout
    )
    tried = {row["method"] for row in report["data"]["tried"]}
    assert tried == CONTROLS | {"analytic"}
    # With simulated pairs the others come in, and are still judged on the real queries.
    made = solve("--store", bare, "--rank", "16", "--out", tmp_path / "S.safetensors", "--simulate", "--json")
    assert made.stderr == "", "no lines beside JSON"
    assert {row["method"] for row in json.loads(made.stdout)["data"]["tried"]} == set(METHODS) - {"cosface"}


def test_without_queries_it_is_the_analytic_map_and_says_so(tmp_path: Path) -> None:
    alone = pair_store(tmp_path, 0.6, splits=())
    said = solve("--store", alone, "--out", tmp_path / "W.safetensors").stdout
    assert said.count("no validation queries to choose on") == 1
    assert "Nothing was tried" not in said
    assert "PCA-whitened" not in said, "no figure of a control is there to beware of"
    assert "Not measured" in said
    W = Projection.load(tmp_path / "W.safetensors")
    assert (W.method, W.knobs["alpha_bar"], W.score) == ("analytic", 0.1, "cosine")
    assert not len(W.used_identities)


def test_methods_that_these_pairs_are_not_for_are_left_out_and_named(here: Path) -> None:
    """Every translation equals its origin: there is no difference to learn from."""
    lines = ["path,identity,role,split"]
    for split, numbers in SPLITS.items():
        for i in numbers:
            for kind in ("o", "g"):
                picture(i, 32).save(here / f"{i}{kind}.png")
                lines.append(f"{i}{kind}.png,{i},{'origin' if kind == 'o' else 'translation'},{split}")
    (here / "list.csv").write_text("\n".join(lines) + "\n")
    words = ["encode", "--manifest", "list.csv", "--store", "same.zarr", "--encoder=patch", "--image-size=32"]
    assert CliRunner().invoke(app, words).exit_code == 0
    said = solve("--store", "same.zarr", "--rank", "16")
    assert "gnull was left out: All 48 differences are zero" in said.stdout
    assert Projection.load("W-auto.safetensors").method == "identity"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_is_as_wide_as_the_terminal_and_loses_nothing(
    answer: tuple[Any, Path], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    choices = load(answer[1].with_suffix(".results.json")).data["tried"]
    shown = render_auto.tried(choices)
    assert max(map(len, shown.splitlines())) <= columns
    cells = Counter(word for line in shown.splitlines() for word in line.split())
    for value, n in Counter(percent(row["map"]) for row in choices).items():
        assert cells[value] >= n
    assert cells["*"] == 1


def test_cosface_is_tried_when_asked_for(store: Path, tmp_path: Path) -> None:
    words = ["--store", store, "--rank", "8", "--out", tmp_path / "W.safetensors", "--json"]
    report = json.loads(solve(*words, "--with-cosface", "--budget", "1").stdout)
    assert "cosface" in {row["method"] for row in report["data"]["tried"]}


def test_what_auto_chooses_is_not_named(store: Path) -> None:
    for option, value in (("--lam", "1"), ("--score", "bias"), ("--budget", "9")):
        said = solve(option, value, "--store", store, code=2).stderr
        assert f"{option} is a knob of " in said
        assert "chooses all knobs on validation" in said
    done = CliRunner().invoke(app, ["solve", "--method", "svd", "--with-cosface"])
    assert done.exit_code == 2
    assert "--method auto" in done.stderr
    assert "between 1 and" in solve("--rank", "0", "--store", store, code=2).stderr
