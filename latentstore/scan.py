"""What a scan may get wrong: bounds on the rounding of inner products, and the scores that settle the rest.

The same arithmetic for NumPy and torch arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import array_api_compat
import numpy as np

Scan = Literal["float32", "float16", "bfloat16"]
_UNIT: dict[Scan, float] = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST: dict[Scan, float] = {"float16": 2.0**-25, "bfloat16": 2.0**-126}
"""Largest error of a number below the normal range, of order 1 at most elsewhere."""
_PIECE = 1 << 17
"""Products in float64 that are held at a time."""
_SEGMENT = 64


def bound(m: int, scan: Scan, norms: Any) -> Any:
    """Return what a scanned inner product of m terms differs from the true one at most.

    Parameters
    ----------
    m : int
    scan : {"float32", "float16", "bfloat16"}
    norms : float64 array
        ‖q‖·max‖r‖ of each query, in the units of the scan.

    Notes
    -----
    float32, with u = 2⁻²⁴: products and sums in any order, fused or not, differ by γₘ·Σ|qᵢrᵢ| at most, with
    γₘ = mu/(1 − mu) and Σ|qᵢrᵢ| ≤ ‖q‖‖r‖ (Higham, Accuracy and Stability, §3.1). Products below the normal
    range may be flushed: m·2⁻¹²⁶. Four u more cover that thresholds are rounded to float32, too.

    16 bits, with u = 2⁻¹¹ (float16) or 2⁻⁸ (bfloat16): both operands are rounded, (2u + u²)·‖q‖‖r‖; products
    of two of them are exact in float32; sums in float32 may be truncated, m·2⁻²³ (tensor cores); the score is
    rounded, and the threshold: 2u together. With both norms near 1 (`half_scale`), numbers below float16's
    normal range are off by 2⁻²⁵ each: √m·2⁻²⁵ for either operand, and one for each rounding of a score.
    """
    if scan == "float32":
        return 1.01 * (m + 4) * 2.0**-24 * norms + m * 2.0**-126
    u, small = _UNIT[scan], _SMALLEST[scan]
    return (4.1 * u + 1.1 * (m + 4) * 2.0**-23) * norms + (8 * math.sqrt(m) + 4) * small


def norm_bound(block: Any) -> float:
    """Return a number that no row's norm exceeds; not finite where a value is not, or squares overflow."""
    m = block.shape[1]
    if isinstance(block, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            squares = float(np.einsum("ij,ij->i", block, block).max())
    else:
        squares = float((block * block).sum(dim=1).max())
    # Squares below the normal range may have been flushed.
    return math.sqrt(squares * (1 + 2 * m * 2.0**-24) + m * 2.0**-126) if math.isfinite(squares) else math.inf


def half_scale(queries: Any, norm: Any, block: Any, largest: float, scan: Scan) -> tuple[Any, Any, Any]:
    """Return (queries, block, scale): both rounded to 16 bits after scaling by powers of two, which is exact.

    Norms are then between ½ and 1 (less where all references are below 2⁻¹⁰⁰), so that float16 neither
    overflows nor loses what counts. ``scale`` (q,) is what that makes of a score. A CPU multiplies the
    rounded numbers in float32.
    """
    import torch

    dtype = getattr(torch, scan)
    exponent = torch.where(norm > 0, torch.ceil(torch.log2(torch.clamp(norm, min=1e-300))), 0.0)
    shrink = torch.exp2(-exponent)
    other = 2.0 ** -math.ceil(math.log2(max(largest, 2.0**-100)))  # itself within float32's range
    q = (queries.to(torch.float64) * shrink[:, None]).to(torch.float32).to(dtype)
    b = (block if other == 1 else block * other).to(dtype)
    if queries.device.type == "cpu":
        q, b = q.to(torch.float32), b.to(torch.float32)
    return q, b, shrink * other


def kth_largest(scores: Any, k: int) -> Any:
    """Return the k-th largest of each row of scores, (q,)."""
    if isinstance(scores, np.ndarray):
        at = scores.shape[1] - k
        return np.partition(scores, at, axis=1)[:, at]
    return scores.topk(k, dim=1, sorted=True).values[:, -1]


def tile_above(scores: Any, least: Any) -> tuple[Any, Any]:
    """Return the (query, place) of the scores that reach each query's least."""
    width = scores.shape[1]
    if isinstance(scores, np.ndarray):
        # Maxima first: once the best are known, few queries have anything in a tile.
        some = np.flatnonzero(scores.max(axis=1) >= least)
        rows = scores if 2 * len(some) > len(scores) else scores[some]
        limit = least if rows is scores else least[some]
        # Flat: several times quicker than nonzero of two dimensions.
        i, j = np.divmod(np.flatnonzero(rows >= limit[:, None]), width)
        return (i if rows is scores else some[i]), j
    if width % _SEGMENT or scores.device.type == "cpu":
        i, j = (scores >= least[:, None]).nonzero(as_tuple=True)
        return i, j
    # A GPU reads the scores once for their maxima; few segments are looked at again.
    segments = scores.view(len(scores), -1, _SEGMENT)
    i, segment = (segments.amax(dim=2) >= least[:, None]).nonzero(as_tuple=True)
    hit, place = (segments[i, segment] >= least[i][:, None]).nonzero(as_tuple=True)
    return i[hit], segment[hit] * _SEGMENT + place


def exact_scores(queries: Any, block: Any, i: Any, j: Any) -> Any:
    """Return the inner products of pairs in float64, (p,): a function of the two rows alone.

    Products of float32 are exact in float64. They are added in a fixed tree, halves onto halves, so that
    every library and device gives the same bits, in blocks of any size.
    """
    xp = array_api_compat.array_namespace(queries)
    step = max(1, _PIECE // queries.shape[1])
    out = []
    for at in range(0, len(i), step):
        x = xp.astype(queries[i[at : at + step]], xp.float64)
        x *= block[j[at : at + step]]
        while x.shape[1] > 1:
            half = x.shape[1] // 2
            odd = x[:, 2 * half :]
            x = x[:, :half] + x[:, half : 2 * half]
            if odd.shape[1]:
                x[:, :1] += odd
        out.append(x[:, 0])
    return xp.concat(out)


@contextmanager
def strict(device: str) -> Iterator[None]:
    """Multiply as the bounds say on CUDA: no TF32, and sums of 16-bit products in float32 alone."""
    if device == "cpu":
        yield
        return
    import torch

    switches: Any = torch.backends.cuda.matmul
    wanted: dict[str, Any] = {
        "allow_fp16_reduced_precision_reduction": False,
        "allow_bf16_reduced_precision_reduction": False,
        # Torch refuses to read its old switch once the new one was written.
        **({"fp32_precision": "ieee"} if hasattr(switches, "fp32_precision") else {"allow_tf32": False}),
    }
    before = {name: getattr(switches, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(switches, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(switches, name, value)
