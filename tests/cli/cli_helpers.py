"""What the tests of the commands share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import numpy as np
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]


def picture(seed: int, size: int = 96) -> Image.Image:
    """Smooth colour fields: neighbouring pixels agree, as in photographs, and no two pictures do."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)
