"""plan and encode --dry-run as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app
from cli.render_plan import duration, size

SMALL = ["--encoder", "patch", "--image-size", "64"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_measured_and_extrapolated_are_told_apart(here: Path) -> None:
    text = run("plan", *SMALL)
    measured, extrapolated = text.split("Extrapolated from it")
    for word in ("60 files", "images, none bad", "ms an image", "MB/s", "free disk", "cores"):
        assert word in measured, word
    for word in ("60 rows", "numbers a row", "images/s", "limit", "a kill costs", "2,000,000", "100,000,000"):
        assert word in extrapolated, word
    assert "Nothing was written" in measured
    assert re.search(r"encode +[\d.]+ ± [\d.]+ ms", measured)
    assert re.search(r"what is left +60 +1 +[\d.]+ kB +yes +[\d.]+ s", extrapolated)
    assert [p.name for p in here.iterdir()] == ["images"]


def test_dry_run_says_the_same_and_encode_then_does_it(here: Path) -> None:
    planned = json.loads(run("plan", "--json", *SMALL))
    dry = json.loads(run("encode", "--dry-run", "--json", *SMALL))
    same = ("rows", "rows_left", "dim", "dtype", "shard_rows", "batch", "threads")
    assert {k: planned[k] for k in same} == {k: dry[k] for k in same}
    # A sample ends by the clock as well: a busy machine reads fewer files, and their rows compress otherwise.
    assert planned["bytes_left"] == pytest.approx(dry["bytes_left"], rel=0.02)
    assert not (here / "latents.zarr").exists()
    assert json.loads(run("encode", "--json", *SMALL))["encoded"] == dry["rows_left"] == 60

    before = tree(here / "latents.zarr")
    finished = run("plan")
    assert "goes on, 60 rows" in finished
    assert "0 rows of 60" in finished
    assert json.loads(run("encode", "--dry-run", "--json"))["rows_left"] == 0
    assert tree(here / "latents.zarr") == before


def test_dry_run_takes_the_options_of_encode(here: Path) -> None:
    plain, wide = (
        json.loads(run("encode", "--dry-run", "--json", *SMALL, *more))
        for more in ([], ["--dtype", "float32", "--threads", "5", "--shard-rows", "168"])
    )
    assert (wide["dtype"], wide["threads"], wide["shard_rows"]) == ("float32", 5, 168)
    assert wide["bytes_left"] > 1.5 * plain["bytes_left"]
    assert [p.name for p in here.iterdir()] == ["images"]


def test_other_sizes_and_machines(here: Path) -> None:
    found = json.loads(
        run("plan", "--json", *SMALL, "--rows", "5000", "--rows", "100000000000", "--machines", "2,8")
    )
    sizes = [(e["rows"], e["machines"], e["fits"]) for e in found["extents"]]
    assert sizes == [
        (60, 2, True), (60, 8, True), (5000, 2, True), (5000, 8, True),
        (100_000_000_000, 2, False), (100_000_000_000, 8, False),
    ]  # fmt: skip


def test_without_a_sample_hours_are_unknown(here: Path) -> None:
    text = run("plan", *SMALL, "--sample", "0")
    assert "--sample 0" in text
    assert text.count("unknown") >= 10
    assert "images/s" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "nowhere"], ["nowhere", "latentstore encode FOLDER"]),
        (["plan", *SMALL, "--machines", "1,x"], ["1,x", "1,4,16"]),
        (["plan", *SMALL, "--machines", "0"], ["1 or more"]),
        (["plan", "--encoder", "nothing"], ["nothing", "tiny, patch"]),
    ],
)
def test_what_cannot_be_planned(here: Path, words: list[str], said: list[str]) -> None:
    told = run(*words, code=2)
    assert all(part in told for part in said), told
    assert [p.name for p in here.iterdir()] == ["images"]


def test_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 16_640_000_000, 8.2e16)] == [
        "0 bytes", "999 bytes", "1.00 kB", "16.64 GB", "82,000.00 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.5, 89, 90, 5399, 5400, 86400 * 4)] == [
        "0.5 s", "89.0 s", "1.5 min", "90.0 min", "1.5 h", "4.0 days",
    ]  # fmt: skip
