"""A training run that may be stopped at any step: schedule, running mean of the weights, checkpoint, log."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentstore.errors import UsageError

CHECKPOINT_EVERY = 500
"""Steps between checkpoints, and between lines of the log."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """What any of the trainings here depends on, beside its data.

    Attributes
    ----------
    steps : int
        Of training.
    rate : float
        Learning rate, reached in ``warm_up`` steps; flat, then a half cosine down to 0 over the last ``fall``
        of the steps. So ``steps`` may be changed on the way, until the fall begins.
    clip : float
        Largest norm of a gradient.
    average : float
        Decay of the running mean of the weights, which is what is kept.
    seed : int
    """

    steps: int = 1000
    rate: float = 1e-3
    warm_up: int = 500
    fall: float = 0.5
    clip: float = 1.0
    average: float = 0.999
    seed: int = 0

    @property
    def falls_at(self) -> int:
        """The step at which the learning rate begins to fall."""
        return round(self.steps * (1 - self.fall))

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        left = min(1.0, (self.steps - step) / (self.steps - self.falls_at))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * float(1 - np.cos(np.pi * left)) / 2


class Run(ABC):
    """A training run with all of its state: what a checkpoint holds.

    Parameters
    ----------
    recipe : Schedule
    learned : mapping of name to parameter
        What is trained.
    data : str
        Fingerprint of what it is trained on.

    Attributes
    ----------
    step : int
        Steps that are done.
    mean : dict of name to tensor
        Running mean of the weights.
    """

    def __init__(self, recipe: Schedule, learned: Mapping[str, torch.nn.Parameter], data: str) -> None:
        self.recipe = recipe
        self.step = 0
        self._learned = dict(learned)
        self._data = data
        self.mean = {name: p.detach().clone() for name, p in self._learned.items()}
        self._optimiser = torch.optim.AdamW(
            self._learned.values(), lr=recipe.rate, betas=(0.9, 0.99), fused=True
        )

    @abstractmethod
    def loss(self) -> tuple[torch.Tensor, float]:
        """Return what this step descends, and the error to be logged: functions of (seed, step) alone."""

    @abstractmethod
    def said_of(self, errors: Sequence[float]) -> dict[str, float]:
        """Return what the log says of some steps' errors."""

    def advance(self) -> float:
        """Take one step, and return its error."""
        recipe = self.recipe
        loss, error = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learned.values(), recipe.clip)
        self._optimiser.param_groups[0]["lr"] = recipe.rate_at(self.step)
        self._optimiser.step()
        self._optimiser.zero_grad()
        share = 1 - min(recipe.average, (1 + self.step) / (10 + self.step))
        now = [p.detach() for p in self._learned.values()]
        torch._foreach_lerp_(list(self.mean.values()), now, share)
        self.step += 1
        return error

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "data": self._data,
            "step": self.step,
            "learned": {name: p.detach() for name, p in self._learned.items()},
            "mean": self.mean,
            "optimiser": self._optimiser.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        UsageError
            It is of another recipe or of other data, or was past the step at which a new number of steps
            lets the learning rate fall.
        """
        state = torch.load(path, weights_only=True)
        mine, then = asdict(self.recipe), dict(state["recipe"])
        if "steps" in then and mine["steps"] != then["steps"]:
            falls = Schedule(steps=then["steps"], fall=then["fall"]).falls_at
            if state["step"] <= min(self.recipe.falls_at, falls):
                then["steps"] = mine["steps"]
        if (mine, self._data) != (then, state["data"]):
            raise UsageError(
                f"{path} is a checkpoint of another run, at step {state['step']}: recipe {then} with data "
                f"{state['data'][:8]}, here {mine} with {self._data[:8]}. Name another --work, or delete it."
            )
        self.step = state["step"]
        self.mean = state["mean"]
        with torch.no_grad():
            for name, p in self._learned.items():
                p.copy_(state["learned"][name])
        self._optimiser.load_state_dict(state["optimiser"])


def train(run: Run, work: Path, every: int = CHECKPOINT_EVERY) -> Iterator[dict[str, Any]]:
    """Take the steps that the checkpoint in ``work`` has not, and yield a line of the log now and then."""
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    errors: list[float] = []
    began = time.process_time()
    while run.step < run.recipe.steps:
        errors.append(run.advance())
        if run.step % every and run.step < run.recipe.steps:
            continue
        run.save(checkpoint)
        yield {
            "step": run.step,
            **run.said_of(errors),
            "rate": round(run.recipe.rate_at(run.step), 6),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        errors, began = [], time.process_time()


def train_and_log(run: Run, work: Path, every: int = CHECKPOINT_EVERY) -> None:
    """Train to the end; each line goes to ``work/log.jsonl`` and to the logger."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "log.jsonl").open("a", encoding="utf-8") as log:
        for line in train(run, work, every):
            log.write(json.dumps(line) + "\n")
            log.flush()
            _log.info("%s", json.dumps(line))
