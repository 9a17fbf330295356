"""JPEGs of the size and texture of photographs from the web, cut from the photographs that are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from latentstore import images, photos

WIDTH, HEIGHT = 640, 427


def write(folder: Path, n: int, *, seed: int = 0) -> None:
    """Write n seeded JPEGs of 640 x 427, about 100 kB each: windows of photographs, with some grain."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    originals = [images.decode(path.read_bytes())[0] for path in photos.bundled()]
    for i in range(n):
        photo = originals[rng.integers(len(originals))]
        width = min(photo.width, photo.height * WIDTH / HEIGHT) * rng.uniform(0.55, 1)
        height = width * HEIGHT / WIDTH
        x, y = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        window = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        grain = np.asarray(window, np.float32) + rng.normal(0, 6, (HEIGHT, WIDTH, 1))
        Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)
