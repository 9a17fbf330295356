"""Maps in place of W: a linear one, an MLP, a convolution, self-attention; built, counted, saved and loaded.

torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import ProjectionFormatError, SolverUsageError
from .files import read_safetensors, write_safetensors
from .rank import check_rank

__all__ = ["DEEPEST", "HEADS", "HeadSpec", "build_head", "load_head", "save_head"]

HEADS = ("linear", "mlp", "convolution", "attention")
"""The heads by name; the first is W."""
DEEPEST = 7
"""Layers of the deepest MLP."""
_FORMAT = "solvers.head"


@dataclass(frozen=True)
class HeadSpec:
    """What a head is built from.

    Attributes
    ----------
    name
        One of `HEADS`.
    dim, rank
        Values of a latent, and of its embedding.
    latent_shape
        (channels, height, width) of a latent, where the head looks at its positions.
    layers
        Of an MLP.
    seed
        Of the initial weights.
    """

    name: str
    dim: int
    rank: int
    latent_shape: tuple[int, int, int] | None = None
    layers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in HEADS:
            raise SolverUsageError(f"There is no head {self.name!r}; choose among {', '.join(HEADS)}.")
        check_rank(self.rank, self.dim)
        if not 1 <= self.layers <= DEEPEST:
            raise SolverUsageError(f"layers must be 1 to {DEEPEST}, not {self.layers}.")
        if self.layers != 1 and self.name != "mlp":
            raise SolverUsageError(
                f"layers is {self.layers}, and the head {self.name} has one. Only mlp has more."
            )
        if self.name not in ("convolution", "attention"):
            return
        if self.latent_shape is None or len(self.latent_shape) != 3:
            raise SolverUsageError(
                f"The head {self.name} looks at the positions of a latent and needs its shape (channels, "
                f"height, width); it was given {self.latent_shape}."
            )
        if math.prod(self.latent_shape) != self.dim or min(self.latent_shape) < 1:
            raise SolverUsageError(
                f"latent_shape {self.latent_shape} holds {math.prod(self.latent_shape)} values, the latents "
                f"{self.dim}. Give the shape of these latents."
            )


def build_head(
    name: str,
    dim: int,
    rank: int,
    *,
    latent_shape: tuple[int, int, int] | None = None,
    layers: int = 1,
    seed: int = 0,
) -> Any:
    """Return a torch module that maps latents (b, dim) to embeddings (b, rank), float32, without biases.

    ``linear``: x W, with the parameter ``weight`` (dim, rank), orthonormal columns at first.
    ``mlp``: h = x W, then ``layers`` - 1 times h ← h + relu(h) W_i with W_i (rank, rank). One layer is
    therefore W itself: the paper's figures for one layer are those of its linear W.
    ``convolution``: one convolution of the latent's channels, flattened. The stride is the smallest whose
    positions divide the rank, the channels make up the rest, and the kernel is 3 x 3 (wider by as much as
    a stride above 2 asks for, so that no value is left out).
    ``attention``: tokens are the latent's positions, their features its channels; t ← t + multi-head
    self-attention of t, then W as in ``linear``.

    The module has ``spec`` (a `HeadSpec`), ``parameter_count`` and ``multiply_adds`` (of one row, forward).
    The same seed gives the same weights; torch's global random state is left alone. No parameter starts at
    zero, so that a learning rate in units of their size means something for each.

    Raises
    ------
    SolverUsageError
        An unknown name, or sizes that do not fit.
    """
    from . import head_modules

    shape = None if latent_shape is None else tuple(int(n) for n in latent_shape)
    spec = HeadSpec(name, dim, rank, shape, layers, seed)  # type: ignore[arg-type]
    return head_modules.CLASSES[name](spec)


def save_head(path: str | os.PathLike[str], head: Any, info: Mapping[str, Any]) -> None:
    """Write a head's weights and what it was built from as one safetensors file, with JSON-able `info`.

    Raises
    ------
    SolverWriteError
        It could not be written.
    """
    tensors = {name: value.detach().cpu().numpy() for name, value in head.state_dict().items()}
    text = json.dumps({"spec": asdict(head.spec), "info": dict(info)}, sort_keys=True)
    write_safetensors(path, tensors, {"format": _FORMAT, "version": "1", "info": text})


def load_head(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Return the head in a file of `save_head`, on the CPU, and its info.

    Raises
    ------
    ProjectionFormatError
        Another kind of file, a damaged one, or one whose weights are not those of the head it names.
    """
    import torch

    tensors, metadata = read_safetensors(path, _FORMAT)
    try:
        held = json.loads(metadata["info"])
        head = build_head(**held["spec"])
        head.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
    except (KeyError, TypeError, json.JSONDecodeError, SolverUsageError, RuntimeError) as error:
        raise ProjectionFormatError(
            f"{path} does not hold the head it says it does ({error}). It is damaged or was written by "
            "another version; train it again."
        ) from error
    return head, dict(held["info"])
