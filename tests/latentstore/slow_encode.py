"""Run by tests in another process: encode slowly, so that it can be killed or run out of disk."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from latentstore.encode import Source, encode
from latentstore.encoders import PatchEncoder
from latentstore.errors import LatentStoreError


class Slow(PatchEncoder):
    """The patch encoder, with a pause before each batch and, from a row on, a limit on the size of files."""

    pause = 0.0
    full_from: int | None = None

    def encode(self, images, rows):
        time.sleep(self.pause)
        if self.full_from is not None and rows[0] >= self.full_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return super().encode(images, rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--full-from", type=int)
    parser.add_argument("--file-limit", type=int)
    args = parser.parse_args()
    encoder = Slow(64)
    encoder.pause, encoder.full_from = args.sleep, args.full_from
    if args.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_limit, resource.RLIM_INFINITY))
    try:
        encode(Source(args.folder), args.store, encoder, shard_rows=84, threads=1)
    except LatentStoreError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
