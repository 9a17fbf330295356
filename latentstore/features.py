"""Latents that somebody else computed, one ``.npy`` an image, listed and read as images are."""

from __future__ import annotations

import io
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib import format as npy

from latentstore import images
from latentstore.errors import ImageError, UsageError
from latentstore.manifest import files_below, input_table, list_manifest, named_row
from latentstore.schema import Space
from latentstore.sources import Source
from latentstore.sources.places import LocalFile

SUFFIX = ".npy"
PUBLISHED_SHAPE = (4, 32, 32)
"""Of Stable Diffusion's VAE at 256 x 256 pixels: 4,096 numbers."""
_ITEM_BYTES = 8
_HEADER_BYTES = 16_384
"""More than NumPy's reader takes (10,000 characters), so that it is the one to refuse."""
_FILTERS = Lock()
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


# --- what the files hold ------------------------------------------------------------------------------


def parse(data: bytes, latent_shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the latent that a ``.npy`` file holds. Nothing in it is unpickled.

    Parameters
    ----------
    data : bytes
        The whole file.
    latent_shape : (C, H, W)

    Returns
    -------
    (C·H·W,) float32 array
        Flattened in that order.

    Raises
    ------
    ImageError
        Status ``unreadable``: no ``.npy`` file, pickled objects, not one latent of 2 to 8 bytes a number, or
        cut off. Status ``not_finite``: NaN, an infinity, or beyond float32.
    """
    shape, fortran, dtype, start = _header(data)
    dim = math.prod(latent_shape)
    whole = tuple(latent_shape)
    if dtype.hasobject:
        raise ImageError("unreadable", "it holds pickled objects, which are never loaded")
    if dtype.kind != "f" or dtype.itemsize > _ITEM_BYTES:
        raise ImageError("unreadable", f"its numbers are {dtype}; float16, float32 and float64 are read")
    if shape not in ((dim,), (1, dim), whole, (1, *whole)):
        raise ImageError("unreadable", f"an array of shape {shape}, not of {dim} numbers or {whole}")
    if len(data) - start != dim * dtype.itemsize:
        raise ImageError("unreadable", f"{len(data) - start} bytes of numbers, not {dim * dtype.itemsize}")
    raw = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):
        values = raw.reshape(dim).astype(np.float32)
    finite = int(np.isfinite(values).sum())
    if finite != dim:
        raise ImageError("not_finite", f"{dim - finite} of its {dim} numbers are not finite in float32")
    return values


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, order, dtype and where the numbers begin."""
    try:
        width = 2 if data[6] == 1 else 4  # of the header's length, by the format's version
        end = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
        shape, fortran, dtype = _parsed_header(data[: min(end, _HEADER_BYTES)])
    except Exception as exc:  # NumPy's parser raises many kinds on hostile bytes; each is a bad file
        raise ImageError("unreadable", "not a .npy file" if data else "the file is empty") from exc
    return shape, fortran, dtype, end


@lru_cache(maxsize=64)
def _parsed_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse what stands before the numbers: it is the same in most files of a folder, and slow to parse."""
    file = io.BytesIO(data)
    # Files that Python 2 wrote ("(4L, 32L, 32L)") are read as any; filters are the whole process's.
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file required", UserWarning)
        found: tuple[tuple[int, ...], bool, np.dtype[Any]] = _READ_HEADER[npy.read_magic(file)](file)
    return found


@dataclass(frozen=True)
class Feature(images.Pixels):
    """A latent in the place of a decoded picture; ``rgb`` is empty, and the picture's size is not known.

    Attributes
    ----------
    latent : (dim,) float32 array
    """

    latent: npt.NDArray[np.float32] = field(kw_only=True)


_NO_PICTURE = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Features(Source):
    """A folder of ``.npy`` files, or a manifest of them, in the place of images.

    Attributes
    ----------
    latent_shape : (C, H, W)
    """

    latent_shape: tuple[int, int, int] = PUBLISHED_SHAPE

    def list(self) -> pa.Table:
        """List the files sorted by name; identities and roles are told by the names, as for images.

        Raises
        ------
        UsageError
            No such folder, or no ``.npy`` file in it.
        ManifestError
        """
        if self.manifest is not None:
            return list_manifest(self.manifest)
        root = Path(self.root)
        if not root.is_dir():
            raise UsageError(
                f"There is no folder {root} (looked in {Path.cwd()}). Name the folder that holds the "
                f"{SUFFIX} files, one an image: latentstore import FOLDER."
            )
        names = sorted(files_below(root, {SUFFIX}, follow_links=self.follow_links))
        if not names:
            raise UsageError(
                f"{root} holds no {SUFFIX} files, also not in subfolders. Images go through latentstore "
                "encode; a folder of features has one file an image, such as T000000_1.npy."
            )
        return input_table(named_row(name) for name in names)

    def check(self) -> None:
        """Find what :meth:`list` would refuse. Raises likewise."""
        self.list()

    def read(self, listed: Mapping[str, Any]) -> images.FileFacts:
        """Read and hash one listed file, if it is not larger than one latent can be.

        Raises
        ------
        ImageError
        """
        place, member = self._found(listed)
        if member is not None or not isinstance(place, LocalFile):
            raise ImageError("unreadable", "features are read from files on this machine")
        most = math.prod(self.latent_shape) * _ITEM_BYTES + _HEADER_BYTES
        with images.regular_file(place.path, place.root) as (fd, facts):
            if facts.st_size > most:
                raise ImageError("too_large", f"{facts.st_size} bytes, more than one latent's {most}")
            with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
                data = file.read(most) or b""
        return images.hashed(data, facts.st_mtime_ns)

    def load(self, listed: Mapping[str, Any], size: int = 0, *, max_pixels: int = 0) -> Feature:
        """Read one listed latent; sizes in pixels mean nothing here.

        Raises
        ------
        ImageError
            With the row's ``status`` and ``reason``.
        """
        del size, max_pixels
        facts = self.read(listed)
        began = time.perf_counter()
        try:
            latent = parse(facts.data, self.latent_shape)
        except ImageError as exc:
            exc.facts = replace(facts, data=b"")
            raise
        return Feature(
            rgb=_NO_PICTURE,
            width=0,
            height=0,
            bytes=facts.bytes,
            mtime=facts.mtime,
            sha256=facts.sha256,
            decode_seconds=time.perf_counter() - began,
            latent=latent,
        )


def load_queries(
    files: Sequence[Path], space: Space
) -> tuple[list[str], npt.NDArray[np.float32], list[tuple[str, str]]]:
    """Read latents that are in no store, to be compared with one of that space.

    Returns
    -------
    names, latents, unreadable
        ``latents`` is (n, dim) float32; ``unreadable`` holds (name, why).
    """
    names: list[str] = []
    rows: list[npt.NDArray[np.float32]] = []
    unreadable: list[tuple[str, str]] = []
    for path in files:
        try:
            source = Features(path.parent, latent_shape=space.latent_shape, follow_links=True)
            rows.append(source.load(named_row(os.fsencode(path.name))).latent)
            names.append(str(path))
        except ImageError as exc:
            unreadable.append((str(path), f"{exc.status}: {exc.reason}"))
    return names, np.stack(rows) if rows else np.empty((0, space.dim), np.float32), unreadable
