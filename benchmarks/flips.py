"""Flip single bytes of a store's files, and see whether ``verify`` names what was hit."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from latentstore.errors import LatentStoreError
from latentstore.store import open_store
from latentstore.verify import Damage, verify

OF_A_SHARD = {
    "latents": {"latents", "index", "padding"},
    "status": {"status"},
    "record": {"record"},
    "manifest": {"manifest"},
}
"""What ``verify`` may call the damage of each kind of file that a shard has."""


def flip(root: Path, count: int, *, seed: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Flip ``count`` bytes, and put each back.

    One file of every shard a round, since damage to two files of a shard would be one finding; one file a
    round of those that belong to no shard, since damage to those may hide the rest. Four in five flips are of
    the first sort.

    Returns
    -------
    missed, by_kind
        The flips that were not found, or not attributed; and how many flips each kind of file had.
    """
    rng = random.Random(seed)  # noqa: S311
    shards, common = files(root)
    missed: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    for number in range(count // 5):
        path = common[number % len(common)]
        kinds["metadata" if path.suffix == ".json" else "input list"] += 1
        before = path.read_bytes()
        at = _flip(path, before, rng)
        if not _found_whole(root, path):
            missed.append({"file": str(path.relative_to(root)), "byte": at})
        path.write_bytes(before)
    left = count - count // 5
    while left:
        chosen = rng.sample(sorted(shards), min(left, len(shards)))
        hit = {}
        for shard in chosen:
            kind = rng.choice(sorted(OF_A_SHARD))
            path = shards[shard][kind]
            before = path.read_bytes()
            hit[shard] = (kind, path, before, _flip(path, before, rng))
            kinds[kind] += 1
        found = verify(open_store(root)).damages
        for shard, (kind, path, before, at) in hit.items():
            if not any(d.shard == shard and d.what in OF_A_SHARD[kind] for d in found):
                missed.append({"file": str(path.relative_to(root)), "byte": at})
            path.write_bytes(before)
        # Nothing may be blamed that was not touched.
        missed += [{"blamed": d.what, "shard": d.shard} for d in found if d.shard not in hit]
        left -= len(chosen)
    if verify(open_store(root)).damages:
        missed.append({"file": "every byte was put back", "byte": -1})
    return missed, dict(kinds)


def files(root: Path) -> tuple[dict[int, dict[str, Path]], list[Path]]:
    """Return each shard's files by kind, and the files that belong to no shard."""
    shards = {}
    for shard in range(open_store(root).layout.n_shards):
        shards[shard] = {
            "latents": root / "latents" / "c" / str(shard) / "0",
            "status": root / "status" / "c" / str(shard),
            "record": root / "done" / f"{shard:06d}.json",
            "manifest": next((root / "manifest").glob(f"part-{shard:06d}-*.parquet")),
        }
    taken = {path for kinds in shards.values() for path in kinds.values()}
    others = sorted(p for p in root.rglob("*") if p.is_file() and p not in taken and p.name != "lock")
    return shards, others


def _flip(path: Path, before: bytes, rng: random.Random) -> int:
    """Change one byte at random; return where."""
    at = rng.randrange(len(before))
    data = bytearray(before)
    data[at] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return at


def _found_whole(root: Path, path: Path) -> bool:
    """Tell whether damage outside the shards is found; refusing to open the store at all is finding it."""
    try:
        found: list[Damage] = verify(open_store(root)).damages
    except LatentStoreError:
        return True
    name = "seal" if path.name == "seal.json" else str(path.relative_to(root))
    return any(d.what == "seal" if name == "seal" else name in d.detail for d in found)
