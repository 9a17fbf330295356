"""CosFace: W learned by a margin softmax over identities. torch is imported only when it runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from .errors import SolverUsageError
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities
from .heads import HEADS
from .losses import DEFAULTS, LOSSES
from .training import LabelledRows, TrainResult, train

__all__ = [
    "ArraySource",
    "CosFace",
    "LabelledRows",
    "TrainResult",
    "preset_auto",
    "preset_paper",
    "train",
]


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Rows and labels held in memory.

    Attributes
    ----------
    rows
        (n, d).
    labels
        (n,) integers 0..C-1; an origin is a member of its class.

    Raises
    ------
    SolverUsageError
        As many labels as rows are needed.
    """

    rows: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.labels):
            raise SolverUsageError(
                f"There are {len(self.rows)} rows and {len(self.labels)} labels. Give every row its label."
            )

    @property
    def dim(self) -> int:
        """Length of a row."""
        return int(self.rows.shape[1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows at `indices`."""
        return self.rows[indices]


_COUNTS = (
    *("rank", "batch_identities", "per_identity", "steps", "schedule_every", "validate_every"),
    *("layers", "accumulate", "patience", "seed"),
)
_CHOICES = {
    "weight_init": ("auto", "principal", "random"),
    "class_init": ("means", "random"),
    "loss": tuple(LOSSES),
    "head": HEADS,
    "precision": ("fp32", "tf32", "bf16"),
}


@dataclass(frozen=True)
class CosFace(Capabilities):
    """Large-margin cosine softmax (CosFace): one class per origin, its translations among its members.

    Loss: cross-entropy of s (cos(x W, c_j) - m [j = y]) over all classes j (or `loss`), with W (d x rank)
    and the class weights c learned by Adam, without bias or weight decay. Price: 2 b d rank + 3 b C rank
    multiply-adds a step of b rows, and memory for C x rank class weights with two Adam moments.

    The defaults are measured on small stores; `preset_auto` sizes them to the data and `preset_paper`
    gives the published recipe.

    Parameters
    ----------
    rank
        Columns of W.
    scale, margin
        s and m of the loss; by default those that `solvers.losses.DEFAULTS` has for it. They are resolved
        once: `dataclasses.replace` with another loss keeps these numbers unless it is given others.
    lr
        Adam's peak learning rate for W and the class weights, in units of the entries' initial size
        when `relative_lr`, else absolute.
    batch_identities, per_identity
        A batch is this many identities times this many rows; with fewer identities, all of them.
    steps
        Optimiser steps.
    warmup, flat
        Shares of the steps at which the rise ends, and at which the cosine decay to 0 begins.
    warmup_from
        Share of the learning rate at which the rise begins.
    schedule_every
        Steps between changes of the learning rate (the paper: once an epoch).
    ema
        Average W with decay min(`ema_decay`, (1 + n) / (10 + n)) after n steps and return the average.
    ema_decay
        The largest decay.
    validate_every
        Steps between validations and entries of the history; by a validation function the best W is kept.
    weight_init
        "principal": W starts at the top right singular vectors of the (uncentred) rows. "random": seeded
        random orthonormal columns. "auto": the better of both by validation, "principal" without it.
        Principal starts win where origins vary in few directions, random ones where translations do.
    class_init
        "means": class weights start at the class means of x W, which short runs need, and which a W that is
        given as the start always gets. "random": Gaussian.
    relative_lr
        Whether `lr` is a share of the initial entries' size: entries of an orthonormal W shrink with
        1 / sqrt(d), so an absolute step would mean something else for every encoder.
    max_seconds
        Stop after so many seconds, validation counted, wherever the run is. Which step that is depends on
        the machine; the report says it.
    seed
        Seed of W, the class weights and the sampler.
    device
        "auto" (CUDA when there is one), "cpu", "cuda", ...
    loss
        "cosface", "softmax" or "circle" (`solvers.losses`, where each has its own scale and margin).
    head, layers, latent_shape
        What stands in the place of W (`solvers.heads`); "linear" is W itself.
    precision
        "fp32", "tf32" (operands of float32 products and convolutions on CUDA rounded to 10 bits) or "bf16"
        (operands of all products rounded to 8 bits, and what the head returns and passes on between its
        layers, too; sums, and the loss's own products, in float32). Weights and Adam's moments are float32
        always.
    accumulate
        Parts of a batch that are computed one after the other, for less memory: the gradient is that of the
        whole batch.
    patience
        Stop after so many validations without a better mAP, once the warm-up is over; None never does.
    """

    rank: int = 512
    scale: float = None  # type: ignore[assignment]  # a number once __post_init__ has looked it up
    margin: float = None  # type: ignore[assignment]
    lr: float = 0.004
    batch_identities: int = 64
    per_identity: int = 2
    steps: int = 400
    warmup: float = 0.1
    flat: float = 0.4
    schedule_every: int = 1
    ema: bool = True
    validate_every: int = 50
    weight_init: str = "auto"
    class_init: str = "means"
    relative_lr: bool = True
    max_seconds: float | None = None
    seed: int = 0
    device: str = "auto"
    loss: str = "cosface"
    head: str = "linear"
    layers: int = 1
    latent_shape: tuple[int, int, int] | None = None
    precision: str = "fp32"
    accumulate: int = 1
    patience: int | None = None
    ema_decay: float = 0.9999
    warmup_from: float = 0.01
    name: ClassVar[str] = "cosface"
    needs_pairs: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    nested_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for knob in _COUNTS:
            value, least = getattr(self, knob), 0 if knob == "seed" else 1
            if knob == "patience" and value is None:
                continue
            if not isinstance(value, Integral) or value < least:
                raise SolverUsageError(f"{knob} must be a whole number, at least {least}, not {value!r}.")
            object.__setattr__(self, knob, int(value))
        for knob, choices in _CHOICES.items():
            if getattr(self, knob) not in choices:
                raise SolverUsageError(
                    f"{knob} must be one of {', '.join(choices)}, not {getattr(self, knob)!r}."
                )
        for knob, own in zip(("scale", "margin"), DEFAULTS[self.loss], strict=True):
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, own)
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not (0 < self.lr < math.inf and 0 < self.scale < math.inf and math.isfinite(self.margin)):
            raise SolverUsageError(
                f"lr and scale must be positive and finite, and the margin finite; got {self.lr}, "
                f"{self.scale} and {self.margin}."
            )
        if self.loss == "softmax" and self.margin != 0:
            raise SolverUsageError(
                f"The softmax loss has no margin, and {self.margin} was given. Leave it out, or take the "
                "loss cosface."
            )
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise SolverUsageError(f"max_seconds must be positive, or None; got {self.max_seconds}.")
        if not (0 <= self.ema_decay < 1 and 0 <= self.warmup_from <= 1):
            raise SolverUsageError(
                f"ema_decay must be 0 or more and less than 1, and warmup_from from 0 to 1; got "
                f"{self.ema_decay} and {self.warmup_from}."
            )
        if not 0.0 <= self.warmup <= self.flat <= 1.0:
            raise SolverUsageError(
                f"0 <= warmup <= flat <= 1 is needed (shares of the steps); got {self.warmup} and "
                f"{self.flat}."
            )

    def fit(self, source: LabelledRows, **how: Any) -> Fitted:
        """Train on labelled rows and return W with its history in the report.

        Parameters
        ----------
        source
            Labelled rows.
        **how
            validate, progress, observe, checkpoint, init, stop, world, free_bytes: as `train` takes them.

        Raises
        ------
        SolverUsageError
            The head is no single matrix: only `train` returns those.
        """
        if self.head != "linear":
            raise SolverUsageError(
                f"fit returns a W, and the head {self.head} has none. Use solvers.sgd.train and its snapshot."
            )
        return fitted(self, train(self, source, **how))


def fitted(cfg: CosFace, result: TrainResult) -> Fitted:
    """Return the W of a training run with an account of it."""
    W = result.weights
    assert W is not None  # noqa: S101 - fit has refused other heads
    if result.weight_init == "init":
        # Whatever was asked for: see `class_init`.
        cfg = replace(cfg, class_init="means")
    text = f"CosFace, {result.steps} steps; W of step {result.best_step}"
    text += "." if result.best_map is None else f", chosen by validation mAP {result.best_map:.4f}."
    report = make_report(
        path="sgd",
        statement=" ".join([text, *result.notes]),
        requested_rank=cfg.rank,
        effective_rank=cfg.rank,
        history=result.history,
        best_step=result.best_step,
        best_map=result.best_map,
        start_map=result.start_map,
        steps=result.steps,
        stopped_early=result.stopped_early,
        seconds=result.seconds,
        weight_init=result.weight_init,
        notes=list(result.notes),
        **result.ran,
    )
    spectrum = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    return Fitted(W, W, None, "cosine", spectrum, cfg.name, asdict(cfg), seed=cfg.seed, report=report)


def preset_paper(rank: int = 512, seed: int = 0) -> CosFace:
    """Return the published recipe: 25 epochs of 2,000 steps, batches of 128 identities x 4 rows.

    Adam at 3.5e-4, learning rate set once an epoch: 1 % to 100 % over 5 epochs, flat to 10, cosine to 25.
    """
    return CosFace(
        rank=rank,
        lr=3.5e-4,
        relative_lr=False,
        batch_identities=128,
        per_identity=4,
        steps=50_000,
        warmup=5 / 25,
        flat=10 / 25,
        schedule_every=2_000,
        validate_every=2_000,
        weight_init="random",
        class_init="random",
        seed=seed,
    )


def preset_auto(
    n_identities: int, n_rows: int, dim: int, budget: float = 40.0, *, rank: int = 512, seed: int = 0
) -> CosFace:
    """Size steps and batch to the data, so that training takes at most about `budget` seconds.

    The steps are estimated for two CPU cores, at six tenths of the budget, and a clock stops the run at the
    budget where the estimate was too low; training stops earlier once every row has been seen some 30
    times, since more only overfits small stores.
    """
    rank = min(rank, dim)
    per_identity = max(2, min(4, round(n_rows / max(n_identities, 1))))
    identities = min(max(n_identities, 1), 128 // per_identity)
    rows = identities * per_identity
    # Operations, two a multiply-add, of both products and their gradients; memory traffic of Adam and the
    # average.
    arithmetic = (4.0 * rows * dim * rank + 6.0 * rows * n_identities * rank) / 5e10
    traffic = 12.0 * 4.0 * rank * (1.3 * dim + n_identities) / 8e9
    affordable = int(0.6 * budget / (arithmetic + traffic + 1e-3))
    useful = math.ceil(30 * n_rows / rows)
    steps = max(20, min(affordable, max(useful, 100), 2_000))
    return CosFace(
        rank=rank,
        batch_identities=identities,
        per_identity=per_identity,
        steps=steps,
        validate_every=max(1, steps // 12),
        patience=6,
        max_seconds=budget,
        seed=seed,
    )
