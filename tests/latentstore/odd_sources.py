"""Sources that workers and child processes import: instant, noisy, failing, or deadly."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from latentstore.images import Pixels
from latentstore.manifest import input_table
from latentstore.sources import Source, SourceError


@dataclass(frozen=True)
class Blank(Source):
    """Pictures that are on no disk: every one is black."""

    rows: int = 0

    def list(self):
        return input_table({"path": f"{i:06d}.png"} for i in range(self.rows))

    def load(self, listed, size, *, max_pixels=0):
        return Pixels(np.zeros((size, size, 3), np.uint8), 1, 1, 0, 0, "0" * 64)


@dataclass(frozen=True)
class Slow(Source):
    """Takes its time to read."""

    pause: float = 0.0

    def load(self, listed, size, *, max_pixels=0):
        time.sleep(self.pause)
        return super().load(listed, size)


class Odd(Source):
    """Behaves as the file's name says."""

    def load(self, listed, size, *, max_pixels=0):
        name = listed["path"]
        if "kill" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "exit" in name:
            os._exit(7)
        if "once" in name:  # the first process that tries it dies
            try:
                os.unlink(self.root / f"{name}.fresh")  # noqa: PTH108
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        if "io" in name:
            raise OSError(errno.EIO, "the disk is gone")
        if "unpicklable" in name:
            raise RuntimeError("held by", lambda: None)
        if "print" in name:
            print("a decoder that talks", flush=True)  # noqa: T201
        return super().load(listed, size)


class Fatal(Source):
    """Kills every Dask worker that loads from it, or hands it on to another process."""

    def load(self, listed, size, *, max_pixels=0):
        os.kill(os.getpid(), signal.SIGKILL)

    def __getattribute__(self, name):
        workers = sys.modules.get("distributed.worker")
        if name == "patterns" and workers is not None and len(workers.Worker._instances):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


class Silent(Source):
    """A server that does not answer; each question is noted beside the folder."""

    def load(self, listed, size, *, max_pixels=0):
        with (self.root.parent / "asked").open("a") as file:
            file.write("?")
        raise SourceError("the server does not answer")


@dataclass(frozen=True)
class Unloadable(Source):
    """Cannot be built anew in another process."""

    made_in: int = field(default_factory=os.getpid)

    def __post_init__(self):
        if self.made_in != os.getpid():
            raise ValueError("not in this process")
