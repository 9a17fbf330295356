"""What every encoder offers, and the arithmetic that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentstore.schema import Space

Pictures = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What encoding needs of an encoder.

    Attributes
    ----------
    space : Space
        Decides which latents may be compared.
    facts : dict
        For the provenance: name, scaling and shift (recorded, never applied), dtype, batch, device, versions.
    batch : int
        The fixed number of pictures of one call; a smaller last batch is padded by the caller.
    """

    space: Space
    facts: dict[str, Any]
    batch: int

    def encode(self, images: Pictures, rows: npt.NDArray[np.int64]) -> Latents:
        """Return (b, dim) latents of (b, size, size, 3) pictures; ``rows`` of the store, or -1 for none."""
        ...


def begin(encoder: Encoder, images: Pictures, rows: npt.NDArray[np.int64]) -> Callable[[], Latents]:
    """Start on a batch, and return what waits for its latents.

    An encoder that has ``submit`` (a network on a GPU) works on while the caller writes the batch before and
    hands over the next; any other is done when this returns.
    """
    submit: Callable[..., Callable[[], Latents]] | None = getattr(encoder, "submit", None)
    if submit is not None:
        return submit(images, rows)
    latents = encoder.encode(images, rows)
    return lambda: latents


def blank_batch(encoder: Encoder) -> Pictures:
    """Return (batch, size, size, 3) grey pictures, to be filled with those that there are.

    Always the same shape: a network's last bits may depend on the number of pictures in a call. Grey where
    there is no picture: black is an extreme, and can overflow a reduced precision.
    """
    size = encoder.space.image_size
    return np.full((encoder.batch, size, size, 3), 128, np.uint8)


def to_unit(pixels: Pictures) -> Latents:
    """Map 0…255 to [-1, 1] as ``ToTensor`` and ``Normalize([0.5], [0.5])`` do."""
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def noise_key(picture: Pictures) -> int:
    """Return what seeds the posterior's noise of a picture: its pixels, so that no two pictures share noise.

    Row numbers would not do: a query in place 0 would carry the noise of the collection's row 0, and find it.
    """
    return int.from_bytes(hashlib.sha256(picture.tobytes()).digest()[:7], "big")


def row_noise(seed: int, row: int, dim: int, *, stream: int = 0) -> Latents:
    """Return the (dim,) standard normal noise of one row: the same in any batch, order or process.

    Other seeds, rows and streams give independent noise.
    """
    return np.random.default_rng([seed, row, stream]).standard_normal(dim, dtype=np.float32)


def versions(*packages: str) -> dict[str, Any]:
    """Return the installed versions, for the provenance."""
    from importlib.metadata import version

    return {"versions": {name: version(name) for name in packages}}
