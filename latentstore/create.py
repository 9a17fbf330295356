"""Making stores, and further arrays in them: whole or not at all."""

from __future__ import annotations

import glob
import json
import shutil
import time
import uuid
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentstore import codecs
from latentstore.errors import UsageError
from latentstore.files import UNLOCKED, check_room, fsync_dir, fsync_tree, write_atomic, write_errors
from latentstore.schema import (
    CHUNK_ROWS,
    LATENTS,
    SCHEMA_VERSION,
    STATUS_NAMES,
    Space,
    StoreSpec,
    canonical_json,
    check_array_name,
    status_name,
)
from latentstore.seal import write_seal
from latentstore.shards import parquet_bytes
from latentstore.store import LatentStore, is_store

_FOLDERS = ("manifest", "inputs", "done", *UNLOCKED)


def create(root: Path, spec: StoreSpec, inputs: pa.Table) -> LatentStore:
    """Create a store and commit its input list; the store appears whole or not at all.

    Raises
    ------
    UsageError
        Something that is no store lies at the path, or the list and the layout differ in length.
    StoreWriteError
        No permission, or not enough room.
    """
    import zarr

    refuse_occupied(root)
    if inputs.num_rows != spec.layout.rows:
        raise UsageError(f"{inputs.num_rows} inputs for {spec.layout.rows} rows.")
    check_room(root, spec.layout.total_bytes)
    with write_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        _sweep_unfinished(root)
        fresh = root.with_name(f".{root.name}.{uuid.uuid4().hex}.partial")
        try:
            fresh.mkdir()
            attrs = {"schema": SCHEMA_VERSION, "kind": spec.kind, "origin": spec.origin}
            group = zarr.create_group(fresh, attributes={"latentstore": attrs})
            _create_arrays(group, LATENTS, spec)
            for name in _FOLDERS:
                group.create_group(name)
            write_atomic(fresh / "inputs" / "part-000000.parquet", parquet_bytes(inputs))
            write_seal(fresh)
            fsync_tree(fresh)
            if root.exists():
                root.rmdir()
            fresh.rename(root)
            fsync_dir(root.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return LatentStore(root)


def refuse_occupied(root: Path) -> None:
    """Refuse a path at which no store can be made.

    Raises
    ------
    UsageError
        Something that is no store lies there, or it is inside a store.
    """
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise UsageError(
            f"{root} exists and is not a latentstore store. Choose another --store, or move it away."
        )
    inside = next((p for p in root.absolute().parents if is_store(p)), None)
    if inside is not None:
        raise UsageError(
            f"{root} lies inside the store {inside}. A further encoder's latents go to {inside}/NAME; "
            "another store goes elsewhere."
        )


def add_array(root: Path, name: str, spec: StoreSpec) -> LatentStore:
    """Add an array for another encoder's latents of the same rows. Needs the writer's lock.

    Raises
    ------
    UsageError
        The name is taken or cannot be one, or the layout has other rows or shards than the first array.
    StoreWriteError
    """
    import zarr

    check_array_name(name)
    first = LatentStore(root)
    if name in first.arrays():
        raise UsageError(f"{root} has an array {name!r} already.")
    if (spec.layout.rows, spec.layout.shard_rows) != (first.layout.rows, first.layout.shard_rows):
        raise UsageError(f"{root / name}: an array has the rows and the shards of the store's first one.")
    check_room(root, spec.layout.total_bytes)
    with write_errors(root / name):
        for left in (root / name, root / status_name(name)):  # a creation that was killed
            shutil.rmtree(left, ignore_errors=True)
        group = zarr.open_group(root, mode="r+")
        _create_arrays(group, name, spec)
        fsync_tree(root / status_name(name))
        fsync_tree(root / name)
        fsync_dir(root)
    write_seal(root)
    return LatentStore(root, name)


def _create_arrays(group: Any, name: str, spec: StoreSpec) -> None:
    """Create the array of the latents and that of their statuses."""
    layout = spec.layout
    own = {
        "space_id": spec.space.id,
        "space": json.loads(canonical_json(_plain(spec.space))),
        "provenance": spec.provenance,
    }
    # Statuses first: an array without them counts as not created.
    group.create_array(
        status_name(name),
        shape=(layout.rows,),
        dtype="uint8",
        chunks=(layout.shard_rows,),
        compressors=None,
        filters=None,
        fill_value=0,
        dimension_names=("row",),
        attributes=status_attributes(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numcodecs' codecs are outside Zarr v3's specification, and say so
        group.create_array(
            name,
            shape=(layout.rows, layout.dim),
            dtype=layout.dtype,
            chunks=(CHUNK_ROWS, layout.dim),
            shards=(layout.shard_rows, layout.dim),
            **codecs.pipeline(layout.codec, layout.dtype),
            fill_value=0,
            dimension_names=("row", f"{name}_dim"),
            attributes={"latentstore": own | ({"codec": layout.codec} if layout.codec else {})},
        )


def status_attributes() -> dict[str, Any]:
    """Return what tells any Zarr reader what the status codes mean (CF conventions)."""
    return {"flag_values": list(range(len(STATUS_NAMES))), "flag_meanings": " ".join(STATUS_NAMES)}


def _sweep_unfinished(root: Path) -> None:
    """Delete what a creation that was killed left beside the store; one under way is a second old at most."""
    for stale in root.parent.glob(f".{glob.escape(root.name)}.*.partial"):
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)


def _plain(space: Space) -> dict[str, Any]:
    return {**asdict(space), "latent_shape": list(space.latent_shape)}
