"""Where two pictures agree, drawn: a heat map over a picture in grey, as small as a page of many needs."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 160
"""Pixels of the longer side."""
NOTE = (
    "Orange places speak for this origin, blue ones against it; places without colour say little. Colours "
    "are relative to the first candidate's; a picture without an origin here has them, too."
)
"""What a heat map shows, for who sees one."""
_FOR, _AGAINST = (230, 97, 0), (0, 114, 178)
"""Orange and blue of nearly one lightness (CIE L* 58 and 46): told apart in every common colour blindness
(Okabe & Ito, "Color Universal Design", 2008), and neither vanishes on a light or a dark page."""
_DARKEST, _LIGHTEST = 40, 215
"""Greys of the picture: black and white would swallow what is laid over them."""
_OPAQUE, _BEND = 0.75, 0.8
_ROBUST = 98.0
"""Percentile of |value| that is drawn at full strength: one place alone must not hide all others."""
_COLOURS = 64


def strength(grid: npt.NDArray[np.floating]) -> float:
    """Return the contribution that is drawn at full strength: the robust maximum of ``|grid|``."""
    size = np.abs(np.nan_to_num(np.asarray(grid, np.float64)))
    return float(np.percentile(size, _ROBUST)) or float(size.max())


def overlay(
    grid: npt.NDArray[np.floating],
    picture: Image.Image | None = None,
    side: int = SIDE,
    *,
    scale: float | None = None,
) -> str:
    """Draw a heat map over its picture.

    Parameters
    ----------
    grid : (H, W) array
        What each place contributes, in any unit.
    picture : PIL.Image.Image, optional
        The whole picture that the grid lies over, in its own proportions; without one, even grey.
    side : int
        Pixels of the longer side.
    scale : float, optional
        The contribution to draw at full strength: the :func:`strength` of a map that this one is to compare
        with. The map's own without one.

    Returns
    -------
    str
        ``data:`` URI of a PNG. The picture is grey; orange places have positive values, blue ones negative,
        the stronger the larger.

    Notes
    -----
    Opacity is the share of the scale, bent so that small values stay visible and zero does not.
    """
    values = np.nan_to_num(np.asarray(grid, np.float64))
    back = _backdrop(values.shape, picture, side)
    # Smoothed between places: a latent's neighbours overlap in what they see of the picture.
    smooth = np.asarray(
        Image.fromarray(values.astype(np.float32)).resize(back.size, Image.Resampling.BICUBIC), np.float64
    )
    peak = scale or strength(values)
    share = np.minimum(np.abs(smooth) / peak, 1.0) ** _BEND if peak > 0 else np.zeros_like(smooth)
    alpha = (_OPAQUE * share)[:, :, None]
    colour = np.where(smooth[:, :, None] >= 0, _FOR, _AGAINST)
    grey = np.asarray(back, np.float64)[:, :, None]
    return _png(np.rint(alpha * colour + (1 - alpha) * grey).astype(np.uint8))


def _backdrop(shape: tuple[int, ...], picture: Image.Image | None, side: int) -> Image.Image:
    if picture is None:
        scale = side / max(shape)
        size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
        return Image.new("L", size, (_DARKEST + _LIGHTEST) // 2)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    grey = picture.convert("L").resize(size, Image.Resampling.BILINEAR)
    return grey.point([round(_DARKEST + (_LIGHTEST - _DARKEST) * v / 255) for v in range(256)])


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    # A palette, without dithering, takes a third of the bytes; at this size nobody sees it.
    small = Image.fromarray(pixels).quantize(_COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
