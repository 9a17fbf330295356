"""Safetensors files with a format's name in their metadata, written whole or not at all."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import ProjectionFormatError, SolverWriteError


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file beside its place and rename it, so that a reader never sees half a file.

    Raises
    ------
    SolverWriteError
        No room, or no permission; nothing was changed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = Path(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        # The library makes files that their owner alone can read; keep the mode of the user's umask.
        part.touch()
        mode = part.stat().st_mode
        whole = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
        save_file(whole, part, metadata={**metadata, "crc32": _crc32(whole)})
        part.chmod(mode)
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(target)
    except (SafetensorError, OSError) as error:
        # The library wraps what the disk said; the disk being full is the usual reason.
        raise SolverWriteError(
            f"{path} could not be written ({error}). Is the disk full? Make room and run the same again; "
            "nothing was changed."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(
    path: str | os.PathLike[str], expected: str, *, version: str = "1"
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file whose metadata names the format `expected` in that version.

    Raises
    ------
    ProjectionFormatError
        It is damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != expected:
                raise ProjectionFormatError(
                    f"{path} is not a {expected} file: its format is {metadata.get('format', 'unnamed')!r}. "
                    "Pass a file that was written by this package."
                )
            if metadata.get("version") != version:
                raise ProjectionFormatError(
                    f"{path} is a {expected} file of version {metadata.get('version')}; this package reads "
                    f"version {version}. Write it again."
                )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ProjectionFormatError(
            f"{path} cannot be read as safetensors ({error}). The file is damaged or of another kind; "
            "write it again."
        ) from error
    # Files of earlier versions carry no checksum.
    if "crc32" in metadata and metadata["crc32"] != _crc32(tensors):
        raise ProjectionFormatError(f"{path} is damaged: its numbers have another checksum. Write it again.")
    return tensors, metadata


def _crc32(tensors: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"
