"""info and verify: what a store is, and whether it is still whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentstore import encoders
from latentstore.changes import changed_sources
from latentstore.encode import encode
from latentstore.errors import CorruptStoreError, UsageError
from latentstore.known import is_held
from latentstore.migrate import migrate
from latentstore.seal import write_seal
from latentstore.sources import Source
from latentstore.store import LatentStore, open_store, writing
from latentstore.verify import Verification, lost_rows, sample_again, verify

OnRows = Callable[[int, int], None]


def describe_store(path: Path) -> dict[str, Any]:
    """Return what a store is, made how, how complete, of which size."""
    store = open_store(path)
    todo = store.todo()
    manifest = store.manifest(["role", "split"])
    files = [p for p in store.root.rglob("*") if p.is_file()]
    payload = sum(len(a) * a.layout.row_bytes for a in (LatentStore(store.root, n) for n in store.arrays()))
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
    give_up_rows: bool = False,
    sources: bool = False,
    content: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
) -> tuple[Verification, int]:
    """Check a store; with ``repair`` mend the damaged shards, and only those, and check again.

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
    if not (repair and found.damages):
        return found, 0
    repaired = mend(store, found, give_up_rows=give_up_rows)
    again = verify(open_store(path))
    again.sources = found.sources
    return again, repaired


def mend(store: LatentStore, found: Verification, *, give_up_rows: bool = False) -> int:
    """Mend what was found; return how many shards. No file is listed, none appended.

    A shard whose latents and manifest are whole is written again from them; any other is made anew from its
    files, after these were looked at.

    Parameters
    ----------
    store : LatentStore
    found : Verification
    give_up_rows : bool
        Mend also where rows would be lost, because their files are gone or hold something else now.

    Raises
    ------
    UsageError
        The store is a simulated or an imported one.
    CorruptStoreError
        Rows would be lost.
    """
    if store.kind != "images" and found.damaged_shards:
        shards = found.damaged_shards
        raise UsageError(
            f"{store.root} holds {store.kind} latents; {len(shards)} of its shards are damaged. Delete their "
            f"records ({', '.join(f'done/{s:06d}.json' for _, s in shards[:5])}) and run the "
            f"{'import' if store.kind == 'imported' else 'simulate'} command that made it again."
        )
    source = Source.recorded(store.origin)
    with writing(store.root):
        if {d.what for d in found.damages if d.shard is None} == {"seal"}:
            write_seal(store.root)  # all that it covers agrees with itself
        # A writer may have been at work while the store was checked: what is damaged still is so now.
        confirmed = verify(store, only=found.damaged_shards).damaged_shards
        differing = {(d.array, d.shard) for d in found.damages if d.what == "sample" and d.shard is not None}
        plan: dict[str, dict[int, frozenset[int] | None]] = {}
        for name, shard in sorted({*confirmed, *differing}):
            array = LatentStore(store.root, name)
            whole = is_held(array, shard) and (name, shard) not in differing
            if not whole and not give_up_rows:
                _refuse_losses(array, source, shard)
            plan.setdefault(name, {})[shard] = frozenset() if whole else None
    # The first array comes first: the others follow its manifest.
    for name in [n for n in store.arrays() if n in plan]:
        array = LatentStore(store.root, name)
        encoder = encoders.load_for(array.space, array.provenance["encoder"])
        encode(source, array.path, encoder, repair=plan[name])
    return sum(map(len, plan.values()))


def _refuse_losses(store: LatentStore, source: Source, shard: int) -> None:
    lost = lost_rows(store, source, shard)
    if lost:
        raise CorruptStoreError(
            f"Shard {shard} of {store.path} would have to be made anew, and {len(lost)} of its rows would be "
            f"lost: their files are gone or hold something else now (the first: {lost[0]}, in "
            f"{store.origin['root']}). Put the files back; or give those rows up with --give-up-rows. "
            "Nothing was changed."
        )


def run_migrate(path: Path) -> tuple[int, int]:
    """Bring a store to the present schema; return the version before and after."""
    root = open_store(path).root
    with writing(root):
        return migrate(root)
