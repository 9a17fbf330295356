"""The memory that a training run holds, counted before it starts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import SolverMemoryError
from .heads import build_head
from .losses import BLOCK_BYTES

if TYPE_CHECKING:
    from .sgd import CosFace

_FLOAT = 4
_EMBEDDED, _EMBEDDED_BYTES = 2048, 128 << 20
"""Rows that a snapshot embeds at a time: so many, or fewer where the head would hold more bytes for them."""


def bytes_needed(cfg: CosFace, n_classes: int, dim: int) -> int:
    """Return the bytes that a run holds at its fullest on the device, beside the latents themselves.

    The head and the class weights, each with a gradient and Adam's two moments; the average, the best and the
    present snapshot of the head; the loss's normalised class weights with their gradient; two batches of
    rows; of one of its parts (`accumulate`) what the head holds for its gradient, or of the rows that are
    embedded at once where that is more; and the logits of one block.
    """
    head, row_bytes = dim * cfg.rank, 0
    if cfg.head != "linear":
        built = build_head(
            cfg.head, dim, cfg.rank, latent_shape=cfg.latent_shape, layers=cfg.layers, seed=cfg.seed
        )
        head, row_bytes = built.parameter_count, built.row_bytes
    rows = min(cfg.batch_identities, n_classes) * cfg.per_identity
    part = math.ceil(rows / cfg.accumulate)
    activations = max(part, rows_embedded(row_bytes)) * row_bytes
    logits = min(2 * part * n_classes * _FLOAT, BLOCK_BYTES)
    numbers = 7 * head + 7 * n_classes * cfg.rank + rows * (3 * dim + 4 * cfg.rank)
    return _FLOAT * numbers + activations + logits


def rows_embedded(row_bytes: int) -> int:
    """Return how many rows are embedded at a time, by a head that holds so many bytes a row."""
    return max(1, min(_EMBEDDED, _EMBEDDED_BYTES // max(row_bytes, 1)))


def check_memory(cfg: CosFace, n_classes: int, dim: int, *, device: str, free: int | None) -> None:
    """Refuse a run that does not fit.

    Parameters
    ----------
    free
        Bytes that may be used; None asks the device, or the system.

    Raises
    ------
    SolverMemoryError
        With both figures.
    """
    needed = bytes_needed(cfg, n_classes, dim)
    free = free_bytes(device) if free is None else free
    if needed > free:
        raise SolverMemoryError(
            f"Training rank {cfg.rank} among {n_classes} identities holds {needed / 1e9:.2f} GB on {device} "
            f"(weights, gradients, Adam's moments and a batch), and {free / 1e9:.2f} GB are free. Take a "
            f"batch in more parts than {cfg.accumulate} (accumulate), a smaller rank or batch, fewer "
            "identities, or a closed form (svd, gnull, analytic), which needs no class weights."
        )


def free_bytes(device: str) -> int:
    """Return the bytes that are free on a torch device, or on this machine."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
