"""Checkpoints of a training run: whole or absent, checked on reading, bound to their recipe and data."""

from __future__ import annotations

import glob
import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, ProjectionFormatError
from .files import read_safetensors, write_safetensors

FORMAT = "latentstore.checkpoint"


@dataclass(eq=False)
class Checkpoint:
    """Where a run keeps its state, and how often.

    Attributes
    ----------
    path
        A .safetensors file; replaced whole, so that a kill leaves the last one.
    every_steps, every_seconds
        Save after so many steps or seconds, whichever comes first; None for never by that count.
    key
        Names recipe and data. A file with another key is refused.
    """

    path: Path
    every_steps: int | None = None
    every_seconds: float | None = 60.0
    key: str = ""
    _last: float = field(default_factory=time.monotonic, init=False, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)

    def due(self, step: int) -> bool:
        """Whether the state after `step` should be saved, by the count of steps."""
        return self.every_steps is not None and step % self.every_steps == 0

    def overdue(self) -> bool:
        """Whether the last save was long enough ago; to be asked where `save` is called."""
        return self.every_seconds is not None and time.monotonic() - self._last >= self.every_seconds

    def save(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any], recipe: Any) -> None:
        """Write tensors and a JSON state, durably, in place of the file before.

        Raises
        ------
        SolverWriteError
            No room, or no permission; the earlier file is still there.
        """
        text = json.dumps({"key": self.key, "recipe": recipe, "state": state}, sort_keys=True)
        metadata = {"format": FORMAT, "version": "1", "run": text, "run_crc32": _crc32(text)}
        write_safetensors(self.path, dict(tensors), metadata)
        self._last = time.monotonic()

    def load(self, recipe: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return tensors and state of the run to go on with; None where there is no file.

        Half-written files of a killed run are removed.

        Raises
        ------
        CheckpointError
            The file is damaged, or belongs to another recipe or other data.
        """
        for part in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.partial"):
            part.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(self.path, FORMAT)
            if metadata.get("run_crc32") != _crc32(metadata.get("run", "")):
                raise ProjectionFormatError(f"{self.path}: the description has another checksum.")
            run = json.loads(metadata["run"])
        # A flipped bit in the header may make any of the parsers stumble.
        except (ProjectionFormatError, OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(str(error)) from error
        self._check_owner(run, json.loads(json.dumps(recipe)))
        return tensors, run["state"]

    def damaged(self, why: str) -> CheckpointError:
        """Return the refusal of a damaged file."""
        return CheckpointError(
            f"The checkpoint {self.path} cannot be used: {why.rstrip('. ')}. Delete it to train from the "
            "start; nothing was changed."
        )

    def remove(self) -> None:
        """Delete the file, if there is one: the run it served is done."""
        self.path.unlink(missing_ok=True)

    def _check_owner(self, run: Mapping[str, Any], recipe: Any) -> None:
        changes = [
            f"{name} is {recipe.get(name)!r} now and was {run['recipe'].get(name)!r}"
            for name in sorted({*recipe, *run["recipe"]})
            if recipe.get(name) != run["recipe"].get(name)
        ]
        if run["key"] != self.key:
            changes.append(f"the key of recipe and data is {self.key!r} now and was {run['key']!r}")
        if changes:
            raise CheckpointError(
                f"The checkpoint {self.path} is of another run: {'; '.join(changes)}. Run with what it was "
                "made with to go on, or delete it to train from the start."
            )


def _crc32(text: str) -> str:
    return f"{zlib.crc32(os.fsencode(text)):08x}"
