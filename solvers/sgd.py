"""CosFace: W learned by a margin softmax over identities. torch is imported only when it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import DivergedError, SolverUsageError
from .fitted import Fitted, make_report
from .gallery_maps import Capabilities
from .rank import check_rank
from .training import (
    Keeper,
    LabelledRows,
    Progress,
    State,
    TrainResult,
    Validate,
    batches,
    choose_start,
    cosface_loss,
    count_classes,
    schedule,
    start_classes,
)

__all__ = [
    "ArraySource",
    "CosFace",
    "LabelledRows",
    "TrainResult",
    "cosface_loss",
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
    """

    rows: np.ndarray
    labels: np.ndarray

    @property
    def dim(self) -> int:
        """Length of a row."""
        return int(self.rows.shape[1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows at `indices`."""
        return self.rows[indices]


@dataclass(frozen=True)
class CosFace(Capabilities):
    """Large-margin cosine softmax (CosFace): one class per origin, its translations among its members.

    Loss: cross-entropy of s (cos(x W, c_j) - m [j = y]) over all classes j, with W (d x rank) and the
    class weights c learned by Adam, without bias or weight decay. Price: 4 b d rank + 6 b C rank
    multiply-adds a step of b rows, and memory for C x rank class weights with two Adam moments.

    The defaults are measured on small stores; `preset_auto` sizes them to the data and `preset_paper`
    gives the published recipe.

    Parameters
    ----------
    rank
        Columns of W.
    scale, margin
        s and m of the loss.
    lr
        Adam's peak learning rate for W and the class weights, in units of the entries' initial size
        when `relative_lr`, else absolute.
    batch_identities, per_identity
        A batch is this many identities times this many rows; with fewer identities, all of them.
    steps
        Optimiser steps.
    warmup, flat
        Shares of the steps at which the rise from 1 % ends, and at which the cosine decay to 0 begins.
    schedule_every
        Steps between changes of the learning rate (the paper: once an epoch).
    ema
        Average W with decay min(0.9999, (1 + n) / (10 + n)) and return the average.
    validate_every
        Steps between validations, where a validation function is given; the best W is kept.
    weight_init
        "principal": W starts at the top right singular vectors of the (uncentred) rows. "random": seeded
        random orthonormal columns. "auto": the better of both by validation, "principal" without it.
        Principal starts win where origins vary in few directions, random ones where translations do.
    class_init
        "means": class weights start at the class means of x W, which short runs need. "random": Gaussian.
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
    """

    rank: int = 512
    scale: float = 64.0
    margin: float = 0.35
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
    name: ClassVar[str] = "cosface"
    needs_pairs: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_torch: ClassVar[bool] = True
    nested_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for knob in ("rank", "batch_identities", "per_identity", "steps", "schedule_every", "validate_every"):
            if getattr(self, knob) < 1:
                raise SolverUsageError(f"{knob} must be at least 1, not {getattr(self, knob)}.")
        if not (self.lr > 0 and self.scale > 0 and math.isfinite(self.margin)):
            raise SolverUsageError(
                f"lr and scale must be positive and the margin finite; got {self.lr}, {self.scale}, "
                f"{self.margin}."
            )
        if not 0.0 <= self.warmup <= self.flat <= 1.0:
            raise SolverUsageError(
                f"0 <= warmup <= flat <= 1 is needed (shares of the steps); got {self.warmup} and "
                f"{self.flat}."
            )
        if self.weight_init not in ("auto", "principal", "random"):
            raise SolverUsageError(
                f"weight_init must be 'auto', 'principal' or 'random', not {self.weight_init!r}."
            )
        if self.class_init not in ("means", "random"):
            raise SolverUsageError(f"class_init must be 'means' or 'random', not {self.class_init!r}.")

    def fit(
        self, source: LabelledRows, *, validate: Validate | None = None, progress: Progress | None = None
    ) -> Fitted:
        """Train on labelled rows and return W with its history in the report."""
        result = train(self, source, validate=validate, progress=progress)
        W = result.weights
        text = f"CosFace, {result.steps} steps; W of step {result.best_step}"
        text += "." if result.best_map is None else f", chosen by validation mAP {result.best_map:.4f}."
        report = make_report(
            path="sgd",
            statement=text,
            requested_rank=self.rank,
            effective_rank=self.rank,
            history=result.history,
            best_step=result.best_step,
            best_map=result.best_map,
            start_map=result.start_map,
            seconds=result.seconds,
            weight_init=result.weight_init,
        )
        spectrum = np.linalg.svd(W.astype(np.float64), compute_uv=False)
        return Fitted(W, W, None, "cosine", spectrum, self.name, asdict(self), seed=self.seed, report=report)


def preset_paper(rank: int = 512, seed: int = 0) -> CosFace:
    """Return the published recipe: 25 epochs of 2,000 steps, batches of 128 identities x 4 rows.

    Adam at 3.5e-4, learning rate set once an epoch: 1 % to 100 % over 5 epochs, flat to 10, cosine to 25.
    """
    return CosFace(
        rank=rank,
        scale=64.0,
        margin=0.35,
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

    The steps are estimated for two CPU cores, and a clock stops the run at 1.25 times the budget where the
    estimate was too low; training stops earlier once every row has been seen some
    30 times, since more only overfits small stores.
    """
    rank = min(rank, dim)
    per_identity = max(2, min(4, round(n_rows / max(n_identities, 1))))
    identities = min(max(n_identities, 1), 128 // per_identity)
    rows = identities * per_identity
    # Multiply-adds of both products and their gradients, and the memory traffic of Adam and the average.
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
        max_seconds=1.25 * budget,
        seed=seed,
    )


def train(
    cfg: CosFace,
    source: LabelledRows,
    *,
    validate: Validate | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train W. On a CPU the same seed, data and thread count give the same W.

    Parameters
    ----------
    cfg
        The recipe.
    source
        Labelled rows.
    validate
        Called with W (d, rank) at the start and every `validate_every` steps; its mAP picks the W kept.
    progress
        Called after every step with (step, steps, loss).

    Raises
    ------
    DivergedError
        If the loss is not finite; it carries the last good W.
    """
    import torch

    check_rank(cfg.rank, source.dim)
    labels = np.asarray(source.labels)
    n_classes = count_classes(labels)
    device = torch.device(_device_name(cfg.device))
    rng = np.random.default_rng(cfg.seed)
    start = time.perf_counter()
    with _full_precision(torch):
        start_name, W0 = choose_start(cfg, source, rng, validate)
        state = State(torch, cfg, W0, start_classes(cfg, source, labels, n_classes, W0, rng), device)
        keeper = Keeper(validate, state.weights)
        draws = batches(labels, n_classes, cfg, rng)
        for step in range(1, cfg.steps + 1):
            indices = next(draws)
            x = torch.as_tensor(np.asarray(source.gather(indices), dtype=np.float32), device=device)
            y = torch.as_tensor(labels[indices].astype(np.int64), device=device)
            lr = cfg.lr * schedule(step - 1, cfg)
            loss = state.step(x, y, lr)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"The loss of step {step} of {cfg.steps} is {loss} (learning rate {lr:.3g}). Lower the "
                    "learning "
                    "rate, or look for rows that are not finite; the last good W is kept on this error.",
                    state.last_good(keeper.best),
                )
            if progress is not None:
                progress(step, cfg.steps, loss)
            late = cfg.max_seconds is not None and time.perf_counter() - start > cfg.max_seconds
            if step % cfg.validate_every == 0 or step == cfg.steps or late:
                keeper.see(step, loss, lr, state.weights)
            if late:
                break
    return TrainResult(
        keeper.best,
        keeper.history,
        keeper.best_step,
        keeper.best_map,
        keeper.start_map,
        step,
        time.perf_counter() - start,
        start_name,
    )


def _device_name(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _full_precision(torch: Any) -> Iterator[None]:
    """Switch TF32 off for the run and put it back: it would round W to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
