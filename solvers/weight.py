"""A bare weight that somebody else trained: one matrix of a torch or safetensors file, read as data only."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ProjectionFormatError, SolverUsageError

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS = ".safetensors"
_OURS = "solvers.projection"
_DEEPEST = 8
_ZIP = b"PK\x03\x04"
"""By which torch knows its own archives."""


@dataclass(frozen=True)
class Weight:
    """A weight as it was found.

    Attributes
    ----------
    W
        (d, m) float32: it maps rows of d numbers to m.
    key
        Its name in the file, or "" where the file is the tensor itself.
    shape
        In the file.
    left_out
        Names of the file's other tensors.
    """

    W: np.ndarray
    key: str
    shape: tuple[int, ...]
    left_out: tuple[str, ...] = ()


def read_weight(path: Path, *, dim: int | None = None, key: str | None = None) -> Weight:
    """Read the one matrix of a file (.pt, .pth, .bin, .safetensors). No pickled code is run.

    Parameters
    ----------
    path
    dim
        Length of a latent. With it both orientations are told apart: outputs x inputs, as torch keeps a
        linear layer, and its transpose. Without it the first is taken for granted.
    key
        Name of the tensor, where the file holds several that would do.

    Raises
    ------
    SolverUsageError
        The file's suffix is another.
    ProjectionFormatError
        The file holds more than tensors, is damaged, or has no such matrix, or several; or a bias, or nothing
        but zeros, or what would take more memory than the file has bytes.
    """
    suffix = path.suffix.lower()
    if suffix not in (*TORCH_SUFFIXES, SAFETENSORS):
        raise SolverUsageError(
            f"{path} is no weight: its suffix is {suffix or 'missing'}; {', '.join(TORCH_SUFFIXES)} and "
            f"{SAFETENSORS} are read."
        )
    tensors = _from_safetensors(path) if suffix == SAFETENSORS else dict(_tensors(_from_torch(path)))
    name = _chosen(path, tensors, dim, key)
    _refuse_bias(path, tensors, name)
    tensor = _plain(path, name, tensors[name])
    if not tensor.is_floating_point():
        raise ProjectionFormatError(
            f"{path} holds {tensor.dtype} in {name!r}; a weight has floating numbers."
        )
    weight = tensor.float().numpy()
    if not np.isfinite(weight).all():
        raise ProjectionFormatError(
            f"{path} holds {int((~np.isfinite(weight)).sum())} numbers that are not finite in {name!r}: its "
            "training has failed, or the file is damaged. Take another checkpoint."
        )
    if not weight.any():
        raise ProjectionFormatError(
            f"{path} holds nothing but zeros in {name!r}, of shape {tuple(weight.shape)}: every latent would "
            "be mapped to one point. Take another checkpoint."
        )
    W = weight if _inputs_first(path, weight.shape, dim) else weight.T
    others = tuple(sorted(tensors.keys() - {name}))
    return Weight(np.ascontiguousarray(W), name, tuple(weight.shape), others)


def _from_torch(path: Path) -> Any:
    import torch

    _refuse_growth(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises a different type for every kind of damage
        raise _not_plain(path, error) from error


def _refuse_growth(path: Path) -> None:
    """Refuse a zip that is larger unpacked than packed: torch itself stores its members as they are."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # of a hostile archive there are many kinds
        raise _not_plain(path, error) from error
    held, size = sum(member.file_size for member in members), path.stat().st_size
    if held > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ProjectionFormatError(
            f"{path} is a compressed archive ({size:,} bytes for {held:,}), and torch.save compresses "
            "nothing. Unpack it if the weight lies inside, or take the file from its source again."
        )


def _not_plain(path: Path, error: Exception) -> ProjectionFormatError:
    return ProjectionFormatError(
        f"{path} cannot be read as plain torch weights ({type(error).__name__}). "
        "Only tensors are accepted, never pickled objects; save the weight with torch.save(tensor)."
    )


def _from_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            if (handle.metadata() or {}).get("format") == _OURS:
                raise ProjectionFormatError(f"{path} is a projection already: use it as it is.")
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ProjectionFormatError(
            f"{path} cannot be read as safetensors ({error}). The file is damaged or of another kind; take "
            "it from its source again."
        ) from error


def _tensors(
    loaded: Any, name: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of nested mappings with its dotted name; each mapping is read once."""
    import torch

    seen = set() if seen is None else seen
    if torch.is_tensor(loaded):
        if not loaded.is_nested:  # several tensors in one, without a shape
            yield name, loaded
    elif isinstance(loaded, Mapping) and depth < _DEEPEST and id(loaded) not in seen:
        seen.add(id(loaded))
        for key, value in loaded.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key), depth + 1, seen)


def _plain(path: Path, name: str, tensor: Any) -> Any:
    """Return a tensor whose numbers all lie in memory one by one; refuse others before any is copied."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        kind = tensor.layout if tensor.layout is not torch.strided else f"on the device {tensor.device.type}"
        raise ProjectionFormatError(
            f"{path} holds {name or 'a tensor'!r} as {kind}; a weight has all its numbers in the file. Save "
            "it with torch.save(tensor.to_dense().cpu())."
        )
    needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if held < needed:
        raise ProjectionFormatError(
            f"{path} holds {held:,} bytes for {name or 'a tensor'!r} of shape {tuple(tensor.shape)}, which "
            f"takes {needed:,}: its numbers are repeated. Save it with torch.save(tensor.contiguous())."
        )
    return tensor.detach().resolve_conj().resolve_neg()


def _chosen(path: Path, tensors: Mapping[str, Any], dim: int | None, key: str | None) -> str:
    """Return the name of the matrix that is meant."""
    matrices = {name: tuple(t.shape) for name, t in tensors.items() if t.ndim == 2}
    fitting = [name for name, shape in matrices.items() if dim is None or max(shape) == dim]
    if key is not None:
        fitting = [name for name in fitting if name == key]
    if len(fitting) == 1:
        return fitting[0]
    held = ", ".join(f"{name or 'the tensor'} {tuple(t.shape)}" for name, t in list(tensors.items())[:6])
    wanted = "one two-dimensional tensor" + ("" if dim is None else f" with a side of {dim} and none larger")
    named = "" if key is None else f" called {key!r}"
    advice = " Name the one that is meant by its key." if len(fitting) > 1 else ""
    raise ProjectionFormatError(
        f"{path} must hold {wanted}{named}; it holds {held or 'no tensors'}"
        f"{' ...' if len(tensors) > 6 else ''}.{advice or ' Save the weight of the projection alone.'}"
    )


def _refuse_bias(path: Path, tensors: Mapping[str, Any], name: str) -> None:
    """Refuse a linear layer with a bias: the weight alone would be another map."""
    stem, dot, last = name.rpartition(".")
    bias = tensors.get(f"{stem}{dot}bias") if last == "weight" else None
    if bias is not None and bool((_plain(path, f"{stem}{dot}bias", bias) != 0).any()):
        raise ProjectionFormatError(
            f"{path} holds a bias beside {name!r}, and a projection has none: the weight alone would be "
            "another map. Take a checkpoint of a layer without a bias."
        )


def _inputs_first(path: Path, shape: tuple[int, ...], dim: int | None) -> bool:
    """Tell whether a matrix is inputs x outputs; a square one is taken as torch keeps it."""
    outputs, inputs = shape
    if dim is None:
        if outputs > inputs:
            raise ProjectionFormatError(
                f"{path} holds a weight of shape {shape}; outputs x inputs was expected, with no more "
                "outputs than inputs. Transpose it, or say how long a latent is."
            )
        return False
    return inputs != dim
