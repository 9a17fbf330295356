"""Claims: matching is exact at the speed of FAISS's flat index, and a kept index opens and grows at once.

On unit rows of 512 numbers, in clusters, from a memory-mapped index: the answer checked against float64, then
our rate over that of FAISS's IndexFlatIP on the same rows in memory, interleaved; the time to open a million
rows; adding one image in a hundred over building; the recall of an approximate part. On CUDA, where there is
one, seconds a pair with the rows on the device, scanned in 16 bits and scored again.

    python -m benchmarks.matching [--small] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_io import describe
from latentstore import approximate, indexing, results
from latentstore.create import create
from latentstore.index import BLOCK, Index
from latentstore.results import Figure, Report
from latentstore.schema import OK, Layout, Space, StoreSpec
from latentstore.search import Search, has_faiss
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, open_store, writing

DIM, QUERIES, TOP, ROUNDS, CHECKED = 512, 1000, 10, 5, 50
FULL, SMALL = (100_000, 1_000_000), (20_000, 100_000)
LIMIT, CUDA_LIMIT, PAPER = 0.9, 5e-12, 0.53e-10
"""Least rate over FAISS's; most seconds a pair on an H200; the paper's seconds a pair."""
OUT = Path(__file__).parent / "results" / "matching.json"
EPS32 = float(np.finfo(np.float32).eps)


def rows_of(first: int, stop: int) -> np.ndarray:
    """Return some of endless rows in a thousand clusters; each depends on its number alone, by thousands."""
    centres = np.random.default_rng(2**40).standard_normal((1000, DIM), np.float32)
    parts = []
    for thousand in range(first // 1000, -(-stop // 1000)):
        rng = np.random.default_rng(thousand)
        block = centres[rng.integers(0, 1000, 1000)] + rng.standard_normal((1000, DIM), np.float32)
        parts.append(block[max(0, first - 1000 * thousand) : stop - 1000 * thousand].astype(np.float16))
    return np.concatenate(parts)


def make_store(root: Path, rows: int) -> LatentStore:
    """Write a store, shard by shard."""
    inputs, _ = describe(rows)
    layout = Layout.plan(rows, DIM)
    create(root, StoreSpec("images", Space("benchmark", "0", 256, (DIM, 1, 1)), layout), inputs)
    with writing(root):
        fill(open_store(root))
    return open_store(root)


def fill(store: LatentStore) -> None:
    table = store.inputs().drop_columns(["path_raw"])
    for shard in store.todo():
        span = store.layout.span(shard)
        with ShardWriter(store.root, store.layout, shard, store.space.id) as writer:
            writer.append(rows_of(span.start, span.stop), np.full(len(span), OK, np.uint8))
            writer.commit(table.slice(span.start, len(span)))


def project(latents: np.ndarray) -> np.ndarray:
    x = latents.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def indexed(store: LatentStore, folder: Path) -> tuple[Index, float]:
    start = time.perf_counter()
    indexing.prepare(store, folder)
    indexing.update(store, folder, project, np.arange(len(store)), fingerprint="benchmark")
    return Index.open(folder), time.perf_counter() - start


def queries_near(index: Index, n: int) -> np.ndarray:
    """Return noisy copies of references, at a cosine of 0.7 or so."""
    rng = np.random.default_rng(7)
    some = np.sort(rng.permutation(len(index.rows))[:n])
    return project(index.references[some] + rng.standard_normal((n, DIM), np.float32) / np.sqrt(DIM))


def check_answer(index: Index, queries: np.ndarray, found: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare some answers with every score in float64."""
    some = queries[:CHECKED].astype(np.float64)
    parts = [some @ block.astype(np.float64).T for _, block in index.blocks()]
    rows = np.concatenate([rows for rows, _ in index.blocks()])
    exact = np.concatenate(parts, axis=1)
    best = np.lexsort((np.broadcast_to(rows, exact.shape), -exact), axis=1)[:, :TOP]
    assert (rows[best] == found[1][:CHECKED]).all(), "the order is not that of float64"
    assert (np.abs(np.take_along_axis(exact, best, 1) - found[0][:CHECKED]) <= 8 * EPS32).all()


