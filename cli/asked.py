"""What is asked for: query pictures and latents, found on disk and encoded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from latentstore import encoders, images
from latentstore.errors import ImageError, UsageError
from latentstore.features import SUFFIX
from latentstore.manifest import files_below, list_folder


def encode_files(
    files: list[Path], encoder: encoders.Encoder
) -> tuple[list[str], Any, list[tuple[str, str]]]:
    """Encode pictures that are in no store.

    Returns
    -------
    names, latents, unreadable
        ``latents`` is (n, dim) float32; ``unreadable`` holds (name, why).
    """
    names: list[str] = []
    blocks: list[Any] = []
    unreadable: list[tuple[str, str]] = []
    size = encoder.space.image_size
    for at in range(0, len(files), encoder.batch):
        pixels = encoders.blank_batch(encoder)
        read: list[str] = []
        for path in files[at : at + encoder.batch]:
            try:
                pixels[len(read)] = images.load(path, size).rgb
                read.append(str(path))
            except ImageError as exc:
                unreadable.append((str(path), f"{exc.status}: {exc.reason}"))
        latents = encoder.encode(pixels, np.full(encoder.batch, -1))[: len(read)]
        finite = [bool(np.isfinite(row).all()) for row in latents]
        unreadable += [
            (n, "not_finite: its latent is not finite") for n, f in zip(read, finite, strict=True) if not f
        ]
        names += [n for n, f in zip(read, finite, strict=True) if f]
        blocks.append(latents[np.array(finite, bool)])
    return (
        names,
        np.concatenate(blocks) if blocks else np.empty((0, encoder.space.dim), np.float32),
        unreadable,
    )


def query_files(queries: list[Path], imported: bool) -> list[Path]:
    """Return the files, and those below the folders: of imported latents ``.npy`` files before pictures."""
    files: list[Path] = []
    for query in queries:
        latents = sorted(files_below(query, {SUFFIX})) if imported and query.is_dir() else []
        if latents:
            files += [query / os.fsdecode(name) for name in latents]
        elif query.is_dir():
            for row in list_folder(query).select(["path", "path_raw"]).to_pylist():
                raw = row["path_raw"]
                files.append(query / (row["path"] if raw is None else os.fsdecode(raw)))
        elif query.exists():
            files.append(query)
        else:
            raise UsageError(f"There is no query image {query} (looked in {Path.cwd()}).")
    return files
