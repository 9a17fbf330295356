"""Bad input: one paragraph with the values and the way out, the right exit code, nothing damaged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app, solve_app
from cli.workflows import run_encode
from latentstore.store import open_store

SMALL = ["--encoder", "patch", "--image-size", "64"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of ``pictures``. Read only."""
    root = tmp_path_factory.mktemp("whole") / "latents.zarr"
    run_encode(pictures, root, encoder="patch", image_size=64)
    return root


@pytest.fixture
def store(here: Path, whole: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(whole, here / "latents.zarr")


CASES = [
    (["encode", "nowhere"], 2, ["nowhere", "latentstore encode FOLDER"]),
    (["encode", "empty"], 2, ["empty", "no image files", ".jpg"]),
    (["encode", "a file"], 2, ["a file", "not a folder"]),
    (["encode", "images", "--manifest", "nowhere.csv"], 2, ["nowhere.csv"]),
    (["encode", "images", "--store", "a file/s.zarr", "--encoder=patch"], 1, ["a file/s.zarr"]),
    (
        ["encode", "images", "--store", "occupied", "--encoder=patch"],
        2,
        ["occupied", "not a latentstore store"],
    ),
    (["encode", "images", "--store", "new.zarr", "--encoder", "nothing"], 2, ["nothing", "tiny, patch"]),
    (["encode", "images", "--store", "new.zarr", "--encoder", "empty"], 2, ["empty", "config.json"]),
    (["encode", "images", "--store", "new.zarr", "--encoder=patch", "--shard-rows", "100"], 2, ["100", "84"]),
    (["encode", "images", "--store", "new.zarr", "--image-size", "65"], 2, ["65", "multiple of 8"]),
    (["encode", "images", "--image-size", "128"], 1, ["space", "Encode again"]),
    (["encode", "images", "--dtype", "float32"], 2, ["float32", "float16"]),
    (["encode", "other"], 2, ["was made from", "--store"]),
    (["simulate", "--alpha-bar", "1.5"], 2, ["1.5", "between 0 and 1"]),
    (["simulate", "--out", "latents.zarr"], 2, ["latents.zarr"]),
    (["simulate", "--per-origin", "0"], 2, ["0"]),
    (["solve", "--method", "analytic", "--rank", "0"], 2, ["0", "256", "--rank"]),
    (["solve", "--method", "analytic", "--rank", "257"], 2, ["257", "256", "--rank"]),
    (["solve", "--method", "svdd"], 2, ["svdd", "svd"]),
    (
        ["solve", "--method", "svd", "--rank", "8"],
        1,
        ["no pairs", "--method analytic", "simulate", "--manifest"],
    ),
    (["solve", "--method", "analytic", "--lam", "2"], 2, ["--lam", "gnull"]),
    (["solve", "--store", "nowhere.zarr"], 2, ["nowhere.zarr", "latentstore encode"]),
    (["solve", "--store", "images"], 2, ["images"]),
    (["solve", "--method", "analytic", "--rank", "8", "--out", "nowhere/W.safetensors"], 2, ["nowhere"]),
    (["match", "nowhere.jpg"], 2, ["nowhere.jpg"]),
    (["match", "images/photo 01.jpg", "--projection", "nowhere.safetensors"], 2, ["nowhere.safetensors"]),
    (["match", "images/photo 01.jpg", "--projection", "a file"], 1, ["a file"]),
    (["match", "a file"], 2, ["a file", "unreadable"]),
    (["match", "images/photo 01.jpg", "--top", "0"], 2, ["--top", "0"]),
    (["evaluate", "--projection", "nowhere.safetensors"], 2, ["nowhere.safetensors"]),
]


@pytest.mark.parametrize(
    ("words", "code", "parts"), CASES, ids=lambda v: " ".join(v) if isinstance(v, list) else None
)
def test_bad_input(store: Path, here: Path, words: list[str], code: int, parts: list[str]) -> None:
    (here / "empty").mkdir()
    (here / "occupied").mkdir()
    (here / "occupied" / "thesis.txt").write_text("mine")
    (here / "a file").write_text("no image")
    (here / "other").mkdir()
    (here / "other" / "x.png").write_bytes((here / "images" / "photo 01.jpg").read_bytes())
    before = tree(here)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code, (done.output, done.exception)
    assert done.stderr.count("\n") == 1, "one paragraph"
    for part in parts:
        assert part in done.stderr
    assert tree(here) == before, "nothing is changed"


def test_projection_of_another_space_is_refused(store: Path, here: Path) -> None:
    runner = CliRunner()
    wide = ["encode", "images", "--store", "wide.zarr", "--encoder=patch", "--image-size=128"]
    assert runner.invoke(app, wide).exit_code == 0
    assert runner.invoke(solve_app, ["--method", "analytic", "--rank", "8"]).exit_code == 0
    words = [
        "match",
        "images/photo 01.jpg",
        "--store",
        "wide.zarr",
        "--projection",
        "W-analytic-8.safetensors",
    ]
    done = runner.invoke(app, words)
    assert done.exit_code == 1
    for name in ("latents.zarr", "wide.zarr"):
        assert open_store(here / name).space.id in done.stderr


def test_a_bad_query_among_good_ones_is_named_and_the_rest_answered(store: Path, here: Path) -> None:
    (here / "broken.jpg").write_bytes(b"not a picture")
    done = CliRunner().invoke(app, ["match", "images/photo 03.jpg", "broken.jpg"])
    assert done.exit_code == 1
    assert "photo 03.jpg" in done.output
    assert "broken.jpg cannot be read" in done.output


def test_bad_images_are_counted_and_strict_exits_with_3(here: Path, pictures: Path) -> None:
    folder = here / "mixed"
    folder.mkdir()
    (folder / "good.jpg").write_bytes((pictures / "photo 00.jpg").read_bytes())
    (folder / "torn.jpg").write_bytes((pictures / "photo 01.jpg").read_bytes()[:200])
    words = ["encode", "mixed", "--store", "m.zarr", *SMALL]
    assert CliRunner().invoke(app, words).exit_code == 0
    done = CliRunner().invoke(app, [*words, "--strict"])
    assert done.exit_code == 3
    assert "1 ok, 1 unreadable" in done.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_store(store: Path, here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    done = CliRunner().invoke(app, ["encode", "images", "--store", "locked/s.zarr", *SMALL])
    assert done.exit_code == 1
    assert "locked" in done.stderr


def test_ctrl_c_says_how_to_go_on_and_a_rerun_finishes(here: Path) -> None:
    script = (
        "import signal, sys, time\n"
        # Where the tests run in a shell's background, their processes inherit that Ctrl-C is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from latentstore.encoders import PatchEncoder\n"
        "whole = PatchEncoder.encode\n"
        "PatchEncoder.batch = 4\n"
        "PatchEncoder.encode = lambda self, *a: (time.sleep(0.2), whole(self, *a))[1]\n"
        "sys.argv = ['latentstore', 'encode', 'images', '--encoder', 'patch', '--image-size', '64']\n"
        "from cli.app import main; main()\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", script], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(here.glob("latents.zarr/latents/c/*/*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert not list(here.rglob("*.partial"))
    assert open_store(here / "latents.zarr").todo() == [0]
    assert CliRunner().invoke(app, ["encode", "images"]).exit_code == 0
    assert open_store(here / "latents.zarr").counts() == {"ok": 60}
