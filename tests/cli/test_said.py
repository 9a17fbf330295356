"""What the commands say: the way out of bad rows, units, and one thing in the singular."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import picture
from typer.testing import CliRunner

from cli import render
from cli.app import app
from latentstore.removal import Removal
from latentstore.verify import Verification

SMALL = ["--encoder", "patch", "--image-size", "64"]


@pytest.fixture
def folder(here: Path) -> Path:
    (here / "mine").mkdir()
    picture(1).save(here / "mine" / "good.jpg")
    return here / "mine"


def encode(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["encode", *words, *SMALL])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_a_status_says_its_way_out(folder: Path, here: Path) -> None:
    (folder / "link.jpg").symlink_to(here / "images" / "photo 01.jpg")
    picture(2, 200).save(folder / "large.jpg")
    said = encode("mine", "--max-pixels", "10000")
    assert "1 ok, 1 too_large, 1 link_outside" in said or "1 ok, 1 link_outside, 1 too_large" in said
    assert "link_outside: --follow-links" in said
    assert "too_large: --max-pixels" in said
    assert "paths were taken" not in said
    assert "link_outside:" not in encode("mine", "--store", "b.zarr", "--follow-links").split("large.jpg")[0]


def test_missing_files_of_a_list_name_the_folder(folder: Path, here: Path) -> None:
    (here / "list.csv").write_text("path\nmine/good.jpg\ngone.jpg\n")
    said = encode("--manifest", "list.csv")
    assert f"missing: paths were taken as relative to {here}" in said


def test_without_one_good_image_the_command_fails(folder: Path, here: Path) -> None:
    (folder / "good.jpg").write_bytes(b"")
    said = encode("mine", code=1)
    assert "None of the images can be used" in said
    assert "the file is empty" in said
    picture(1).save(folder / "good.jpg")
    assert "None of" not in encode("mine", "--retry-bad")


def test_a_cut_tar_is_in_the_notes(folder: Path, here: Path) -> None:
    import tarfile

    with tarfile.open(here / "x.tar", "w") as tar:
        tar.add(folder / "good.jpg", "good.jpg")
        end = tar.offset
    assert "Note:" not in encode("x.tar")
    (here / "x.tar").write_bytes((here / "x.tar").read_bytes()[:end])
    assert "Note: " in encode("x.tar", "--store", "cut.zarr")
    assert "1 ok" in encode("x.tar", "--store", "cut.zarr")


def test_facts_have_units() -> None:
    said = render.facts(
        {"bytes": 16_640, "rows": 12_345, "codec": None, "arrays": ["latents", "small"], "more": {"on": True}}
    )
    assert said.splitlines() == [
        "bytes: 16.64 kB", "rows: 12,345", "codec: none", "arrays: latents, small", "more:", "  on: yes",
    ]  # fmt: skip


def test_an_unfinished_store_is_not_called_whole() -> None:
    path = Path("s.zarr")
    assert render.verified(Verification(shards=1, bytes=2_000), path, 0).splitlines() == [
        "s.zarr: 1 shard, 2.00 kB checked", "  whole",
    ]  # fmt: skip
    said = render.verified(Verification(shards=2, open_shards=1), path, 0)
    assert said.splitlines()[1:] == [
        "  1 shard not written yet; run encode again",
        "  what is written is whole",
    ]


def test_what_a_removal_did() -> None:
    def said(rows: list[int], shards: int) -> str:
        return render.removed(Removal("s.zarr", rows, [], shards, ["latents"]))

    assert said([], 0) == "s.zarr: nothing to remove (already removed)."
    assert "was deleted" not in said([], 1)
    assert "interrupted" in said([], 1)
    assert said([7], 1).startswith("s.zarr: 1 row removed; 1 shard replaced, and what was derived")
