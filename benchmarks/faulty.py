"""The job under test, run in a process of its own that may be killed, and images that kill their decoder."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentstore import images
from latentstore.cluster import connect, on_cluster
from latentstore.encode import encode
from latentstore.encoders import load_encoder
from latentstore.errors import LatentStoreError
from latentstore.sources import Source

RECIPE = {"name": "patch", "image_size": 64}
SHARD_ROWS = 84
POISON = "poison"


@dataclass(frozen=True)
class Faulty(Source):
    """A folder that is slow to read, and whose poisonous images kill the process that decodes them."""

    pause: float = 0.0

    def load(
        self, listed: Mapping[str, Any], size: int, *, max_pixels: int = images.MAX_PIXELS
    ) -> images.Pixels:
        """Load an image slowly, or die of it."""
        time.sleep(self.pause)
        if POISON in str(listed["path"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(listed, size, max_pixels=max_pixels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--isolate", action="store_true")
    args = parser.parse_args(arguments)
    source = Faulty(args.folder, pause=args.pause)
    options: dict[str, Any] = {"shard_rows": SHARD_ROWS, "threads": 1, "isolate": args.isolate}
    try:
        if args.workers is None:
            encode(source, args.store, load_encoder(**RECIPE), **options)
        else:
            with connect(workers=args.workers) as client:
                encode(source, args.store, load_encoder(**RECIPE), run=on_cluster(client, RECIPE), **options)
    except LatentStoreError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return exc.exit_code
    return 0
