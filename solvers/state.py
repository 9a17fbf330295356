"""The head, the class weights, their optimiser and the average: one step, and all that a checkpoint holds.

This module imports torch; `training` imports it when a run begins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .distributed import World
from .losses import LOSSES, gradients
from .memory import rows_embedded

if TYPE_CHECKING:
    from .sgd import CosFace

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of every parameter, beside its count of steps."""


class Snapshot:
    """The head of one step, averaged where the recipe says so; training goes on without changing it.

    Attributes
    ----------
    head
        A torch module (b, d) -> (b, rank).
    step
        The step it was taken after; 0 is the start.
    """

    def __init__(self, head: Any, step: int) -> None:
        self.head, self.step = head, step

    @cached_property
    def weights(self) -> np.ndarray | None:
        """W (d, rank) float32, None for a head that is no single matrix."""
        if self.head.spec.name != "linear":
            return None
        return np.array(self.head.weight.detach().cpu().numpy(), dtype=np.float32)

    def embed(self, block: Any) -> np.ndarray:
        """Return the embeddings (n, rank) float32 of rows (n, d), in full precision."""
        first = next(self.head.parameters())
        parts, step = [], rows_embedded(self.head.row_bytes)
        with products("fp32", first.device), torch.no_grad():
            for at in range(0, len(block), step):
                part = block[at : at + step]
                part = part if isinstance(part, torch.Tensor) else torch.tensor(part)
                parts.append(self.head(part.to(first.device).to(first.dtype)).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.head.spec.rank), dtype=np.float32)

    def finite(self) -> bool:
        """Whether every weight is, and their lengths: by those that overflow, rows are divided to nothing."""
        return _finite(self.head.parameters())


class Objective(torch.nn.Module):
    """Head and class weights as one module whose output is the loss, as DistributedDataParallel wants it."""

    def __init__(self, cfg: CosFace, head: Any, classes: Any) -> None:
        super().__init__()
        self.cfg, self.head = cfg, head
        self.classes = torch.nn.Parameter(classes)
        self.product_dtype = torch.bfloat16 if cfg.precision == "bf16" else None

    def forward(self, x: Any, labels: Any) -> Any:
        """Return the mean loss of rows x (b, d) with labels (b,)."""
        return LOSSES[self.cfg.loss](self.embed(x), self.classes, labels, **self._how)

    def embed(self, x: Any) -> Any:
        """Return the embeddings (b, rank) float32, under bf16 of operands and results that were rounded."""
        rounded = self.product_dtype is not None
        with torch.autocast(x.device.type, dtype=self.product_dtype, enabled=rounded):
            return self.head(x).float()

    def add_gradients(self, x: Any, labels: Any, share: float) -> Any:
        """Add the gradients of share times the loss; return that product.

        Without autograd in between, which would copy the gradient of the class weights.
        """
        y, classes = self.embed(x), self.classes.detach()
        loss, d_y, d_classes = gradients(self.cfg.loss, y.detach(), classes, labels, **self._how)
        if share != 1.0:
            loss, d_y, d_classes = loss * share, d_y.mul_(share), d_classes.mul_(share)
        y.backward(d_y)
        self.classes.grad = d_classes if self.classes.grad is None else self.classes.grad.add_(d_classes)
        return loss

    @property
    def _how(self) -> dict[str, Any]:
        return {"scale": self.cfg.scale, "margin": self.cfg.margin, "product_dtype": self.product_dtype}


