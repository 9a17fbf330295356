"""Attacks on pixels: what happens to a picture on its way through the world. On queries only, seeded.

:data:`FAMILIES` names the kinds with the intensities that robustness is measured at. Figure 7 of the ICML
paper shows JPEG compression, Gaussian blur, resizing and watermarks; its text names the strongest JPEG
(quality 30) and the strongest blur (σ = 3 pixels). Those two ends are the paper's. All other intensities, the
weaker JPEGs and blurs among them, and all other kinds are ours; so is whatever goes beyond the two ends.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from latentstore.errors import UsageError

Seed = int | Sequence[int]
"""What NumPy's generators take: a number, or several, such as (seed, row)."""
MARKS = ("SAMPLE", "PREVIEW", "DO NOT COPY", "COPYRIGHT", "STOCK PHOTO")
"""What a watermark says."""
_ROWS = 256
"""Rows of a picture that noise is drawn for at a time: 12 megapixels in float64 take 288 MB."""


@dataclass(frozen=True)
class Attack:
    """A named attack of one intensity; call it with an RGB image and a seed."""

    name: str
    apply: Callable[[Image.Image, Seed], Image.Image]

    def __call__(self, image: Image.Image, seed: Seed) -> Image.Image:
        """Return the attacked picture."""
        return self.apply(image, seed)


@dataclass(frozen=True)
class Family:
    """Attacks that differ in their intensity.

    Attributes
    ----------
    make : callable
        Returns the attack of an intensity; raises UsageError for one that cannot be.
    intensities : tuple of float
        Those that are measured by default, the strongest last.
    label, axis : str
        Its title, and what the axis of intensities says.
    rises : bool
        Whether a larger intensity is a stronger attack.
    neutral : float
        Where a picture without the attack stands on the axis.
    """

    make: Callable[[float], Attack]
    intensities: tuple[float, ...]
    label: str
    axis: str
    rises: bool
    neutral: float


def jpeg(quality: float) -> Attack:
    """Return JPEG compression at a whole quality from 1 (worst) to 100 (which is not lossless either).

    Raises
    ------
    UsageError
    """
    if not (1 <= quality <= 100 and quality == int(quality)):
        raise UsageError(f"JPEG quality is {quality:g}; it must be a whole number from 1 to 100.")

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        del seed
        out = io.BytesIO()
        image.save(out, "JPEG", quality=int(quality))
        return Image.open(out).convert("RGB")

    return Attack(f"JPEG {quality:g}", apply)


def crop(keep: float) -> Attack:
    """Return a crop that keeps ``keep`` of each side (0 < keep < 1), at a seeded place.

    Raises
    ------
    UsageError
    """
    if not 0 < keep < 1:
        raise UsageError(f"crop keeps {keep} of each side; it must lie between 0 and 1.")

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
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

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
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

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
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

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        rng = np.random.default_rng(seed)
        pixels = np.array(image)
        for top in range(0, len(pixels), _ROWS):
            part = pixels[top : top + _ROWS]
            part[...] = np.rint((part + rng.normal(0.0, deviation, part.shape)).clip(0, 255))
        return Image.fromarray(pixels)

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

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        *gains, gamma = np.exp(np.random.default_rng(seed).normal(0.0, strength, 4))
        curves = np.array(gains)[:, None] * (np.arange(256) / 255) ** gamma
        return image.point(np.rint(255 * curves.clip(0, 1)).astype(int).ravel().tolist())

    return Attack(f"colour {strength:g}", apply)


def watermark(opacity: float) -> Attack:
    """Return a text, tiled aslant over the whole picture, of an opacity from 0 (none) to 1.

    White letters with a black rim, a twelfth of the shorter side high, in Pillow's own font. The text, the
    offset of the tiles and their direction are seeded. Another version of Pillow may draw them a little
    differently.

    Raises
    ------
    UsageError
    """
    if not 0 <= opacity <= 1:
        raise UsageError(f"watermark has an opacity of {opacity}; it must be from 0 to 1.")

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        grey, mask = _tiled_text(image.size, np.random.default_rng(seed)).split()
        mask = mask.point([round(v * opacity) for v in range(256)])
        return Image.composite(grey.convert("RGB"), image, mask)

    return Attack(f"watermark {opacity:g}", apply)


