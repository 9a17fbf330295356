"""Claims: the store is read and written at the speed of the disk, and costs no more bytes than its rows.

Our reader and writer beside a memory map, zarr-python, tensorstore and one ``.npy`` file an image, on the
same rows in one run, interleaved; every answer is checked before it is timed. "Cold" means that our files
were dropped from this machine's page cache (a cache below it may remain); ratios above 1 favour us.

    python -m benchmarks.store_io [--rows 20160] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import zarr

from latentstore import results
from latentstore.create import create
from latentstore.manifest import input_table, manifest_table
from latentstore.results import Figure, Report
from latentstore.schema import OK, Layout, Space, StoreSpec
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, open_store

DIM, PER_IDENTITY, SHARD, ROUNDS = 4096, 21, 4032, 5
OUT = Path(__file__).parent / "results" / "store_io.json"


def rows_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, DIM), dtype=np.float32).astype(np.float16)


def describe(n: int) -> tuple[Any, list[Any]]:
    """Return the input list and the manifest table of each shard, which other writers do not have."""
    inputs = input_table({"path": f"{i:07d}.png"} for i in range(n))
    rows = inputs.drop_columns(["path_raw"]).to_pylist()
    tables = [
        manifest_table(
            [{**row, "row": at + i, "status": "ok"} for i, row in enumerate(rows[at : at + SHARD])]
        )
        for at in range(0, n, SHARD)
    ]
    return inputs, tables


def write_ours(root: Path, data: np.ndarray, inputs: Any, tables: list[Any]) -> None:
    space = Space("benchmark", "0", 256, (4, 32, 32))
    layout = Layout.plan(len(data), DIM, shard_rows=SHARD)
    create(root, StoreSpec("images", space, layout), inputs)
    for shard, table in enumerate(tables):
        span = layout.span(shard)
        with ShardWriter(root, layout, shard, space.id) as writer:
            for at in range(span.start, span.stop, 1008):
                block = data[at : min(at + 1008, span.stop)]
                writer.append(block, np.full(len(block), OK, np.uint8))
            writer.commit(table)


def write_zarr(root: Path, data: np.ndarray) -> None:
    array = zarr.create_array(
        root, shape=data.shape, dtype="float16", chunks=(84, DIM), shards=(4032, DIM), compressors=None
    )
    for at in range(0, len(data), 4032):
        array[at : at + 4032] = data[at : at + 4032]


def drop(paths: list[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def timed(cases: dict[str, Callable[[], Any]], before: Callable[[], None]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            before()
            began = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def write_raw(root: Path, data: np.ndarray) -> None:
    """Write the rows alone, to one file a shard: the limit."""
    root.mkdir()
    for at in range(0, len(data), SHARD):
        data[at : at + SHARD].tofile(root / f"{at:07d}")


def synced(write: Callable[[Path, np.ndarray], None], root: Path, data: np.ndarray) -> None:
    write(root, data)
    for path in files_below(root):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def files_below(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def compare(
    figures: list[Figure], what: str, ours: str, times: dict[str, float], floors: dict[str, float]
) -> None:
    for name, seconds in times.items():
        if name != ours:
            floor = floors.get(name)
            note = f"floor {floor:g}" if floor else ""
            figures.append(
                Figure(what, seconds / times[ours], name, "note", unit="times ours", n=ROUNDS, note=note)
            )
            print(f"{what:<34} {name:<24} {seconds / times[ours]:7.2f} x   {note}")


def measure_writes(work: Path, data: np.ndarray, figures: list[Figure]) -> LatentStore:
    inputs, tables = describe(len(data))

    def fresh(name: str) -> Path:
        shutil.rmtree(work / name, ignore_errors=True)
        return work / name

    cases = {
        "ours, with fsync": lambda: write_ours(fresh("ours.zarr"), data, inputs, tables),
        "zarr-python": lambda: write_zarr(fresh("theirs.zarr"), data),
        "zarr-python, then fsync": lambda: synced(write_zarr, fresh("theirs.zarr"), data),
        "raw bytes, then fsync": lambda: synced(write_raw, fresh("raw"), data),
    }
    compare(figures, "write", "ours, with fsync", timed(cases, os.sync), {"zarr-python, then fsync": 2.0})
    store = open_store(work / "ours.zarr")
    payload = len(data) * DIM * 2
    disk = sum(p.stat().st_size for p in files_below(store.root / "latents"))
    figures.append(
        Figure("bytes on disk over payload", disk / payload, "ours", unit="ratio", note="at most 1.01")
    )
    print(f"{'bytes on disk over payload':<34} {disk / payload:.5f}")
    return store


def measure_reads(work: Path, store: LatentStore, data: np.ndarray, figures: list[Figure]) -> None:
    flat, folder = work / "flat.bin", work / "npy"
    data.tofile(flat)
    for i, row in enumerate(data):
        place = folder / f"{i // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{i}.npy", row)
    array = zarr.open_array(store.root / "latents", mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.root / "latents")}}
    fast = tensorstore.open(spec, read=True).result()

    def mapped() -> np.ndarray:
        # A map that stays open would keep its pages: it is opened anew each time.
        return np.memmap(flat, np.float16, "r", shape=data.shape)

    everything = [*files_below(store.root / "latents"), flat, *files_below(folder)]
    buffer = np.empty_like(data)

    def npy(rows: np.ndarray) -> np.ndarray:
        return np.stack([np.load(folder / f"{r // 1000:03d}" / f"{r}.npy") for r in rows])

    def pieces(rows: np.ndarray) -> np.ndarray:
        starts = rows[::PER_IDENTITY] if len(rows) % PER_IDENTITY == 0 else rows
        width = PER_IDENTITY if len(rows) % PER_IDENTITY == 0 else 1
        return np.concatenate([array[s : s + width] for s in starts])

    rng = np.random.default_rng(1)
    chosen = np.sort(rng.permutation(len(data) // PER_IDENTITY)[:128])
    blocks = (chosen[:, None] * PER_IDENTITY + np.arange(PER_IDENTITY)).ravel()
    four = (
        chosen[:, None] * PER_IDENTITY
        + np.sort(rng.permuted(np.tile(np.arange(21), (128, 1)), axis=1)[:, :4])
    ).ravel()
    sequential: dict[str, Callable[[], Any]] = {
        "ours": lambda: store.reader.read(0, len(data), buffer),
        "memmap": lambda: np.copyto(buffer, mapped()),
        "zarr-python": lambda: array[:],
    }
    gathers: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, rows in (("gather 21 of 21", blocks), ("gather 4 of 21", four)):
        gathers[name] = {
            "ours": lambda rows=rows: store.reader.gather(rows),
            "npy files": lambda rows=rows: npy(rows),
            "memmap": lambda rows=rows: mapped()[rows],
            "tensorstore": lambda rows=rows: fast[rows].read().result(),
            "zarr-python": lambda rows=rows: pieces(rows),
        }
        for reader, case in gathers[name].items():
            assert np.array_equal(case(), data[rows]), (name, reader)
    for case in sequential.values():
        buffer[:] = 0
        got = case()
        assert np.array_equal(buffer if got is None else got, data)
    floors_cold = {
        "sequential read": {"memmap": 1.0, "zarr-python": 2.0},
        "gather 21 of 21": {"npy files": 10.0},
        "gather 4 of 21": {"npy files": 5.0, "tensorstore": 3.0},
    }
    for heat, before in (("cold", lambda: drop(everything)), ("warm", lambda: None)):
        for name, cases in {"sequential read": sequential, **gathers}.items():
            floors = (
                floors_cold[name] if heat == "cold" else {"memmap": 0.5} if name == "sequential read" else {}
            )
            compare(figures, f"{name}, {heat}", "ours", timed(cases, before), floors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_160)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    data = rows_of(args.rows)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        store = measure_writes(Path(name), data, figures)
        measure_reads(Path(name), store, data, figures)
    report = Report(
        kind="benchmark",
        title="Reading and writing the store",
        summary=["Times of others over ours: above 1 ours is faster."],
        data={"rows": args.rows, "dim": DIM, "dtype": "float16", "identities gathered": 128},
        figures=figures,
        reproduce=["python -m benchmarks.store_io"],
        **results.stamp(),
    )
    report.write(args.out)


if __name__ == "__main__":
    main()
