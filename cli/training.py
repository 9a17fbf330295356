"""CosFace on a store's rows: what it is trained on, how its run is sized, kept, stopped and gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cli import placement, recipe
from cli.choosing import Judge
from cli.collection import Collection, Queries, Rows
from cli.curves import Course, samples
from cli.guard import stoppable
from cli.knobs import SolveOptions, listed
from cli.simulating import SimulatedPairs
from latentstore.encoders.devices import pick_device
from latentstore.errors import UsageError
from latentstore.results import Curve
from solvers.checkpoint import Checkpoint
from solvers.distributed import World
from solvers.errors import CheckpointError, StoppedError
from solvers.fitted import Fitted
from solvers.memory import bytes_needed, check_memory
from solvers.projection import Projection
from solvers.sgd import ArraySource, CosFace, LabelledRows

Progress = Callable[[int, int, float], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """How a training run starts, where its latents lie, and what it leaves beside W.

    Attributes
    ----------
    out : Path, optional
        W's file, beside which checkpoint and log lie. Without it nothing is kept, and a run cannot go on.
    init : Path, optional
        The Projection that W starts at.
    latents : {"gpu", "host", "store"}, optional
        Chosen by counting bytes where it is not named.
    log, plot : Path, optional
        JSON lines, one a validation (by default beside W), and a PNG of the curves.
    fresh : bool
        Start anew where a checkpoint lies.
    checkpoint_every : float
        Seconds between checkpoints.
    world : World, optional
        The processes that train together.
    """

    out: Path | None = None
    init: Path | None = None
    latents: str | None = None
    log: Path | None = None
    plot: Path | None = None
    fresh: bool = False
    checkpoint_every: float = 60.0
    world: World | None = None

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes."""
        return self.world is None or self.world.leads

    def beside(self, suffix: str) -> Path | None:
        """Return a file beside W's: ``W.safetensors`` → ``W.checkpoint.safetensors``."""
        return None if self.out is None else self.out.with_suffix(suffix)

    @property
    def checkpoint(self) -> Path | None:
        """Where the run keeps its state."""
        return self.beside(".checkpoint.safetensors")

    @property
    def log_file(self) -> Path | None:
        """Where the validations go, by default beside W; None where this process does not write."""
        return (self.log or self.beside(".log.jsonl")) if self.leads else None


