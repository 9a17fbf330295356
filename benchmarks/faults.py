"""Claims: whatever is killed, filled or poisoned, a rerun ends in the store that an undisturbed run makes.

Real processes, real signals, a real full disk. Each proof is a function of a working folder and a size, and
returns how many faults it made and how many came out as claimed. ``python -m benchmarks.faults`` runs them at
full size; the tests run the same functions scaled down.

    python -m benchmarks.faults [--only NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import flips
from benchmarks.faulty import POISON, RECIPE, SHARD_ROWS, Faulty
from latentstore import results
from latentstore.cluster import connect, on_cluster
from latentstore.encode import EncodeSummary, encode
from latentstore.encoders import load_encoder
from latentstore.results import Figure, Report
from latentstore.schema import STATUS_CODE
from latentstore.sources import Source
from latentstore.store import open_store

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).parent / "results" / "faults.json"
LIMIT = 300.0
"""Seconds after which a process that should have ended is taken for hung."""
OF_A_RUN = ("done/lock", "done/seal.json", "latents/zarr.json")
"""Files that name the process, the date, or the checksum of the date: they differ between any two runs."""


@dataclass
class Proof:
    """What a proof found: ``found`` of ``expected`` faults came out as claimed; ``cases`` says each."""

    name: str
    claim: str
    expected: int
    found: int = 0
    cases: list[dict[str, Any]] = field(default_factory=list)

    def case(self, holds: bool, **facts: Any) -> None:
        """Count one fault."""
        self.found += holds
        self.cases.append({"holds": holds, **facts})

    @property
    def holds(self) -> bool:
        """Tell whether all faults came out as claimed."""
        return self.found == self.expected


# --- the world ---------------------------------------------------------------------------------------


def photos(folder: Path, n: int, *, first: int = 0) -> Path:
    """Add n seeded pictures to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:06d}.png", compress_level=1)
    return folder


def undisturbed(folder: Path, root: Path, **options: Any) -> EncodeSummary:
    return encode(Source(folder), root, load_encoder(**RECIPE), shard_rows=SHARD_ROWS, **options)


def contents(root: Path) -> dict[str, bytes]:
    """Return every file that may not depend on when or how a store was made."""
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name not in OF_A_RUN}


def same(root: Path, reference: Path) -> bool:
    """Tell whether two stores are equal byte for byte, each row is there once, in order, no partial left."""
    ours = contents(root)
    rows = open_store(root).manifest(["row"])["row"].to_pylist()
    return ours == contents(reference) and rows == list(range(len(open_store(root)))) and not partials(root)


