"""Claims: encoding runs at the speed of the model, or of model and decoder where they share the cores.

a. SD2's VAE (its architecture; random weights, nothing is downloaded): end to end over the VAE alone.
b. The built-in encoder: end to end over enc/(enc + decode), the bound when both take turns on the cores.
c. Four common pipelines with the same encoders on the same files; times of theirs over ours.
d. ``verify`` over reading the same bytes in order, both with a cold cache.
e. What looking at a finished shard costs a resume.
f. What ``plan`` predicted over what the run took.

Every pipeline's latents are compared with ours before anything is timed; cases take turns within a round.

    python -m benchmarks.encode_speed [--images FOLDER] [--only abcdef] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import pictures
from benchmarks.encode_peers import PEERS
from benchmarks.store_io import describe as describe_rows
from benchmarks.store_io import drop, files_below, rows_of, write_ours
from latentstore import results
from latentstore.create import create
from latentstore.encode import Source, encode
from latentstore.encoders import Encoder, load_encoder
from latentstore.manifest import input_table, manifest_table
from latentstore.plan import plan
from latentstore.results import Figure, Report
from latentstore.schema import OK, Layout, Space, StoreSpec
from latentstore.shards import ShardWriter
from latentstore.store import open_store
from latentstore.verify import verify

OUT = Path(__file__).parent / "results" / "encode_speed.json"
N_PICTURES, N_VAE, N_SHARDS, N_ROWS = 672, 24, 2000, 36_288
Cases = dict[str, Callable[[], Any]]


class Bench:
    """Collects figures, prints them as they come, and holds the working folder."""

    def __init__(self, work: Path, rounds: int) -> None:
        self.work, self.rounds, self.repeats = work, rounds, rounds
        self.figures: list[Figure] = []
        self._names = 0

    def fresh(self, suffix: str = "") -> Path:
        """Return a path that does not exist yet."""
        self._names += 1
        return self.work / f"{self._names:04d}{suffix}"

    def add(self, name: str, value: float, subject: str = "", *, unit: str = "ratio", note: str = "") -> None:
        """Keep and print one figure."""
        self.figures.append(Figure(name, value, subject, unit=unit, n=self.repeats, note=note))
        print(f"{name:<46} {subject:<24} {value:10.4g} {unit:<9} {note}", flush=True)

    def timed(
        self, cases: Cases, *, before: Callable[[], None] = lambda: None, rounds: int | None = None
    ) -> dict[str, float]:
        """Return each case's median seconds; the order turns from round to round."""
        self.repeats = rounds or self.rounds
        times: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        for turn in range(self.repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                before()
                began = time.perf_counter()
                cases[name]()
                times[name].append(time.perf_counter() - began)
        return {name: statistics.median(values) for name, values in times.items()}


def save_sd2(folder: Path) -> Path:
    """Save a VAE of SD2's architecture with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
    ).save_pretrained(folder)
    return folder


def decoded(files: Sequence[Path], encoder: Encoder) -> list[npt.NDArray[np.uint8]]:
    """Return the files as the encoder's batches, in memory."""
    source, size = Source(files[0].parent), encoder.space.image_size
    loaded = [source.load({"path": path.name}, size).rgb for path in files]
    return [np.stack(loaded[at : at + encoder.batch]) for at in range(0, len(files), encoder.batch)]


def encode_all(encoder: Encoder, batches: list[npt.NDArray[np.uint8]]) -> None:
    for batch in batches:
        encoder.encode(batch, np.full(len(batch), -1))


def decode_all(files: Sequence[Path], size: int) -> None:
    source = Source(files[0].parent)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda path: source.load({"path": path.name}, size), files):
            pass


def pipelines(bench: Bench, folder: Path, encoder: Encoder) -> Cases:
    """Return ours and the peers', after checking that they all give the same latents.

    Both round the same float32 numbers to float16, which differ by their batch in the last bits: they may
    fall on neighbouring float16 numbers, at most eps of the largest number of a row apart.
    """
    files = sorted(folder.iterdir())
    root = bench.fresh(".zarr")
    encode(Source(folder), root, encoder)
    ours = open_store(root).reader.read(0, len(files)).astype(np.float32)
    largest = np.abs(ours).max(axis=1, keepdims=True)
    eps = float(np.finfo(np.float16).eps)
    cases: Cases = {"ours": lambda: encode(Source(folder), bench.fresh(".zarr"), encoder)}
    for name, peer in PEERS.items():
        theirs = peer(files, encoder, bench.fresh()).astype(np.float32)
        worst = float((np.abs(theirs - ours) / largest).max())
        assert worst <= eps, (name, worst)
        cases[name] = lambda peer=peer: peer(files, encoder, bench.fresh())
    return cases


def compare(bench: Bench, what: str, times: dict[str, float], n: int) -> None:
    for name, seconds in times.items():
        bench.add(f"{what}: images a second", n / seconds, name, unit="images/s")
    for name in PEERS:
        bench.add(f"{what}: time over ours", times[name] / times["ours"], name, unit="times ours")