@dataclass(frozen=True)
class Trained:
    """A training run's W with its account.

    Attributes
    ----------
    fitted : Fitted
    choices : list of dict
        The validation table by step, empty without a judge.
    latents : str
        Where the latents lay, in words.
    notes : list of str
    curves : list of Curve
    """

    fitted: Fitted
    choices: list[dict[str, Any]]
    latents: str
    notes: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is trained on: rows of the store, or simulated pairs in memory, with the class of each row."""

    collection: Collection
    rows: Rows
    labels: npt.NDArray[np.int64]
    without: int = 0
    simulated: SimulatedPairs | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.labels) * self.collection.store.layout.row_bytes

    def digest(self) -> str:
        """Return what changes with the rows or their classes."""
        drawn = "" if self.simulated is None else self.simulated.strengths.name
        both = self.rows.tobytes() + self.labels.astype(np.int64).tobytes() + drawn.encode()
        return hashlib.sha256(both).hexdigest()[:16]


def fit_cosface(
    collection: Collection,
    options: SolveOptions,
    rank: int,
    *,
    judge: Judge | None,
    asked: Queries | None = None,
    simulated: SimulatedPairs | None = None,
    init: Projection | None = None,
    progress: Progress | None = None,
    run: Run | None = None,
    say: Say = lambda text: None,
) -> Trained:
    """Train on the training split; a judge chooses the step.

    Parameters
    ----------
    asked : Queries, optional
        Validation queries whose cosines with their origins are followed.
    init : Projection, optional
        Where W starts; of ``rank`` columns or more.
    run : Run, optional
        Without it nothing is written, and Ctrl-C ends at once.
    say : callable
        Takes a line for where the latents lie, and one a validation.

    Raises
    ------
    UsageError
        One identity, latents that do not fit where they were asked for, a checkpoint of another run.
    KeyboardInterrupt
        Ctrl-C or SIGTERM: the run was saved, and the text says how to go on.
    """
    keep = run or Run()
    data = training_rows(collection) if simulated is None else _simulated_rows(simulated)
    cfg = recipe.build(
        options.preset,
        options.recipe,
        n_identities=int(data.labels.max()) + 1,
        n_rows=len(data.labels),
        dim=collection.store.layout.dim,
        rank=rank,
        seed=options.seed,
        budget=options.budget,
        warm=init is not None,
    )
    device = str(pick_device(cfg.device)) if keep.world is None else keep.world.device
    source, place, left = placed(data, cfg, keep.latents, device)
    say(place.sentence)
    notes = _without(data)
    notes += _partly(init)
    for text in notes:
        say(text)
    silent = run is None or not run.leads
    followed = [] if silent or judge is None or asked is None else samples(collection, asked, simulated)
    resumed = keep.checkpoint is not None and keep.checkpoint.exists() and not keep.fresh
    shown: Say = (lambda text: None) if silent else say
    course = Course(judge, followed, log=keep.log_file, resumed=resumed, say=shown)
    if resumed:
        say(f"Going on from {keep.checkpoint} (--fresh starts anew).")
    losses: list[float] = []

    def stepped(step: int, steps: int, loss: float) -> None:
        losses[1:] = [loss]  # the first and the last
        if progress is not None:
            progress(step, steps, loss)

    with nullcontext(lambda: None) if keep.checkpoint is None else stoppable(say) as came:
        try:
            fitted = cfg.fit(
                source,
                validate=None if judge is None else course.validate,
                progress=stepped,
                observe=course.observe,
                checkpoint=_checkpoint(keep, data, asked, init),
                init=None if init is None else np.ascontiguousarray(init.query_map[:, :rank]),
                stop=lambda: came() is not None,
                world=keep.world,
                free_bytes=left,
            )
        except StoppedError as stopped:
            text = f"Stopped after step {stopped.step:,} of {cfg.steps:,}. {keep.checkpoint} holds the run: "
            raise type(came() or KeyboardInterrupt())(
                text + "run the same command again to go on from there."
            ) from None
        except CheckpointError as error:
            raise UsageError(f"{error} --fresh starts anew in its place.") from error
    notes += _early(fitted.report, cfg) + _untrained(fitted.report, losses, judged=judge is not None)
    history = [h for h in fitted.report["history"] if h["map"] is not None]
    choices = [{"method": "cosface", "knobs": {"step": h["step"]}, "map": h["map"]} for h in history]
    return Trained(fitted, choices, place.sentence, notes, course.curves())


def finished(run: Run, trained_curves: list[Curve], best: int | None) -> None:
    """Draw the plot, and delete the checkpoint: W and its results are written, and nothing is left to do."""
    if run.plot is not None:
        from cli.render_curves import draw

        draw(trained_curves, best, run.plot)
    if run.checkpoint is not None:
        run.checkpoint.unlink(missing_ok=True)


def placed(
    data: _Rows, cfg: CosFace, asked: str | None, device: str
) -> tuple[LabelledRows, placement.Placement, int]:
    """Return the rows where they are fastest to draw from, the words for it, and the bytes left to train in.

    Raises
    ------
    SolverMemoryError
        Training itself does not fit: nothing was read.
    """
    n_classes, dim = int(data.labels.max()) + 1, data.collection.store.layout.dim
    room = placement.free(device, placement.local_processes())
    own, have = ("host", room.host) if room.gpu is None else ("gpu", room.gpu)
    check_memory(cfg, n_classes, dim, device=device, free=have)
    beside = bytes_needed(cfg, n_classes, dim)
    place = placement.choose(data.n_bytes, room, asked=asked, beside=beside)
    left = have - data.n_bytes * (place.place == own)
    if data.simulated is None:
        return placement.labelled(data.collection, data.rows, data.labels, place.place, device), place, left
    return _simulated_source(data.simulated, data, place.place, room, device), place, left


def _simulated_source(
    simulated: SimulatedPairs, data: _Rows, place: str, room: placement.Free, device: str
) -> LabelledRows:
    if place == "store":
        raise UsageError(
            f"--simulate draws its translations in memory: {data.n_bytes / 1e9:.1f} GB, and "
            f"{room.host / 1e9:.1f} GB are free. Write them into a store first (latentstore simulate --store "
            f"{data.collection.store.path} --out simulated.zarr), which can be trained from where it lies."
        )
    held, at = np.empty((0, 0)), 0
    for sides in simulated.pairs():
        if not at:
            held = np.empty((len(data.labels), sides[0].shape[1]), sides[0].dtype)
        for first, side in zip((0, len(held) // 2), sides, strict=True):
            held[first + at : first + at + len(side)] = side
        at += len(sides[0])
    if place == "host":
        return ArraySource(held, data.labels)
    return placement.on_device(placement.host_blocks(held), len(held), data.labels, device)


def training_rows(collection: Collection) -> _Rows:
    """Return the training split's pairs as rows with classes, an origin being a member of its own."""
    origins, translated = collection.pairs("train")
    rows = np.concatenate([np.unique(origins), translated])
    mine = collection.gallery[collection.split[collection.gallery] == "train"]
    without = len(set(collection.identity[mine].tolist()) - set(collection.identity[translated].tolist()))
    return _Rows(collection, rows, _classes(collection, rows), without)


