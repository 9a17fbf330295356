"""Where the latents of a training run lie: in GPU memory, in host memory, or in the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli import kept
from cli.collection import BLOCK, Collection, Rows
from cli.render import size
from latentstore.errors import UsageError
from solvers.sgd import ArraySource, LabelledRows

PLACES = ("gpu", "host", "store")
"""Fastest first."""
_SHARE = 0.8
"""Of the free memory that may be taken: the rest is for batches, validation and other programs."""


@dataclass(frozen=True)
class Free:
    """Bytes that can be taken; ``gpu`` is None where training does not run on one."""

    host: int
    gpu: int | None = None


@dataclass(frozen=True)
class Placement:
    """A choice, with the words for it."""

    place: str
    sentence: str


@dataclass(frozen=True, eq=False)
class StoreRows:
    """Rows that stay in the store: each batch is gathered, in the order of the disk.

    Attributes
    ----------
    collection : Collection
    rows : (n,) array
    labels : (n,) array of int
    """

    collection: Collection
    rows: Rows
    labels: npt.NDArray[np.int64]

    @property
    def dim(self) -> int:
        """Length of a row."""
        return self.collection.store.layout.dim

    def gather(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.floating[Any]]:
        """Return the rows at ``indices``, in the order asked and the stored dtype."""
        return self.collection.read(self.rows[indices])


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Rows held in one torch tensor, on any device, in the stored dtype.

    Attributes
    ----------
    rows : (n, d) tensor
    labels : (n,) array of int
    """

    rows: Any
    labels: npt.NDArray[np.int64]

    @property
    def dim(self) -> int:
        """Length of a row."""
        return int(self.rows.shape[1])

    def gather(self, indices: npt.NDArray[np.int64]) -> Any:
        """Return the rows at ``indices`` as a tensor on the same device."""
        import torch

        return self.rows[torch.as_tensor(indices, device=self.rows.device)]


def free(device: str, processes: int = 1) -> Free:
    """Return what this process may take; host memory is shared evenly by the processes of a machine.

    Parameters
    ----------
    device : str
        Where training runs: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    """
    host = min(kept.free_memory(), *_cgroup_room()) // processes
    if not device.startswith("cuda"):
        return Free(host)
    import torch

    return Free(host, torch.cuda.mem_get_info(torch.device(device))[0])


def choose(needed: int, room: Free, *, asked: str | None = None, beside: int = 0) -> Placement:
    """Choose by counting bytes.

    Parameters
    ----------
    needed : int
        Bytes of the latents in the stored dtype.
    room : Free
    asked : {"gpu", "host", "store"}, optional
        Taken if it fits.
    beside : int
        Bytes that training takes where it runs: class weights, moments, a batch.

    Raises
    ------
    UsageError
        What was asked for does not fit, or there is no GPU.
    """
    on_gpu = room.gpu is not None
    left = {"gpu": 0 if room.gpu is None else room.gpu - beside, "host": room.host - beside * (not on_gpu)}
    fits = {place: needed <= _SHARE * left[place] for place in left} | {"store": True}
    if asked == "gpu" and not on_gpu:
        raise UsageError(
            "--latents is gpu, and training runs on the CPU. Leave it out, or name a GPU with --device cuda."
        )
    if asked is not None and not fits[asked]:
        raise UsageError(
            f"--latents is {asked}: the latents take {size(needed)} there, and {size(left[asked])} are free "
            f"beside what training needs (of which {_SHARE:.0%} may be taken). Leave it out, and the fastest "
            "place that they fit is chosen."
        )
    place = asked or next(p for p in PLACES if fits[p] and (p != "gpu" or on_gpu))
    return Placement(place, _sentence(place, needed, room, left, named=asked is not None))


def labelled(
    collection: Collection, rows: Rows, labels: npt.NDArray[np.int64], place: str, device: str
) -> LabelledRows:
    """Return the rows of a store with their labels, at a place."""
    if place == "store":
        return StoreRows(collection, rows, labels)
    if place == "host":
        return ArraySource(collection.read(rows), labels)
    return on_device(collection.blocks(rows), len(rows), labels, device)


def on_device(
    blocks: Iterator[npt.NDArray[Any]], n: int, labels: npt.NDArray[np.int64], device: str
) -> TensorRows:
    """Copy blocks of rows, ``n`` in all, into one tensor: never more of them than a block is on the host."""
    import torch

    held, at = None, 0
    for block in blocks:
        part = torch.from_numpy(block)
        if held is None:
            held = torch.empty((n, block.shape[1]), dtype=part.dtype, device=device)
        held[at : at + len(block)] = part
        at += len(block)
    return TensorRows(held, labels)


def host_blocks(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield rows that are in memory block by block."""
    yield from (rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK))


def _sentence(place: str, needed: int, room: Free, left: dict[str, int], *, named: bool) -> str:
    why = ", as asked" if named else ""
    if place == "store":
        short = "" if named else f": {size(max(0, left['host']))} of host memory are free for them"
        return f"Latents: {size(needed)}, read from the store batch by batch{why}{short}."
    name, have = ("GPU", room.gpu or 0) if place == "gpu" else ("host", room.host)
    return f"Latents: {size(needed)} in {name} memory (of {size(have)} free){why}."


def _cgroup_room(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return what each limit on this process' groups leaves (version 2, then 1); nothing where none is read.

    Cached pages of files count as used there and can be taken back, so they are given back here.
    """
    found = []
    for own in _groups(proc, root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            with suppress(OSError, ValueError):
                room = int((own / limit).read_text()) - int((own / used).read_text())
                lines = (own / "memory.stat").read_text().splitlines()
                found.append(room + sum(int(line.split()[1]) for line in lines if line.startswith(cached)))
    return found


def _groups(proc: Path, root: Path) -> list[Path]:
    """Return the folders of this process' memory groups and of all above them."""
    folders: dict[Path, None] = {}
    with suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory") or "memory" in controllers.split(","):
                top = root / "memory" if controllers else root
                own = top / name.lstrip("/")
                folders |= dict.fromkeys(p for p in (own, *own.parents) if p == top or top in p.parents)
    return list(folders)


def local_processes() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
