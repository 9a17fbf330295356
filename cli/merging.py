"""Kept parts merged two by two: the same tree, and so the same bits, in one process and on a cluster."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from solvers.moments import Moments


def merge_two(first: Path, second: Path, out: Path) -> None:
    """Write the sum of two files of moments: what a worker runs. Made twice, it holds the same numbers.

    Raises
    ------
    ProjectionFormatError
        A file is damaged.
    SolverWriteError
    """
    total = Moments.load(first)[0]
    total.merge(Moments.load(second)[0])
    total.save(out)


def merge_tree(parts: list[Path], out: Path, client: Any = None, *, at_once: int = 1) -> None:
    """Merge neighbours, then neighbours of what came of them, until one file is left.

    Parameters
    ----------
    parts : list of Path
        Two or more.
    client : dask.distributed.Client, optional
        Its workers merge pairs of a level at the same time.
    at_once : int
        Merges under way at a time: each worker holds both sums of its own, and may be on this machine.
    """
    level, row, made = 0, list(parts), list[Path]()
    try:
        while len(row) > 1:
            pairs = list(zip(row[0::2], row[1::2], strict=False))
            last = len(row) == 2
            level += 1
            above = [
                out if last else out.with_name(f".{out.stem}-{level}-{i}.partial") for i in range(len(pairs))
            ]
            made += [] if last else above
            _merge_level([(a, b, c) for (a, b), c in zip(pairs, above, strict=True)], client, at_once)
            row = above + row[2 * len(pairs) :]
    finally:
        for path in made:
            with suppress(OSError):
                path.unlink()


def _merge_level(jobs: list[tuple[Path, Path, Path]], client: Any, at_once: int) -> None:
    if client is None:
        for job in jobs:
            merge_two(*job)
        return
    from dask.distributed import as_completed

    for at in range(0, len(jobs), at_once):
        own = [[p.absolute() for p in job] for job in jobs[at : at + at_once]]
        futures = [client.submit(merge_two, *job, pure=False) for job in own]
        for _ in as_completed(futures, loop=client.loop):
            pass  # all of them, also where one fails: what the others write is deleted afterwards
        client.gather(futures)
