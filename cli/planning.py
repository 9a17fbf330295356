"""plan and encode --dry-run: what an encode run will take, without touching the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.workflows import Named, what_to_encode
from latentstore import encoders, images
from latentstore.errors import UsageError
from latentstore.plan import MACHINES, Plan, plan
from latentstore.sources import Source


def run_plan(
    named: Named | Source,
    store: Path,
    *,
    dtype: str | None = None,
    shard_rows: int | None = None,
    codec: str | None = None,
    max_pixels: int = images.MAX_PIXELS,
    threads: int | None = None,
    sample: int = 32,
    rows: list[int] | None = None,
    machines: str | None = None,
    **encoding: Any,
) -> Plan:
    """Say what encoding these images into a store will take.

    Parameters
    ----------
    named, store, dtype, shard_rows, codec, max_pixels, threads, **encoding
        As for :func:`~cli.workflows.run_encode`.
    sample, rows
        As for :func:`~latentstore.plan.plan`.
    machines : str, optional
        Numbers with commas between them.
    """
    counts = MACHINES if machines is None else _numbers(machines)
    source, recipe = what_to_encode(named, store, dtype=dtype, shard_rows=shard_rows, codec=codec, **encoding)
    return plan(
        source,
        store,
        encoders.load_encoder(**recipe),
        dtype=dtype or "float16",
        shard_rows=shard_rows,
        codec=codec,
        max_pixels=max_pixels,
        threads=threads,
        sample=sample,
        rows=rows or (),
        machines=counts,
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as exc:
        raise UsageError(
            f"--machines is {text!r}; give whole numbers with commas between them, as in 1,4,16."
        ) from exc
