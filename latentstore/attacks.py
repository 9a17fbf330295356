"""Attacks on pixels: what happens to a picture on its way through the world. On queries only, seeded."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

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


def blur(sigma: float) -> Attack:
    """Return a Gaussian blur of ``sigma`` pixels (above 0).

    Raises
    ------
    UsageError
    """
    if not 0 < sigma < float("inf"):
        raise UsageError(f"blur has a sigma of {sigma} pixels; it must be above 0.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        del seed
        return image.filter(ImageFilter.GaussianBlur(sigma))

    return Attack(f"blur {sigma:g} px", apply)


def shrink(keep: float) -> Attack:
    """Return a bicubic resize to ``keep`` of each side (0 < keep < 1), as a thumbnail would.

    Raises
    ------
    UsageError
    """
    if not 0 < keep < 1:
        raise UsageError(f"shrink keeps {keep} of each side; it must lie between 0 and 1.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        del seed
        width, height = (max(1, round(side * keep)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    return Attack(f"shrink to {keep:.3g}", apply)


def noise(deviation: float) -> Attack:
    """Return seeded Gaussian noise of ``deviation`` grey levels (of 255) on every value, clipped.

    Raises
    ------
    UsageError
    """
    if not 0 < deviation < float("inf"):
        raise UsageError(f"noise has a deviation of {deviation} grey levels; it must be above 0.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        pixels = np.asarray(image, np.float64)
        pixels = pixels + np.random.default_rng(seed).normal(0.0, deviation, pixels.shape)
        return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))

    return Attack(f"noise {deviation:g}", apply)


def colour(strength: float) -> Attack:
    """Return seeded gains of the three channels and a gamma, as a filter of a photo app would.

    Each is e to a Gaussian of deviation ``strength`` (above 0); values are clipped.

    Raises
    ------
    UsageError
    """
    if not 0 < strength < float("inf"):
        raise UsageError(f"colour has a strength of {strength}; it must be above 0.")

    def apply(image: Image.Image, seed: int) -> Image.Image:
        *gains, gamma = np.exp(np.random.default_rng(seed).normal(0.0, strength, 4))
        pixels = np.asarray(image, np.float64) / 255
        pixels = np.array(gains) * pixels**gamma
        return Image.fromarray(np.rint(255 * pixels.clip(0, 1)).astype(np.uint8))

    return Attack(f"colour {strength:g}", apply)
