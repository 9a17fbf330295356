"""Claim: what ``encode --codec`` saves, and what it costs, is known before it is chosen.

The same latents of real photographs written plainly and by each codec: bytes, error, write and read rates, in
one run, interleaved; every answer is checked against the codec's bound before it is timed.

    python -m benchmarks.codecs [--images FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.store_io import describe, files_below
from latentstore import results
from latentstore.create import create
from latentstore.encode import Source, encode
from latentstore.encoders import load_encoder
from latentstore.photos import bundled, write_tiles
from latentstore.results import Figure, Report
from latentstore.schema import OK, Layout, Space, StoreSpec
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, open_store

CODECS = (None, "zstd", "blosc", "bitround:7", "bitround:5", "bitround:3")
ROWS, SHARD, ROUNDS = 4032, 1008, 5
OUT = Path(__file__).parent / "results" / "codecs.json"


def latents_of(images: Path, work: Path) -> np.ndarray:
    """Return float16 latents of the folder's images, repeated to ROWS rows."""
    encode(Source(images), work / "photos.zarr", load_encoder("patch"))
    store = open_store(work / "photos.zarr")
    rows = store.reader.gather(np.flatnonzero(store.status() == OK))
    return np.resize(rows, (ROWS, rows.shape[1]))


def write(root: Path, data: np.ndarray, codec: str | None) -> LatentStore:
    shutil.rmtree(root, ignore_errors=True)
    inputs, _ = describe(len(data))
    layout = Layout.plan(len(data), data.shape[1], shard_rows=SHARD, codec=codec)
    create(root, StoreSpec("images", Space("benchmark", "0", 256, (4, 32, 32)), layout), inputs)
    rows = inputs.drop_columns(["path_raw"])
    for shard in range(layout.n_shards):
        span = layout.span(shard)
        with ShardWriter(root, layout, shard, "benchmark") as writer:
            for at in range(span.start, span.stop, 64):
                block = data[at : min(at + 64, span.stop)]
                writer.append(block, np.full(len(block), OK, np.uint8))
            writer.commit(rows.slice(span.start, len(span)))
    return open_store(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="default: photographs of scikit-image")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    times: dict[tuple[str, str], list[float]] = {}
    figures = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        images = args.images or work / "images"
        if args.images is None:
            write_tiles(images, bundled())
        data = latents_of(images, work)
        gathered = np.sort(np.random.default_rng(0).permutation(len(data))[:256])
        for round_ in range(ROUNDS):
            for codec in CODECS:
                label = codec or "none"
                start = time.perf_counter()
                store = write(work / label.replace(":", "-"), data, codec)
                cases = {"write": time.perf_counter() - start}
                start = time.perf_counter()
                got = store.reader.read(0, len(data))
                cases["sequential read"] = time.perf_counter() - start
                start = time.perf_counter()
                some = store.reader.gather(gathered)
                cases["gather 256 rows"] = time.perf_counter() - start
                assert np.array_equal(some, got[gathered])
                for case, seconds in cases.items():
                    times.setdefault((case, label), []).append(seconds)
                if round_ == 0:
                    figures += sizes_and_errors(store, data, got, label)
    for (case, label), seconds in times.items():
        ratio = statistics.median(seconds) / statistics.median(times[case, "none"])
        figures.append(Figure(case, ratio, label, "note", unit="times no codec", n=ROUNDS))
    for figure in figures:
        print(f"{figure.subject:<12} {figure.name:<28} {figure.value:.5g} {figure.unit}")
    report = Report(
        kind="benchmark",
        title="What a codec saves and costs",
        summary=[
            "Times over those of plain rows, files in the page cache; errors relative to the row's norm."
        ],
        data={"rows": ROWS, "dim": data.shape[1], "images": "own folder" if args.images else "scikit-image"},
        figures=figures,
        reproduce=["python -m benchmarks.codecs"],
        **results.stamp(),
    )
    report.write(args.out)


def sizes_and_errors(store: LatentStore, data: np.ndarray, got: np.ndarray, label: str) -> list[Figure]:
    exact = data.astype(np.float64)
    error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    kept = int(label.split(":")[1]) if ":" in label else None
    assert error.max() <= (0 if kept is None else 2.0 ** -(kept + 1))
    disk = sum(p.stat().st_size for p in files_below(store.root / "latents"))
    return [
        Figure("bytes over plain rows", disk / data.nbytes, label, "note", unit="ratio"),
        Figure("relative error, worst row", float(error.max()), label, "note", unit="of the row's norm"),
    ]


if __name__ == "__main__":
    main()
