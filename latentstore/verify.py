"""Is every byte of a store what its records say? Which shards are not, and making only those anew."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from latentstore import codecs
from latentstore.changes import Change
from latentstore.encoders import Encoder, blank_batch
from latentstore.errors import CorruptStoreError, ImageError, StoreFormatError
from latentstore.removal import REMOVED, Removed, read_removed
from latentstore.schema import LATENTS, OK
from latentstore.seal import SEAL, read_seal
from latentstore.shards import (
    Record,
    latents_file,
    pending_file,
    read_index_is_plain,
    record_file,
    status_file,
    unnamed_parts,
)
from latentstore.sources import Source
from latentstore.store import LatentStore

_PIECE = 1 << 20
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Damage:
    """One thing that is not as recorded. ``shard`` is None where it is not in one shard."""

    shard: int | None
    what: str
    detail: str
    array: str = LATENTS


@dataclass
class Verification:
    """What was checked and what was found.

    Attributes
    ----------
    shards : int
        Shards checked.
    bytes : int
        Bytes read.
    damages : list of Damage
    open_shards : int
        Shards that were never committed: unfinished, not damaged.
    sampled, worst : int, float
        Rows encoded again, and the largest difference of one, relative to the row's norm.
    sources : list of Change, or None
        Committed files that are no longer as they were read; None when they were not looked at.
    """

    shards: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    open_shards: int = 0
    sampled: int = 0
    worst: float = 0.0
    sources: list[Change] | None = None

    @property
    def findings(self) -> bool:
        """Whether anything is not as recorded; a file that was only touched is."""
        return bool(self.damages) or any(change.what != "touched" for change in self.sources or [])

    @property
    def damaged_shards(self) -> list[tuple[str, int]]:
        """The (array, shard) to be made anew."""
        return sorted({(d.array, d.shard) for d in self.damages if d.shard is not None})


def verify(
    store: LatentStore,
    *,
    only: Collection[tuple[str, int]] | None = None,
    on_rows: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every checksum, record and manifest part against each other and against the committed list.

    All arrays of the store are checked.

    Parameters
    ----------
    store : LatentStore
    only : collection of (array, shard), optional
        Check these shards alone.
    on_rows : callable, optional
        Called with (rows checked, damaged rows among them) after each shard.
    """
    found = Verification(damages=_metadata(store))
    inputs: Any = None
    try:
        # What fails its checksum is not read: flipped bytes can be any text, or none.
        if not any("inputs/" in damage.detail for damage in found.damages):
            inputs = store.inputs()
        if inputs is not None and inputs.num_rows < len(store):
            found.damages.append(
                Damage(None, "input list", f"{inputs.num_rows} inputs for {len(store)} rows")
            )
            inputs = None
    except Exception as exc:  # Parquet's readers raise many kinds on flipped bytes
        found.damages.append(Damage(None, "input list", f"cannot be read ({type(exc).__name__})"))
    removed = _removed(store, found)
    # Reading and checksums leave the interpreter free: threads check several shards at a time.
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        for name in store.arrays():
            try:
                array = LatentStore(store.root, name)
            except StoreFormatError as exc:
                found.damages.append(Damage(None, "metadata", str(exc), name))
                continue
            every = range(array.layout.n_shards)
            shards = [s for s in every if only is None or (name, s) in only]
            looks = pool.map(partial(_look, array, inputs, removed), shards)
            for shard, (damages, size) in zip(shards, looks, strict=True):
                _count(array, shard, damages, size, found, on_rows)
    return found


def _look(store: LatentStore, inputs: Any, removed: Removed, shard: int) -> tuple[list[Damage], int]:
    """Check one shard of one array; return what is wrong and the bytes read."""
    damages, size = _shard(store, shard, inputs)
    damages = damages or _still_there(store, shard, removed)
    if pending_file(store.root, shard, store.array).exists():
        text = f"was interrupted; `latentstore remove --store {store.root}` finishes it"
        damages.append(Damage(None, "removal", text))
    return [replace(d, array=store.array) for d in damages], size


