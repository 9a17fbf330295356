"""Claims: a CosFace step is bound by its products, wherever latents lie; a closed form is a head start.

Steps of the published batch (512 rows of 4,096 numbers, rank 512, 10,000 classes) against the same products
alone, from host memory and from a store, interleaved; against the straightforward loop (one ``.npy`` file an
image, a DataLoader, full logits); the loss alone against pytorch-metric-learning's at 1,000, 10,000 and
100,000 classes; and the seconds to 99 % of the better run's best validation mAP from a random start and from
gnull, gnull's own seconds counted, on analytic diffusion. Losses are compared before anything is timed. The
rows of an identity lie side by side in the store, as they do where images are encoded folder by folder: a
batch reads runs of four rows.

    python -m benchmarks.cosface [--classes 10000] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.store_io import describe, drop, files_below, write_ours
from latentstore import results
from latentstore.reader import Reader
from latentstore.results import Figure, Report
from latentstore.store import open_store
from solvers.data import PairData
from solvers.losses import cosface
from solvers.methods import build
from solvers.metrics import average_precision
from solvers.projection import Projection
from solvers.sgd import ArraySource, CosFace, preset_auto, preset_paper, train

DIM, RANK, BATCH, PER, ROUNDS, STEPS = 4096, 512, 512, 4, 3, 8
MEMORY_LIMIT, STORE_LIMIT, WARM_LIMIT, COLD_LIMIT = 0.7, 0.9, 1.5, 5.0
OUT = Path(__file__).parent / "results" / "cosface.json"


class Stored:
    """Rows that stay in the store."""

    def __init__(self, reader: Reader, labels: np.ndarray) -> None:
        self.reader, self.labels, self.dim = reader, labels, reader.layout.dim

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return rows as a training run asks for them."""
        return np.asarray(self.reader.gather(indices))


def recipe(steps: int) -> CosFace:
    paper = preset_paper(RANK)
    return replace(paper, steps=steps, schedule_every=1, validate_every=steps, device="cpu")


def seconds_a_step(source: Any, steps: int = STEPS) -> float:
    """Return the mean over steps of the training loop, the first two left out."""
    times: list[float] = []
    train(recipe(steps + 2), source, progress=lambda *_: times.append(time.perf_counter()))
    return mean_step(times)


def mean_step(ends: list[float]) -> float:
    """Return the mean seconds of a step from when each ended, the first two left out.

    Waiting for rows comes in lumps, one a block that is read ahead: a median step would leave it out.
    """
    return (ends[-1] - ends[1]) / (len(ends) - 2)


def products(classes: int) -> Callable[[], float]:
    """Return what runs the five products of a step on arrays that are there, and its median seconds."""
    rng = torch.Generator().manual_seed(0)
    x, W, dy = (torch.randn(shape, generator=rng) for shape in ((BATCH, DIM), (DIM, RANK), (BATCH, RANK)))
    C, y, p = (torch.randn(s, generator=rng) for s in ((classes, RANK), (BATCH, RANK), (BATCH, classes)))
    # A step writes its logits and gradients into memory that it had before.
    logits, d_classes, d_weights = (torch.empty_like(like) for like in (p, C, W))

    def once() -> float:
        start = time.perf_counter()
        torch.mm(x, W)
        torch.mm(y, C.T, out=logits)
        torch.mm(p, C)
        torch.mm(p.T, y, out=d_classes)
        torch.mm(x.T, dy, out=d_weights)
        return time.perf_counter() - start

    def run() -> float:
        return statistics.median(once() for _ in range(STEPS))

    return run


class Files(torch.utils.data.Dataset[Any]):
    """One ``.npy`` an image, as the paper's repository publishes them."""

    def __init__(self, root: Path, labels: np.ndarray) -> None:
        self.root, self.labels = root, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.from_numpy(np.load(self.root / f"{index}.npy")).float(), int(self.labels[index])


