"""The user's own lines, as they stand, one after the other, in a folder that holds only ``images/``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Run, RunApart, picture
from PIL import Image

from latentstore import attacks, images, photos
from latentstore.encoders import DEFAULT, PatchEncoder
from latentstore.results import load
from latentstore.store import open_store
from solvers.projection import Projection


@pytest.mark.full
def test_the_lines_as_they_stand(run: Run, run_apart: RunApart, here: Path) -> None:
    run("latentstore", "encode")
    refused = run_apart("solve", "--method", "svd", "--rank", "512", code=1)
    for way in ("no pairs", "--method analytic", "latentstore simulate", "--manifest"):
        assert way in refused.stderr
    assert refused.stderr.count("\n") == 1, "one paragraph"
    assert not list(here.glob("W-*"))
    run("latentstore", "simulate")

    solved = run("solve", "--method", "svd", "--rank", "512", "--store", "simulated.zarr").stdout
    for part in (
        "numerical rank",
        "decided by",
        "singular values",
        "arithmetic, not learned",
        "random subspace",
    ):
        assert part in solved
    for control in ("raw", "centred", "PCA-whitened ¼", "PCA-whitened ½", "chance", "best control"):
        assert control in solved
    trained = run("solve", "--method", "cosface", "--store", "simulated.zarr").stdout
    assert "numerical rank" in trained
    assert "best control" in trained

    query = "images/photo 07.jpg"
    svd = run("latentstore", "match", query, "--projection", "W-svd-512.safetensors", "--json").stdout
    own = run("latentstore", "match", query, "--json").stdout
    for text in (svd, own):
        found = json.loads(text)["matches"][0]
        assert found["candidates"][0]["path"] == "photo 07.jpg"
        assert found["margin"] == pytest.approx(
            found["candidates"][0]["score"] - found["candidates"][1]["score"], abs=1e-6
        )
    kept = json.loads(own)
    assert kept["made"]
    again = json.loads(run_apart("latentstore", "match", query, "--json").stdout)
    assert not again["made"], "the analytic map is made once and kept"
    assert again["projection"] == kept["projection"]

    W = Projection.load(here / "W-svd-512.safetensors")
    assert W.query_map.shape == (4096, 512)
    assert W.space_id == open_store(here / "latents.zarr").space.id
    report = load(here / "W-svd-512.results.json")
    assert report.find("mAP", subject="svd")
    assert report.find("mAP", subject="raw")


def test_photographs_by_the_encoder_that_nobody_named(run: Run, here: Path) -> None:
    """encode, solve, evaluate and match, on photographs and their altered versions."""
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    lines = ["path,identity,role,split"]
    splits = ("train", "test", "train", "validation", "train")
    for i, path in enumerate(photos.bundled()):
        photo, _ = images.decode(path.read_bytes())
        photo = photo.convert("RGB").resize((300, 260))
        photo.save(here / f"{i}.png")
        attacks.jpeg(10)(photo.crop((15, 15, 300, 260)), 0).save(here / f"{i}b.png")
        split = splits[i % len(splits)]
        lines += [f"{i}.png,{i},origin,{split}", f"{i}b.png,{i},translation,{split}"]
    (here / "list.csv").write_text("\n".join(lines) + "\n")
    run("latentstore", "encode", "--manifest", "list.csv")
    store = open_store(here / "latents.zarr")
    assert store.provenance["encoder"]["name"] == "tiny"
    assert store.space.latent_shape == (4, 32, 32)
    assert set(store.counts()) == {"ok"}

    run("solve", "--method", "gnull", "--rank", "8")
    run("latentstore", "evaluate", "--projection", "W-gnull-8.safetensors", "--out", "e.json")
    precision = {f.subject: f.value for f in load(here / "e.json").find("mAP")}
    assert precision["centred"] > 2 * precision["chance"]

    own = json.loads(run("latentstore", "match", "3b.png", "--json").stdout)["matches"][0]
    assert own["candidates"][0]["path"] == "3.png"


def test_a_store_goes_on_with_the_encoder_that_made_it(run: Run, here: Path) -> None:
    """Whatever the default is by now."""
    (here / "mine").mkdir()
    picture(1).save(here / "mine" / "a.png")
    run("latentstore", "encode", "mine", "--encoder=patch", "--image-size=64")
    picture(2).save(here / "mine" / "b.png")
    run("latentstore", "encode")
    store = open_store(here / "latents.zarr")
    assert (store.counts(), store.provenance["encoder"]["name"]) == ({"ok": 2}, "patch")
    np.testing.assert_array_equal(
        store.reader.gather([1])[0],
        PatchEncoder(64).encode(pixels(picture(2), 64), np.arange(1))[0].astype(np.float16),
    )
    assert "space" in run("latentstore", "encode", "--encoder", DEFAULT, code=1).stderr


def pixels(image: Image.Image, size: int) -> np.ndarray:
    return images.resize(image, size)[None]


def test_a_few_pictures_are_enough_to_go_the_whole_way(run: Run, here: Path) -> None:
    """Few identities leave validation or test empty: the figure is missing, and said to be."""
    few = here / "few"
    few.mkdir()
    # Plain colours, no two in one direction from their mean: under a cosine those would be equal.
    for i, colour in enumerate(np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)):
        Image.fromarray(np.tile(colour, (8, 8, 1))).save(few / f"{i}.png")
    run("latentstore", "encode", "few", "--encoder=patch", "--image-size=64")
    run("latentstore", "simulate")
    for method in ("svd", "gnull", "cosface", "analytic"):
        out = run("solve", "--method", method, "--rank", "16", "--store", "simulated.zarr").stdout
        assert "mAP" in out or "Not measured" in out
    found = run("latentstore", "match", "few/3.png", "--json").stdout
    assert json.loads(found)["matches"][0]["candidates"][0]["path"] == "3.png"


def test_closed_forms_and_match_import_no_torch(here: Path) -> None:
    import subprocess
    import sys

    script = """
