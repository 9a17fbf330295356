"""The knobs of every method as options: which method has which is read off the methods themselves."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cli import recipe
from latentstore.errors import UsageError
from solvers.errors import SolverUsageError
from solvers.methods import ALIASES, METHODS, build, get
from solvers.sgd import CosFace

AUTO = "auto"
"""The method that tries all others on validation."""
TRAINED = ("preset", "budget", "seed")
"""Knobs of the method that is trained by gradients, beside the numbers of its recipe, which a preset sets."""
STORED = "store"
"""In the place of a shape: the one that the store's encoder gives."""
_OPTION = {"prompt": "prompt-strength"}
_STRENGTHS = ("alpha_bar", "prompt")


@dataclass(frozen=True)
class Strengths:
    """How simulated translations are drawn to fit on.

    Attributes
    ----------
    alpha_bars : tuple of float
        Noise levels ᾱ, spread evenly over the training images; less is a stronger translation.
    prompt : float
        Standard deviation of the random prompt's mean, in units of the prior's own.
    seed : int
        Of the noise, and of which image gets which level.
    """

    alpha_bars: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
    prompt: float = 0.3
    seed: int = 0

    @property
    def name(self) -> str:
        """What the report and the map's provenance say."""
        levels = ", ".join(f"{a:g}" for a in self.alpha_bars)
        return f"analytic diffusion, alpha_bar {levels}, prompt {self.prompt:g}, seed {self.seed}"


@dataclass(frozen=True)
class SolveOptions:
    """What ``solve`` was asked for.

    Attributes
    ----------
    method : str
        A name of :data:`solvers.methods.METHODS`, or ``"auto"``.
    rank : int or "all"
        Columns of W; with ``auto`` at most so many.
    rank_named : bool
        Whether the rank was asked for; one that was not is lowered to what the latents can have.
    knobs : mapping
        Fields of the method that were named; the others are chosen on validation or left at their default.
    preset : {"auto", "paper"}
        Of ``cosface``.
    recipe : mapping
        Numbers of the preset that were named.
    budget : float, optional
        Seconds that ``cosface`` may train; None for the preset's own.
    seed : int
        Of ``cosface``, and of simulated translations.
    simulate : Strengths, optional
        Fit on simulated translations of the training images instead of the store's pairs.
    with_cosface : bool
        Whether ``auto`` tries ``cosface``, too.
    """

    method: str = "svd"
    rank: int | str = 512
    knobs: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "auto"
    budget: float | None = None
    seed: int = 0
    simulate: Strengths | None = None
    with_cosface: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rank_named: bool = True

    @classmethod
    def of(
        cls,
        method: str,
        rank: int | str | None = None,
        *,
        simulate: bool = False,
        with_cosface: bool = False,
        **named: Any,
    ) -> SolveOptions:
        """Take the knobs that were named (not None), and refuse those that the method would ignore.

        Raises
        ------
        SolverUsageError, UsageError
        """
        check_name(method)
        if rank is not None and method != AUTO and not has_rank(method):
            raise UsageError(
                f"--rank is {rank}, and the method {method} has no rank: it keeps every dimension. "
                "Leave it out."
            )
        given = {k: v for k, v in named.items() if v is not None}
        trained = {k: given.pop(k) for k in TRAINED if k in given}
        numbers = {k: given.pop(k) for k in recipe.fields() if k in given}
        strengths = None
        if simulate:
            _check_simulated(method)
            own = {k: given.pop(k) for k in _STRENGTHS if k in given}
            strengths = _strengths(own, trained.get("seed", 0))
        if with_cosface and method != AUTO:
            raise UsageError(
                f"--with-cosface is about what --method auto tries, and the method is {method}. Leave it "
                "out, or use --method auto."
            )
        unread = [] if with_cosface else [k for k in trained if not (simulate and k == "seed")]
        check_foreign(method, [*given, *unread, *([] if with_cosface else numbers)])
        recipe.check_budget(trained.get("budget"))
        made = cls(
            method,
            cls.rank if rank is None else rank,
            given,
            simulate=strengths,
            with_cosface=with_cosface,
            recipe=numbers,
            rank_named=rank is not None,
            **trained,
        )
        made._check_values()
        return made

    def _check_values(self) -> None:
        """Let the method refuse what no store could satisfy, before one is read."""
        if self.method == AUTO or get(self.method).needs_torch:
            recipe.build(self.preset, self.recipe, seed=self.seed, budget=self.budget)
        if self.method != AUTO and not get(self.method).needs_torch:
            values = {k: v for k, v in self.knobs.items() if v != STORED}
            build(self.method, **values, **({"rank": self.rank} if has_rank(self.method) else {}))


