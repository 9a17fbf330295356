"""The parts of a CosFace run: loss, optimiser state, schedule, identity sampler, starting points.

torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import SolverUsageError
from .gallery_maps import random_orthonormal
from .linalg import fix_signs, orthonormalise

if TYPE_CHECKING:
    from .sgd import CosFace

Validate = Callable[[np.ndarray], float]
Progress = Callable[[int, int, float], None]


class LabelledRows(Protocol):
    """Rows with class labels, read in any order."""

    @property
    def dim(self) -> int:
        """Length of a row."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) integers 0..C-1."""

    def gather(self, indices: np.ndarray) -> Any:
        """Return the rows at `indices`, (b, dim)."""


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The outcome of a training run.

    Attributes
    ----------
    weights
        (d, rank) float32: the best W by validation, or the last.
    history
        One dict for every validation (or every `validate_every` steps): step, loss, lr, map.
    best_step
        The step W comes from; 0 is the start.
    best_map, start_map
        Validation mAP of W and of the start, None without validation.
    steps, seconds, weight_init
        What was run, and the start that was taken.
    """

    weights: np.ndarray
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_map: float | None = None
    start_map: float | None = None
    steps: int = 0
    seconds: float = 0.0
    weight_init: str = ""


def cosface_loss(x: Any, W: Any, classes: Any, labels: Any, scale: float, margin: float) -> Any:
    """Return the mean CosFace loss of torch rows x (b, d), W (d, m), classes (C, m), labels (b,)."""
    from torch.nn import functional

    cosine = functional.normalize(x @ W) @ functional.normalize(classes).T
    target = functional.one_hot(labels, classes.shape[0]).to(cosine.dtype)
    return functional.cross_entropy(scale * (cosine - margin * target), labels)


class State:
    """W, class weights, optimiser and average on one device."""

    def __init__(self, torch: Any, cfg: CosFace, W: np.ndarray, classes: np.ndarray, device: Any) -> None:
        self.torch, self.cfg, self.count = torch, cfg, 0
        self.W = torch.nn.Parameter(torch.tensor(W, device=device))
        self.classes = torch.nn.Parameter(torch.tensor(classes, device=device))
        self.average = self.W.detach().clone()
        groups = [{"params": [p], "lr": 0.0} for p in (self.W, self.classes)]
        self.units = [
            float(p.detach().square().mean().sqrt()) if cfg.relative_lr else 1.0
            for p in (self.W, self.classes)
        ]
        self.optimiser = torch.optim.Adam(groups, fused=device.type == "cpu")

    def step(self, x: Any, y: Any, lr: float) -> float:
        """Take one step; a loss that is not finite changes nothing."""
        loss = cosface_loss(x, self.W, self.classes, y, self.cfg.scale, self.cfg.margin)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        for group, unit in zip(self.optimiser.param_groups, self.units, strict=True):
            group["lr"] = lr * unit
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.count += 1
        decay = min(0.9999, (1 + self.count) / (10 + self.count))
        self.average.lerp_(self.W.detach(), 1.0 - decay)
        return value

    def last_good(self, earlier: np.ndarray) -> np.ndarray:
        """Return the present W if it is finite, else the earlier one."""
        W = self.weights()
        return W if np.isfinite(W).all() else earlier

    def weights(self) -> np.ndarray:
        """Return the W that would be returned now, on the host."""
        W = self.average if self.cfg.ema else self.W.detach()
        return np.array(W.cpu().numpy(), dtype=np.float32)


class Keeper:
    """Keeps the best W by validation, or the latest finite one."""

    def __init__(self, validate: Validate | None, weights: Callable[[], np.ndarray]) -> None:
        self.validate = validate
        self.best, self.best_step = weights(), 0
        self.start_map = None if validate is None else float(validate(self.best))
        self.best_map = self.start_map
        self.history: list[dict[str, Any]] = [{"step": 0, "loss": None, "lr": 0.0, "map": self.start_map}]

    def see(self, step: int, loss: float, lr: float, weights: Callable[[], np.ndarray]) -> None:
        """Judge the present W."""
        W = weights()
        if not np.isfinite(W).all():
            return
        score = None if self.validate is None else float(self.validate(W))
        self.history.append({"step": step, "loss": loss, "lr": lr, "map": score})
        # Among equals the later one: where validation is saturated, the W that was trained.
        if score is None or self.best_map is None or score >= self.best_map:
            self.best, self.best_step, self.best_map = W, step, score


def schedule(step: int, cfg: CosFace) -> float:
    """Share of the peak learning rate: linear from 1 %, flat, then a cosine towards 0."""
    at = (step // cfg.schedule_every) * cfg.schedule_every / cfg.steps
    if at < cfg.warmup:
        return 0.01 + 0.99 * at / cfg.warmup
    if at < cfg.flat or cfg.flat == 1.0:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (at - cfg.flat) / (1.0 - cfg.flat)))


def batches(
    labels: np.ndarray, n_classes: int, cfg: CosFace, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield row indices of P identities x K rows; every identity once before any comes again."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(n_classes + 1))
    p, k = min(cfg.batch_identities, n_classes), cfg.per_identity
    queue = np.zeros(0, dtype=np.int64)
    while True:
        if len(queue) < p:
            # A class left over from the last round is not drawn twice into one batch.
            fresh = rng.permutation(n_classes)
            late = np.isin(fresh, queue)
            queue = np.concatenate([queue, fresh[~late], fresh[late]])
        chosen, queue = queue[:p], queue[p:]
        rows = []
        for c in chosen:
            members = order[starts[c] : starts[c + 1]]
            rows.append(rng.choice(members, size=k, replace=len(members) < k))
        yield np.concatenate(rows)


def start_classes(
    cfg: CosFace,
    source: LabelledRows,
    labels: np.ndarray,
    n_classes: int,
    W: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the class weights that training starts from, (C, rank)."""
    noise = rng.standard_normal((n_classes, cfg.rank)).astype(np.float32) / np.float32(math.sqrt(cfg.rank))
    if cfg.class_init == "random":
        return noise
    sums = np.zeros((n_classes, cfg.rank), dtype=np.float32)
    for at in range(0, len(labels), 2048):
        rows = np.arange(at, min(at + 2048, len(labels)))
        y = np.asarray(source.gather(rows), dtype=np.float32) @ W
        y /= np.maximum(np.linalg.norm(y, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        np.add.at(sums, labels[rows], y)
    norm = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norm > 0, sums / np.where(norm > 0, norm, 1), noise).astype(np.float32)


def choose_start(
    cfg: CosFace, source: LabelledRows, rng: np.random.Generator, validate: Validate | None
) -> tuple[str, np.ndarray]:
    """Return the name of the start and its W: the configured one, or the better by validation."""
    if cfg.weight_init != "auto":
        return cfg.weight_init, start_weights(cfg.weight_init, cfg, source, rng)
    if validate is None:
        return "principal", start_weights("principal", cfg, source, rng)
    starts = {name: start_weights(name, cfg, source, rng) for name in ("principal", "random")}
    scores = {name: float(validate(W)) for name, W in starts.items()}
    best = max(scores, key=lambda name: scores[name])
    return best, starts[best]


def start_weights(name: str, cfg: CosFace, source: LabelledRows, rng: np.random.Generator) -> np.ndarray:
    """Return the start called "principal" or "random", orthonormal columns (d, rank)."""
    d, m = source.dim, cfg.rank
    if name == "random":
        return random_orthonormal(d, m, cfg.seed).astype(np.float32)
    # Top right singular vectors by randomised subspace iteration; uncentred, because W has no centre.
    n = len(source.labels)
    chosen = np.sort(rng.choice(n, size=min(n, 8192), replace=False))
    rows = np.concatenate(
        [
            np.asarray(source.gather(chosen[i : i + 1024]), dtype=np.float32)
            for i in range(0, len(chosen), 1024)
        ]
    )
    basis = rng.standard_normal((d, min(m + 16, d))).astype(np.float32)
    for _ in range(3):
        basis = orthonormalise(rows.T @ (rows @ basis))
    inside = (rows @ basis).astype(np.float64)
    turn = np.linalg.eigh(inside.T @ inside)[1][:, ::-1]
    # Made orthonormal again in float64: few rows leave columns that float32 left nearly parallel.
    return fix_signs(orthonormalise(basis.astype(np.float64) @ turn))[:, :m].astype(np.float32)


def count_classes(labels: np.ndarray) -> int:
    """Return the number of classes, refusing fewer than two or labels that are not 0..C-1."""
    found = np.unique(labels)
    if labels.ndim != 1 or len(found) < 2:
        raise SolverUsageError(
            f"CosFace tells identities apart and needs at least 2 of them; there are {len(found)}. "
            "Use the method analytic, which needs the collection alone."
        )
    if not np.array_equal(found, np.arange(len(found))):
        raise SolverUsageError(
            f"Labels must be 0..C-1, every class with a row; {len(found)} classes run from {found[0]} to "
            f"{found[-1]}. "
            "Number them with numpy.unique(..., return_inverse=True)."
        )
    return len(found)
