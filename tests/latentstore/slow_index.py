"""Run by tests in another process: index slowly, so that it can be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from latentstore import indexing
from latentstore.schema import OK
from latentstore.store import open_store

PIECE = 64


def project(latents):
    """Two different numbers for each of a latent's, and one that is large."""
    x = latents.astype(np.float32)
    return np.concatenate([x[:, ::2] * 3, x[:, 1::2] - 1, 100 + x[:, :1]], axis=1)


def slowly(latents):
    time.sleep(0.05)
    return project(latents)


def main():
    root, folder = map(Path, sys.argv[1:])
    indexing.BLOCK = indexing.PIECE = PIECE
    store = open_store(root)
    rows = np.flatnonzero(store.status() == OK)
    indexing.update(store, folder, slowly, rows, fingerprint="f" * 16)


if __name__ == "__main__":
    main()
