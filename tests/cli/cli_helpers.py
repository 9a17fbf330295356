"""What the tests of the commands share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from cli.app import app
from cli.workflows import run_encode

Run = Callable[..., Result]
RunApart = Callable[..., subprocess.CompletedProcess[str]]


def picture(seed: int, size: int = 96) -> Image.Image:
    """Smooth colour fields: neighbouring pixels agree, as in photographs, and no two pictures do."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


SPLITS: Mapping[str, range] = {"train": range(48), "validation": range(48, 72), "test": range(72, 108)}


def pair_store(
    folder: Path,
    share: float,
    *,
    role: str = "translation",
    splits: tuple[str, ...] = ("train", "validation", "test"),
    name: str = "pairs.zarr",
) -> Path:
    """Encode 108 pictures (64 values each), and in some splits each blended with another one by a share."""
    lines = ["path,identity,role,split"]
    for split, numbers in SPLITS.items():
        for i in numbers:
            own = picture(i, 32)
            own.save(folder / f"{i}.png")
            lines.append(f"{i}.png,{i},origin,{split}")
            if split in splits:
                Image.blend(own, picture(10_000 + i, 32), share).save(folder / f"{i}b.png")
                lines.append(f"{i}b.png,{i},{role},{split}")
    listed = folder / f"{name}.csv"
    listed.write_text("\n".join(lines) + "\n")
    run_encode(folder, folder / name, manifest=listed, encoder="patch", image_size=32)
    return folder / name


def solve(*words: Any, code: int = 0, method: str = "cosface") -> Any:
    done = CliRunner().invoke(app, ["solve", "--method", method, *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def paragraph(done: Any) -> str:
    """The one paragraph of a failure, without the lines that came before it."""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last
