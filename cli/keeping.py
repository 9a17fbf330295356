"""info and verify: what a store is, and whether it is still whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.workflows import run_encode
from latentstore import encoders
from latentstore.changes import changed_sources
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.migrate import migrate
from latentstore.sources import Source
from latentstore.store import LatentStore, open_store, writing
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
        "schema": store.schema,
        "arrays": store.arrays(),
        "rows": len(store),
        "dim": store.layout.dim,
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "shards": store.layout.n_shards,
        "shard rows": store.layout.shard_rows,
        "committed shards": store.layout.n_shards - len(todo),
        "statuses": store.counts(),
        "roles": dict(Counter(manifest["role"].to_pylist())),
        "splits": dict(Counter(manifest["split"].to_pylist())),
        "bytes": size,
        "bytes over payload": round(size / payload, 4) if payload and not todo else None,
        "files": len(files),
        "space": {"id": store.space.id, **asdict(store.space)},
        "made from": store.origin,
        "made by": store.provenance,
    }


def run_verify(
    path: Path,
    *,
    sample: int = 0,
    repair: bool = False,
    sources: bool = False,
    content: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
) -> tuple[Verification, int]:
    """Check a store; with ``repair`` make the damaged shards anew and check again.

    With ``sources`` also look whether the files it was made from are as they were read, by size and time of
    modification; with ``content`` by reading them.

    Returns
    -------
    verification, repaired
        ``repaired`` counts shards.
    """
    store = open_store(path)
    if on_start is not None:
        rows = len(store) * len(store.arrays())
        rows += len(store) if sources or content else 0
        on_start(rows, rows)
    found = verify(store, on_rows=on_rows)
    if sources or content:
        with suppress(CorruptStoreError):  # a damaged manifest is among the damages
            found.sources = changed_sources(store.first, content=content, on_rows=on_rows)
    if sample and store.kind == "images" and not found.damages:
        sample_again(store, encoders.load_for(store.space, store.provenance["encoder"]), found, rows=sample)
    shards = found.damaged_shards
    if not (repair and shards):
        return found, 0
    if store.kind != "images":
        raise UsageError(
            f"{path} holds simulated latents; {len(shards)} of its shards are damaged. Delete their records "
            f"({', '.join(f'done/{s:06d}.json' for _, s in shards[:5])}) and run the simulate command that "
            "made it again."
        )
    with writing(store.root):
        for name in store.arrays():
            discard(LatentStore(store.root, name), [s for array, s in shards if array == name])
    # The first array comes first: the others follow its manifest.
    for name in [n for n in store.arrays() if n in {array for array, _ in shards}]:
        encode_again(LatentStore(store.root, name))
    again = verify(open_store(path))
    again.sources = found.sources
    return again, len(shards)


def encode_again(store: LatentStore) -> None:
    """Make the open shards of an array, from the source and by the encoder that it was made with."""
    run_encode(Source.recorded(store.origin), store.path)


def run_migrate(path: Path) -> tuple[int, int]:
    """Bring a store to the present schema; return the version before and after."""
    root = open_store(path).root
    with writing(root):
        return migrate(root)
