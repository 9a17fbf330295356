"""What one image takes here and now: a sample through the real encoder, and a file to the disk."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentstore import images
from latentstore.encoders import Encoder, blank_batch
from latentstore.errors import ImageError
from latentstore.files import write_errors
from latentstore.manifest import manifest_table
from latentstore.shards import parquet_bytes
from latentstore.sources import Source

NAMED = 5
"""Bad images of the sample that are named."""
_LOAD_SECONDS, _ENCODE_SECONDS, _WRITE_SECONDS = 1.0, 1.0, 0.3
"""What each part is measured for at least, where there is enough to measure."""
_LOAD_LIMIT, _ENCODE_LIMIT = 8.0, 5.0
"""Seconds after which no more is begun: the whole takes at most about 20."""
_WRITE_BYTES, _WRITE_LIMIT, _PIECE = 64 << 20, 1 << 30, 8 << 20


@dataclass(frozen=True)
class Costs:
    """What one image takes, measured on a sample.

    Attributes
    ----------
    sampled, bad : int
        Images that were read, and those of them that cannot be used.
    bad_named : list of (path, status, reason)
    file_bytes : float
        Mean size of a file.
    read_ms, decode_ms : float
        One thread's milliseconds an image on the clock; ``decode_ms`` includes resizing.
    spread_ms : float
        Twice the standard error of reading and decoding one image.
    encode_ms, encode_cpu_ms : float
        Milliseconds an image on the clock, and of all cores together, at the encoder's own batch.
    manifest_row_bytes, manifest_shard_bytes : float
        Parquet bytes of a row, and of a part without rows.
    write_rate : float
        Bytes a second, with the final fsync, to a file beside the store.
    encode_spread_ms : float
        Twice the standard error of encoding one image, over the calls; 0 for a single call.
    """

    sampled: int
    bad: int
    bad_named: list[tuple[str, str, str]]
    file_bytes: float
    read_ms: float
    decode_ms: float
    spread_ms: float
    encode_ms: float
    encode_cpu_ms: float
    manifest_row_bytes: float
    manifest_shard_bytes: float
    write_rate: float
    encode_spread_ms: float = 0.0


def measure(
    source: Source,
    listed: pa.Table,
    encoder: Encoder,
    where: Path,
    *,
    sample: int = 32,
    max_pixels: int = images.MAX_PIXELS,
    seed: int = 0,
) -> Costs:
    """Read, decode and encode a sample of the listed images, and write a file beside the store."""
    size = encoder.space.image_size
    pictures = blank_batch(encoder)
    read: list[float] = []
    decode: list[float] = []
    manifest: list[dict[str, Any]] = []
    bad: list[tuple[str, str, str]] = []
    began = time.perf_counter()
    for at in _spread(listed.num_rows, sample, seed):
        spent = time.perf_counter() - began
        if spent > _LOAD_LIMIT or (len(manifest) >= sample and spent > _LOAD_SECONDS):
            break
        row = listed.slice(at, 1).to_pylist()[0]
        start = time.perf_counter()
        try:
            item: images.Pixels | ImageError = source.load(row, size, max_pixels=max_pixels)
        except ImageError as exc:
            item = exc
        seconds = time.perf_counter() - start
        manifest.append(_manifest_row(at, row, item))
        if isinstance(item, ImageError):
            bad.append((row["path"], item.status, item.reason))
            continue
        read.append(seconds - item.decode_seconds)
        decode.append(item.decode_seconds)
        # More pictures than a batch replace its first: what they show does not change the time.
        pictures[len(read) % encoder.batch] = item.rgb
    encode, encode_cpu, encode_spread = _encode_seconds(encoder, pictures)
    shard_bytes, row_bytes = parquet_size(manifest_table(manifest))
    return Costs(
        sampled=len(manifest),
        bad=len(bad),
        bad_named=bad[:NAMED],
        file_bytes=_mean([row["bytes"] for row in manifest if row.get("bytes") is not None]),
        read_ms=1000 * _mean(read),
        decode_ms=1000 * _mean(decode),
        spread_ms=2000 * _standard_error([r + d for r, d in zip(read, decode, strict=True)]),
        encode_ms=1000 * encode,
        encode_cpu_ms=1000 * encode_cpu,
        manifest_row_bytes=row_bytes,
        manifest_shard_bytes=shard_bytes,
        write_rate=write_rate(where),
        encode_spread_ms=2000 * encode_spread,
    )


def parquet_size(table: pa.Table) -> tuple[float, float]:
    """Return the bytes of a Parquet file around its rows, and of each row, from a table of some."""
    one, rows = len(parquet_bytes(table.slice(0, 1))), table.num_rows
    each = (len(parquet_bytes(table)) - one) / (rows - 1) if rows > 1 else 0.0
    return one - each, each


def _spread(rows: int, sample: int, seed: int) -> Iterator[int]:
    """Yield rows, none twice: in each round one of each of ``sample`` equal stretches, in random order."""
    rng = np.random.default_rng(seed)
    seen: set[int] = set()
    edges = np.linspace(0, rows, min(sample, rows) + 1).astype(np.int64)
    while True:
        picks = rng.permutation(rng.integers(edges[:-1], edges[1:])).tolist()
        fresh = [row for row in picks if row not in seen]
        if not fresh:
            return
        seen.update(fresh)
        yield from fresh


def _manifest_row(row: int, listed: dict[str, Any], item: images.Pixels | ImageError) -> dict[str, Any]:
    """Return a manifest row of the size that the real one will have."""
    facts = item if isinstance(item, images.Pixels) else item.facts
    out: dict[str, Any] = {**listed, "row": row, "status": "ok", "reason": ""}
    out |= {n: getattr(facts, n, None) for n in ("bytes", "mtime", "sha256", "width", "height")}
    if isinstance(item, ImageError):
        out |= {"status": item.status, "reason": item.reason}
    return out


def _encode_seconds(encoder: Encoder, pictures: npt.NDArray[np.uint8]) -> tuple[float, float, float]:
    """Return seconds an image on the clock, of CPU, and the standard error of the first.

    The first call warms up, unless it takes very long.
    """
    rows = np.full(encoder.batch, -1, np.int64)
    calls: list[tuple[float, float]] = []
    while True:
        clock, cpu = time.perf_counter(), time.process_time()
        encoder.encode(pictures, rows)
        calls.append((time.perf_counter() - clock, time.process_time() - cpu))
        spent = sum(seconds for seconds, _ in calls)
        if spent > _ENCODE_LIMIT or (len(calls) > 1 and spent - calls[0][0] > _ENCODE_SECONDS):
            break
    counted = calls[1:] or calls
    clocks, cpus = zip(*counted, strict=True)
    clock, cpu, error = fmean(clocks), fmean(cpus), _standard_error(clocks)
    return clock / encoder.batch, cpu / encoder.batch, error / encoder.batch


def write_rate(where: Path) -> float:
    """Write a file without a name in a folder, flush it to the disk, and return bytes a second.

    Raises
    ------
    StoreWriteError
        The folder cannot be written to.
    """
    piece = np.random.default_rng(0).bytes(_PIECE)
    with write_errors(where), tempfile.TemporaryFile(dir=where, buffering=0) as file:
        began, written = time.perf_counter(), 0
        while written < _WRITE_BYTES or (
            written < _WRITE_LIMIT and time.perf_counter() - began < _WRITE_SECONDS
        ):
            written += file.write(piece)
        os.fsync(file.fileno())
        return written / (time.perf_counter() - began)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