def interleaved(ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rates(index: Index, queries: np.ndarray) -> list[Figure]:
    n, group, figures = len(index.rows), f"{len(index.rows):,} rows", []
    check_answer(index, queries, index.search(queries, TOP))
    flat = None
    if has_faiss():
        import faiss

        flat = faiss.IndexFlatIP(DIM)
        flat.add(np.ascontiguousarray(index.references))
    for q in (len(queries), len(queries) // 10):
        asked = queries[:q]
        ways: dict[str, Callable[[], Any]] = {"latentstore": lambda asked=asked: index.search(asked, TOP)}
        if flat is not None:
            flat.search(asked, TOP)
            ways["FAISS flat"] = lambda asked=asked: flat.search(asked, TOP)
        seconds, data = interleaved(ways), f"{q:,} queries"
        for name, each in seconds.items():
            role, value = "method" if name == "latentstore" else "control", statistics.median(each) / (n * q)
            note = f"{data}; the paper: {PAPER:.2g}"
            figures.append(Figure("seconds a pair", value, name, role, group, "s", n=ROUNDS, note=note))
        if flat is not None:
            ratio = np.array(seconds["FAISS flat"]) / np.array(seconds["latentstore"])
            value, span = float(np.median(ratio)), (float(ratio.min()), float(ratio.max()))
            name, note = "our rate over FAISS flat's", f"{data}; limit {LIMIT}"
            figures.append(Figure(name, value, "latentstore", "method", group, "times", span, ROUNDS, note))
    one = statistics.median(interleaved({"one": lambda: index.search(queries[:1], TOP)})["one"])
    figures.append(Figure("one query", one, "latentstore", "method", group, "s", n=ROUNDS))
    return figures


def opening(index: Index) -> Figure:
    each = interleaved({"open": lambda: len(Index.open(index.folder))})["open"]
    n = len(index.rows)
    return Figure(
        "open the index", statistics.median(each), "latentstore", "method", f"{n:,} rows", "s", n=ROUNDS
    )


def growing(store: LatentStore, folder: Path, built: float) -> Figure:
    """Append one image in a hundred, bring the index up to date."""
    before = len(store)
    more, _ = describe(before + before // 100)
    with writing(store.root):
        store = store.extend(more.slice(before))
        fill(store)
    index, seconds = indexed(open_store(store.root), folder)
    assert len(index) == before + before // 100
    note = f"building: {built:.3g} s for {before:,} rows; adding: {seconds:.3g} s"
    return Figure(
        "adding 1 % over building", seconds / built, "latentstore", "method", unit="share", note=note
    )


def recall(index: Index, queries: np.ndarray, factory: str) -> list[Figure]:
    start = time.perf_counter()
    index = approximate.make(index, factory)
    seconds = time.perf_counter() - start
    found = approximate.measure(index, queries, "noisy copies").body["approximate"]["recall"]
    group = f"{len(index.rows):,} rows"
    return [
        Figure("recall@1", found["at_1"], factory, "method", group, "fraction", n=found["n"]),
        Figure("recall@10", found["at_10"], factory, "method", group, "fraction", n=found["n"]),
        Figure("seconds a query", found["seconds"], factory, "method", group, "s", n=found["n"]),
        Figure("seconds a query", found["exact_seconds"], "exact", "control", group, "s", n=found["n"]),
        Figure("training and adding", seconds, factory, "note", group, "s"),
    ]


def on_cuda(rows: int, queries: int) -> list[Figure]:
    """Scan rows that lie on the device, in 16 bits; the answer is compared with the scan in float32."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def units(n: int) -> Any:
        return torch.nn.functional.normalize(torch.randn(n, DIM, device="cuda", generator=generator))

    references, asked = units(rows), units(queries).cpu().numpy()
    number = np.arange(rows)

    def search(scan: Any) -> tuple[np.ndarray, np.ndarray]:
        found = Search(asked, TOP, device="cuda", scan=scan, largest=1.001)
        for at in range(0, rows, 4 * BLOCK):
            found.add(number[at : at + 4 * BLOCK], references[at : at + 4 * BLOCK])
        torch.cuda.synchronize()
        return found.best()

    expected, figures = search("float32"), []
    for scan in ("float16", "bfloat16", "float32"):
        assert all((a == b).all() for a, b in zip(search(scan), expected, strict=True))
        seconds = interleaved({scan: lambda scan=scan: search(scan)})[scan]
        value = statistics.median(seconds) / (rows * queries)
        note = f"{queries:,} queries, {torch.cuda.get_device_name()}; limit {CUDA_LIMIT:g}"
        figures.append(
            Figure(
                "seconds a pair on CUDA", value, scan, "method", f"{rows:,} rows", "s", n=ROUNDS, note=note
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quick try of everything")
    parser.add_argument("--folder", type=Path, help="where stores and indexes are made (5 GB)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sizes, figures = SMALL if args.small else FULL, []
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            store = make_store(Path(name) / "s.zarr", rows)
            index, built = indexed(store, Path(name) / "index")
            queries = queries_near(index, QUERIES // (2 if args.small else 1))
            figures += rates(index, queries)
            figures.append(opening(index))
            if rows == sizes[0]:
                figures.append(growing(store, index.folder, built))
            elif has_faiss():
                cells = 1 << (int(4 * np.sqrt(rows)).bit_length() - 1)
                figures += recall(index, queries, f"IVF{cells},Flat")
            shutil.rmtree(index.folder)
    caveats = []
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError
        figures += on_cuda(sizes[1], 2000 if args.small else 10_000)
    except ImportError:
        caveats.append("On CUDA: not run, as there is no CUDA device here.")
    for f in figures:
        print(f"{f.subject:<16} {f.name:<28} {f.group:<16} {f.value:.4g} {f.unit}  {f.note}")
    print(*caveats, sep="\n")
    Report(
        kind="benchmark",
        title="Matching: exact search, the kept index, and an approximate part",
        summary=[f"{f.name}, {f.group}: {f.value:.3g} ({f.note})" for f in figures if f.interval],
        data={"rows": list(sizes), "dim": DIM, "top": TOP, "vectors": "a thousand clusters, normalised"},
        figures=figures,
        caveats=caveats,
        reproduce=["python -m benchmarks.matching" + " --small" * args.small],
        **results.stamp(),
    ).write(args.out)


if __name__ == "__main__":
    main()
