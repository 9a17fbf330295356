"""The processes of one training run: who leads, what each computes, what all agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .errors import SolverUsageError


@dataclass(frozen=True)
class World:
    """The processes that train one W together; by default this one alone.

    Attributes
    ----------
    rank, size
        This process's number and how many there are. Rank 0 leads: it alone validates, writes and reports.
    device
        Where this process computes, as torch names it.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def from_environment(cls, device: str = "auto") -> World | None:
        """Join the processes that torchrun started; None where it started none.

        Parameters
        ----------
        device
            "auto" (a GPU for each process where there is CUDA), "cuda" or "cpu".

        Raises
        ------
        SolverUsageError
            Fewer GPUs than processes on this machine.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        import torch
        from torch import distributed

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda"):
            local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= present:
                raise SolverUsageError(
                    f"Process {local} of this machine needs a GPU of its own and there are {present}. Start "
                    f"torchrun with --nproc-per-node {max(present, 1)}, or train on the CPU (device cpu)."
                )
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    @property
    def leads(self) -> bool:
        """Whether this process validates, writes and reports."""
        return self.rank == 0

    def share(self, total: int, what: str) -> slice:
        """Return this process's equal part of `total` things.

        Raises
        ------
        SolverUsageError
            They cannot be shared out equally: the mean over all would not be the mean of the parts.
        """
        if total % self.size:
            raise SolverUsageError(
                f"A batch of {total} {what} cannot be shared equally by {self.size} processes. Take a "
                f"multiple of {self.size}, or another number of processes."
            )
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def agree(self, value: Any) -> Any:
        """Return rank 0's value on every process."""
        if self.size == 1:
            return value
        from torch import device, distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, device=device(self.device))
        return box[0]

    def mean(self, tensor: Any) -> Any:
        """Return the mean of a torch tensor over the processes, in place; no wait for the device."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def close(self) -> None:
        """Leave the group; the last thing a process does."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