def _simulated_rows(simulated: SimulatedPairs) -> _Rows:
    labels = _classes(simulated.collection, simulated.rows)
    return _Rows(simulated.collection, simulated.rows, np.concatenate([labels, labels]), 0, simulated)


def _early(report: Mapping[str, Any], cfg: CosFace) -> list[str]:
    """Say why a run took fewer steps than it had; nothing where it took all."""
    reason = {
        "patience": f"{cfg.patience} validations in a row were no better (--patience)",
        "max_seconds": f"{cfg.max_seconds or 0:g} s had passed (--budget)",
    }.get(report.get("stopped_early") or "")
    return (
        [] if reason is None else [f"Training ended at step {report['steps']:,} of {cfg.steps:,}: {reason}."]
    )


def _partly(init: Projection | None) -> list[str]:
    """Say what of a map to start at is not taken."""
    if init is None:
        return []
    parts = {
        "its centre": init.center is not None,
        "its map of references": not init.symmetric,
        "its bias": init.score != "cosine",
    }
    left = [name for name, there in parts.items() if there]
    if not left:
        return []
    text = f"Of --init the columns for queries are taken, not {listed(left)}: it starts near that map."
    return [text]


def _untrained(report: Mapping[str, Any], losses: list[float], *, judged: bool) -> list[str]:
    """Say where W is the start, or merely the last step's, and where the loss did not fall."""
    notes = []
    if len(losses) > 1 and not losses[-1] < losses[0]:
        notes.append(
            f"The loss did not fall ({losses[0]:.3g} at the first step, {losses[-1]:.3g} at the last): this "
            "run learned nothing, or diverged. Lower --lr."
        )
    if report["best_step"] == 0:
        notes.append("No step was better than the start: W is the start, and training added nothing.")
    elif not judged:
        notes.append("No validation queries: W is the last step's, and no mAP or cosines were followed.")
    return notes


def _without(data: _Rows) -> list[str]:
    if not data.without:
        return []
    n, all_ = data.without, data.without + int(data.labels.max()) + 1
    text = (
        f"{n:,} of {all_:,} identities of the training split have no translation, and CosFace learns nothing "
        "from them: they are left out of its classes."
    )
    return [text]


def _classes(collection: Collection, rows: Rows) -> npt.NDArray[np.int64]:
    names, labels = np.unique(collection.labels(collection.identity[rows]).astype(str), return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            f"CosFace tells identities apart and needs at least 2 with pairs in the training split; "
            f"{collection.store.path} has {len(names)}. Encode more images, or use --method analytic."
        )
    return labels.astype(np.int64)


def _checkpoint(run: Run, data: _Rows, asked: Queries | None, init: Projection | None) -> Checkpoint | None:
    """Return where the run is kept, bound to what it is trained, judged and started with."""
    if run.checkpoint is None:
        return None
    if run.fresh and run.leads:
        run.checkpoint.unlink(missing_ok=True)
    judged = "none" if asked is None else f"{asked.collection.data_hash}/{_digest(asked.rows)}"
    start = "none" if init is None else _digest(init.query_map)
    key = f"data {data.collection.data_hash}, rows {data.digest()}, validation {judged}, init {start}"
    return Checkpoint(run.checkpoint, every_seconds=run.checkpoint_every, key=key)


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