def draws(labels: np.ndarray, steps: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.permutation(labels.max() + 1)[: BATCH // PER]
        yield (chosen[:, None] * PER + np.arange(PER)).ravel().tolist()


def plain_loss(x: Any, W: Any, C: Any, labels: Any) -> Any:
    cosine = functional.normalize(x @ W) @ functional.normalize(C).T
    cosine[torch.arange(len(x)), labels] -= 0.35
    return functional.cross_entropy(64.0 * cosine, labels)


def plain_loop(root: Path, labels: np.ndarray, before: Callable[[], None], steps: int = STEPS) -> float:
    """Return the mean seconds a step of what one writes in an afternoon, the first two left out."""
    before()
    W = torch.nn.Parameter(torch.randn(DIM, RANK) / DIM**0.5)
    C = torch.nn.Parameter(torch.randn(int(labels.max()) + 1, RANK) / RANK**0.5)
    optimiser = torch.optim.Adam([W, C], lr=3.5e-4)
    loader = torch.utils.data.DataLoader(
        Files(root, labels), batch_sampler=list(draws(labels, steps + 2)), num_workers=2
    )
    times = []
    for x, y in loader:
        loss = plain_loss(x, W, C, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        float(loss.detach())
        times.append(time.perf_counter())
    return mean_step(times)


def time_steps(root: Path, classes: int) -> list[Figure]:
    """Time the step from memory and from the store, beside the bound and the straightforward loop."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((classes * PER, DIM), np.float32).astype(np.float16)
    labels = np.repeat(np.arange(classes), PER)
    write_ours(root / "s.zarr", rows, *describe(len(rows)))
    (root / "npy").mkdir()
    for i, row in enumerate(rows):
        np.save(root / "npy" / f"{i}.npy", row)
    os.sync()
    check_loss(rows, classes)
    reader = open_store(root / "s.zarr").reader
    memory, store = ArraySource(rows, labels), Stored(reader, labels)
    ours, theirs = files_below(root / "s.zarr"), files_below(root / "npy")
    bound = products(classes)
    ways: dict[str, Callable[[], float]] = {
        "the five products": bound,
        "from memory": lambda: seconds_a_step(memory),
        "from the store": lambda: seconds_a_step(store),
        "straightforward loop": lambda: plain_loop(root / "npy", labels, lambda: None),
    }
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(way())
    cold: dict[str, list[float]] = {"from the store": [], "straightforward loop": []}
    for _ in range(ROUNDS):
        drop(ours)
        cold["from the store"].append(seconds_a_step(store))
        cold["straightforward loop"].append(plain_loop(root / "npy", labels, lambda: drop(theirs)))
    data = f"{BATCH} rows a step, d = {DIM:,}, rank {RANK}, {classes:,} classes"
    figures = [ratio("from memory over the bound", times["the five products"], times["from memory"],
                     "from memory", f"{data}; limit {MEMORY_LIMIT}"),
               ratio("from the store over from memory", times["from memory"], times["from the store"],
                     "from the store", f"limit {STORE_LIMIT}"),
               ratio("over the straightforward loop, warm", times["straightforward loop"],
                     times["from the store"], "from the store", f"limit {WARM_LIMIT}"),
               ratio("over the straightforward loop, cold", cold["straightforward loop"],
                     cold["from the store"], "from the store", f"limit {COLD_LIMIT}")]  # fmt: skip
    for name, values in times.items():
        role = "note" if name == "the five products" else "control" if "loop" in name else "method"
        rate = BATCH / statistics.median(values)
        figures.append(Figure("samples a second", rate, name, role, unit="rows/s", n=ROUNDS))
    return figures


def ratio(name: str, slow: list[float], fast: list[float], subject: str, note: str) -> Figure:
    """Return the speed of `fast` in units of that of `slow`: the median over rounds of one run."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    span = (min(each), max(each))
    return Figure(name, statistics.median(each), subject, "method", "", "times", span, len(each), note)


def check_loss(rows: np.ndarray, classes: int) -> None:
    x = torch.from_numpy(rows[:BATCH].astype(np.float32))
    W, C = torch.randn(DIM, RANK) / DIM**0.5, torch.randn(classes, RANK)
    y = torch.arange(BATCH) // PER
    ours, plain = float(cosface(x @ W, C, y)), float(plain_loss(x, W, C, y))
    assert abs(ours - plain) < 1e-5 * abs(plain), (ours, plain)


def time_losses() -> list[Figure]:
    """Loss and gradients alone, beside pytorch-metric-learning's."""
    from pytorch_metric_learning.losses import CosFaceLoss

    figures = []
    for classes in (1_000, 10_000, 100_000):
        y = torch.randn(BATCH, RANK, requires_grad=True)
        C = torch.randn(classes, RANK, requires_grad=True)
        labels = torch.arange(BATCH) // PER
        peer = CosFaceLoss(classes, RANK, margin=0.35, scale=64)
        with torch.no_grad():
            peer.W.copy_(C.T)

        def own(y: Any = y, C: Any = C, labels: Any = labels) -> Any:
            return cosface(y, C, labels)

        def theirs(y: Any = y, labels: Any = labels, peer: Any = peer) -> Any:
            return peer(y, labels)

        a, b = float(own().detach()), float(theirs().detach())
        assert abs(a - b) < 1e-4 * abs(b), (a, b)
        times: dict[str, list[float]] = {"own": [], "peer": []}
        for _ in range(ROUNDS + 1):
            for name, way in (("own", own), ("peer", theirs)):
                start = time.perf_counter()
                way().backward()
                times[name].append(time.perf_counter() - start)
                for p in (y, C, peer.W):
                    p.grad = None
        note = f"loss and gradients of {BATCH} rows"
        name = f"over pytorch-metric-learning, {classes:,} classes"
        figures.append(ratio(name, times["peer"][1:], times["own"][1:], "loss", note))
    return figures


def world(n: int, dim: int, per: int, alpha_bar: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw origins (n, dim) of a falling spectrum, and translations (n, per, dim) by exact diffusion."""
    rng = np.random.default_rng(seed)
    e = 1 / np.arange(1, dim + 1)
    e *= dim / e.sum()
    a = alpha_bar * e / (alpha_bar * e + 1 - alpha_bar)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0]
    o = rng.standard_normal((n, 1, dim)) * np.sqrt(e)
    g = a * o + np.sqrt(e * (1 - a**2)) * rng.standard_normal((n, per, dim))
    return (o[:, 0] @ turn).astype(np.float32), (g @ turn).astype(np.float32)


def time_starts(dim: int = 1024, n: int = 4000, per: int = 4, rank: int = 256) -> list[Figure]:
    """Seconds until 99 % of the better run's best validation mAP, from two starts, beside the closed form."""
    o, g = world(n, dim, per, 0.1, 1)
    held, asked = world(1000, dim, 1, 0.1, 2)
    names = np.arange(len(held))
    of = np.arange(len(held))[:300]

    def score(p: Projection) -> float:
        return average_precision(p.queries(asked[of, 0]), of, p.references(held), names).map

    start = time.perf_counter()
    data = PairData(
        dim=dim,
        n_pairs=n * per,
        n_origins=n,
        n_gallery=n,
        stored_eps=float(np.finfo(np.float32).eps),
        pairs_source=lambda: iter([(o, g.reshape(-1, dim), np.repeat(np.arange(n), per))]),
        origins_source=lambda: iter([o]),
        gallery_source=lambda: iter([o]),
    )
    closed = build("gnull", rank=rank, lam=10.0).fit(data).projection()
    closed_seconds = time.perf_counter() - start
    closed_map = score(closed)
    source = ArraySource(np.concatenate([o, g.reshape(-1, dim)]),
                         np.concatenate([np.arange(n), np.repeat(np.arange(n), per)]))  # fmt: skip
    cfg = replace(preset_auto(n, len(source.labels), dim, 120.0, rank=rank), validate_every=20, patience=None,
                  device="cpu")  # fmt: skip

    def course(init: np.ndarray | None, before: float) -> list[tuple[float, float]]:
        """Return (seconds, validation mAP) at every validation, the start first; `before` it were so many."""
        told: list[dict[str, Any]] = []
        result = train(
            replace(cfg, weight_init="random"),
            source,
            validate=lambda s: score(Projection(s.weights, s.weights)),
            observe=told.append,
            init=init,
        )
        return [(before, float(result.start_map or 0.0))] + [(before + t["seconds"], t["map"]) for t in told]

    note = f"{n:,} origins × {per}, d = {dim:,}, rank {rank}, analytic diffusion, ᾱ = 0.1"
    figures = [
        Figure("seconds", closed_seconds, "gnull alone", "method", unit="s", note=note),
        Figure("validation mAP", closed_map, "gnull alone", "method", unit="fraction", n=len(of)),
    ]
    courses = {
        "CosFace, cold": course(None, 0.0),
        "CosFace, warm, from gnull": course(closed.query_map, closed_seconds),
    }
    target = 0.99 * max(value for points in courses.values() for _, value in points)
    for name, points in courses.items():
        first = next((seconds for seconds, value in points if value >= target), None)
        note = (
            f"{target:.4f} was never reached" if first is None else f"gnull's {closed_seconds:.1f} s counted"
        )
        best = max(value for _, value in points)
        if first is not None:
            what = f"seconds to 99 % of the best mAP ({target:.4f})"
            figures.append(Figure(what, first, name, "method", unit="s", note=note if "warm" in name else ""))
        for what, value in (("start", points[0][1]), ("best", best)):
            told = note if first is None and what == "best" else ""
            figures.append(
                Figure(f"validation mAP, {what}", value, name, "method", unit="fraction", note=told)
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        figures = time_steps(Path(name), args.classes)
    figures += time_losses()
    figures += time_starts()
    for f in figures:
        print(f"{f.subject:<24} {f.name:<44} {f.value:.5g} {f.unit} {f.interval or ''}")
    Report(
        kind="benchmark",
        title="CosFace: the step beside its products, its peers, and its starts",
        summary=[figures[0].note],
        data={"classes": args.classes, "rows a class": PER, "latents": "synthetic"},
        figures=figures,
        reproduce=["python -m benchmarks.cosface"],
        **results.stamp(),
    ).write(args.out)


if __name__ == "__main__":
    main()
