"""Failures of the solvers, each with the exit code a command line should end with."""

from __future__ import annotations

from typing import Any


class SolverError(Exception):
    """A solver cannot give a right answer; the message says what, the values and what to do."""

    exit_code = 1


class SolverUsageError(SolverError, ValueError):
    """A request that no data could satisfy: a rank out of range, an unknown method, a bad knob."""

    exit_code = 2


class NoPairsError(SolverUsageError):
    """A method that learns from pairs was given none."""

    exit_code = 1


class SpaceError(SolverError, ValueError):
    """Latents and projection come from different encoders or encoder settings."""


class LeakError(SolverError, ValueError):
    """Identities used for fitting or choosing are among those being reported."""


class DivergedError(SolverError, ArithmeticError):
    """Training reached a loss that is not finite.

    Attributes
    ----------
    weights
        The last good W (d x m), or None when no step succeeded.
    """

    def __init__(self, message: str, weights: Any = None) -> None:
        super().__init__(message)
        self.weights = weights


class SolverWriteError(SolverError, OSError):
    """A result could not be written to disk."""


class ProjectionFormatError(SolverError, ValueError):
    """A file is not a projection that can be read."""
