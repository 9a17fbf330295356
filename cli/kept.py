"""Where sums over a store's latents are kept, and whether they fit: on the disk, and in memory."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import zarr

from latentstore.errors import StoreWriteError, UsageError
from latentstore.files import check_room
from latentstore.store import LatentStore, open_store

PAIR_MATRICES, PART_MATRICES, MERGE_MATRICES, ROW_MATRICES = 13, 6, 8, 7
"""Of dim x dim that a fit on pairs, a part's sums, a merge of two, or a spectrum of rows holds at once."""
STALE = 3600
"""Seconds after which an unfinished file is nobody's: no part takes so long."""


def folder_of(store: LatentStore) -> Path:
    """Return where the sums over an array's latents are kept."""
    return store.root / "moments" / store.array


def prepare_folder(folder: Path, store: LatentStore, needed: int) -> None:
    """Make the folder of kept sums, clear what killed passes left in it, and refuse what cannot fit.

    Raises
    ------
    StoreWriteError
    """
    check_room(store.root, needed)
    try:
        for group in (store.root / "moments", folder_of(store), folder):
            zarr.open_group(group, mode="a")  # zarr warns of folders that are no groups
    except OSError as exc:
        raise StoreWriteError(
            f"Sums over the latents could not be kept in {folder}: {exc.strerror or exc}. Make room or "
            "permission there."
        ) from exc
    for left in folder.glob(".*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def check_memory(dim: int, matrices: int) -> None:
    """Refuse before any work what would not fit in this machine's free memory.

    Parameters
    ----------
    dim : int
    matrices : int
        Float64 matrices of dim x dim that are held at once.

    Raises
    ------
    UsageError
    """
    needed, free = matrices * 8 * dim**2, free_memory()
    if needed > free:
        raise UsageError(
            f"Covariances of latents of {dim:,} numbers take {needed / 1e9:.1f} GB ({matrices} matrices of "
            f"{dim:,} x {dim:,} in float64), and {free / 1e9:.1f} GB are free. Three ways on: a machine with "
            f"more memory; fewer rows than dimensions in the training split, which are solved in their span; "
            "or --method cosface, which holds no covariance."
        )


def free_memory() -> int:
    """Return the bytes that this process could still take without swapping."""
    with suppress(OSError, ValueError):
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def writable(store: LatentStore) -> bool:
    """Tell whether sums can be kept beside the latents at all."""
    return os.access(store.root, os.W_OK)


def drop(store: LatentStore) -> int:
    """Delete the kept sums of a store's array; return their bytes.

    Raises
    ------
    StoreWriteError
    """
    folder = folder_of(store)
    freed = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return 0
    except OSError as exc:
        raise StoreWriteError(f"{folder} could not be deleted: {exc.strerror or exc}.") from exc
    return freed


def forget(path: Path) -> None:
    """Delete a file that may be gone, or that may not be deleted."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def check_unchanged(store: Path, data_hash: str) -> None:
    """Refuse sums of latents that were changed while they were read.

    Raises
    ------
    UsageError
    """
    if open_store(store).data_hash() != data_hash:
        raise UsageError(
            f"{store} was changed (images added, mended or removed) while its latents were summed. Run the "
            "same command again."
        )
