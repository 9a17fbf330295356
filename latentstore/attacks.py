"""Attacks on pixels: what happens to a picture on its way through the world. On queries only, seeded."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentstore.errors import UsageError


@dataclass(frozen=True)
class Attack:
    """A named attack of one intensity; call it with an RGB image and a seed."""

    name: str
    apply: Callable[[Image.Image, int], Image.Image]

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Return the attacked picture."""
        return self.apply(image, seed)


def jpeg(quality: int) -> Attack:
    """Return JPEG compression at a quality from 1 (worst) to 95.

    Raises
    ------
    UsageError
    """
    if not 1 <= quality <= 95:
        raise UsageError(f"JPEG quality is {quality}; it must be from 1 to 95.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        del seed
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(out).convert("RGB")

    return Attack(f"JPEG {quality}", apply)


def crop(keep: float) -> Attack:
    """Return a crop that keeps ``keep`` of each side (0 < keep < 1), at a seeded place.

    Raises
    ------
    UsageError
    """
    if not 0 < keep < 1:
        raise UsageError(f"crop keeps {keep} of each side; it must lie between 0 and 1.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        width, height = (max(1, round(side * keep)) for side in image.size)
        rng = np.random.default_rng(seed)
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        return image.crop((left, top, left + width, top + height))

    return Attack(f"crop {keep:.0%}".replace("%", " %"), apply)
