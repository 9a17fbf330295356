"""Real pictures on disk, and the commands as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import Run, RunApart, picture
from typer.testing import CliRunner, Result

from cli.app import app, solve_app


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "images"
    folder.mkdir()
    for i in range(60):
        picture(i).save(folder / f"photo {i:02d}.jpg", quality=92)
    return folder


@pytest.fixture
def here(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds only ``images/``."""
    (tmp_path / "images").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path) -> Run:
    """Run a command in this process: one of its own would import everything again."""
    del here  # the working folder

    def call(*words: str | Path, code: int = 0) -> Result:
        program, *rest = (str(w) for w in words)
        entry = {"latentstore": app, "solve": solve_app}[program]
        done = CliRunner().invoke(entry, rest, prog_name=program, catch_exceptions=False)
        assert done.exit_code == code, (done.exit_code, done.stdout, done.stderr)
        return done

    return call


@pytest.fixture
def run_apart(here: Path) -> RunApart:
    """Run a command in a process of its own, as a shell does."""

    def call(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        program, *rest = (str(w) for w in words)
        entry = {"latentstore": "main", "solve": "solve_main"}[program]
        script = f"import sys; sys.argv[0] = {program!r}; from cli.app import {entry}; {entry}()"
        done = subprocess.run(
            [sys.executable, "-c", script, *rest], cwd=here, capture_output=True, text=True, timeout=240
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    return call