import sys
from pathlib import Path
from cli import matching, solving, workflows
from latentstore.simulate import Diffusion
workflows.run_encode(Path("images"), Path("s.zarr"), encoder="patch", image_size=64)
workflows.run_simulate(Path("s.zarr"), Path("p.zarr"), Diffusion())
for method in ("svd", "gnull", "analytic"):
    solving.solve(Path("p.zarr"), Path(method + ".safetensors"), solving.SolveOptions(method, 32))
matching.run_match([Path("images/photo 01.jpg")], Path("s.zarr"))
print(sorted({"torch", "diffusers", "dask", "cupy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_evaluate_matches_what_solve_reported(run: Run, here: Path) -> None:
    run("latentstore", "encode", "--encoder=patch", "--image-size=64")
    run("latentstore", "simulate", "--per-origin", "2")
    solved = json.loads(
        run("solve", "--method", "gnull", "--rank", "32", "--store", "simulated.zarr", "--json").stdout
    )
    evaluated = json.loads(
        run(
            "latentstore", "evaluate", "--projection", "W-gnull-32.safetensors", "--store", "simulated.zarr",
            "--out", "e.json", "--json",
        ).stdout
    )  # fmt: skip

    def value(report: dict[str, object], name: str) -> float:
        return next(f["value"] for f in report["figures"] if f["name"] == name and f["subject"] == "gnull")  # type: ignore[attr-defined]

    assert value(solved, "mAP") == value(evaluated, "mAP")
    assert value(solved, "Acc") == value(evaluated, "Acc")
    assert load(here / "e.json").find("mAP", subject="chance")
    run(
        "latentstore", "evaluate", "--projection", "W-gnull-32.safetensors", code=2
    )  # no pairs in latents.zarr


def test_attacked_picture_finds_its_origin_in_both_backends(run: Run, here: Path) -> None:
    run("latentstore", "encode", "--encoder=patch", "--image-size=64")
    with Image.open(here / "images" / "photo 11.jpg") as image:
        image.save(here / "suspect.jpg", quality=20)
    tables = []
    for backend in ("numpy", "faiss"):
        found = json.loads(
            run("latentstore", "match", "suspect.jpg", "--backend", backend, "--top", "7", "--json").stdout
        )
        assert found["backend"] == backend
        tables.append([c["path"] for c in found["matches"][0]["candidates"]])
        assert tables[-1][0] == "photo 11.jpg"
        assert len(tables[-1]) == 7
    assert tables[0] == tables[1]
    assert "photo 11.jpg" in run("latentstore", "match", "suspect.jpg").stdout