def _tiled_text(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return the letters over a picture of a size, as grey with alpha."""
    text = MARKS[int(rng.integers(len(MARKS)))]
    height = max(6, round(min(size) / 12))
    font = ImageFont.load_default(height)
    width = round(font.getlength(text)) + 2 * height
    # Two lines, the lower one half a text further on, and what of it comes in again from the left.
    tile = Image.new("LA", (width, 6 * height))
    draw = ImageDraw.Draw(tile)
    for x, y in (
        (height, height),
        (height + width // 2, 4 * height),
        (height + width // 2 - width, 4 * height),
    ):
        rim = max(1, height // 12)
        draw.text((x, y), text, (255, 255), font, stroke_width=rim, stroke_fill=(0, 255))
    # Turned about its middle, a square on the diagonal covers the picture in every direction.
    side = 2 * int(np.ceil(np.hypot(*size) / 2)) + 2
    moved = np.roll(np.asarray(tile), tuple(int(rng.integers(n)) for n in (6 * height, width)), axis=(0, 1))
    times = (-(-side // (6 * height)), -(-side // width), 1)
    canvas = Image.fromarray(np.tile(moved, times)[:side, :side])
    turned = canvas.rotate(30 if rng.random() < 0.5 else -30, Image.Resampling.BILINEAR)
    left, top = ((side - n) // 2 for n in size)
    return turned.crop((left, top, left + size[0], top + size[1]))


def flip(kind: float) -> Attack:
    """Return a mirror image: 1 changes left and right, 2 top and bottom.

    Raises
    ------
    UsageError
    """
    if kind not in (1, 2):
        raise UsageError(f"flip is {kind:g}; 1 changes left and right, 2 top and bottom.")
    mirrored = ImageOps.mirror if kind == 1 else ImageOps.flip

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        del seed
        return mirrored(image)

    return Attack("flip left-right" if kind == 1 else "flip top-bottom", apply)


def rotation(degrees: float) -> Attack:
    """Return a turn by 0 to 180 degrees about the middle, in a seeded direction.

    Right angles turn the whole picture, without loss. Any other turn keeps the frame: what stands out of it
    is cut off, and the corners that come free are black.

    Raises
    ------
    UsageError
    """
    if not 0 <= degrees <= 180:
        raise UsageError(f"rotation is by {degrees:g} degrees; it must be from 0 to 180.")

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        angle = degrees if np.random.default_rng(seed).random() < 0.5 else -degrees
        return image.rotate(angle, Image.Resampling.BICUBIC, expand=degrees % 90 == 0)

    return Attack(f"rotation {degrees:g}°", apply)


def brightness(factor: float) -> Attack:
    """Return values times a factor (at least 0), clipped: 1 changes nothing, 0 is black."""
    return _enhanced("brightness", ImageEnhance.Brightness, factor)


def contrast(factor: float) -> Attack:
    """Return distances from the picture's mean grey times a factor (at least 0): 0 is one grey."""
    return _enhanced("contrast", ImageEnhance.Contrast, factor)


def saturation(factor: float) -> Attack:
    """Return distances from each pixel's own grey times a factor (at least 0): 0 has no colour."""
    return _enhanced("saturation", ImageEnhance.Color, factor)


def _enhanced(name: str, kind: Callable[[Image.Image], ImageEnhance._Enhance], factor: float) -> Attack:
    if not 0 <= factor < float("inf"):
        raise UsageError(f"{name} has a factor of {factor}; it must be at least 0.")

    def apply(image: Image.Image, seed: Seed) -> Image.Image:
        del seed
        return kind(image).enhance(factor)

    return Attack(f"{name} {factor:g}", apply)


_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
_JPEG = tuple(map(float, range(100, 0, -10)))
FAMILIES: dict[str, Family] = {
    "jpeg": Family(jpeg, _JPEG, "JPEG compression", "quality (110: not compressed)", False, 110.0),
    "blur": Family(blur, (1.0, 2.0, 3.0, 5.0), "Gaussian blur", "σ in pixels", True, 0.0),
    "resize": Family(shrink, (*_SHARES, 0.25), "Resizing", "share of each side", False, 1.0),
    "watermark": Family(watermark, (0.2, 0.4, 0.6, 0.8), "Watermark", "opacity", True, 0.0),
    "crop": Family(crop, _SHARES, "Cropping", "share of each side that is kept", False, 1.0),
    "flip": Family(flip, (1.0, 2.0), "Flip", "1 left-right, 2 top-bottom", True, 0.0),
    "rotation": Family(rotation, (5.0, 10.0, 20.0, 45.0, 90.0), "Rotation", "degrees", True, 0.0),
    "colour": Family(
        colour, (0.1, 0.25, 0.5, 1.0), "Colour", "deviation of log gains and log gamma", True, 0.0
    ),
    "noise": Family(noise, (10.0, 20.0, 40.0, 80.0), "Noise", "deviation in grey levels", True, 0.0),
    "brightness": Family(brightness, (0.8, 0.6, 0.4, 0.2), "Brightness", "factor", False, 1.0),
    "contrast": Family(contrast, (0.8, 0.6, 0.4, 0.2), "Contrast", "factor", False, 1.0),
    "saturation": Family(saturation, (0.5, 0.0), "Saturation", "factor", False, 1.0),
}
"""Kind → its intensities and how they run. See the head of this module for which are the paper's."""
USUAL = ("jpeg", "blur", "resize", "watermark", "crop", "flip", "rotation", "colour")
"""The kinds that are measured where none is named."""
