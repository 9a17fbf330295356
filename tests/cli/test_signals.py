"""Ctrl-C and SIGTERM, sent to all processes of a job as a terminal or a scheduler sends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app
from latentstore.store import open_store

SLOW = """
import sys, time
from latentstore.encoders import PatchEncoder
whole = PatchEncoder.encode
PatchEncoder.batch = 4
PatchEncoder.encode = lambda self, *a: (time.sleep(0.2), whole(self, *a))[1]
"""
# Where the tests run in a shell's background, their processes inherit that Ctrl-C is ignored.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["latentstore", "encode", "images", "--encoder", "patch", "--image-size", "64", *sys.argv[1:]]
from cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "script", "options", "code"),
    [
        (signal.SIGTERM, SLOW + MAIN, [], 143),
        (signal.SIGINT, MAIN, ["--workers", "2"], 130),
        (signal.SIGTERM, MAIN, ["--workers", "2"], 143),
    ],
)
def test_one_line_and_a_rerun_finishes(
    here: Path, sent: signal.Signals, script: str, options: list[str], code: int
) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", script, *options],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    # The store is made when the workers are there, and just before they begin.
    while not (here / "latents.zarr").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, sent)
    out, said = job.communicate(timeout=60)
    assert (out, said) == ("", "Stopped. Finished shards are kept; run the same command again to go on.\n")
    assert job.returncode == code
    assert CliRunner().invoke(app, ["encode", "images"]).exit_code == 0
    assert open_store(here / "latents.zarr").counts() == {"ok": 60}


def test_a_handler_that_is_there_is_left_alone(here: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        assert CliRunner().invoke(app, ["info", "nowhere.zarr"]).exit_code == 2
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert CliRunner().invoke(app, ["info", "nowhere.zarr"]).exit_code == 2
    assert signal.getsignal(signal.SIGTERM) is before
