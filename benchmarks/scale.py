"""Claims: twice the images take twice the time, and four times the images no more memory.

``latentstore encode`` of n, 2n and 4n small JPEGs with the built-in encoder, each in a process of its own,
alone and driving two local workers. The pictures are few, the paths are many:
hard links, which decode like any file.

    python -m benchmarks.scale [--images 3000] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentstore import results
from latentstore.results import Figure, Report

SIZE, SHARD_ROWS, ROUNDS, DISTINCT = 64, 672, 3, 16
TIME_LIMIT, MEMORY_LIMIT = 2.1, 1.1
OUT = Path(__file__).parent / "results" / "scale.json"
WAYS: dict[str, int | None] = {"one process": None, "two workers": 2}


def make_folder(folder: Path, n: int) -> None:
    """Write n paths of 16 different JPEGs, a thousand a folder."""
    originals = folder.parent / "originals"
    originals.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(DISTINCT):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(originals / f"{i}.jpg", quality=90)
    for i in range(n):
        place = folder / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(originals / f"{i % DISTINCT}.jpg")


def encode_one(folder: Path, store: Path, workers: int | None) -> dict[str, Any]:
    """Run the command in this process and say what it took; Linux gives kilobytes."""
    from cli.app import main as latentstore

    options = ["--encoder", "patch", "--image-size", str(SIZE), "--shard-rows", str(SHARD_ROWS), "--json"]
    options += [] if workers is None else ["--workers", str(workers)]
    sys.argv = ["latentstore", "encode", str(folder), "--store", str(store), *options]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        latentstore()
    summary = json.loads(printed.getvalue())
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "rows": summary["rows"],
        "ok": summary["counts"].get("ok", 0),
        "seconds": summary["seconds"]["total"],
        "cpu": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak": own.ru_maxrss * 1024,
        "largest worker": children.ru_maxrss * 1024,
    }


def in_child(folder: Path, store: Path, workers: int | None) -> dict[str, Any]:
    """Measure in a process of its own: a peak is a process', and does not go down again."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", str(folder), str(store)]
    command += [] if workers is None else ["--workers", str(workers)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(out.splitlines()[-1])
    return measured


def measure(work: Path, n: int, rounds: int) -> list[Figure]:
    folders = {times: work / f"images-{times}n" for times in (1, 2, 4)}
    for times, folder in folders.items():
        make_folder(folder, times * n)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for turn in range(rounds):
        for way, workers in WAYS.items():
            for times, folder in folders.items():
                if times == 4 and turn:
                    continue  # its peak alone counts, and hardly varies
                measured = in_child(folder, work / f"{way}-{times}-{turn}.zarr", workers)
                assert measured["rows"] == measured["ok"] == times * n, measured
                runs.setdefault((way, times), []).append(measured)
                print(f"{way}, {times * n:,} images: {measured}", flush=True)
    figures = []
    for way, workers in WAYS.items():

        def of(what: str, times: int, way: str = way) -> float:
            return statistics.median(run[what] for run in runs[way, times])

        figures += [
            Figure("seconds", of("seconds", t), way, group=f"{t * n} images", unit="s", n=rounds)
            for t in (1, 2, 4)
        ]
        figures += [
            Figure("time, 2n over n", of("seconds", 2) / of("seconds", 1), way, unit="ratio", n=rounds,
                   note=f"at most {TIME_LIMIT:g}"),
            Figure("peak memory", of("peak", 1), way, group=f"{n} images", unit="bytes", n=rounds),
            Figure("peak memory, 4n over n", of("peak", 4) / of("peak", 1), way, unit="ratio", n=rounds,
                   note=f"at most {MEMORY_LIMIT:g}"),
            Figure("peak memory of one more image", (of("peak", 4) - of("peak", 1)) / (3 * n), way,
                   unit="bytes", n=rounds),
        ]  # fmt: skip
        if workers is not None:
            ratio = of("largest worker", 4) / of("largest worker", 1)
            figures.append(Figure("peak memory of the largest worker, 4n over n", ratio, way, unit="ratio"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=3000, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", type=Path, nargs=2, metavar=("FOLDER", "STORE"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(encode_one(*args.one, args.workers)))
        return
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), args.images, args.rounds)
    ratios = [f for f in figures if f.unit == "ratio"]
    for figure in ratios:
        print(f"{figure.name:<46} {figure.subject:<12} {figure.value:6.3f}   {figure.note}")
    Report(
        kind="benchmark",
        title="Encoding more images",
        summary=[f"{f.name}, {f.subject}: {f.value:.2f}" for f in ratios],
        data={"n": args.images, "image size": SIZE, "shard rows": SHARD_ROWS, "distinct pictures": DISTINCT},
        figures=figures,
        reproduce=["python -m benchmarks.scale"],
        **results.stamp(),
    ).write(args.out)


if __name__ == "__main__":
    main()
