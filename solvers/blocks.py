"""Blocks of rows, looked at and brought to the precision of the products before they are summed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import namespace
from .errors import SolverUsageError
from .halves import single
from .linalg import on_host
from .products import TILE, Precision


def tiles(block: Any, dim: int, what: str) -> Iterator[Any]:
    """Yield a block of rows tile by tile."""
    block = checked(block, dim, what)
    for at in range(0, block.shape[0], TILE):
        yield block[at : at + TILE]


def checked(x: Any, dim: int, what: str) -> Any:
    """Return rows of length `dim`, or say why they are none."""
    if x.ndim != 2 or x.shape[1] != dim:
        raise SolverUsageError(
            f"A block of {what} must have the shape (rows, {dim}), not {tuple(x.shape)}. "
            "Pass latents of one encoder, one row per image."
        )
    return x


def finite_sum(rows: Any, what: str, of: Any = None) -> Any:
    """Return the float64 column sums, which show in one look whether any value is not finite.

    `rows` may be sums of the rows that are meant, which are then `of`.
    """
    xp = namespace(rows)
    total = column_sums(rows)
    if bool(xp.all(xp.isfinite(total))):
        return total
    rows = rows if of is None else of
    bad = int(xp.sum(xp.astype(xp.any(~xp.isfinite(rows), axis=1), xp.int64)))
    if not bad:
        raise SolverUsageError(
            f"The sum over {rows.shape[0]} {what} is too large for {rows.dtype}. Scale the latents down."
        )
    raise SolverUsageError(
        f"{bad} of {rows.shape[0]} {what} hold values that are not finite. "
        "Leave such rows out: a single one would spoil every sum."
    )


def column_sums(rows: Any) -> Any:
    """Return the float64 sums of the columns."""
    xp = namespace(rows)
    if not on_host(rows) or rows.dtype == np.float64:
        return xp.sum(rows, axis=0, dtype=xp.float64)
    # Single-precision sums of a few rows lose nothing that counts beside the products; they take half the
    # time of converting every value.
    total = np.zeros(rows.shape[1])
    for at in range(0, len(rows), 64):
        total += rows[at : at + 64].sum(axis=0)
    return total


def cast(x: Any, precision: Precision) -> Any:
    """Return an array in the precision of the products."""
    xp = namespace(x)
    if precision == "float32" and on_host(x) and x.dtype == np.float16:
        return single(x)
    return xp.astype(x, xp.float32 if precision == "float32" else xp.float64, copy=False)