def option(knob: str) -> str:
    """Return what a knob is called on the command line."""
    return "--" + _OPTION.get(knob, knob).replace("_", "-")


def fields(method: str) -> tuple[str, ...]:
    """Return the knobs of a method but its rank; of a trained one those that are options."""
    known = get(method)
    if known.needs_torch:
        return (*TRAINED, *recipe.fields())
    if not dataclasses.is_dataclass(known):
        return ()
    return tuple(f.name for f in dataclasses.fields(known) if f.init and f.name != "rank")


def has_rank(method: str) -> bool:
    """Tell whether a method has a rank."""
    return "rank" in getattr(get(method), "__dataclass_fields__", {})


def owners(knob: str) -> list[str]:
    """Return the methods that have a knob."""
    return [name for name in METHODS if knob in fields(name)]


def check_name(method: str) -> None:
    """Refuse what is neither a method nor ``auto``.

    Raises
    ------
    SolverUsageError
    """
    names = [AUTO, *METHODS]
    if method in names:
        return
    if method.lower().replace(" ", "-").replace("_", "-") in ALIASES:
        get(method)  # says what equals it
    close = difflib.get_close_matches(method.lower(), names, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise SolverUsageError(f"There is no method {method!r}; the methods are {', '.join(names)}.{meant}")


def check_foreign(method: str, knobs: list[str]) -> None:
    """Refuse knobs that a method would ignore.

    Raises
    ------
    UsageError
    """
    for knob in knobs:
        own = owners(knob)
        if method == AUTO:
            tried = ", which it tries with --with-cosface" if knob in fields(CosFace.name) else ""
            raise UsageError(
                f"{option(knob)} is a knob of {listed(own)}{tried}, and the method is auto, which chooses "
                f"all knobs on validation. Leave it out, or use --method {own[0]}."
            )
        if method not in own:
            use = f"--method {own[0]}" if len(own) == 1 else f"one of these as --method: {', '.join(own)}"
            raise UsageError(
                f"{option(knob)} is a knob of {listed(own)}, and the method is {method}, which would ignore "
                f"it. Leave it out, or use {use}."
                if own
                else f"{option(knob)} is no knob of any method. Leave it out."
            )


def check_run(method: str, named: Mapping[str, Any]) -> None:
    """Refuse what is about a training run (not None, not False) for a method that has none.

    Raises
    ------
    UsageError
    """
    given = [name for name, value in named.items() if value not in (None, False)]
    if given and (method == AUTO or not get(method).needs_torch):
        raise UsageError(
            f"{option(given[0])} is about a training run, and the method {method} has none of its own. Leave "
            f"it out, or use --method {CosFace.name}."
        )


def parse_rank(text: str) -> int | str:
    """Return the rank of ``--rank``: a whole number, or "all".

    Raises
    ------
    UsageError
    """
    try:
        return "all" if text == "all" else int(text)
    except ValueError:
        raise UsageError(f"--rank is {text!r}; it must be a whole number, or all.") from None


def parse_levels(text: str) -> float | tuple[float, ...]:
    """Return the ᾱ of ``--alpha-bar``: one number, or several between commas.

    Raises
    ------
    UsageError
    """
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(
            f"--alpha-bar is {text!r}; it must be a number between 0 and 1, or several between commas, as "
            "in 0.05,0.2."
        ) from None
    return found[0] if len(found) == 1 else found


def parse_shape(text: str) -> tuple[int, ...] | str:
    """Return the shape of ``--latent-shape``: three whole numbers, or "store" for the encoder's own.

    Raises
    ------
    UsageError
    """
    try:
        found = () if text == STORED else tuple(int(word) for word in text.split(","))
    except ValueError:
        found = (0,)
    if text != STORED and (len(found) != 3 or min(found) < 1):
        raise UsageError(
            f"--latent-shape is {text!r}; it must be store (the encoder's own), or channels, height and "
            "width between commas, as in 4,32,32."
        )
    return found or STORED


def listed(names: list[str]) -> str:
    """Return names as a phrase: ``gnull``, ``gnull and plda``, ``gnull, plda and cca``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _check_simulated(method: str) -> None:
    if method != AUTO and not get(method).needs_pairs:
        raise UsageError(
            f"--simulate makes pairs to learn from, and {method} learns from none. Leave --simulate out, or "
            "use a method that learns from pairs (svd, gnull)."
        )


def _strengths(own: Mapping[str, Any], seed: int) -> Strengths:
    levels = own.get("alpha_bar", Strengths.alpha_bars)
    levels = levels if isinstance(levels, tuple) else (levels,)
    return Strengths(levels, own.get("prompt", Strengths.prompt), seed)
