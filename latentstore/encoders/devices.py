"""Where a network runs, in which precision, and how batches get there and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import numpy as np

from latentstore.encoders.base import Latents, Pictures
from latentstore.errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Name of a precision, and of its dtype in the provenance."""
_AMPERE = 8
"""The first CUDA compute capability whose matrix units take bfloat16."""


def pick_device(name: str) -> Any:
    """Return the torch device of ``--device``.

    Raises
    ------
    UsageError
        There is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"--device is {name!r}; use auto, cpu, cuda or cuda:N.") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device is {name!r}, but torch {torch.__version__} sees no CUDA device here. Use cpu or auto."
        )
    return device


def pick_precision(asked: str, device: Any) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``: what was asked for, or what suits the device.

    On a CPU that is ``fp32``; on CUDA ``bf16``, whose range is float32's, where the card has it.
    """
    import torch

    if asked not in get_args(Precision):
        raise UsageError(f"--precision is {asked!r}; use {', '.join(get_args(Precision))}.")
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= _AMPERE else "fp16"


def exact_kernels(device: Any) -> AbstractContextManager[Any]:
    """Within it, CUDA convolves in the precision it was given and by the same kernels on every run.

    Otherwise cuDNN would round float32 to TF32, and its timing trials could pick other kernels, and so other
    last bits, after a resume. The flags are as before afterwards.
    """
    import torch

    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[Any] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


class Transfers:
    """Moves batches to the device, and latents back.

    On CUDA both run through page-locked memory (torch's host allocator keeps and reuses it) and on streams of
    their own, so that the upload of one batch and the download of another overlap the computing of a third.
    On a CPU nothing moves. The CUDA half has not been run yet.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self._streams = (
            (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        )

    def upload(self, images: Pictures) -> Any:
        """Return (b, size, size, 3) uint8 on the device, ready for work on the current stream."""
        import torch

        host = torch.from_numpy(np.ascontiguousarray(images))
        if self._streams is None:
            return host.to(self._device)
        up, computing = self._streams[0], torch.cuda.current_stream(self._device)
        with torch.cuda.stream(up):
            there = host.pin_memory().to(self._device, non_blocking=True)
        computing.wait_stream(up)
        # Allocated on one stream and read on another: it may not be reused before that is done.
        there.record_stream(computing)
        return there

    def fetch(self, there: Any) -> Callable[[], Latents]:
        """Start to bring (b, dim) float32 back, and return what waits for it."""
        import torch

        if self._streams is None:
            here: Latents = there.cpu().numpy()
            return lambda: here
        down = self._streams[1]
        down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(down):
            host = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            host.copy_(there, non_blocking=True)
            there.record_stream(down)
            arrived = torch.cuda.Event()
            arrived.record(down)

        def wait() -> Latents:
            arrived.synchronize()
            latents: Latents = host.numpy()
            return latents

        return wait