def partials(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*.partial")]


def state(root: Path) -> dict[str, int]:
    """Return what a kill left: records of finished shards, and partial files."""
    return {"records": len(list((root / "done").glob("[0-9]*.json"))), "partials": len(partials(root))}


def start(folder: Path, root: Path, *options: Any) -> subprocess.Popen[str]:
    """Start encoding in another process."""
    command = [sys.executable, "-c", "import sys; from benchmarks.faulty import main; sys.exit(main())"]
    return subprocess.Popen(
        [*command, str(folder), str(root), *map(str, options)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit code and what it said on standard error."""
    try:
        _, said = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, said


def run(folder: Path, root: Path, *options: Any) -> tuple[int, str]:
    return finish(start(folder, root, *options))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is so, or the process has ended."""
    deadline = time.monotonic() + LIMIT
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.001)


def writes(root: Path, process: subprocess.Popen[str]) -> bool:
    """Tell whether this process, rather than one before it, holds the writer's lock."""
    try:
        return (root / "done" / "lock").read_text() == f"{process.pid}\n"
    except OSError:
        return False


# --- the proofs --------------------------------------------------------------------------------------


def job_killed(work: Path, kills: int) -> Proof:
    """Kill -9 the job at random points; a kill counts when a record and a partial were on the disk."""
    proof = Proof("job killed", "kill -9 of the job, then resume: the same bytes", kills)
    rng, shards = random.Random(kills), 8 + kills // 2  # noqa: S311
    folder = photos(work / "in", shards * SHARD_ROWS)
    undisturbed(folder, work / "reference.zarr")
    counted: list[dict[str, int]] = []
    stores = 0
    while len(counted) < kills:
        stores += 1
        root = work / f"killed-{stores}.zarr"
        at_kill: list[dict[str, int]] = []
        while len(counted) + len(at_kill) < kills:
            process = start(folder, root, "--pause", 0.002)
            wait_for(lambda root=root, process=process: writes(root, process), process)
            goal = state(root)["records"] + rng.randrange(3)
            wait_for(lambda root=root, goal=goal: state(root)["records"] >= goal, process)
            time.sleep(rng.uniform(0.0, 0.2))
            process.send_signal(signal.SIGKILL)
            if finish(process)[0] != -signal.SIGKILL:
                break  # it was done before
            found = state(root)
            if found["records"] and found["partials"]:
                at_kill.append(found)
        code, said = run(folder, root)
        holds = code == 0 and same(root, work / "reference.zarr")
        counted += at_kill
        for kill in at_kill:
            proof.case(holds, shards=shards, **kill)
        if code:
            raise AssertionError(said)
    return proof


def workers_killed(work: Path, kills: int) -> Proof:
    """Kill -9 single workers of a local cluster while they encode."""
    proof = Proof("workers killed", "kill -9 of single workers: the same bytes, no row counted twice", kills)
    rng, shards = random.Random(kills), 10 + 2 * kills  # noqa: S311
    folder = photos(work / "in", shards * SHARD_ROWS)
    undisturbed(folder, work / "reference.zarr")
    with connect(workers=2) as client:
        while len(proof.cases) < kills:
            root = work / f"{len(proof.cases)}.zarr"
            killed, told = encode_and_kill(client, folder, root, kills - len(proof.cases), rng)
            whole = same(root, work / "reference.zarr") and told == shards * SHARD_ROWS
            for kill in killed:
                proof.case(whole, **kill)
    return proof


def encode_and_kill(
    client: Any, folder: Path, root: Path, kills: int, rng: random.Random
) -> tuple[list[dict[str, int]], int]:
    """Encode, killing workers now and then; return the states at the kills, and how many rows were told."""
    killed: list[dict[str, int]] = []
    told, goal = 0, rng.randrange(4) * SHARD_ROWS

    def on_rows(rows: int, bad: int) -> None:
        nonlocal told, goal
        told += rows
        # While a nanny starts its next worker it has none.
        pids = [nanny.pid for nanny in client.cluster.workers.values() if nanny.pid]
        if told >= goal and len(killed) < kills and len(pids) == 2:
            os.kill(rng.choice(pids), signal.SIGKILL)
            killed.append({"rows": told, **state(root)})
            goal = told + rng.randrange(4) * SHARD_ROWS

    run_there = on_cluster(client, RECIPE, threads=1)
    source = Faulty(folder, pause=0.002)
    summary = encode(
        source, root, load_encoder(**RECIPE), shard_rows=SHARD_ROWS, run=run_there, on_rows=on_rows
    )
    return killed, told if told == summary.encoded else -1


def files_added(work: Path, rounds: int) -> Proof:
    """Add files between a kill and the rerun: they are appended, as they would be to a finished store."""
    proof = Proof("files added", "files added between kill and rerun: appended behind the others", rounds)
    for number in range(rounds):
        here = work / str(number)
        folder, root = photos(here / "in", 6 * SHARD_ROWS + 17 * number), here / "s.zarr"
        undisturbed(folder, here / "reference.zarr")
        process = start(folder, root, "--pause", 0.002)
        wait_for(lambda root=root: bool(state(root)["records"] and state(root)["partials"]), process)
        process.kill()
        code, _ = finish(process)
        # Between the others by name.
        for i in range(40):
            shutil.copy(folder / f"{i:06d}.png", folder / f"{i:06d} added.png")
        at_kill = state(root)
        finished = run(folder, root)[0] == 0
        undisturbed(folder, here / "reference.zarr")
        proof.case(code == -signal.SIGKILL and finished and same(root, here / "reference.zarr"), **at_kill)
    return proof


def disk_full(work: Path, rounds: int) -> Proof:
    """Fill the disk under a running job; make room; run again."""
    proof = Proof("disk full", "one paragraph, finished shards kept, the rerun goes on", rounds)
    for number in range(rounds):
        here = work / str(number)
        folder = photos(here / "in", 12 * SHARD_ROWS)
        undisturbed(folder, here / "reference.zarr")
        with small_disk(here / "disk", 8 << 20) as disk:
            root = (disk or here) / "s.zarr"
            process = start(folder, root, "--pause", 0.002)
            goal = 2 + number % 6
            wait_for(lambda root=root, goal=goal: state(root)["records"] >= goal, process)
            ballast = root.with_name("ballast")
            if disk is None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            else:
                fill(ballast)
            code, said = finish(process)
            kept = written(root)
            ballast.unlink(missing_ok=True)
            told = code == 1 and said.count("\n") == 1 and "The disk is full" in said
            finished = run(folder, root)[0] == 0
            again = written(root)
            holds = told and finished and all(again[shard] == facts for shard, facts in kept.items())
            how = "file size limit" if disk is None else "tmpfs"
            proof.case(holds and same(root, here / "reference.zarr"), kept=len(kept), by=how)
    return proof


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path | None]:
    """Mount a small file system; yield None where that is not allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        allowed = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        allowed = False
    try:
        yield place if allowed else None
    finally:
        if allowed:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Write a file until the disk is full."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def written(root: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of the finished shards: they change when one is written again."""
    done = [int(path.stem) for path in (root / "done").glob("[0-9]*.json")]
    facts = {str(shard): (root / "latents" / "c" / str(shard) / "0").stat() for shard in done}
    return {shard: (stat.st_ino, stat.st_mtime_ns) for shard, stat in facts.items()}


def poisoned(work: Path, images: int) -> Proof:
    """Encode images that kill the process that decodes them: in process, apart, and on two workers."""
    ways = {"rerun": (), "--isolate": ("--isolate",), "--workers 2": ("--workers", 2)}
    claim = "every other image is encoded to the same bytes; the poisonous ones are rows of status killed"
    proof = Proof("poisonous images", claim, len(ways))
    folder = photos(work / "in", 4 * SHARD_ROWS + 10)
    for i in range(images):
        name = f"{(i * 2 * SHARD_ROWS + 30) % (4 * SHARD_ROWS) + i:06d}.png"
        (folder / name).rename(folder / name.replace(".png", f" {POISON}.png"))
    undisturbed(folder, work / "reference.zarr")
    for way, options in ways.items():
        root, runs, began = work / f"{way.replace(' ', '')}.zarr", 1, time.perf_counter()
        code, said = run(folder, root, *options)
        while code == -signal.SIGKILL and runs <= images:  # each run gets past one shard at least
            runs += 1
            code, said = run(folder, root, *options)
        seconds = round(time.perf_counter() - began, 1)
        holds = code == 0 and only_poison_differs(root, work / "reference.zarr", images)
        proof.case(holds, way=way, images=images, runs=runs, seconds=seconds)
        if code:
            raise AssertionError(said)
    return proof


def only_poison_differs(root: Path, reference: Path, images: int) -> bool:
    ours, theirs = open_store(root), open_store(reference)
    mine, other = ours.manifest().to_pylist(), theirs.manifest().to_pylist()
    bad = np.array([POISON in row["path"] for row in other])
    a, b = ours.reader.read(0, len(ours)), theirs.reader.read(0, len(theirs))
    return (
        int(bad.sum()) == images
        and a[~bad].tobytes() == b[~bad].tobytes()
        and not a[bad].any()
        and ours.status()[bad].tolist() == [STATUS_CODE["killed"]] * images
        and all(m == o for m, o, poison in zip(mine, other, bad, strict=True) if not poison)
        and all(m["sha256"] == o["sha256"] for m, o in zip(mine, other, strict=True))
        and not partials(root)
    )


def two_jobs(work: Path, rounds: int) -> Proof:
    """Start a second job on a store that is being written; kill the first; let the second go on."""
    proof = Proof(
        "two jobs", "one is refused and changes nothing; when the other is killed, it goes on", rounds
    )
    folder = photos(work / "in", 8 * SHARD_ROWS)
    undisturbed(folder, work / "reference.zarr")
    for number in range(rounds):
        root = work / f"{number}.zarr"
        # Both at once, on nothing: whoever comes first.
        pair = [start(folder, root, "--pause", 0.01) for _ in range(2)]
        wait_for(lambda pair=pair: any(p.poll() is not None for p in pair), pair[0])
        loser, winner = sorted(pair, key=lambda p: p.poll() is None)
        refused = finish(loser)
        third = run(folder, root)
        going = winner.poll() is None
        if number % 2:
            winner.kill()
        code, _ = finish(winner)
        ended = code == (-signal.SIGKILL if number % 2 else 0)
        told = all(c == 1 and said.startswith("StoreLockedError: ") for c, said in (refused, third))
        goes_on = run(folder, root)[0] == 0
        holds = told and going and ended and goes_on and same(root, work / "reference.zarr")
        proof.case(holds, winner="killed" if number % 2 else "finished")
    return proof


def bytes_flipped(work: Path, count: int) -> Proof:
    """Flip single bytes all over a store; ``verify`` must name every file that was hit."""
    proof = Proof("flipped bytes", "verify finds each one and says where", count)
    folder = photos(work / "in", min(60, 8 + count // 100) * SHARD_ROWS)
    undisturbed(folder, work / "s.zarr")
    photos(folder, 30, first=90_000)
    undisturbed(folder, work / "s.zarr")  # a second input list
    missed, by_kind = flips.flip(work / "s.zarr", count, seed=count)
    proof.found = count - len(missed)
    proof.cases = [{"kind": kind, "flips": n} for kind, n in by_kind.items()] + missed
    return proof


FULL: dict[Callable[[Path, int], Proof], int] = {
    job_killed: 25,
    workers_killed: 10,
    files_added: 5,
    disk_full: 6,
    poisoned: 4,
    two_jobs: 6,
    bytes_flipped: 10_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[proof.__name__ for proof in FULL])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    figures, details, timings = [], {}, {}
    for prove, size in FULL.items():
        if args.only not in (None, prove.__name__):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            proof = prove(Path(work), size)
        timings[proof.name] = round(time.perf_counter() - began, 1)
        print(f"{proof.name:<18} {proof.found:,} of {proof.expected:,}: {proof.claim}", flush=True)
        figures.append(
            Figure(proof.name, proof.found, "as claimed", unit="faults", n=proof.expected, note=proof.claim)
        )
        details[proof.name] = {"found": proof.found, "expected": proof.expected, "cases": proof.cases}
    Report(
        kind="benchmark",
        title="The store under faults",
        summary=[
            "Faults that came out as claimed, of those that were made; every process and signal is real."
        ],
        data=details,
        figures=figures,
        reproduce=["python -m benchmarks.faults"],
        timings=timings,
        caveats=["`done/lock` and what can be made anew (`projections/`) are not covered by checksums."],
        **results.stamp(),
    ).write(args.out)
    if any(figure.value != figure.n for figure in figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
