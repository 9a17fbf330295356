"""Classification losses over class weights: CosFace, softmax and Circle, with their gradients in one pass.

All three are the cross-entropy of logits z that follow from the products of embeddings and class weights.
The forward pass already forms both gradients, a block of rows at a time, so that of the b x C logits never
more than a block is held and nothing but the gradients waits for the backward pass.
torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from .errors import SolverUsageError

__all__ = ["BLOCK_BYTES", "DEFAULTS", "LOSSES", "LossFunction", "circle", "cosface", "gradients", "softmax"]

BLOCK_BYTES = 256 << 20
"""Memory for the logits of one block of rows, with what their gradient needs beside them."""
EPS = 1e-12
"""Rows are divided by at least this norm, as `torch.nn.functional.normalize` does."""
_FLOOR = (-60.0, -math.inf)
"""Logits so far below their row's largest (e⁻⁶⁰ is nothing beside 1, in float64 too) count as -inf: their
exponentials would be subnormal, which processors multiply a hundred times slower."""
DEFAULTS: Mapping[str, tuple[float, float]] = {
    "cosface": (64.0, 0.35),
    "softmax": (1.0, 0.0),
    "circle": (256.0, 0.25),
}
"""The published (scale, margin) of every loss."""


class LossFunction(Protocol):
    """A loss over class weights, differentiable in the embeddings and in the class weights."""

    def __call__(
        self,
        y: Any,
        classes: Any,
        labels: Any,
        *,
        scale: float,
        margin: float,
        product_dtype: Any = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> Any:
        """Return the mean loss of torch rows y (b, m) with labels (b,) among classes (C, m)."""


def cosface(
    y: Any,
    classes: Any,
    labels: Any,
    *,
    scale: float = 64.0,
    margin: float = 0.35,
    product_dtype: Any = None,
    block_bytes: int = BLOCK_BYTES,
) -> Any:
    """Return the mean CosFace loss (Wang et al. 2018): cross-entropy of scale (cos - margin [own class]).

    Parameters
    ----------
    y
        (b, m) float tensor of embeddings, of any length: they are normalised here.
    classes
        (C, m) float tensor of class weights, normalised here.
    labels
        (b,) int64 tensor of 0..C-1.
    scale, margin
        s and m of the loss.
    product_dtype
        A torch dtype to which the operands of the three products are rounded; sums and results stay in
        float32.
    block_bytes
        Memory for the logits of one block of rows.

    Returns
    -------
    Tensor
        Scalar, float64 for float64 input, else float32. A zero row has finite gradients.

    Raises
    ------
    SolverUsageError
        Shapes or settings that do not fit.
    """
    return _apply("cosface", y, classes, labels, scale, margin, product_dtype, block_bytes)


def softmax(
    y: Any,
    classes: Any,
    labels: Any,
    *,
    scale: float = 1.0,
    margin: float = 0.0,
    product_dtype: Any = None,
    block_bytes: int = BLOCK_BYTES,
) -> Any:
    """Return the mean cross-entropy of scale y cᵀ, without normalisation; parameters as `cosface`.

    It has no margin: any but 0 is refused.
    """
    return _apply("softmax", y, classes, labels, scale, margin, product_dtype, block_bytes)


def circle(
    y: Any,
    classes: Any,
    labels: Any,
    *,
    scale: float = 256.0,
    margin: float = 0.25,
    product_dtype: Any = None,
    block_bytes: int = BLOCK_BYTES,
) -> Any:
    """Return the mean class-level Circle loss (Sun et al. 2020); parameters as `cosface`.

    With γ the scale and m the margin, log(1 + Σ exp(γ a_n (cos_n - m) - γ a_p (cos_p - 1 + m))) over the
    other classes n, where a_n = max(cos_n + m, 0) and a_p = max(1 + m - cos_p, 0) are weights: as in the
    original, no gradient passes through them.
    """
    return _apply("circle", y, classes, labels, scale, margin, product_dtype, block_bytes)


LOSSES: Mapping[str, LossFunction] = {"cosface": cosface, "softmax": softmax, "circle": circle}
"""The losses by name."""


@dataclass(frozen=True)
class _Kind:
    """What sets a loss apart.

    Attributes
    ----------
    normalises
        Whether embeddings and class weights are divided by their norms.
    factor
        scale -> what the embeddings are multiplied by before the product with the class weights.
    settle
        (product, rows, labels, scale, margin) -> slope. Turns the product of a block into its logits in
        place and returns d logits / d product, None where that is 1 everywhere.
    buffers
        Arrays of a block's shape that are held at once.
    """

    normalises: bool
    factor: Callable[[float], float]
    settle: Callable[[Any, Any, Any, float, float], Any]
    buffers: int


def _settle_cosface(product: Any, rows: Any, labels: Any, scale: float, margin: float) -> None:
    product[rows, labels] -= scale * margin


def _settle_softmax(product: Any, rows: Any, labels: Any, scale: float, margin: float) -> None:
    pass


def _settle_circle(product: Any, rows: Any, labels: Any, scale: float, margin: float) -> Any:
    # The product is √γ cos: both factors of a logit are then in units of √γ, and γ needs no pass of its own.
    root = math.sqrt(scale)
    own = product[rows, labels]
    slope = (product + root * margin).clamp_(min=0.0)
    product.sub_(root * margin).mul_(slope)
    own_slope = (root * (1.0 + margin) - own).clamp_(min=0.0)
    slope[rows, labels] = own_slope
    product[rows, labels] = own_slope * (own - root * (1.0 - margin))
    return slope


_KINDS = {
    "cosface": _Kind(True, lambda scale: scale, _settle_cosface, 1),
    "softmax": _Kind(False, lambda scale: scale, _settle_softmax, 1),
    "circle": _Kind(True, math.sqrt, _settle_circle, 2),
}


def gradients(
    name: str,
    y: Any,
    classes: Any,
    labels: Any,
    *,
    scale: float,
    margin: float,
    product_dtype: Any = None,
    block_bytes: int = BLOCK_BYTES,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Any, Any, Any]:
    """Return (loss, gradient in y, gradient in classes) of the loss called `name`, outside autograd.

    The parameters are those of `cosface`; of `needed`, what is False is not formed and returned as None.
    For a training loop of its own: it spares the backward pass its copy of the class weights' gradient.

    Raises
    ------
    SolverUsageError
        Shapes or settings that do not fit.
    """
    import torch

    if name not in _KINDS:
        raise SolverUsageError(f"There is no loss {name!r}; choose among {', '.join(_KINDS)}.")
    _check(name, y, classes, labels, scale, margin)
    kind = _KINDS[name]
    with torch.no_grad():
        dtype = torch.float64 if torch.float64 in (y.dtype, classes.dtype) else torch.float32
        u, v = y.to(dtype), classes.to(dtype)
        u_inverse, v_inverse = (_inverse_norms(rows) if kind.normalises else None for rows in (u, v))
        by = (
            u.new_full((len(u), 1), kind.factor(scale))
            if u_inverse is None
            else kind.factor(scale) * u_inverse
        )
        loss, d_u, d_v = _blocks(
            kind, u * by, v, v_inverse, labels, scale, margin, product_dtype, block_bytes, needed
        )
        d_y = None if d_u is None else _tangent(d_u.mul_(by), u, u_inverse).to(y.dtype)
        d_classes = None if d_v is None else _tangent(d_v, v, v_inverse).to(classes.dtype)
    return loss, d_y, d_classes


def _blocks(
    kind: _Kind,
    u: Any,
    v: Any,
    v_inverse: Any,
    labels: Any,
    scale: float,
    margin: float,
    product_dtype: Any,
    block_bytes: int,
    needed: tuple[bool, bool],
) -> tuple[Any, Any, Any]:
    """Return the mean cross-entropy and its gradients in u (b, m) and v (C, m), None where not needed.

    Rows of v are divided by their norms in the logits, not before: that spares a second copy of v. Its
    gradient is that in v divided.
    """
    import torch
    from torch.nn import functional

    held = kind.buffers * u.element_size() + (0 if product_dtype is None else product_dtype.itemsize)
    step = max(1, block_bytes // (held * len(v)))
    rounded = _round(v, product_dtype)
    d_u = torch.empty_like(u) if needed[0] else None
    d_v = None
    total = u.new_zeros(())
    for at in range(0, len(u), step):
        own, block = labels[at : at + step], u[at : at + step]
        rows = torch.arange(len(own), device=u.device)
        z = _product(_round(block, product_dtype), rounded.T, u.dtype)
        if v_inverse is not None:
            z.mul_(v_inverse.T)
        slope = kind.settle(z, rows, own, scale, margin)
        target, peak = z[rows, own], z.amax(dim=1, keepdim=True)
        sums = functional.threshold(z.sub_(peak), *_FLOOR, inplace=True).exp_().sum(dim=1)
        total += (sums.log() + peak[:, 0] - target).sum()
        if not any(needed):
            continue
        # Probabilities less 1 at the label, times the slope; both still to be divided by the row's sum.
        z[rows, own] -= sums
        for share in (slope, None if v_inverse is None else v_inverse.T):
            if share is not None:
                z.mul_(share)
        z = _round(z, product_dtype)
        share = (1.0 / (len(u) * sums))[:, None]
        if d_u is not None:
            d_u[at : at + step] = _product(z, rounded, u.dtype).mul_(share)
        if needed[1]:
            d_v = _plus_product(d_v, z.T, _round(block * share, product_dtype), u.dtype)
    return total / len(u), d_u, d_v


def _inverse_norms(rows: Any) -> Any:
    """Return one over the norms of rows, at least EPS, as (n, 1)."""
    import torch

    return 1.0 / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(EPS)


def _tangent(gradient: Any, rows: Any, inverse: Any) -> Any:
    """Take from a gradient, in place, what lies along its row: lengths do not count. None: they do."""
    import torch

    if inverse is None:
        return gradient
    along = torch.linalg.vecdot(gradient, rows)[:, None] * inverse.square()
    # A row shorter than EPS was divided by a constant, and its direction is one like others.
    along = along.where(inverse < 1.0 / EPS, torch.zeros_like(along))
    return gradient.addcmul_(rows, along, value=-1.0)


def _round(x: Any, dtype: Any) -> Any:
    return x if dtype is None else x.to(dtype)


def _product(a: Any, b: Any, dtype: Any) -> Any:
    """Return a @ b summed and returned in `dtype`, whatever the operands were rounded to."""
    import torch

    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda" and _sums_in_other_types():
        return torch.mm(a, b, out_dtype=dtype)
    # Elsewhere torch would round the result, too: 8 bits of a logit of 64 are no logit.
    return a.to(dtype) @ b.to(dtype)


@cache
def _sums_in_other_types() -> bool:
    """Whether this torch can return a product in another type than its operands' (2.8 and later, on CUDA)."""
    import torch

    return "dtype" in torch.ops.aten.mm.overloads()


