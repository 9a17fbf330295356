"""info and verify: what a store is, and whether it is still whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.workflows import run_encode
from latentstore import encoders
from latentstore.errors import UsageError
from latentstore.store import open_store, writing
from latentstore.verify import Verification, discard, sample_again, verify

OnRows = Callable[[int, int], None]


def describe_store(path: Path) -> dict[str, Any]:
    """Return what a store is, made how, how complete, of which size."""
    store = open_store(path)
    todo = store.todo()
    manifest = store.manifest(["role", "split"])
    files = [p for p in path.rglob("*") if p.is_file()]
    payload = len(store) * store.layout.row_bytes
    size = sum(p.stat().st_size for p in files)
    return {
        "store": str(path),
        "kind": store.kind,
        "rows": len(store),
        "dim": store.layout.dim,
        "dtype": store.layout.dtype,
        "shards": store.layout.n_shards,
        "shard rows": store.layout.shard_rows,
        "committed shards": store.layout.n_shards - len(todo),
        "statuses": store.counts(),
        "roles": dict(Counter(manifest["role"].to_pylist())),
        "splits": dict(Counter(manifest["split"].to_pylist())),
        "bytes": size,
        "bytes over payload": round(size / payload, 4) if payload and not todo else None,
        "files": len(files),
        "space": {"id": store.space.id, **store.space.__dict__},
        "made from": store.origin,
        "made by": store.provenance,
    }


def run_verify(
    path: Path,
    *,
    sample: int = 0,
    repair: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
) -> tuple[Verification, int]:
    """Check a store; with ``repair`` make the damaged shards anew and check again.

    Returns
    -------
    verification, repaired
        ``repaired`` counts shards.
    """
    store = open_store(path)
    if on_start is not None:
        on_start(len(store), len(store))
    found = verify(store, on_rows=on_rows)
    if sample and store.kind == "images" and not found.damages:
        sample_again(store, encoders.load_for(store.space, store.provenance["encoder"]), found, rows=sample)
    shards = found.damaged_shards
    if not (repair and shards):
        return found, 0
    if store.kind != "images":
        raise UsageError(
            f"{path} holds simulated latents; {len(shards)} of its shards are damaged. Delete their records "
            f"({', '.join(f'done/{s:06d}.json' for s in shards[:5])}) and run the simulate command that made "
            "it again."
        )
    with writing(path):
        discard(store, shards)
    listed = store.origin["manifest"]
    run_encode(
        Path(store.origin["root"]),
        path,
        manifest=None if listed is None else Path(listed),
        follow_links=store.origin["follow_links"],
    )
    return verify(open_store(path)), len(shards)