def _count(
    store: LatentStore,
    shard: int,
    damages: list[Damage],
    size: int,
    found: Verification,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    found.damages += damages
    found.shards += 1
    found.bytes += size
    if not damages and not store.is_done(shard):
        found.open_shards += 1
    if on_rows is not None:
        rows = len(store.layout.span(shard))
        on_rows(rows, rows if damages else 0)


def _removed(store: LatentStore, found: Verification) -> Removed:
    try:
        return read_removed(store.root)
    except CorruptStoreError as exc:
        found.damages.append(Damage(None, "removed list", str(exc)))
        return Removed()


def _still_there(store: LatentStore, shard: int, removed: Removed) -> list[Damage]:
    """Report rows that should have been removed, and a list that is gone."""
    record = store.record(shard)
    if record is None:
        return []
    span = range(record.start, record.start + record.rows)
    codes = np.fromfile(status_file(store.root, shard, store.array), np.uint8)
    finishes = f"`latentstore remove --store {store.root}` finishes that"
    if any(codes[row - span.start] != REMOVED for row in removed.within(span)):
        return [Damage(None, "removal", f"shard {shard} has removed rows still in it; {finishes}")]
    if not removed.rows and (codes == REMOVED).any():
        return [Damage(None, "removed list", f"is missing, but shard {shard} has removed rows")]
    if removed.sha256 and record.manifest_part:
        contents = store.manifest_part(record, ["sha256"])["sha256"].to_pylist()
        if not removed.sha256.isdisjoint(contents):
            return [
                Damage(None, "removal", f"shard {shard} has removed content under another name; {finishes}")
            ]
    return []


def sample_again(
    store: LatentStore, encoder: Encoder, found: Verification, *, rows: int, seed: int = 0
) -> None:
    """Encode some rows again from their files, and record those that differ beyond the stored precision.

    The tolerance is 64 times the stored dtype's epsilon, relative to the row's norm: rounding to that dtype
    is half an epsilon a number; other kernels, libraries or devices move the rest. A lossy codec's own bound
    counts where it is larger.
    A file that is gone, or has changed since (by its hash), is passed over.
    """
    status = store.status()
    chosen = np.flatnonzero(status == OK)
    chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:rows])
    if not len(chosen):
        return
    listed = store.inputs().select(["path", "path_raw"]).take(chosen).to_pylist()
    # By row, not by place: shards that are not written have no manifest.
    table = store.manifest(["row", "sha256"])
    sha256 = dict(zip(table["row"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    source = Source.recorded(store.origin)
    tolerance = max(64 * float(np.finfo(store.layout.dtype).eps), codecs.relative_error(store.layout.codec))
    for row, image in zip(chosen.tolist(), listed, strict=True):
        latent = _encode_one(source, encoder, {**image, "sha256": sha256.get(row)}, row)
        if latent is None:
            continue
        stored = store.reader.read(row, row + 1)[0].astype(np.float64)
        difference = float(np.linalg.norm(latent - stored)) / max(float(np.linalg.norm(stored)), 1e-30)
        found.sampled += 1
        found.worst = max(found.worst, difference)
        if difference > tolerance:
            shard = row // store.layout.shard_rows
            text = f"row {row} encodes differently now: {difference:.2g}, and {tolerance:.2g} is allowed"
            found.damages.append(Damage(shard, "sample", text, store.array))


def lost_rows(store: LatentStore, source: Source, shard: int) -> list[str]:
    """Return the paths whose rows would be lost if a shard were made from its files anew.

    Those that were ok and whose file is gone, unreadable, or of another content now. Where the manifest is
    damaged, contents cannot be compared.
    """
    first = store.first
    record = first.record(shard)
    span = store.layout.span(shard)
    listed = store.inputs().slice(span.start, len(span)).select(["path", "path_raw"]).to_pylist()
    before: list[dict[str, Any]] = [{"status": "ok", "sha256": None}] * len(listed)
    if record is not None:
        part = store.root / "manifest" / record.manifest_part
        if part.exists() and zlib.crc32(part.read_bytes()) == record.manifest_crc32:
            known = first.manifest_part(record, ["status", "sha256"]).to_pylist()
            before[: len(known)] = known
    source.refresh()
    lost = []
    for image, was in zip(listed, before, strict=True):
        if was["status"] == "ok":
            try:
                sha256 = source.read(image).sha256
            except ImageError:
                sha256 = ""
            if sha256 == "" or was["sha256"] not in (None, sha256):
                lost.append(image["path"])
    return lost


def _encode_one(
    source: Source, encoder: Encoder, listed: dict[str, Any], row: int
) -> npt.NDArray[np.float64] | None:
    try:
        picture = source.load(listed, encoder.space.image_size, max_pixels=1 << 40)
    except (ImageError, OSError):
        return None
    if picture.sha256 != listed["sha256"]:
        return None
    pixels = blank_batch(encoder)
    pixels[0] = picture.rgb
    return encoder.encode(pixels, np.full(encoder.batch, row))[0].astype(np.float64)


def _metadata(store: LatentStore) -> list[Damage]:
    """Check the files that belong to no shard against the seal, and the spaces against their ids."""
    out = []
    seal = read_seal(store.root)
    if not seal:
        out.append(Damage(None, "seal", f"{SEAL} is missing, or does not match its own checksum"))
    for name, crc in seal.items():
        try:
            if zlib.crc32((store.root / name).read_bytes()) != crc:
                out.append(Damage(None, "metadata", f"{name} does not match its checksum"))
        except OSError as exc:
            out.append(Damage(None, "metadata", f"{name} cannot be read ({exc.strerror})"))
    for part in unnamed_parts(store.root):
        text = f"{part} stands beside the part that its shard's record names; run encode again"
        out.append(Damage(None, "manifest", text))
    for array in store.arrays():
        try:
            body = json.loads((store.root / array / "zarr.json").read_text(encoding="utf-8"))
            recorded, space = (
                body["attributes"]["latentstore"]["space_id"],
                LatentStore(store.root, array).space,
            )
        except (ValueError, KeyError, TypeError, StoreFormatError):
            continue  # told with the array's shards
        if recorded != space.id:
            out.append(Damage(None, "space", f"recorded as {recorded}, its fields hash to {space.id}", array))
    return out


def _shard(store: LatentStore, shard: int, inputs: Any) -> tuple[list[Damage], int]:
    record = store.record(shard)
    path = record_file(store.root, shard, store.array)
    if record is None:
        if path.exists():
            return [Damage(shard, "record", f"{path.name} does not match its own checksum")], 0
        return [], 0
    out: list[Damage] = []
    if path.read_bytes() != record.to_bytes():
        out.append(Damage(shard, "record", f"{path.name} has a byte between its values that was not written"))
    if record.space_id != store.space.id:
        out.append(Damage(shard, "record", f"of space {record.space_id}, not {store.space.id}"))
    span = store.layout.span(shard)
    if record.rows != len(span):
        return [], 0  # grown by an append that is not finished: open, not damaged
    size, part = 0, b""
    try:
        size = _latents(store, record, out)
        status = status_file(store.root, shard, store.array).read_bytes()
        if record.manifest_part:
            part = (store.root / "manifest" / record.manifest_part).read_bytes()
    except OSError as exc:
        return [*out, Damage(shard, "file", f"{exc.filename} cannot be read ({exc.strerror})")], size
    if zlib.crc32(status) != record.status_crc32 or len(status) != store.layout.shard_rows:
        out.append(Damage(shard, "status", "does not match its checksum"))
    if zlib.crc32(part) != record.manifest_crc32:
        out.append(Damage(shard, "manifest", f"{record.manifest_part} does not match its checksum"))
    elif record.manifest_part and inputs is not None:
        out += _agrees(store, record, inputs.slice(span.start, len(span)))
    return out, size + len(status) + len(part)


def _latents(store: LatentStore, record: Record, out: list[Damage]) -> int:
    """Check the payload's checksum, the padding and the index; return the bytes read."""
    path, coded = latents_file(store.root, record.shard, store.array), record.latents_bytes
    payload = coded or record.rows * store.layout.row_bytes
    left, crc = payload, 0
    buffer = memoryview(bytearray(_PIECE))  # reused: fresh pages cost more than the checksum
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while left:
            got = file.readinto(buffer[:left])
            if not got:
                break
            crc, left = zlib.crc32(buffer[:got], crc), left - got
        tail = file.read()
    if left or crc != record.latents_crc32 or (coded and tail):
        out.append(Damage(record.shard, "latents", "do not match their checksum"))
    elif not coded and not read_index_is_plain(path, store.layout, record.shard):
        out.append(Damage(record.shard, "index", "is not that of contiguous rows, or fails its checksum"))
    elif not coded and any(tail[: len(tail) - 16 * store.layout.chunks_per_shard - 4]):
        out.append(Damage(record.shard, "padding", "holds bytes that are not zero"))
    return payload - left + len(tail)


def _agrees(store: LatentStore, record: Record, inputs: Any) -> list[Damage]:
    names = ["path", "identity", "group", "role", "split"]
    try:
        table = store.manifest_part(record)
    except CorruptStoreError as exc:
        return [Damage(record.shard, "manifest", str(exc))]
    if table.select(names).to_pydict() != inputs.select(names).to_pydict():
        return [Damage(record.shard, "manifest", "differs from the committed input list")]
    if table["row"].to_pylist() != list(store.layout.span(record.shard)):
        return [Damage(record.shard, "manifest", "rows are not numbered in order")]
    return []
