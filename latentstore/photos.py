"""Real photographs that ship inside scikit-image and scikit-learn, cut into tiles: for the demo.

A handful of photos is a smoke test of the way, not a measure of accuracy.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from latentstore import images
from latentstore.errors import MissingExtraError

TILE = 128
_MIN_CONTRAST = 8.0
"""Standard deviation of grey levels (of 255) below which a tile is a blank that no method can tell apart."""

PHOTOS: dict[str, tuple[str, ...]] = {
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
"""Photographs only: drawings, charts and the stereo twin of the motorcycle are left out."""


def bundled() -> list[Path]:
    """Return the photographs that are installed.

    Raises
    ------
    MissingExtraError
        Neither scikit-image nor scikit-learn is installed.
    """
    found = []
    for place, names in PHOTOS.items():
        package, *folders = place.split("/")
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent.joinpath(*folders)
            found += [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise MissingExtraError(
            "The demo's photographs come with scikit-image and scikit-learn, which are not installed: "
            "pip install 'latentstore[demo]', or name your own folder with --images."
        )
    return found


def tiles(photo: Path, size: int = TILE) -> Iterator[tuple[str, Image.Image]]:
    """Yield (name, tile) of the non-overlapping tiles of a photo that are not blank."""
    image, _ = images.decode(photo.read_bytes())
    for y in range(0, image.height - size + 1, size):
        for x in range(0, image.width - size + 1, size):
            tile = image.crop((x, y, x + size, y + size))
            if np.asarray(tile.convert("L"), np.float32).std() >= _MIN_CONTRAST:
                yield f"{photo.stem}-{y // size:02d}-{x // size:02d}.png", tile


def write_tiles(folder: Path, photos: list[Path], *, limit_per_photo: int | None = None) -> Path:
    """Write the tiles of photos as PNG files with a manifest, split by photo; return the manifest's path.

    Of five photos, in the order of their names' hash, three are for training, one for validation and
    one for test, so that no photo stands on two sides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for photo, split in _split_photos(photos).items():
        for number, (name, tile) in enumerate(tiles(photo)):
            if limit_per_photo is not None and number >= limit_per_photo:
                break
            tile.save(folder / name)
            rows.append(
                {"path": name, "identity": name, "group": photo.stem, "role": "origin", "split": split}
            )
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "identity", "group", "role", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def _split_photos(photos: list[Path]) -> dict[Path, str]:
    import hashlib

    order = sorted(photos, key=lambda p: hashlib.sha256(p.name.encode()).digest())
    cycle = ("train", "test", "train", "validation", "train")
    return {photo: cycle[i % 5] for i, photo in enumerate(order)}
