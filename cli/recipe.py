"""The recipe of a CosFace run: a preset, and every number of it that was named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentstore.errors import UsageError
from solvers.losses import DEFAULTS
from solvers.sgd import CosFace, preset_auto, preset_paper

BUDGET = 40.0
"""Seconds that ``--preset auto`` may train."""
_ELSEWHERE = {"rank", "seed", "max_seconds", "head", "layers", "latent_shape"}
"""Fields that options of their own give, and those of heads that are no matrix W (``ablate`` has them)."""


def fields() -> tuple[str, ...]:
    """Return the numbers of the recipe that are options, read off the method."""
    return tuple(f.name for f in dataclasses.fields(CosFace) if f.name not in _ELSEWHERE)


def check_budget(seconds: float | None) -> None:
    """Refuse a budget that is no time.

    Raises
    ------
    UsageError
    """
    if seconds is not None and not 1 <= seconds < math.inf:
        raise UsageError(f"--budget is {seconds:g}; it must be a number of seconds, at least 1.")


def build(
    preset: str,
    named: Mapping[str, Any],
    *,
    n_identities: int = 2,
    n_rows: int = 4,
    dim: int = 1,
    rank: int = 1,
    seed: int = 0,
    budget: float | None = None,
    warm: bool = False,
) -> CosFace:
    """Return a preset with the named numbers in the place of its own.

    Parameters
    ----------
    preset : {"auto", "paper"}
    named : mapping
        Fields of :class:`CosFace`.
    n_identities, n_rows, dim : int
        Of the training rows: ``auto`` is sized to them.
    budget : float, optional
        Seconds; by default 40 for ``auto``, unless its steps are named, and no limit for ``paper``. Steps
        that are named are taken: neither a clock nor patience ends them that was not named, too.
    warm : bool
        Whether W starts at a given map: class weights then start at the class means.

    Raises
    ------
    UsageError, SolverUsageError
        An unknown preset, or numbers that cannot be.
    """
    if preset == "paper":
        base = replace(preset_paper(rank=rank, seed=seed), max_seconds=budget)
    elif preset == "auto":
        seconds = BUDGET if budget is None else budget
        base = preset_auto(n_identities, n_rows, dim, seconds, rank=rank, seed=seed)
    else:
        raise UsageError(f"--preset is {preset!r}; use auto or paper.")
    given = {"class_init": "means", **named} if warm else dict(named)
    if "steps" in given:
        # An epoch is a share of the steps: with the paper's 2,000, a short run would never leave its warm-up.
        epochs = ("schedule_every", "validate_every") if preset == "paper" else ("validate_every",)
        own = {knob: max(1, round(given["steps"] * getattr(base, knob) / base.steps)) for knob in epochs}
        given = {**own, "max_seconds": budget, "patience": None, **given}
    if "loss" in given:
        scale, margin = DEFAULTS.get(given["loss"], (base.scale, base.margin))
        given = {"scale": scale, "margin": margin, **given}
    return replace(base, **given)
