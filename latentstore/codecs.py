"""Compressed and quantised stores, for those who want them: Zarr's and numcodecs' own codecs, by name.

Latents hardly compress (float16: 9 % at most), and coded rows cannot be read in place: gathers go through
Zarr, which is far slower. ``benchmarks/codecs.py`` measures the price of each.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from latentstore.errors import UsageError
from latentstore.schema import Layout

NAMES = ("zstd", "blosc", "bitround:K")
_MANTISSA = {"float16": 10, "float32": 23}


def pipeline(codec: str | None, dtype: str) -> dict[str, Any]:
    """Return the ``filters`` and ``compressors`` of :func:`zarr.create_array` for a codec's name.

    ``zstd`` and ``blosc`` (byte shuffle, then zstd) lose nothing. ``bitround:K`` keeps K bits of the mantissa
    (numcodecs' BitRound: relative error at most 2^-(K+1)), then blosc.

    Raises
    ------
    UsageError
    """
    from numcodecs.zarr3 import BitRound
    from zarr.codecs import BloscCodec, ZstdCodec

    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=np.dtype(dtype).itemsize)
    if codec is None:
        return {"filters": None, "compressors": None}
    if codec == "zstd":
        return {"filters": None, "compressors": ZstdCodec(level=1)}
    if codec == "blosc":
        return {"filters": None, "compressors": blosc}
    found = re.fullmatch(r"bitround:([0-9]{1,2})", codec)
    if found is None:
        raise UsageError(f"--codec is {codec!r}; it must be one of {', '.join(NAMES)}.")
    kept = int(found[1])
    if not 1 <= kept < _MANTISSA[dtype]:
        raise UsageError(
            f"--codec {codec} keeps {kept} bits, but {dtype} has {_MANTISSA[dtype]}: K must be 1 to "
            f"{_MANTISSA[dtype] - 1}."
        )
    return {"filters": [BitRound(keepbits=kept)], "compressors": blosc}


def encode_shard(array: Path, layout: Layout, shard: int, rows: npt.NDArray[Any]) -> bytes:
    """Return the bytes that Zarr itself writes for one shard.

    Parameters
    ----------
    array : Path
        Of the array in the store, for its metadata.
    layout : Layout
    shard : int
    rows : (n, dim) array
        The shard's rows.
    """
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    held = {"zarr.json": default_buffer_prototype().buffer.from_bytes((array / "zarr.json").read_bytes())}
    span = layout.span(shard)
    # A shard of zeros (of bad rows alone) is written, too: its record covers a file.
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")  # numcodecs' codecs are outside Zarr v3's specification, and say so
        out: Any = zarr.open_array(MemoryStore(held), mode="r+")
        out[span.start : span.stop] = rows
    data: bytes = held[f"c/{shard}/0"].to_bytes()
    return data


def open_array(path: Path, mode: Literal["r", "r+"] = "r") -> Any:
    """Open an array through Zarr, without its warnings about numcodecs' codecs."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_array(path, mode=mode)


def relative_error(codec: str | None) -> float:
    """Return the largest relative error that a codec makes in a number."""
    found = re.fullmatch(r"bitround:([0-9]{1,2})", codec or "")
    return 2.0 ** -(int(found[1]) + 1) if found else 0.0


def rounded(codec: str | None, block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a block as the codec will give it back."""
    found = re.fullmatch(r"bitround:([0-9]{1,2})", codec or "")
    if not found:
        return block
    from numcodecs import BitRound

    bits: npt.NDArray[Any] = BitRound(keepbits=int(found[1])).encode(block.copy())
    return bits.view(block.dtype).reshape(block.shape)
