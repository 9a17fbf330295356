"""The training loop: steps, validations, checkpoints, and all reasons to stop.

torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .checkpoint import Checkpoint
from .distributed import World
from .errors import SolverUsageError, StoppedError
from .heads import build_head
from .keeper import Keeper, Validate, Watch, order
from .memory import check_memory
from .rank import check_rank
from .sampler import Loader, arrived, batches, count_classes, peculiarities, read_ahead
from .starts import given_weights, mean_classes, random_classes, start_name, start_weights

if TYPE_CHECKING:
    from .sgd import CosFace
    from .state import Snapshot, State

Progress = Callable[[int, int, float], None]
Observe = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]


class LabelledRows(Protocol):
    """Rows with class labels, read in any order, from another thread than the one that made them."""

    @property
    def dim(self) -> int:
        """Length of a row."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) integers 0..C-1."""

    def gather(self, indices: np.ndarray) -> Any:
        """Return the rows at `indices`, (b, dim): a NumPy array or torch tensor of any float dtype."""


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The outcome of a training run.

    Attributes
    ----------
    weights
        (d, rank) float32: the best W by validation, or the last. None for a head that is no single matrix.
    history
        One dict for every validation (or every `validate_every` steps): step, loss, lr, map.
    best_step
        The step W comes from; 0 is the start.
    best_map, start_map
        Validation mAP of W and of the start, None without validation.
    steps, seconds, weight_init
        What was run, earlier runs of the same checkpoint counted, and the start that was taken.
    snapshot
        The head that the weights are those of.
    stopped_early
        "patience", "max_seconds", or None where all steps were taken.
    notes
        Sentences on how the data fall short of the recipe.
    ran
        Of the last run: device ("cpu", "cuda"), processes, threads (torch's, of the process that tells) and
        precision, which on a CPU is "fp32" where "tf32" was asked for.
    """

    weights: np.ndarray | None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_map: float | None = None
    start_map: float | None = None
    steps: int = 0
    seconds: float = 0.0
    weight_init: str = ""
    snapshot: Snapshot | None = None
    stopped_early: str | None = None
    notes: tuple[str, ...] = ()
    ran: Mapping[str, Any] = field(default_factory=dict)


def schedule(step: int, cfg: CosFace) -> float:
    """Share of the peak learning rate: linear from `warmup_from`, flat, then a cosine towards 0."""
    at = (step // cfg.schedule_every) * cfg.schedule_every / cfg.steps
    if at < cfg.warmup:
        return cfg.warmup_from + (1.0 - cfg.warmup_from) * at / cfg.warmup
    if at < cfg.flat or cfg.flat == 1.0:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (at - cfg.flat) / (1.0 - cfg.flat)))


def train(
    cfg: CosFace,
    source: LabelledRows,
    *,
    validate: Validate | None = None,
    progress: Progress | None = None,
    observe: Observe | None = None,
    checkpoint: Checkpoint | None = None,
    init: np.ndarray | None = None,
    stop: Stop | None = None,
    world: World | None = None,
    free_bytes: int | None = None,
) -> TrainResult:
    """Train W. On a CPU the same seed, data and thread count give the same W, interrupted or not.

    Parameters
    ----------
    cfg
        The recipe.
    source
        Labelled rows; one batch is read ahead, in a thread.
    validate
        Called with a `Snapshot` at the start and every `validate_every` steps; its mAP picks the W kept.
    progress
        Called after every step with (step, steps, loss); on a GPU the loss is the last that was looked at.
    observe
        Called at every validation with a dict: step, loss, lr, map, best_map, best_step, seconds and
        rows_per_second (validations not counted).
    checkpoint
        Where the run is kept, and gone on from when it was interrupted.
    init
        (d, rank): W starts there, and class weights at the means of their rows.
    stop
        Asked between steps; True saves the checkpoint and ends the run.
    world
        The processes that share the work; the batch is that of one process alone.
    free_bytes
        Memory that may be used; by default what is free on the device.

    Raises
    ------
    DivergedError
        The loss is not finite; it carries the last good W.
    StoppedError
        `stop` said so.
    BadRowsError, SolverMemoryError, CheckpointError, SolverUsageError
        Rows, sizes, a checkpoint or a request that cannot be used; before the first step.
    """
    check_rank(cfg.rank, source.dim)
    world = World(device=_device_name(cfg.device)) if world is None else world
    run = Run(cfg, source, world, validate, checkpoint, init)
    check_memory(cfg, run.n_classes, source.dim, device=world.device, free=free_bytes)
    from .state import products

    with products(cfg.precision, world.device):
        run.begin()
        reason = _take_steps(run, progress, observe, stop)
    return run.result(reason)


def _take_steps(
    run: Run, progress: Progress | None, observe: Observe | None, stop: Stop | None
) -> str | None:
    """Take the steps still to come; return why they ended early, None if they did not."""
    cfg, state, keeper = run.cfg, run.state, run.keeper
    watch, pace = Watch(cfg, state, keeper), Pace(run)
    reader = read_ahead(run.batches(), Loader(run.source, run.labels, run.world.device))
    with closing(reader):
        for step, batch in enumerate(reader, start=run.taken + 1):
            if run.out_of_patience:
                run.save()
                return "patience"
            x, labels = arrived(batch)
            lr = cfg.lr * schedule(step - 1, cfg)
            watch.add(step, lr, state.step(x, labels, lr))
            run.taken = step
            if progress is not None and run.world.leads:
                progress(step, cfg.steps, watch.loss)
            decides = watch.fresh or run.world.size == 1
            late, asked, overdue = run.decide(stop) if decides else (False, False, False)
            if step % cfg.validate_every == 0 or step == cfg.steps or late:
                loss, rate = watch.look(), pace.rate()
                keeper.see(state.snapshot(step), loss, lr, waits=step > cfg.warmup * cfg.steps)
                pace.report(observe, rate)
            if late and step < cfg.steps:
                run.save()
                return "max_seconds"
            # Also the last step: what comes after training may be stopped, too.
            ends = step == cfg.steps
            if run.checkpoint is not None and (asked or overdue or ends or run.checkpoint.due(step)):
                watch.look()
                run.save()
            if asked and step < cfg.steps:
                raise StoppedError(
                    f"Training was stopped after step {step} of {cfg.steps}. "
                    + ("Run the same again to go on." if run.checkpoint else "Nothing of it was kept."),
                    step,
                    watch.last_good().weights,
                )
    return None


class Run:
    """One training run: what it was given, and what it has come to.

    Attributes
    ----------
    taken
        Steps that were taken, those of earlier runs counted.
    earlier
        Seconds that earlier runs took.
    """

    def __init__(
        self,
        cfg: CosFace,
        source: LabelledRows,
        world: World,
        validate: Validate | None,
        checkpoint: Checkpoint | None,
        init: np.ndarray | None,
    ) -> None:
        self.cfg, self.source, self.world = cfg, source, world
        self.labels = np.asarray(source.labels)
        self.n_classes = count_classes(self.labels)
        self.share = world.share(min(cfg.batch_identities, self.n_classes), "identities")
        rows = (self.share.stop - self.share.start) * cfg.per_identity
        if cfg.accumulate > rows:
            raise SolverUsageError(
                f"A process has {rows} rows of a batch and cannot compute them in {cfg.accumulate} parts. "
                "Lower accumulate."
            )
        self.checkpoint, self.init = checkpoint, init
        self.keeper = Keeper(validate, world)
        self.started, self.earlier, self.taken = time.perf_counter(), 0.0, 0
        self.weight_init = start_name(cfg, init)
        self.state: State

    @property
    def out_of_patience(self) -> bool:
        """Whether validation has not become better for as long as the recipe waits."""
        return self.cfg.patience is not None and self.keeper.waited >= self.cfg.patience

    def decide(self, stop: Stop | None) -> tuple[bool, bool, bool]:
        """Return whether the time is up, whether to stop and whether to save, as the leader's clock has it.

        All look at their losses before the leader saves: one that alone found them bad would leave the others
        waiting.
        """
        limit = self.cfg.max_seconds
        late = limit is not None and self.seconds > limit
        overdue = self.world.leads and self.checkpoint is not None and self.checkpoint.overdue()
        late, asked, overdue = self.world.agree((late, stop is not None and stop(), overdue))
        return late, asked, overdue

    @property
    def seconds(self) -> float:
        """Seconds of this run and of those before it."""
        return self.earlier + time.perf_counter() - self.started

    def begin(self) -> None:
        """Go on from the checkpoint, or start."""
        held = self.checkpoint.load(self._recipe()) if self.checkpoint and self.world.leads else None
        held = self.world.agree(held)
        if held is None:
            self._start()
        else:
            self._resume(*held)

    def batches(self) -> Iterator[np.ndarray]:
        """Yield this process's rows of every batch still to come."""
        draws = batches(self.labels, self.n_classes, self.cfg, done=self.taken)
        k = self.cfg.per_identity
        for rows in islice(draws, self.cfg.steps - self.taken):
            yield rows[self.share.start * k : self.share.stop * k]

    def save(self) -> None:
        """Write the checkpoint; weights that are not finite are not kept."""
        if self.checkpoint is None or not (self.world.leads and self.state.finite()):
            return
        best = {f"best.{name}": p.cpu().numpy() for name, p in self.keeper.best.head.named_parameters()}
        words = {
            "taken": self.taken,
            "seconds": self.seconds,
            "units": self.state.units,
            "weight_init": self.weight_init,
            "keeper": self.keeper.state(),
        }
        self.checkpoint.save(self.state.tensors() | best, words, self._recipe())

    def result(self, stopped_early: str | None) -> TrainResult:
        """Return what the run has come to."""
        best = self.keeper.best
        return TrainResult(
            best.weights,
            self.keeper.history,
            best.step,
            self.keeper.best_map,
            self.keeper.start_map,
            self.taken,
            self.seconds,
            self.weight_init,
            best,
            stopped_early,
            peculiarities(self.labels, self.cfg),
            self._ran(),
        )

    @property
    def device_type(self) -> str:
        """What computes: "cpu", "cuda"."""
        return self.world.device.split(":")[0]

    def _ran(self) -> dict[str, Any]:
        import torch

        precision = self.cfg.precision
        return {
            "device": self.device_type,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "precision": "fp32" if precision == "tf32" and self.device_type != "cuda" else precision,
        }

    def _recipe(self) -> dict[str, Any]:
        """Return what a checkpoint must have been made with to be gone on from."""
        init = None if self.init is None else f"{zlib.crc32(np.ascontiguousarray(self.init).data):08x}"
        rows = {"identities": self.n_classes, "rows": len(self.labels), "dim": self.source.dim}
        # A device's rounding is its own: a run that changes it is another run.
        return asdict(self.cfg) | rows | {"init": init, "device": self.device_type}

    def _head(self) -> Any:
        cfg = self.cfg
        return build_head(
            cfg.head,
            self.source.dim,
            cfg.rank,
            latent_shape=cfg.latent_shape,
            layers=cfg.layers,
            seed=cfg.seed,
        )

    def _start(self) -> None:
        from .state import Snapshot, State

        head = self._head().to(self.world.device)
        classes = np.zeros((self.n_classes, self.cfg.rank), dtype=np.float32)
        score = None
        if self.world.leads:
            rng = np.random.default_rng(self.cfg.seed)
            score = self._place(head, rng)
            classes = random_classes(self.cfg, self.n_classes, rng)
            # Random class weights would soon undo a W that was given.
            if self.cfg.class_init == "means" or self.init is not None:
                classes = mean_classes(classes, self.source, self.labels, Snapshot(head, 0).embed)
        self.weight_init, score = self.world.agree((self.weight_init, score))
        self.state = State(self.cfg, head, classes, self.world)
        start = self.state.snapshot(0)
        self.keeper.begin(start, self.keeper.score(start) if score is None else score)

    def _place(self, head: Any, rng: np.random.Generator) -> float | None:
        """Set W to the start asked for, or to the better by validation; return its score, if judged."""
        import torch

        from .state import Snapshot

        if self.weight_init == "seeded":
            return None
        names, validate = [self.weight_init], self.keeper.validate
        if self.weight_init == "auto":
            names = ["principal"] if validate is None else ["principal", "random"]
        starts = {name: self._start_weights(name, rng) for name in names}
        scores: dict[str, float] = {}
        for name, W in starts.items():
            with torch.no_grad():
                head.weight.copy_(torch.tensor(W))
            if validate is not None and len(starts) > 1:
                scores[name] = float(validate(Snapshot(copy.deepcopy(head), 0)))
        self.weight_init = max(scores, key=lambda name: order(scores[name])) if scores else names[0]
        with torch.no_grad():
            head.weight.copy_(torch.tensor(starts[self.weight_init]))
        return scores.get(self.weight_init)

    def _start_weights(self, name: str, rng: np.random.Generator) -> np.ndarray:
        if name == "init":
            assert self.init is not None  # noqa: S101 - only then has the start this name
            return given_weights(self.init, self.source.dim, self.cfg.rank)
        return start_weights(name, self.cfg, self.source, rng)

    def _resume(self, tensors: Mapping[str, np.ndarray], words: Mapping[str, Any]) -> None:
        from .state import State

        classes = np.zeros((self.n_classes, self.cfg.rank), dtype=np.float32)
        self.state = State(self.cfg, self._head(), classes, self.world)
        try:
            self.taken, self.earlier = int(words["taken"]), float(words["seconds"])
            self.weight_init = str(words["weight_init"])
            self.state.load(tensors, self.taken, words["units"])
            step = int(words["keeper"]["best_step"])
            self.keeper.load(words["keeper"], self.state.restored(tensors, "best.", step))
        except (KeyError, ValueError, TypeError) as error:
            assert self.checkpoint is not None  # noqa: S101 - it is where the tensors come from
            raise self.checkpoint.damaged(f"it does not hold what this recipe trains ({error})") from error


class Pace:
    """Rows a second between validations, and what is told of a run at each."""

    def __init__(self, run: Run) -> None:
        self.run, self.step, self.time = run, run.taken, time.perf_counter()

    def rate(self) -> float:
        """Return the rows a second since the last validation ended; asked before the next one begins."""
        cfg = self.run.cfg
        rows = min(cfg.batch_identities, self.run.n_classes) * cfg.per_identity * (self.run.taken - self.step)
        return rows / (time.perf_counter() - self.time)

    def report(self, observe: Observe | None, rate: float) -> None:
        """Tell what the last validation found, and begin to count again."""
        run, keeper = self.run, self.run.keeper
        if observe is not None and run.world.leads:
            observe(
                {
                    **keeper.history[-1],
                    "best_map": keeper.best_map,
                    "best_step": keeper.best.step,
                    "seconds": run.seconds,
                    "rows_per_second": rate,
                }
            )
        self.step, self.time = run.taken, time.perf_counter()


def _device_name(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
