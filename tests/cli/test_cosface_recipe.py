"""The numbers of ``solve --method cosface``: whose they are, what they are refused for, what goes wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import pair_store, paragraph
from cli_helpers import solve as invoke
from typer.testing import CliRunner

from cli import knobs, recipe, settling
from cli.app import app
from cli.collection import Collection
from latentstore.errors import UsageError
from solvers.errors import SolverUsageError
from solvers.losses import DEFAULTS
from solvers.projection import Projection
from solvers.sgd import preset_paper

RANK, STEPS = 8, 30
SHORT = ("--rank", RANK, "--steps", STEPS, "--weight-init", "random", "--lr", 0.02)
"""A run whose best W is of a step in the middle."""
CHECKPOINT = "W.checkpoint.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_store(tmp_path_factory.mktemp("cosface"), 0.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the recipe ---------------------------------------------------------------------------------------------


def test_the_paper_preset_is_taken_and_every_named_number_overrides_it() -> None:
    assert recipe.build("paper", {}, rank=512, dim=4096) == preset_paper()
    for name in recipe.fields():
        value = {
            "loss": "circle",
            "weight_init": "principal",
            "class_init": "means",
            "precision": "bf16",
        }.get(
            name,
            {
                **{"ema": False, "relative_lr": True, "device": "cpu", "warmup": 0.1, "flat": 0.9},
                **{"ema_decay": 0.9, "warmup_from": 0.5},
            }.get(name, 7),
        )
        made = recipe.build("paper", {name: value}, rank=512, dim=4096)
        assert getattr(made, name) == value
        kept = {name} | {
            "steps": {"schedule_every", "validate_every", "patience"},
            "loss": {"scale", "margin"},
        }.get(name, set())
        unchanged = replace(made, **{k: getattr(preset_paper(), k) for k in kept})
        assert unchanged == preset_paper()


def test_fewer_steps_keep_the_papers_25_epochs() -> None:
    made = recipe.build("paper", {"steps": 500})
    assert (made.schedule_every, made.validate_every) == (20, 20)
    assert recipe.build("paper", {"steps": 500, "schedule_every": 3}).schedule_every == 3
    assert recipe.build("auto", {"steps": 500}).schedule_every == 1


def test_a_loss_brings_its_own_numbers_unless_they_are_named() -> None:
    for loss, numbers in DEFAULTS.items():
        made = recipe.build("paper", {"loss": loss})
        assert (made.scale, made.margin) == numbers
    assert recipe.build("auto", {"loss": "circle", "scale": 32.0}).scale == 32.0


def test_named_steps_are_taken_whatever_the_clock_says() -> None:
    assert recipe.build("auto", {}).max_seconds == recipe.BUDGET
    assert recipe.build("auto", {"steps": 9}).max_seconds is None
    assert recipe.build("auto", {"steps": 9}, budget=3).max_seconds == 3
    assert recipe.build("paper", {}, budget=3).max_seconds == 3


def test_the_numbers_are_refused_for_other_methods_and_before_a_store_is_read() -> None:
    for words in (["--margin", "0.2"], ["--no-ema"], ["--preset", "paper"], ["--accumulate", "2"]):
        said = paragraph(invoke(*words, "--store", "nowhere.zarr", method="svd", code=2))
        assert "is a knob of cosface, and the method is svd" in said
    for words in (["--init", "W"], ["--latents", "host"], ["--log", "l"], ["--plot", "p"], ["--fresh"]):
        said = paragraph(invoke(*words, "--store", "nowhere.zarr", method="auto", code=2))
        assert "is about a training run" in said
    for words, part in (
        (["--lr", "-1"], "lr and scale must be positive"),
        (["--ema-decay", "1"], "ema_decay must be"),
        (["--warmup-from", "-1"], "warmup_from from 0 to 1"),
        (["--warmup", "0.9"], "warmup <= flat"),
        (["--steps", "0"], "at least 1"),
        (["--budget", "0"], "--budget"),
    ):
        assert part in paragraph(invoke(*words, "--store", "nowhere.zarr", code=2))
    assert "lam" in paragraph(invoke("--lam", "-1", "--store", "nowhere.zarr", method="gnull", code=2))
    said = paragraph(invoke("--store", "nowhere.zarr", method="foo", code=2))
    assert "the methods are auto, identity" in said


def test_auto_hands_the_numbers_on() -> None:
    with pytest.raises(UsageError, match="--with-cosface"):
        knobs.SolveOptions.of("auto", margin=0.2)
    assert knobs.SolveOptions.of("auto", with_cosface=True, margin=0.2).recipe == {"margin": 0.2}


def test_help_has_a_panel() -> None:
    text = CliRunner().invoke(app, ["solve", "--help"], env={"COLUMNS": "120"}).stdout
    panel = text.split("─ CosFace ─", 1)[1]
    for name in recipe.fields():
        assert re.sub("-lr$", "-lr", "--" + name.replace("_", "-")) in panel
    assert "--patience" not in text.split("─ CosFace ─", 1)[0]


# --- where W starts, and ranks ------------------------------------------------------------------------------


def test_w_starts_at_the_map_of_init(folder: Path, store: Path) -> None:
    invoke("--rank", 12, "--store", store, "--out", "G.safetensors", "--lam", "1", method="gnull")
    Projection.load("G.safetensors").using(["seen elsewhere"]).save("G.safetensors")
    words = ("--store", store, "--init", "G.safetensors", "--steps", 1, "--lr", "1e-9", "--no-ema")
    invoke(*words, "--rank", RANK, "--out", "W.safetensors")
    G, W = Projection.load("G.safetensors"), Projection.load("W.safetensors")
    start, near = (v / np.linalg.norm(v) for v in (G.query_map[:, :RANK], W.query_map))
    # Under the cosine W has no length. One step of Adam moves an entry by the rate: 1e-9 of its size.
    np.testing.assert_allclose(near, start, atol=4 * np.finfo(np.float32).eps * np.abs(start).max())
    assert set(G.used_identities) <= set(W.used_identities), "what the start has seen, W has seen"
    assert "rank 12, not the usual 512" in invoke(*words, "--out", "V.safetensors").stdout
    said = paragraph(invoke(*words, "--rank", 20, code=2))
    assert "--rank is 20, and the map of --init has 12 columns" in said


def test_a_start_that_cannot_be_is_refused(folder: Path, store: Path) -> None:
    words = ("--store", store, "--rank", RANK)
    assert "no projection none" in paragraph(invoke(*words, "--init", "none", code=2))
    Path("text").write_text("no tensors")
    assert "cannot be read as safetensors" in paragraph(invoke(*words, "--init", "text", code=1))
    W = np.eye(64, 9, dtype=np.float32)
    Projection(W, W, space_id="of another encoder").save("other.safetensors")
    assert "of another encoder" in paragraph(invoke(*words, "--init", "other.safetensors", code=1))
    Projection(W[:32], W[:32]).save("small.safetensors")
    said = paragraph(invoke(*words, "--init", "small.safetensors", code=2))
    assert "32 numbers" in said
    assert "have 64" in said
    both = ("--init", "other.safetensors", "--weight-init", "random")
    assert "--weight-init" in paragraph(invoke(*words, *both, code=2))


def test_a_default_rank_is_lowered_and_an_asked_one_refused(folder: Path, store: Path) -> None:
    for method in ("svd", "pca"):
        done = invoke("--store", store, method=method)
        assert "W has rank 64, not the usual 512: the latents have 64 dimensions." in done.stdout
        assert Projection.load(f"W-{method}-64.safetensors").rank == 64
    assert "between 1 and the latents' dimension 64" in paragraph(
        invoke("--store", store, "--rank", 512, method="svd", code=2)
    )


# --- what goes wrong, and what is said beside ---------------------------------------------------------------


def test_divergence_leaves_the_last_good_w(folder: Path, store: Path) -> None:
    said = paragraph(
        invoke(
            *SHORT, "--store", store, "--lr", "1e38", "--validate-every", 99, "--out", "W.safetensors", code=1
        )
    )
    assert "The last good W is W.last-good.safetensors" in said
    W = Projection.load("W.last-good.safetensors")
    assert W.query_map.shape == (64, RANK)
    assert W.space_id == Collection.open(store).store.space.id
    assert len(W.used_identities)
    assert not Path("W.safetensors").exists()


@pytest.mark.parametrize("lr", ["1e3", "1e30"])
def test_a_run_that_diverged_without_an_infinity_is_told(folder: Path, store: Path, lr: str) -> None:
    said = " ".join(invoke(*SHORT, "--store", store, "--lr", lr, "--out", "W.safetensors").output.split())
    assert "The loss did not fall" in said
    assert "W is the start, and training added nothing" in said


def test_data_that_cannot_be_trained_on(folder: Path, tmp_path: Path, store: Path) -> None:
    alone = pair_store(tmp_path, 0.5, splits=(), name="alone.zarr")
    assert "holds no pairs" in paragraph(invoke("--store", alone, "--rank", 8, code=1))
    said = paragraph(invoke("--store", store, "--rank", 8, "--device", "tpu", code=2))
    assert "--device" in said


def test_one_identity_is_refused_and_identities_without_pairs_are_counted(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Collection.pairs

    def some(self: Collection, split: str, kept: int = 1) -> Any:
        origins, translated = whole(self, split)
        return (origins[:kept], translated[:kept]) if split == "train" else (origins, translated)

    monkeypatch.setattr(Collection, "pairs", some)
    assert "needs at least 2" in paragraph(invoke("--store", store, "--rank", 8, code=2))
    monkeypatch.setattr(Collection, "pairs", lambda self, split: some(self, split, 30))
    done = invoke(*SHORT, "--store", store)
    assert "18 of 48 identities of the training split have no translation" in done.stdout


def test_what_does_not_fit_is_refused_before_it_is_read(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli import placement

    monkeypatch.setattr(placement, "free", lambda device, processes=1: placement.Free(1000))
    monkeypatch.setattr(placement, "labelled", lambda *a: pytest.fail("read"))
    said = paragraph(invoke(*SHORT, "--store", store, code=1))
    assert "GB are free" in said


def test_a_w_of_other_data_is_not_replaced_in_silence(folder: Path, store: Path, tmp_path: Path) -> None:
    words = ("--rank", 8, "--out", "W.safetensors")
    assert "replaced" not in invoke(*words, "--store", store, method="svd").stdout
    assert "replaced" not in invoke(*words, "--store", store, method="pca").stdout, "of the same data"
    other = pair_store(tmp_path, 0.3, name="other.zarr")
    said = invoke(*words, "--store", other, method="svd").stdout
    assert re.search(r"Note: W\.safetensors was replaced: .*other data \(fitted on pairs\.zarr 2", said)


def test_a_shape_that_is_not_the_encoders_is_refused(folder: Path, store: Path) -> None:
    words = ("--store", store, "--rank", 8, "--latent-shape")
    said = paragraph(invoke(*words, "1,8,8", method="analytic", code=2))
    assert "--latent-shape is 1,8,8" in said
    assert "gives 4,4,4" in said
    invoke(*words, "4,4,4", method="analytic")


def test_a_ridge_at_the_edge_is_told() -> None:
    def told(**maps: float) -> list[str]:
        rows = [
            {"method": "plda", "rank": 8, "knobs": {"lam": float(k[1:])}, "map": v, "chosen": False}
            for k, v in maps.items()
        ]
        max(rows, key=lambda r: r["map"])["chosen"] = True
        return settling.at_an_edge(knobs.SolveOptions("plda", 8), rows)

    assert "100, lies at the edge" in told(l10=0.5, l100=0.6)[0]
    assert not told(l10=0.7, l100=0.6)
    assert not told(l100=0.6, l10=0.6), "validation cannot tell them apart"


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises((UsageError, SolverUsageError), match="auto or paper"):
        recipe.build("large", {})
