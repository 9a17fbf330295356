"""Claim: ``latentstore --help`` answers quickly, because nothing heavy is imported for it.

Times fresh processes, interleaved: the interpreter alone (the limit), ``--help``, and the import of torch
and diffusers (what a careless import would cost).

    python -m benchmarks.cli_start
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from latentstore import results
from latentstore.results import Figure, Report

REPEATS = 7
OUT = Path(__file__).parent / "results" / "cli_start.json"
CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "latentstore --help": [sys.executable, "-m", "cli.app", "--help"],
    "import torch, diffusers": [sys.executable, "-c", "import torch, diffusers.models"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    shown = subprocess.run(CASES["latentstore --help"], check=True, capture_output=True, text=True).stdout
    assert "encode" in shown
    assert "match" in shown
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(REPEATS):
        for name, command in CASES.items():
            times[name].append(seconds(command))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["latentstore --help"] / median["python -c pass"]
    saved = median["import torch, diffusers"] / median["latentstore --help"]
    figures = [
        Figure(
            "seconds", value, name, "note", unit="s", n=REPEATS, interval=(min(times[name]), max(times[name]))
        )
        for name, value in median.items()
    ]
    figures += [
        Figure("--help over the bare interpreter", ratio, unit="ratio", n=REPEATS),
        Figure("import of torch and diffusers over --help", saved, unit="ratio", n=REPEATS),
    ]
    report = Report(
        kind="benchmark",
        title="How quickly the command line answers",
        summary=[f"{ratio:.1f} times the bare interpreter; torch and diffusers take {saved:.1f} times it."],
        data={"repeats": REPEATS, "interval": "smallest and largest of the repeats"},
        figures=figures,
        reproduce=["python -m benchmarks.cli_start"],
        **results.stamp(),
    )
    report.write(OUT)
    print("\n".join(report.summary))


if __name__ == "__main__":
    main()
