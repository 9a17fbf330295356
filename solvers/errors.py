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


class StoppedError(SolverError):
    """Training was asked to stop, and did between two steps.

    Attributes
    ----------
    step
        The last step that was taken.
    weights
        The last good W (d x m); None for a head that is no single matrix.
    """

    def __init__(self, message: str, step: int, weights: Any = None) -> None:
        super().__init__(message)
        self.step = step
        self.weights = weights


class BadRowsError(SolverError, ValueError):
    """Rows to learn from hold numbers that are not finite, or are not of the stated shape."""


class SolverMemoryError(SolverError, MemoryError):
    """What a run would hold does not fit the memory that is free; nothing was started."""


class CheckpointError(SolverUsageError):
    """A checkpoint is damaged, or belongs to another recipe or other data."""


class SolverWriteError(SolverError, OSError):
    """A result could not be written to disk."""


class ProjectionFormatError(SolverError, ValueError):
    """A file is not a projection that can be read."""