def sd2(bench: Bench, photos: Path, n: int) -> None:
    """Take cases a and c: the network decides; nothing that we do around it may be seen."""
    encoder = load_encoder(str(save_sd2(bench.fresh())), device="cpu")
    # Full batches, so that both sides encode the same number of pictures.
    n = encoder.batch * math.ceil(n / encoder.batch)
    folder = bench.fresh()
    folder.mkdir()
    for path in sorted(photos.iterdir())[:n]:
        shutil.copy(path, folder)
    files = sorted(folder.iterdir())
    cases = pipelines(bench, folder, encoder)
    batches = decoded(files, encoder)
    # The peers once: each takes as long as the network does.
    compare(bench, "SD2's VAE", bench.timed(cases, rounds=1), len(files))
    alone: Cases = {"the VAE alone": lambda: encode_all(encoder, batches)}
    times = bench.timed({"ours": cases["ours"]} | alone, rounds=min(3, bench.rounds))
    bench.add(
        "SD2's VAE: end to end over the VAE alone", times["the VAE alone"] / times["ours"], note="floor 0.95"
    )


def small(bench: Bench, photos: Path) -> None:
    """Take cases b and c: reading and decoding weigh as much as the encoder."""
    encoder = load_encoder("patch")
    files = sorted(photos.iterdir())
    cases = pipelines(bench, photos, encoder)
    batches = decoded(files, encoder)
    parts: Cases = {
        "encoding alone": lambda: encode_all(encoder, batches),
        "decoding alone": lambda: decode_all(files, encoder.space.image_size),
    }
    times = bench.timed(cases | parts)
    compare(bench, "patch", times, len(files))
    bound = times["encoding alone"] + times["decoding alone"]
    bench.add("patch: end to end over enc/(enc + decode)", bound / times["ours"], note="floor 0.9")


def checking(bench: Bench, n: int) -> None:
    """Take case d."""
    root, data = bench.fresh(".zarr"), rows_of(n)
    write_ours(root, data, *describe_rows(n))
    store = open_store(root)
    assert not verify(store).damages
    buffer = np.empty_like(data)
    everything = files_below(root)
    times = bench.timed(
        {"verify": lambda: verify(store), "read": lambda: store.reader.read(0, n, buffer)},
        before=lambda: drop(everything),
    )
    assert np.array_equal(buffer, data)
    bench.add("verify: its speed over a cold read", times["read"] / times["verify"], note="floor 0.7")
    bench.add("verify: bytes a second", data.nbytes / times["verify"], unit="bytes/s")


def many_shards(root: Path, n: int) -> None:
    """Make a store of n committed shards of 84 tiny rows."""
    space, layout = Space("benchmark", "0", 8, (8, 1, 1)), Layout.plan(84 * n, 8, shard_rows=84)
    inputs = input_table({"path": f"{i:08d}.png"} for i in range(84 * n))
    create(root, StoreSpec("images", space, layout), inputs)
    rows = inputs.slice(0, 84).drop_columns(["path_raw"]).to_pylist()
    latents, status = np.ones((84, 8), np.float16), np.full(84, OK, np.uint8)
    for shard in range(n):
        named = [{**row, "row": 84 * shard + i, "status": "ok"} for i, row in enumerate(rows)]
        with ShardWriter(root, layout, shard, space.id) as writer:
            writer.append(latents, status)
            writer.commit(manifest_table(named))


def resume(bench: Bench, n: int) -> None:
    """Take case e."""
    root = bench.fresh(".zarr")
    many_shards(root, n)
    store = open_store(root)
    assert store.todo() == []
    (root / "done" / f"{n // 2:06d}.json").rename(root / "hidden.json")
    assert store.todo() == [n // 2]
    (root / "hidden.json").rename(root / "done" / f"{n // 2:06d}.json")
    seconds = bench.timed({"todo": store.todo})["todo"]
    bench.add("resume: checking a finished shard", 1e6 * seconds / n, unit="µs", note="at most 50")


def predicted(bench: Bench, photos: Path) -> None:
    """Take case f."""
    encoder = load_encoder("patch")
    ratios = []
    for _ in range(bench.rounds):
        root = bench.fresh(".zarr")
        found = plan(Source(photos), root, encoder, sample=64)
        assert found.hours is not None
        ratios.append(3600 * found.hours / encode(Source(photos), root, encoder).seconds["total"])
    bench.add("plan: predicted over taken time", statistics.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of image files; made when left out")
    parser.add_argument("--n", type=int, default=N_PICTURES, help="pictures to make")
    parser.add_argument("--vae-images", type=int, default=N_VAE)
    parser.add_argument("--shards", type=int, default=N_SHARDS)
    parser.add_argument("--rows", type=int, default=N_ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="abdef", help="cases; c comes with a and b")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.rounds)
        photos = args.images or bench.fresh()
        if args.images is None:
            pictures.write(photos, args.n)
        cases: Cases = {
            "a": lambda: sd2(bench, photos, args.vae_images),
            "b": lambda: small(bench, photos),
            "d": lambda: checking(bench, args.rows),
            "e": lambda: resume(bench, args.shards),
            "f": lambda: predicted(bench, photos),
        }
        for letter, case in cases.items():
            if letter in args.only:
                case()
        sizes = [p.stat().st_size for p in photos.iterdir()]
    claims = [f for f in bench.figures if f.note]
    Report(
        kind="benchmark",
        title="Encoding at the speed of the model",
        summary=[f"{f.name}: {f.value:.3g} {f.unit} ({f.note})" for f in claims],
        data={
            "pictures": len(sizes),
            "mean bytes of a picture": statistics.fmean(sizes),
            "VAE pictures": args.vae_images,
            "verified rows": args.rows,
            "resumed shards": args.shards,
        },
        figures=bench.figures,
        reproduce=["python -m benchmarks.encode_speed"],
        **results.stamp(),
    ).write(args.out)


if __name__ == "__main__":
    main()