def _plus_product(into: Any, a: Any, b: Any, dtype: Any) -> Any:
    """Return into + a @ b, in place; a @ b where there is nothing yet."""
    if into is None:
        return _product(a, b, dtype)
    return into.addmm_(a, b) if a.dtype == dtype else into.add_(_product(a, b, dtype))


def _check(name: str, y: Any, classes: Any, labels: Any, scale: float, margin: float) -> None:
    if not (y.ndim == classes.ndim == 2 and y.shape[1] == classes.shape[1] and labels.shape == y.shape[:1]):
        raise SolverUsageError(
            f"A loss takes embeddings (b, m), class weights (C, m) and labels (b,); got {tuple(y.shape)}, "
            f"{tuple(classes.shape)} and {tuple(labels.shape)}."
        )
    if not len(y):
        raise SolverUsageError("The loss of a batch without rows is not defined; give at least one.")
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(margin)):
        raise SolverUsageError(f"The scale must be positive and the margin finite; got {scale} and {margin}.")
    if name == "softmax" and margin != 0:
        raise SolverUsageError(
            f"The softmax loss has no margin, and {margin} was given. Give 0, or the loss cosface."
        )


def _apply(
    name: str,
    y: Any,
    classes: Any,
    labels: Any,
    scale: float,
    margin: float,
    product_dtype: Any,
    block_bytes: int,
) -> Any:
    def run(needed: tuple[bool, bool]) -> tuple[Any, Any, Any]:
        return gradients(
            name,
            y,
            classes,
            labels,
            scale=scale,
            margin=margin,
            product_dtype=product_dtype,
            block_bytes=block_bytes,
            needed=needed,
        )

    return _function().apply(y, classes, run)


@cache
def _function() -> Any:
    """Return the autograd function, made at its first use: its base class is torch's."""
    import torch
    from torch.autograd.function import once_differentiable

    class WithGradients(torch.autograd.Function):
        """A scalar whose gradients are known as soon as its value is."""

        @staticmethod
        def forward(
            ctx: Any, y: Any, classes: Any, run: Callable[[tuple[bool, bool]], tuple[Any, Any, Any]]
        ) -> Any:
            loss, d_y, d_classes = run((ctx.needs_input_grad[0], ctx.needs_input_grad[1]))
            ctx.save_for_backward(d_y, d_classes)
            return loss

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, incoming: Any) -> tuple[Any, Any, None]:
            d_y, d_classes = (None if g is None else g * incoming.to(g.dtype) for g in ctx.saved_tensors)
            return d_y, d_classes, None

    return WithGradients
