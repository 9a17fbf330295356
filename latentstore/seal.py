"""Checksums of the files that belong to no shard: metadata and input lists."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from latentstore.files import write_atomic
from latentstore.schema import canonical_json

SEAL = Path("done") / "seal.json"


def sealed_files(root: Path) -> list[Path]:
    """Return the files that only creating, growing and migrating a store write."""
    files = [*root.glob("zarr.json"), *root.glob("*/zarr.json"), *root.glob("inputs/part-*.parquet")]
    return sorted(files)


def write_seal(
    root: Path, *, written: Iterable[str] = (), coming: Mapping[Path, bytes] | None = None
) -> None:
    """Record the checksums of the files that belong to no shard.

    Parameters
    ----------
    root : Path
    written : iterable of str
        Files, relative to the store, that this step has written. Others keep the sums that they have: damage
        since is not sealed.
    coming : mapping, optional
        Contents that are about to be written.
    """
    coming, sums = coming or {}, read_seal(root)
    new = set(written)
    for path in sealed_files(root):
        name = str(path.relative_to(root))
        if name not in sums or name in new or path in coming:
            sums[name] = zlib.crc32(coming.get(path) or path.read_bytes())
    write_atomic(root / SEAL, _seal_bytes(sums))


def read_seal(root: Path) -> dict[str, int]:
    """Return the sealed checksums by file; empty when there is no seal, or any byte of it has changed."""
    try:
        raw = (root / SEAL).read_bytes()
        sums: dict[str, int] = json.loads(raw)["files"]
        return sums if raw == _seal_bytes(sums) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seal_bytes(sums: Mapping[str, int]) -> bytes:
    ordered = dict(sorted(sums.items()))
    body = {"files": ordered, "crc32": zlib.crc32(canonical_json(ordered).encode())}
    return (json.dumps(body, indent=1) + "\n").encode()
