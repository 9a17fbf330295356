"""The best head so far, and the losses: what is judged while a run goes on.

torch is imported by the functions that use it, never by importing this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .distributed import World
from .errors import DivergedError

if TYPE_CHECKING:
    from .sgd import CosFace
    from .state import Snapshot, State

Validate = Callable[["Snapshot"], float]

UNSEEN_STEPS = 16
"""On a GPU the host looks at the losses after so many steps: a look makes it wait for the device."""


def order(score: float) -> float:
    """Return what scores are compared by: one that is no number is below all others."""
    return -math.inf if math.isnan(score) else score


class Keeper:
    """Keeps the best snapshot by validation, or the latest finite one; alike in every process."""

    def __init__(self, validate: Validate | None, world: World) -> None:
        self.validate, self.world = validate, world
        self.history: list[dict[str, Any]] = []
        self.best: Any = None
        self.best_map: float | None = None
        self.start_map: float | None = None
        self.waited = 0

    def score(self, snapshot: Snapshot) -> float | None:
        """Return the leader's validation mAP, None without validation."""
        judged = self.validate is not None and self.world.leads
        return self.world.agree(float(self.validate(snapshot)) if judged else None)  # type: ignore[misc]

    def begin(self, snapshot: Snapshot, score: float | None) -> None:
        """Take the start and its score."""
        self.best, self.best_map, self.start_map = snapshot, score, score
        self.history = [{"step": 0, "loss": None, "lr": 0.0, "map": score}]

    def see(self, snapshot: Snapshot, loss: float, lr: float, *, waits: bool = True) -> None:
        """Judge a snapshot; one that is not finite is passed over. Patience is spent where it `waits`."""
        if not snapshot.finite():
            return
        score = self.score(snapshot)
        self.history.append({"step": snapshot.step, "loss": loss, "lr": lr, "map": score})
        better = score is None or self.best_map is None or order(score) > order(self.best_map)
        self.waited = 0 if better else self.waited + waits
        # Among equals the later one: where validation is saturated, the W that was trained.
        if score is None or self.best_map is None or order(score) >= order(self.best_map):
            self.best, self.best_map = snapshot, score

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of it in words."""
        names = ("history", "best_map", "start_map", "waited")
        return {name: getattr(self, name) for name in names} | {"best_step": self.best.step}

    def load(self, state: Mapping[str, Any], best: Snapshot) -> None:
        """Take over what `state` returned."""
        self.history, self.waited = list(state["history"]), int(state["waited"])
        self.best, self.best_map, self.start_map = best, state["best_map"], state["start_map"]


class Watch:
    """Looks at the losses as often as that is cheap, and keeps a head from before any that is not finite."""

    def __init__(self, cfg: CosFace, state: State, keeper: Keeper) -> None:
        self.cfg, self.state, self.keeper = cfg, state, keeper
        self.every = 1 if state.device.type == "cpu" else UNSEEN_STEPS
        self.pending: list[tuple[int, float, Any]] = []
        self.good: Snapshot = keeper.best
        self.loss = math.nan

    def add(self, step: int, lr: float, loss: Any) -> None:
        """Take the loss of a step, on its device."""
        self.pending.append((step, lr, loss))
        if step % self.every == 0 or step == 1:
            self.look()

    def look(self) -> float:
        """Return the last loss, once all so far were found finite.

        Raises
        ------
        DivergedError
            One is not; the weights of the last look that was good are on it.
        """
        import torch

        if self.pending:
            losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
            for (step, lr, _), loss in zip(self.pending, losses, strict=True):
                if not math.isfinite(loss):
                    raise self._diverged(step, lr, loss)
            self.loss = losses[-1]
            if self.every > 1:
                self.good = self._finite(self.state.snapshot(self.pending[-1][0]))
            self.pending = []
        return self.loss

    @property
    def fresh(self) -> bool:
        """Whether no loss waits to be looked at."""
        return not self.pending

    def last_good(self) -> Snapshot:
        """Return the present head where a bad loss changes nothing, else that of the last good look."""
        if self.every == 1:
            self.good = self._finite(self.state.snapshot(self.state.count))
        return self.good

    def _diverged(self, step: int, lr: float, loss: float) -> DivergedError:
        error = DivergedError(
            f"The loss of step {step} of {self.cfg.steps} is {loss} (learning rate {lr:.3g}). Lower the "
            "learning rate, or look for rows that are not finite.",
            self.last_good().weights,
        )
        # Below a traceback; a command line says where it has written them.
        error.add_note("The last good W is in the exception's `weights`.")
        return error

    def _finite(self, snapshot: Snapshot) -> Snapshot:
        return snapshot if snapshot.finite() else self.good if self.good.finite() else self.keeper.best