class State:
    """What training changes, on one device and alike in every process.

    Parameters
    ----------
    head
        A module of `solvers.heads`.
    classes
        (C, rank) float32.
    """

    def __init__(self, cfg: CosFace, head: Any, classes: np.ndarray, world: World) -> None:
        self.cfg, self.world, self.count = cfg, world, 0
        self.device = torch.device(world.device)
        self.objective = Objective(cfg, head, torch.tensor(classes)).to(self.device)
        self.parallel = self.objective
        if world.size > 1:
            # Every process begins with the weights of the first: the wrapper sends them round.
            self.parallel = torch.nn.parallel.DistributedDataParallel(
                self.objective, gradient_as_bucket_view=True
            )
        self.parameters = dict(self.objective.named_parameters())
        self.average = copy.deepcopy(head).requires_grad_(False)
        self._follow(1.0)
        self.units = {
            name: float(p.detach().square().mean().sqrt()) if cfg.relative_lr else 1.0
            for name, p in self.parameters.items()
        }
        self.fused = self.device.type in ("cpu", "cuda")
        groups = [{"params": [p], "lr": 0.0} for p in self.parameters.values()]
        self.optimiser = torch.optim.Adam(groups, fused=self.fused)

    def step(self, x: Any, labels: Any, lr: float) -> Any:
        """Take one step on this process's part of the batch; return the whole batch's loss, on the device.

        On a CPU, where knowing the loss costs nothing, one that is not finite changes nothing.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.world.mean(self._gradients(x, labels))
        if self.device.type == "cpu" and not torch.isfinite(loss):
            return loss
        for group, unit in zip(self.optimiser.param_groups, self.units.values(), strict=True):
            group["lr"] = lr * unit
        self.optimiser.step()
        self.count += 1
        if self.cfg.ema:
            self._follow(1.0 - min(self.cfg.ema_decay, (1 + self.count) / (10 + self.count)))
        return loss

    def snapshot(self, step: int) -> Snapshot:
        """Return a copy of what the run would return now."""
        if not self.cfg.ema:
            self._follow(1.0)
        return Snapshot(copy.deepcopy(self.average), step)

    def finite(self) -> bool:
        """Whether every weight is, and their lengths."""
        return _finite(self.parameters.values())

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all that changes, by name, on the host; on a CPU the arrays are views."""
        held = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        held |= {f"average.{name}": p for name, p in self.average.named_parameters()}
        for name, p in self.parameters.items():
            moments = self.optimiser.state.get(p, {})
            held |= {f"adam.{name}.{key}": moments[key] for key in _MOMENTS if key in moments}
        return {name: value.cpu().numpy() for name, value in held.items()}

    def load(self, tensors: Mapping[str, np.ndarray], count: int, units: Mapping[str, float]) -> None:
        """Take over what `tensors` returned, after `count` steps, with the learning rates' units of then.

        Raises
        ------
        KeyError, ValueError
            Names or shapes that are not those of this recipe.
        """
        for name, p in self.parameters.items():
            _fill(p, tensors[f"weights.{name}"])
            if count:
                moments = {key: torch.empty_like(p, requires_grad=False) for key in _MOMENTS}
                for key, value in moments.items():
                    _fill(value, tensors[f"adam.{name}.{key}"])
                taken = torch.tensor(float(count), device=self.device if self.fused else "cpu")
                self.optimiser.state[p] = {"step": taken, **moments}
        for name, p in self.average.named_parameters():
            _fill(p, tensors[f"average.{name}"])
        self.count = count
        self.units = {name: float(units[name]) for name in self.parameters}

    def restored(self, tensors: Mapping[str, np.ndarray], prefix: str, step: int) -> Snapshot:
        """Return the snapshot whose parameters are the tensors `prefix` + name."""
        head = copy.deepcopy(self.average)
        for name, p in head.named_parameters():
            _fill(p, tensors[prefix + name])
        return Snapshot(head, step)

    def _gradients(self, x: Any, labels: Any) -> Any:
        """Add the gradients of the mean loss over the rows, a micro-batch at a time; return that loss."""
        parts = list(zip(*(t.tensor_split(self.cfg.accumulate) for t in (x, labels)), strict=True))
        total = torch.zeros((), device=self.device)
        for at, (rows, own) in enumerate(parts, start=1):
            share = len(rows) / len(x)
            if self.world.size == 1:
                total += self.objective.add_gradients(rows, own, share)
                continue
            # Gradients are exchanged once a step, with the last micro-batch.
            with nullcontext() if at == len(parts) else self.parallel.no_sync():
                loss = self.parallel(rows, own) * share
                loss.backward()
            total += loss.detach()
        return total

    def _follow(self, weight: float) -> None:
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.objective.head.parameters(), strict=True):
                mean.lerp_(p, weight)


@contextmanager
def products(precision: str, device: Any) -> Iterator[None]:
    """Multiply and convolve float32 on CUDA in TF32 or in full, and put torch's settings back afterwards.

    Other devices have no such settings, and torch's are not touched.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    # Torch refuses to read its old switches once the new ones were written, and not the other way round.
    values: tuple[Any, Any] = ("ieee", "tf32")
    name, switches = (
        "fp32_precision",
        [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)],
    )
    if not all(hasattr(switch, name) for switch in switches):
        name, switches, values = (
            "allow_tf32",
            [torch.backends.cuda.matmul, torch.backends.cudnn],
            (False, True),
        )
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, values[precision == "tf32"])
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _finite(weights: Iterable[Any]) -> bool:
    return all(bool(torch.isfinite(p.detach().square().sum())) for p in weights)


def _fill(tensor: Any, values: np.ndarray) -> None:
    """Copy values into a tensor of the same shape and type, bit for bit."""
    found = torch.tensor(values)
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise ValueError(
            f"{tuple(found.shape)} {found.dtype} where {tuple(tensor.shape)} {tensor.dtype} belongs"
        )
    with torch.no_grad():
        tensor.copy_(found)
