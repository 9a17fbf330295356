"""simulate: whose training split the prior is fitted on, and what a resumed run is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from cli_helpers import picture
from typer.testing import CliRunner

from cli.app import app
from cli.collection import Collection
from latentstore.store import open_store

SMALL = ["--encoder", "patch", "--image-size", "64"]


def invoke(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def latents(path: Path) -> np.ndarray:
    store = open_store(path)
    return store.reader.read(0, len(store))


def test_prior_comes_from_the_training_split_alone(here: Path) -> None:
    """Changing a test picture changes its own translation only; changing a training picture changes all."""
    lines = "".join(f"photo {i:02d}.jpg,{i},origin,{'train' if i < 40 else 'test'}\n" for i in range(60))
    outcome = {}
    for name, changed in (("base", None), ("other test", 50), ("other train", 10)):
        folder = here / name
        shutil.copytree(here / "images", folder)
        if changed is not None:
            picture(999).save(folder / f"photo {changed:02d}.jpg")
        (folder / "list.csv").write_text("path,identity,role,split\n" + lines)
        store, out = f"{name}.zarr", f"{name}-pairs.zarr"
        invoke("encode", "--manifest", f"{name}/list.csv", "--store", store, *SMALL)
        invoke("simulate", "--store", store, "--out", out, "--mode", "mean", "--prompt-strength", "0")
        pairs = Collection.open(here / out)
        row = {
            i: r
            for i, r in zip(pairs.identity, range(len(pairs.identity)), strict=True)
            if pairs.role[r] == "translation"
        }
        outcome[name] = {i: (int(r), pairs.read(np.array([r]))[0]) for i, r in row.items()}
    same = [i for i in outcome["base"] if outcome["base"][i][0] == outcome["other test"][i][0] and i != "50"]
    assert len(same) > 30
    for i in same:
        assert np.array_equal(outcome["base"][i][1], outcome["other test"][i][1])
    changed = [i for i in same if not np.array_equal(outcome["base"][i][1], outcome["other train"][i][1])]
    assert len(changed) > 30


def test_prior_of_another_store(here: Path) -> None:
    invoke("encode", "images", *SMALL)
    half = here / "half"
    half.mkdir()
    for i in range(30):
        (half / f"{i}.jpg").write_bytes((here / "images" / f"photo {i:02d}.jpg").read_bytes())
    invoke("encode", "half", "--store", "half.zarr", *SMALL)
    invoke("simulate", "--out", "own.zarr")
    invoke("simulate", "--out", "lent.zarr", "--prior", "half.zarr")
    assert not np.array_equal(latents(here / "own.zarr"), latents(here / "lent.zarr"))
    said = invoke("simulate", "--out", "own.zarr", "--prior", "half.zarr", code=2)
    assert "prior" in said
    invoke("encode", "half", "--store", "wide.zarr", "--encoder=patch", "--image-size=128")
    assert "space" in invoke("simulate", "--out", "x.zarr", "--prior", "wide.zarr", code=1)
    assert not (here / "x.zarr").exists()


def test_changed_provenance_is_warned_about_and_goes_on(here: Path) -> None:
    invoke("encode", "images", *SMALL)
    meta = here / "latents.zarr" / "latents" / "zarr.json"
    body = json.loads(meta.read_text())
    body["attributes"]["latentstore"]["provenance"]["encoder"]["versions"]["numpy"] = "0.1"
    meta.write_text(json.dumps(body))
    assert "Warning" not in invoke("encode", "images"), "nothing was encoded, so nothing can differ"
    (here / "latents.zarr" / "done" / "000000.json").unlink()
    said = invoke("encode", "images")
    assert "numpy was 0.1, now " in said
    assert open_store(here / "latents.zarr").counts() == {"ok": 60}
