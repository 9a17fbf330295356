"""The house: who imports whom, what is imported late, and that the README's commands are real."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "cupy", "faiss", "dask", "diffusers", "transformers")
ALLOWED = {"latentstore": set(), "solvers": set(), "cli": {"latentstore", "solvers"}}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_layers(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & (set(ALLOWED) - {package} - ALLOWED[package])
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize(
    "words", [["--help"], ["encode", "--help"], ["match", "--help"], ["translate", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        f"import sys; sys.argv = ['latentstore', *{words!r}]\n"
        "from cli.app import main\n"
        "try: main()\n"
        f"except SystemExit as e: print('LOADED', e.code, sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "LOADED 0 []" in out


def test_every_command_shows_an_example() -> None:
    from typer.testing import CliRunner

    from cli.app import COMMANDS, app

    for command in COMMANDS:
        text = CliRunner().invoke(app, [command.__name__, "--help"]).output
        assert re.search(r"Example: (latentstore|solve) ", text), command.__name__


def readme_commands() -> list[str]:
    """The lines of README's shell blocks that run our commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [
        line.split("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(("latentstore ", "solve "))]


def test_every_readme_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder that holds what the page says it holds."""
    from typer.testing import CliRunner

    from cli.app import app, solve_app

    sys.path.insert(0, str(ROOT / "tests" / "cli"))
    try:
        from cli_helpers import picture
    finally:
        sys.path.pop(0)
    for folder, count in (("images", 60), ("suspects", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            picture(i).save(tmp_path / folder / f"{i:02d}.jpg")
    (tmp_path / "suspicious.jpg").write_bytes((tmp_path / "images" / "07.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commands = readme_commands()
    assert {c.split()[0] for c in commands} == {"latentstore", "solve"}
    for command in commands:
        words = shlex.split(command)
        # 576 numbers an image: as long as any rank on the page, and quick to solve.
        if words[:2] in (["latentstore", "encode"], ["latentstore", "plan"]) and "--image-size" not in words:
            words += ["--image-size", "96"]
        if words[:2] == ["latentstore", "demo"]:
            words += ["--image-size", "64", "--rank", "32", "--budget", "2", "--translated", "1"]
        if "OWNER/NAME" in command:
            continue  # a hub name: there is no hub in a test
        # In this process: forty others would import everything forty times.
        program = app if words[0] == "latentstore" else solve_app
        done = CliRunner().invoke(program, words[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"


def test_the_readme_python_runs(tmp_path: Path) -> None:
    from latentstore.encode import Source, encode
    from latentstore.encoders import PatchEncoder

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    sys.path.insert(0, str(ROOT / "tests" / "cli"))
    from cli_helpers import picture

    (tmp_path / "images").mkdir()
    for i in range(10):
        picture(i).save(tmp_path / "images" / f"{i}.jpg")
    encode(Source(tmp_path / "images"), tmp_path / "latents.zarr", PatchEncoder())
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_version_is_written_once() -> None:
    from latentstore import __version__

    assert __version__ in (ROOT / "latentstore" / "_version.py").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
