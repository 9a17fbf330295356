"""Claims: the pass over the pairs runs at the speed of its products; every closed form follows in seconds.

At d = 4,096 on synthetic latents: the pass from a store against reading the rows once and against the same
products once on arrays in memory, interleaved; n, 2n and 4n pairs, each in a process of its own; every method
after the pass, at one ridge and a further one. At d = 1,024: the smallest singular directions by the pass
against scikit-learn's IncrementalPCA, Dask's svd_compressed and SciPy's SVD in memory, with their accuracy.

    python -m benchmarks.closed_forms [--dim 4096] [--origins 3000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.linalg.blas

from benchmarks.store_io import describe
from cli.passes import PairPass
from cli.streams import pair_blocks
from latentstore import results
from latentstore.create import create
from latentstore.results import Figure, Report
from latentstore.schema import OK, Layout, Space, StoreSpec
from latentstore.shards import ShardWriter
from latentstore.store import LatentStore, open_store
from solvers.data import PairData
from solvers.methods import METHODS, build

PER, ROUNDS, SMALLEST, PEER_DIM = 8, 5, 512, 1024
PASS_LIMIT, METHODS_LIMIT, FURTHER_LIMIT = 1.15, 180.0, 15.0
OUT = Path(__file__).parent / "results" / "closed_forms.json"


def make_store(root: Path, origins: int, dim: int) -> LatentStore:
    """Write a store of origins, each followed by PER noisy translations of it, block by block."""
    rng = np.random.default_rng(0)
    spectrum = np.linspace(2, 0.2, dim, dtype=np.float32)
    rows = origins * (1 + PER)
    inputs, _ = describe(rows)
    layout = Layout.plan(rows, dim)
    create(root, StoreSpec("images", Space("benchmark", "0", 256, (dim, 1, 1)), layout), inputs)
    table = inputs.drop_columns(["path_raw"])
    left = np.zeros((0, dim), np.float16)
    for shard in range(layout.n_shards):
        span = layout.span(shard)
        while len(left) < len(span):
            o = rng.standard_normal((64, 1, dim), np.float32) * spectrum + 0.5
            noise = rng.standard_normal((64, PER, dim), np.float32) * spectrum[::-1]
            fresh = np.concatenate([o, o + noise], axis=1).reshape(-1, dim).astype(np.float16)
            left = np.concatenate([left, fresh])
        with ShardWriter(root, layout, shard, "benchmark") as writer:
            writer.append(left[: len(span)], np.full(len(span), OK, np.uint8))
            writer.commit(table.slice(span.start, len(span)))
        left = left[len(span) :]
    return open_store(root)


def pairs_of(store: LatentStore) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(store))
    translations = rows[rows % (1 + PER) != 0]
    return translations - translations % (1 + PER), translations


def plan_of(store: LatentStore, parts: int = 1) -> PairPass:
    origins, translations = pairs_of(store)
    return PairPass.of(store, origins, translations, origins.astype(str), parts=parts)


def data_of(store: LatentStore) -> PairData:
    origins, translations = pairs_of(store)
    own, gallery = np.unique(origins), np.unique(origins)
    return PairData(
        dim=store.layout.dim,
        n_pairs=len(origins),
        n_origins=len(own),
        n_gallery=len(gallery),
        stored_eps=float(np.finfo(np.float16).eps),
        pairs_source=lambda: pair_blocks(store.reader, origins, translations),
        origins_source=lambda: iter([store.reader.gather(own)]),
        gallery_source=lambda: iter([store.reader.gather(gallery)]),
        moments_source=lambda: plan_of(store).in_memory(),
    )


def products_once(o: np.ndarray, t: np.ndarray, summed: np.ndarray) -> None:
    """Run the four products of the pass on float32 arrays that are there already, tile by tile."""
    d = o.shape[1]
    tt, ot = np.zeros((d, d), order="F"), np.zeros((d, d))
    for at in range(0, len(t), 8192):
        tt += scipy.linalg.blas.ssyrk(1.0, t[at : at + 8192].T)
    for at in range(0, len(o), 8192):
        tt += scipy.linalg.blas.ssyrk(1.0, o[at : at + 8192].T)
        tt += scipy.linalg.blas.ssyrk(1.0, o[at : at + 8192].T)
        ot += o[at : at + 8192].T @ summed[at : at + 8192]


def time_pass(store: LatentStore) -> list[Figure]:
    origins, translations = pairs_of(store)
    own = np.unique(origins)
    o = store.reader.gather(own).astype(np.float32)
    t = store.reader.gather(translations).astype(np.float32) - np.repeat(o, PER, axis=0)
    summed = t.reshape(len(o), PER, -1).sum(axis=1)
    seconds: dict[str, list[float]] = {"read": [], "products": [], "pass": []}
    buffer = np.empty((4032, store.layout.dim), np.float16)
    plan_of(store).in_memory()  # the first of everything is slower
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for at in range(0, len(store), len(buffer)):
            stop = min(at + len(buffer), len(store))
            store.reader.read(at, stop, buffer[: stop - at])
        seconds["read"].append(time.perf_counter() - start)
        start = time.perf_counter()
        products_once(o, t, summed)
        seconds["products"].append(time.perf_counter() - start)
        start = time.perf_counter()
        moments = plan_of(store).in_memory()
        seconds["pass"].append(time.perf_counter() - start)
    direction = np.random.default_rng(1).standard_normal(store.layout.dim)
    energy = sum(
        float(((t[i : i + 2000].astype(np.float64) @ direction) ** 2).sum()) for i in range(0, len(t), 2000)
    )
    assert abs(direction @ moments.pairs.second_t @ direction * len(t) - energy) < 1e-5 * energy
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    bounds = np.maximum(seconds["read"], seconds["products"])
    each = np.array(seconds["pass"]) / bounds
    data = f"{len(translations):,} pairs of {len(o):,} origins, d = {store.layout.dim:,}"
    return [
        Figure("the pass over max(read, products)", float(np.median(each)), "pass", "method", unit="times",
               interval=(float(each.min()), float(each.max())), n=ROUNDS, note=f"{data}; limit {PASS_LIMIT}"),
        Figure("reading once, warm", medians["read"], "limit", "note", unit="s", n=ROUNDS),
        Figure("the same products, once in memory", medians["products"], "limit", "note", unit="s", n=ROUNDS),
        Figure("the pass", medians["pass"], "pass", "method", unit="s", n=ROUNDS),
    ]  # fmt: skip


def time_methods(store: LatentStore) -> list[Figure]:
    """Every closed form at one ridge after the pass, the shared decompositions charged to who is first."""
    data = data_of(store)
    _ = data.moments
    _ = data.gallery_spectrum
    figures, total = [], 0.0
    for name, method in METHODS.items():
        if method.needs_torch:
            continue
        knobs = {"rank": SMALLEST} if "rank" in method.__dataclass_fields__ else {}
        start = time.perf_counter()
        fitted = build(name, **knobs).fit(data)
        seconds = time.perf_counter() - start
        assert np.isfinite(fitted.query_map).all()
        total += seconds
        print(f"{name:<16} {seconds:.1f} s", flush=True)
        figures.append(Figure("fit after the pass", seconds, name, "method", unit="s"))
        if "lam" in method.__dataclass_fields__:
            start = time.perf_counter()
            build(name, **knobs, lam=7.0).fit(data)
            further = time.perf_counter() - start
            print(f"{name:<16} {further:.1f} s for a further ridge", flush=True)
            note = f"limit {FURTHER_LIMIT:g} s"
            figures.append(Figure("a further ridge", further, name, "method", unit="s", note=note))
    note = f"limit {METHODS_LIMIT:g} s; pass and gallery spectrum not counted"
    figures.append(Figure("all closed forms, one ridge each", total, "all", "method", unit="s", note=note))
    return figures


def peak() -> int:
    """Return the most memory that this process held, in bytes; getrusage would count its parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def one_size(origins: int, dim: int) -> dict[str, float]:
    """Make a store, then pass over it in this process: seconds and the peak of what it held, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        code = (
            "import sys; from pathlib import Path; from benchmarks.closed_forms import make_store; "
            f"make_store(Path(sys.argv[1]) / 's.zarr', {origins}, {dim})"
        )
        subprocess.run([sys.executable, "-c", code, name], check=True)
        store = open_store(Path(name) / "s.zarr")
        before = peak()
        start = time.perf_counter()
        plan_of(store).in_memory()
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "memory": peak() - before,
    }


def scaling(origins: int, dim: int) -> list[Figure]:
    figures, first = [], {"seconds": 0.0, "memory": 0.0}
    for times in (1, 2, 4):
        command = [sys.executable, "-m", "benchmarks.closed_forms", "--size", str(times * origins)]
        done = subprocess.run([*command, "--dim", str(dim)], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        first = first if first["seconds"] else found
        label = f"{times} n" if times > 1 else "n"
        for what in ("seconds", "memory"):
            value = found[what] / first[what]
            figures.append(Figure(f"pass, {what} over those of n", value, label, "note", unit="times"))
    return figures


def peers(origins: int) -> list[Figure]:
    """Measure the smallest singular directions of T: time, and residual over the exact one."""
    import dask.array as da
    from sklearn.decomposition import IncrementalPCA

    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "s.zarr", origins, PEER_DIM)
        o_rows, g_rows = pairs_of(store)
        T = store.reader.gather(g_rows).astype(np.float32) - store.reader.gather(o_rows).astype(np.float32)

        def by_pass() -> np.ndarray:
            return build("svd", rank=SMALLEST).fit(data_of(store)).query_map

        def by_svd() -> np.ndarray:
            return scipy.linalg.svd(T.astype(np.float64), full_matrices=False)[2][-SMALLEST:].T

        def by_incremental() -> np.ndarray:
            model = IncrementalPCA(n_components=PEER_DIM, batch_size=2 * PEER_DIM).fit(T)
            return np.asarray(model.components_[-SMALLEST:].T)

        def by_dask() -> np.ndarray:
            blocks = da.from_array(T, chunks=(4096, PEER_DIM))
            v = da.linalg.svd_compressed(blocks, k=PEER_DIM, n_power_iter=0, seed=0)[2]
            return np.asarray(v[-SMALLEST:].compute().T)

        ways = {
            "latentstore, from the store": by_pass,
            "SciPy SVD in memory, float64": by_svd,
            "scikit-learn IncrementalPCA (centred)": by_incremental,
            "Dask svd_compressed, full size": by_dask,
        }
        exact = np.linalg.norm(T.astype(np.float64) @ by_svd())
        times: dict[str, list[float]] = {}
        residual: dict[str, float] = {}
        for _ in range(ROUNDS):
            for label, way in ways.items():
                start = time.perf_counter()
                W = way()
                times.setdefault(label, []).append(time.perf_counter() - start)
                residual[label] = float(np.linalg.norm(T.astype(np.float64) @ W)) / float(exact) - 1
    own = statistics.median(times["latentstore, from the store"])
    figures: list[Any] = []
    for label, seconds in times.items():
        ratio = statistics.median(seconds) / own
        note = f"{len(T):,} pairs, d = {PEER_DIM:,}; smallest {SMALLEST} directions"
        role = "method" if label.startswith("latentstore") else "control"
        figures.append(Figure("time over ours", ratio, label, role, unit="times", n=ROUNDS, note=note))
        figures.append(Figure("residual above the exact SVD's", residual[label], label, role, unit="share"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--origins", type=int, default=3000)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.size:
        print(json.dumps(one_size(args.size, args.dim)))
        return
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "s.zarr", args.origins, args.dim)
        figures = time_pass(store)
        figures += time_methods(store)
    figures += scaling(args.origins, args.dim)
    figures += peers(args.origins // 2)
    for f in figures:
        print(f"{f.subject:<40} {f.name:<36} {f.value:.5g} {f.unit}")
    Report(
        kind="benchmark",
        title="The pass over the pairs, and every closed form after it",
        summary=[figures[0].note],
        data={"dim": args.dim, "origins": args.origins, "translations of each": PER, "latents": "synthetic"},
        figures=figures,
        reproduce=["python -m benchmarks.closed_forms"],
        **results.stamp(),
    ).write(args.out)


if __name__ == "__main__":
    main()
