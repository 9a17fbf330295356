"""The demo at a small size: it ends with a page and figures that say what stands behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cli import demo_world
from cli.collection import Collection
from cli.demo import HEADLINE, METHODS, DemoOptions, run_demo
from latentstore import results
from latentstore.errors import UsageError
from solvers.projection import Projection, identity_hash

pytest.importorskip("skimage", reason="the demo's photographs come with scikit-image")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(DemoOptions(out=out, rank=64, image_size=64, budget=1, translated=2), say=lambda text: None)
    return out


def test_every_method_stands_beside_controls_and_chance(demo: Path) -> None:
    report = results.load(demo / "report.json")
    groups = {f.group for f in report.figures if f.name == "mAP"}
    assert HEADLINE in groups
    assert any(g.startswith("oracle") for g in groups)
    for group in groups:
        subjects = {f.subject: f for f in report.find("mAP", group=group)}
        assert set(METHODS) <= set(subjects)
        for control in ("raw", "centred", "PCA-whitened ¼", "PCA-whitened ½", "random subspace", "chance"):
            assert control in subjects, (group, control)
        chance = subjects["chance"].value
        assert subjects["raw"].value > 5 * chance, "pictures are found far above chance"
    assert report.settings["method chosen on validation"] in METHODS
    assert {c.plot for c in report.curves} >= {"mAP by rank of W"}
    ranks = {tuple(c.x) for c in report.curves if c.plot == "mAP by rank of W" and c.role == "method"}
    assert (8.0, 16.0, 32.0, 64.0) in ranks
    assert set(report.timings) >= {"encode", "simulate translations", "evaluate"}


def test_the_page_says_how_many_photographs_and_is_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    report = results.load(demo / "report.json")
    assert f"Only {report.data['photographs']} photographs" in page
    assert "smoke test" in page
    assert "data:image/jpeg;base64," in page
    assert len(page) < 5_000_000
    assert "<script" not in page


def test_no_photograph_stands_on_two_sides(demo: Path) -> None:
    gallery = Collection.open(demo / "latents.zarr")
    sides: dict[str, set[str]] = {}
    for group, split in zip(gallery.group, gallery.split, strict=True):
        sides.setdefault(group, set()).add(split)
    assert all(len(s) == 1 for s in sides.values())
    assert {s for side in sides.values() for s in side} == {"train", "validation", "test"}
    attacked = Collection.open(demo / "attacked.zarr")
    assert set(attacked.split) == {"test"}


def test_a_second_run_reuses_the_store(demo: Path) -> None:
    shard = demo / "latents.zarr" / "latents" / "c" / "0" / "0"
    before = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    old = results.load(demo / "report.json")
    run_demo(DemoOptions(out=demo, rank=64, image_size=64, budget=1, translated=2), say=lambda text: None)
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == before
    again = results.load(demo / "report.json")
    closed = [m for m in METHODS if m != "cosface"]
    for method in closed:
        assert again.find("mAP", subject=method) == old.find("mAP", subject=method)


def test_own_images(here: Path) -> None:
    result = run_demo(
        DemoOptions(images=here / "images", out=here / "out", rank=32, image_size=64, budget=2, translated=0),
        say=lambda text: None,
    )
    assert result.report.data["gallery"] == 60
    assert "tiles" not in result.report.summary[0]
    assert f"{HEADLINE} were searched" in result.report.summary[0]


def test_translations_by_both_models_come_first_and_nothing_was_fitted_on_them(demo: Path) -> None:
    report = results.load(demo / "report.json")
    made = Collection.open(demo / "translated.zarr")
    assert sorted(made.model) == ["a", "a", "b", "b"]
    assert set(made.split) == {"test"}
    gallery = Collection.open(demo / "latents.zarr")
    assert set(made.identity) <= set(gallery.identity[gallery.split == "test"])
    assert report.find("mAP", subject="raw", group="translations by b")[0].n == 2
    first = next(f.group for f in report.figures if f.name == "mAP")
    assert first == demo_world.HEADLINE
    assert report.summary[0].startswith(f"4 {first} were searched")
    assert report.settings[first].startswith("2 test pictures by each of a, b")
    hashed = identity_hash(sorted(set(made.identity.tolist())))
    maps = sorted(demo.glob("W-*.safetensors"))
    assert len(maps) == len(METHODS)
    for path in maps:
        used = Projection.load(path).used_identities
        assert not np.intersect1d(used, hashed).size, path
        assert path.name.startswith("W-analytic") or len(used), path


def test_without_the_models_attacked_pictures_come_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_world, "models", dict)
    options = DemoOptions(images=here / "images", out=here / "out", rank=32, image_size=64, budget=1)
    report = run_demo(options, say=lambda text: None).report
    assert next(f.group for f in report.figures if f.name == "mAP") == HEADLINE
    assert not (here / "out" / "translated").exists()


def test_too_few_images(here: Path) -> None:
    few = here / "few"
    few.mkdir()
    (few / "1.jpg").write_bytes((here / "images" / "photo 01.jpg").read_bytes())
    with pytest.raises(UsageError, match="at least 20"):
        run_demo(DemoOptions(images=few, out=here / "out"), say=lambda text: None)
