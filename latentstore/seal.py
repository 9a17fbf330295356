"""Checksums of the files that belong to no shard: metadata and input lists."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from latentstore.files import write_atomic
from latentstore.schema import canonical_json

SEAL = Path("done") / "seal.json"


def write_seal(root: Path, *, coming: Mapping[Path, bytes] | None = None) -> None:
    """Record the checksums of the files that only creating, growing and migrating a store write.

    ``coming`` holds contents that are about to be written.
    """
    files = [*root.glob("zarr.json"), *root.glob("*/zarr.json"), *root.glob("inputs/part-*.parquet")]
    sums = {
        str(p.relative_to(root)): zlib.crc32((coming or {}).get(p) or p.read_bytes()) for p in sorted(files)
    }
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
    body = {"files": sums, "crc32": zlib.crc32(canonical_json(sums).encode())}
    return (json.dumps(body, indent=1) + "\n").encode()
