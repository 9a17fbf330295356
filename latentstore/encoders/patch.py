"""The built-in encoder: PCA of 8 x 8 patches. It needs NumPy alone, and no download."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore.encoders.base import Latents, Pictures, to_unit, versions
from latentstore.errors import UsageError
from latentstore.schema import Space

_DATA = Path(__file__).parents[1] / "data"


class PatchEncoder:
    """The best linear code of its size: PCA of 8 x 8 RGB patches to 4 numbers.

    At 256 x 256 pixels a latent is 4 x 32 x 32 = 4,096 numbers, like Stable Diffusion's. It is linear and
    learned no semantics: for trials, before any download.

    Parameters
    ----------
    image_size : int
        A multiple of 8 (64 gives 256-d latents).
    batch : int, optional
        Pictures of one call, by default 28. The latents do not depend on it.

    Notes
    -----
    Principal component analysis (Pearson 1901; Hotelling 1933): no other linear map of a patch to 4
    numbers and back has a smaller mean squared error on the photos it was fitted on. See
    ``latentstore/data/patch.json`` for the data and the PSNR on held-out photos.
    """

    batch = 28  # divides the rows of a chunk, and so of a shard: no padding but in the last one

    def __init__(self, image_size: int = 256, batch: int | None = None) -> None:
        from safetensors.numpy import load

        if image_size < 8 or image_size % 8:
            raise UsageError(
                f"The patch encoder needs an image size that is a multiple of 8, not {image_size}."
            )
        if batch is not None:
            self.batch = batch
        raw = (_DATA / "patch.safetensors").read_bytes()
        weights = load(raw)
        self._mean: npt.NDArray[np.float32] = weights["mean"]
        self._components: npt.NDArray[np.float32] = weights["components"]
        side = image_size // 8
        self.space = Space(
            encoder="patch",
            weights=hashlib.sha256(self._mean.tobytes() + self._components.tobytes()).hexdigest(),
            image_size=image_size,
            latent_shape=(len(self._components), side, side),
        )
        self.facts: dict[str, Any] = {
            "name": "patch",
            "dtype": "float32",
            "device": "cpu",
            **versions("numpy"),
        }

    def encode(self, images: Pictures, rows: npt.NDArray[np.int64]) -> Latents:
        """Return (b, dim) latents."""
        del rows
        channels, side, _ = self.space.latent_shape
        codes = np.matmul(patches(images) - self._mean, self._components.T, dtype=np.float32)
        return np.ascontiguousarray(
            codes.reshape(len(images), side * side, channels).transpose(0, 2, 1)
        ).reshape(len(images), -1)

    def decode(self, latents: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Return (b, size, size, 3) pictures in [-1, 1]: the least-squares reconstruction."""
        channels, side, _ = self.space.latent_shape
        codes = np.asarray(latents, np.float32).reshape(-1, channels, side * side).transpose(0, 2, 1)
        flat = codes @ self._components + self._mean
        grid = flat.reshape(-1, side, side, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(-1, side * 8, side * 8, 3)


def patches(images: Pictures) -> npt.NDArray[np.float32]:
    """Cut (b, size, size, 3) pictures into (b, (size/8)², 192) patches in [-1, 1], row by row."""
    b, size = images.shape[:2]
    side = size // 8
    grid = images.reshape(b, side, 8, side, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return to_unit(grid.reshape(b, side * side, 192))
