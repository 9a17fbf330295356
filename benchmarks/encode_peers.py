"""How images are encoded without us: four common pipelines, each with the same encoder on the same files.

They keep latents only: no hashes, no manifest, no statuses, no resume, and no fsync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import torch
import zarr
from PIL import Image

from latentstore.encoders import Encoder

Pictures = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.float16]
WORKERS = 2


def load(path: Path, size: int) -> Pictures:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def encode(encoder: Encoder, pictures: Pictures) -> Latents:
    return encoder.encode(pictures, np.full(len(pictures), -1)).astype(np.float16)


def plain_loop(files: Sequence[Path], encoder: Encoder, out: Path) -> Latents:
    """One image after the other, one ``.npy`` each."""
    out.mkdir()
    for path in files:
        np.save(out / f"{path.stem}.npy", encode(encoder, load(path, encoder.space.image_size)[None])[0])
    return np.stack([np.load(out / f"{path.stem}.npy") for path in files])


class Images(torch.utils.data.Dataset[Pictures]):
    """What a DataLoader reads in its worker processes."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Pictures:
        return load(self.files[i], self.size)


def data_loader(files: Sequence[Path], encoder: Encoder, out: Path) -> Latents:
    """Torch's DataLoader with two worker processes, our batch size, into a memory map."""
    latents = np.memmap(out, np.float16, "w+", shape=(len(files), encoder.space.dim))
    loader = torch.utils.data.DataLoader(
        Images(files, encoder.space.image_size), encoder.batch, num_workers=WORKERS, collate_fn=np.stack
    )
    at = 0
    for pictures in loader:
        latents[at : at + len(pictures)] = encode(encoder, pictures)
        at += len(pictures)
    latents.flush()
    return np.array(latents)


def batches(files: Sequence[Path], encoder: Encoder) -> Iterator[tuple[int, Latents]]:
    """Yield (first row, latents), decoding in two threads ahead of the encoder."""
    with ThreadPoolExecutor(WORKERS) as pool:
        loaded = pool.map(lambda path: load(path, encoder.space.image_size), files)
        for at in range(0, len(files), encoder.batch):
            pictures = [next(loaded) for _ in files[at : at + encoder.batch]]
            yield at, encode(encoder, np.stack(pictures))


def hdf5(files: Sequence[Path], encoder: Encoder, out: Path) -> Latents:
    """Threads and one chunked HDF5 file."""
    dim = encoder.space.dim
    with h5py.File(out, "w") as file:
        rows = min(84, len(files))
        latents = file.create_dataset("latents", (len(files), dim), "float16", chunks=(rows, dim))
        for at, block in batches(files, encoder):
            latents[at : at + len(block)] = block
        return np.array(latents)


def zarr_regions(files: Sequence[Path], encoder: Encoder, out: Path) -> Latents:
    """Threads and zarr-python, a region at a time; unsharded, since a shard would be rewritten by each."""
    dim = encoder.space.dim
    latents = zarr.create_array(
        out, shape=(len(files), dim), dtype="float16", chunks=(encoder.batch, dim), compressors=None
    )
    for at, block in batches(files, encoder):
        latents[at : at + len(block)] = block
    return np.asarray(latents[:])


PEERS: dict[str, Callable[[Sequence[Path], Encoder, Path], Latents]] = {
    "plain loop, .npy files": plain_loop,
    "DataLoader, memmap": data_loader,
    "threads, HDF5": hdf5,
    "threads, zarr-python": zarr_regions,
}
