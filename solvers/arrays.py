"""The array decides the backend: NumPy, CuPy and torch arrays through one namespace."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np

from .errors import SolverUsageError


def namespace(*arrays: Any) -> Any:
    """Return the array namespace of the arguments.

    Raises
    ------
    SolverUsageError
        If the arrays belong to different libraries, or to none.
    """
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(sorted({f"{type(a).__module__}.{type(a).__name__}" for a in arrays}))
        raise SolverUsageError(
            f"Arrays of one library are needed, not a mixture; got {kinds}. "
            "Convert them to one library first (solvers.arrays.as_like does)."
        ) from error


def to_host(x: Any) -> np.ndarray:
    """Copy an array of any supported library to a NumPy array (no copy where it is one)."""
    if isinstance(x, np.ndarray):
        return x
    if array_api_compat.is_torch_array(x):
        tensor = x.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no bfloat16; float32 holds it exactly
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    if array_api_compat.is_cupy_array(x):
        return np.asarray(x.get())
    return np.asarray(x)


def as_like(host_array: np.ndarray, like: Any) -> Any:
    """Bring a NumPy array into the namespace, device and dtype of `like`."""
    xp = namespace(like)
    if array_api_compat.is_numpy_namespace(xp):
        return host_array.astype(like.dtype, copy=False)
    return xp.asarray(host_array, dtype=like.dtype, device=array_api_compat.device(like))


def as_rows(x: Any, dim: int, what: str = "rows") -> np.ndarray:
    """Return `x` as finite float64 rows of length `dim` on the host, or say why it cannot be."""
    return to_host(as_float64(x, dim, what))


def as_float64(x: Any, dim: int, what: str = "rows") -> Any:
    """Return `x` as finite float64 rows of length `dim` in its own library, or say why it cannot be."""
    x = x if is_array(x) else np.asarray(x)
    if x.ndim != 2 or x.shape[1] != dim:
        raise SolverUsageError(
            f"A block of {what} must have the shape (rows, {dim}), not {tuple(x.shape)}. "
            "Pass latents of one encoder, one row per image."
        )
    xp = namespace(x)
    rows = xp.astype(x, xp.float64, copy=False)
    finite = xp.all(xp.isfinite(rows), axis=1)
    if not bool(xp.all(finite)):
        bad = int(xp.sum(xp.astype(~finite, xp.int64)))
        raise SolverUsageError(
            f"{bad} of {rows.shape[0]} {what} hold values that are not finite. "
            "Leave such rows out: a single one would spoil every sum."
        )
    return rows


def is_array(x: Any) -> bool:
    """Tell whether `x` is an array of a supported library."""
    return bool(array_api_compat.is_array_api_obj(x))
