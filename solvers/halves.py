"""Half precision widened by shifting its bits, where NumPy converts one value at a time."""

from __future__ import annotations

import numpy as np

_KEPT = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]
"""Sign, exponent and mantissa of a half shifted left by 13, without the copies of its sign between."""
_SCALE = np.float32(2.0**112)
"""Makes up for the difference of the exponents' biases, 127 - 15; exact also for subnormal halves."""
_FINITE = 65536.0
"""Where halves that are not finite arrive."""
_VALUES = 1 << 16
"""Values at a time: the four sweeps over them stay in the second-level cache."""


def single(rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return (n, d) rows as float32, exactly; of float16 in a third to a half of NumPy's time.

    Parameters
    ----------
    rows
        (n, d) of any float dtype.
    out
        (n, d) float32, C-contiguous: filled and returned where given.
    """
    made = np.empty(rows.shape, np.float32) if out is None else out
    if rows.dtype != np.float16 or not rows.dtype.isnative:
        np.copyto(made, rows, casting="same_kind")
        return made
    bits, step = rows.view(np.int16), max(1, _VALUES // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        values = made[at : at + step]
        shifted = values.view(np.int32)
        np.copyto(shifted, bits[at : at + step])
        np.left_shift(shifted, 13, out=shifted)
        np.bitwise_and(shifted, _KEPT, out=shifted)
        np.multiply(values, _SCALE, out=values)
        if values.size and (values.max() >= _FINITE or values.min() <= -_FINITE):
            np.copyto(values, rows[at : at + step])  # infinities and NaN: let NumPy keep them
    return made
