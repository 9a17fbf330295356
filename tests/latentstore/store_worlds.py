"""Seeded pictures and stores, and ways of looking at a store's files."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from latentstore.create import create
from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.manifest import input_table, manifest_table
from latentstore.schema import OK, STATUS_NAMES, Layout, Space, StoreSpec
from latentstore.shards import ShardWriter
from latentstore.store import writing

SLOW = Path(__file__).with_name("slow_encode.py")
SIZE = 64


def picture(seed, width=24, height=20):
    """A smooth random colour picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def photo_folder(folder, n, *, seed=0):
    folder.mkdir(parents=True)
    for i in range(n):
        picture(seed * 100_000 + i).save(folder / f"{i:04d}.png", compress_level=1)
    return folder


def encode_patch(folder, root, **options):
    """Encode at 64 pixels (d = 256), by default in shards of 84 rows."""
    source = options.pop("source", None) or Source(folder)
    encoder = options.pop("encoder", None) or PatchEncoder(SIZE)
    return encode(source, root, encoder, **{"shard_rows": 84, "threads": 2} | options)


def expected_latent(image, size=SIZE, dtype=np.float16):
    """What the patch encoder's row of a Pillow image must be, by the definition of the code.

    Per patch in float64: W (x/127.5 - 1 - mean).
    """
    encoder = PatchEncoder(size)
    x = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), np.float64)
    side = size // 8
    out = np.empty((4, side, side))
    for i in range(side):
        for j in range(side):
            patch = x[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(-1) / 127.5 - 1
            out[:, i, j] = encoder._components.astype(np.float64) @ (patch - encoder._mean)
    return out.reshape(-1).astype(dtype)


# --- stores without pictures -------------------------------------------------------------------------


def space_of(dim):
    return Space(encoder="test", weights="0" * 64, image_size=8, latent_shape=(dim, 1, 1))


def rows_of(n, **columns):
    """An input list of n rows, overridden by columns."""
    each = [{k: v[i] for k, v in columns.items()} for i in range(n)]
    return input_table({"path": f"{i:06d}.png"} | each[i] for i in range(n))


def make_store(root, latents, *, status=None, inputs=None, shard_rows=84, batch=50, only=None, codec=None):
    """A store of given latents; ``only`` names the shards to write."""
    n, dim = latents.shape
    inputs = rows_of(n) if inputs is None else inputs
    layout = Layout.plan(n, dim, dtype=str(latents.dtype), shard_rows=shard_rows, codec=codec)
    spec = StoreSpec("images", space_of(dim), layout, {"made": "by a test"}, {"root": str(root.parent)})
    store = create(root, spec, inputs)
    status = np.full(n, OK, np.uint8) if status is None else status
    with writing(root):
        for shard in range(layout.n_shards) if only is None else only:
            write_shard(store, shard, latents, status, inputs, batch)
    return store


def write_shard(store, shard, latents, status, inputs, batch=50):
    span = store.layout.span(shard)
    with ShardWriter(store.root, store.layout, shard, store.space.id) as writer:
        for first in range(span.start, span.stop, batch):
            part = slice(first, min(first + batch, span.stop))
            writer.append(latents[part], status[part])
        rows = inputs.slice(span.start, len(span)).to_pylist()
        for i, row in enumerate(rows):
            del row["path_raw"]
            row |= {"row": span.start + i, "status": STATUS_NAMES[status[span.start + i]], "reason": ""}
        return writer.commit(manifest_table(rows))


# --- files of a store --------------------------------------------------------------------------------


def tree(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def data_files(root):
    """The bytes of everything that may not depend on when or how a store was made."""
    return {
        name: data
        for name, data in tree(root).items()
        # the process; the date; the checksum of the date
        if name not in ("done/lock", "latents/zarr.json", "done/seal.json")
    }


def shard_facts(root):
    """Inode and modification time of every shard file: they change when one is written again."""
    return {
        p.parent.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (root / "latents" / "c").glob("*/0")
    }


def done_shards(root):
    return {p.stem for p in (root / "done").glob("[0-9]*.json")}


def partials(root):
    return list(root.rglob("*.partial"))


# --- other processes ---------------------------------------------------------------------------------


def slow_encode(folder, root, *options):
    """Start encoding in another process, with a slowed encoder."""
    command = [sys.executable, str(SLOW), str(folder), str(root), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_in_the_middle(folder, root, *, done=1, seconds=0.05):
    """Encode in another process and kill -9 it when shards are done and one is half written."""
    process = slow_encode(folder, root, "--sleep", seconds)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if len(done_shards(root)) >= done and list((root / "latents" / "c").glob("*/*.partial")):
                break
            time.sleep(0.001)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -9, errors
    assert done_shards(root), "killed before a shard was done"
    assert list((root / "latents" / "c").glob("*/*.partial")), "killed between two shards"


# --- picture files by hand ---------------------------------------------------------------------------


def file_bytes(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write_raw(folder, name, data):
    """Write a file whose name is bytes."""
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
        file.write(data)
