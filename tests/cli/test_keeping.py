"""What keeps a store, as its user runs it: a second encoder, takedown, migration, codecs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import Run, picture


@pytest.fixture
def store(run: Run, here: Path) -> Path:
    """Its images are this test's own."""
    (here / "images").unlink()
    (here / "images").mkdir()
    for i in range(30):
        picture(i).save(here / "images" / f"{i:02d}.jpg")
    run("latentstore", "encode", "--encoder=patch", "--image-size=64")
    return here / "latents.zarr"


def test_a_second_encoders_latents_beside_the_first(run: Run, store: Path) -> None:
    small = ("--encoder=patch", "--image-size=32")
    said = run("latentstore", "encode", "--store", "latents.zarr/small", *small).stdout
    assert "latents.zarr/small: 30 rows" in said
    facts = json.loads(run("latentstore", "info", "--json").stdout)
    assert facts["arrays"] == ["latents", "small"]
    found = run("latentstore", "match", "images/07.jpg", "--store", "latents.zarr/small", "--json")
    assert json.loads(found.stdout)["matches"][0]["candidates"][0]["path"] == "07.jpg"
    assert "whole" in run("latentstore", "verify").stdout
    wrong = run("latentstore", "encode", "--store", "latents.zarr/again", *small, code=2)
    assert "in 'small'" in wrong.stderr


def test_remove_asks_and_then_removes_everywhere(run: Run, store: Path, here: Path) -> None:
    run("latentstore", "match", "images/07.jpg")  # keeps the collection's map
    unasked = run("latentstore", "remove", "07.jpg", "--json", code=2)
    assert "07.jpg" in unasked.stderr
    assert "give --yes" in unasked.stderr
    assert unasked.stdout == ""
    assert json.loads(run("latentstore", "info", "--json").stdout)["statuses"] == {"ok": 30}
    shutil.copy(here / "images" / "07.jpg", here / "outside.jpg")
    said = json.loads(run("latentstore", "remove", "outside.jpg", "--yes", "--json").stdout)
    assert (said["paths"], said["shards"]) == (["07.jpg"], 1)
    assert [p.name for p in (store / "projections").iterdir()] == ["zarr.json"]
    assert "already removed" in run("latentstore", "remove", "07.jpg", "--yes").stdout
    found = json.loads(run("latentstore", "match", "outside.jpg", "--json").stdout)
    assert "07.jpg" not in [c["path"] for c in found["matches"][0]["candidates"]]
    run("latentstore", "encode")
    assert json.loads(run("latentstore", "info", "--json").stdout)["statuses"] == {"ok": 29, "removed": 1}
    assert "whole" in run("latentstore", "verify").stdout
    for name, words in (("nothing.jpg", "neither a path"), ("outside2.jpg", "No row of")):
        if name == "outside2.jpg":
            picture(99).save(here / name)
        assert words in run("latentstore", "remove", name, "--yes", code=2).stderr


def test_codecs_at_the_command_line(run: Run, store: Path) -> None:
    small = ("--encoder=patch", "--image-size=64")
    run("latentstore", "encode", "--store", "coded.zarr", *small, "--codec", "bitround:5")
    facts = json.loads(run("latentstore", "info", "coded.zarr", "--json").stdout)
    assert facts["codec"] == "bitround:5"
    assert (
        "made with bitround:5"
        in run("latentstore", "encode", "--store", "coded.zarr", "--codec", "zstd", code=2).stderr
    )
    unknown = run("latentstore", "encode", "--store", "x.zarr", *small, "--codec", "lz9", code=2)
    assert "--codec" in unknown.stderr
    assert "whole" in run("latentstore", "verify", "coded.zarr").stdout


def test_migrate_says_what_it_did(run: Run, store: Path) -> None:
    assert "is of schema 2." in run("latentstore", "migrate").stdout
    body = json.loads((store / "zarr.json").read_bytes())
    body["attributes"]["latentstore"]["schema"] = 1
    (store / "zarr.json").write_text(json.dumps(body))
    assert "was of schema 1, and is of schema 2 now" in run("latentstore", "migrate").stdout
    assert "whole" in run("latentstore", "verify").stdout
