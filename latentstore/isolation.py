"""Decoding in child processes: an image that takes its decoder down costs its own row, not the job.

A decoder that crashes (a segmentation fault, the system's out-of-memory killer) takes its process with it,
and no ``except`` helps. Here each decoding thread talks to a child process of its own through pipes, one
image at a time: the child's death names the image. Slower than decoding in threads, so it is used for shards
in which a process has died, or when it is asked for; passing the pixels on counts as reading.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from latentstore import images
from latentstore.errors import ImageError, LatentStoreError
from latentstore.files import partials_below
from latentstore.sources import Source

TRIES = 2
"""Processes that an image may take down before it is given up: the first death may have been another's."""
# Not multiprocessing: it refuses children to the daemonic processes that Dask's workers are.
_BOOT = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from latentstore.isolation import serve; serve()"
)


class IsolationError(LatentStoreError):
    """The process that should decode could not be started, or was stopped."""


def half_written(root: Path) -> frozenset[int]:
    """Return the shards in which a writer's process just ended: their partial files are there still.

    Look before the writer's lock is taken, which sweeps them away. A shard that another process is writing
    now may be among them.
    """
    parts = (name.split("/") for name in partials_below(root))
    return frozenset(int(p[2]) for p in parts if len(p) == 4 and p[1] == "c" and p[3].startswith("0."))


class Isolated:
    """A source that decodes in child processes, one for each thread that loads at the same time.

    Use it as a context manager; no process starts before the first image.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._closed = False

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._closed = True
        for child in list(self._children):
            child.end()

    def load(
        self, listed: Mapping[str, Any], size: int, *, max_pixels: int = images.MAX_PIXELS
    ) -> images.Pixels:
        """Read, decode and resize one listed image in a child process; see :meth:`Source.load`.

        Raises
        ------
        ImageError
            As the source does; with status ``killed`` when the image took down two processes.
        IsolationError
            No child process can be started.
        """
        how = ""
        for _ in range(TRIES):
            child = self._child()
            try:
                kind, answer = child.ask((dict(listed), size, max_pixels))
            except (EOFError, OSError, pickle.UnpicklingError):
                self._children.discard(child)
                how = child.end()
                continue
            self._idle.append(child)
            if kind == "pixels":
                pixels: images.Pixels = answer
                return pixels
            if kind == "raised":
                raise answer
            status, reason, facts = answer
            error = ImageError(status, reason)
            error.facts = facts
            raise error
        killed = ImageError("killed", f"decoding it ended its process ({how})")
        killed.facts = replace(self.source.read(listed), data=b"")
        raise killed

    def _child(self) -> _Child:
        if self._closed:
            raise IsolationError("Decoding was stopped.")
        try:
            return self._idle.pop()
        except IndexError:
            child = _Child(self.source)
            self._children.add(child)
            return child


class _Child:
    """One child process. It ends when its parent does: its requests then come to an end."""

    def __init__(self, source: Source) -> None:
        # In a session of its own, so that Ctrl-C reaches the job alone and is not taken for a crash.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._send(sys.path)
            self.ask(source)
        except (EOFError, OSError) as exc:
            raise IsolationError(
                f"The process that decodes images apart could not start ({self.end()}); its own message is "
                "above. Every process must be able to import what the job uses."
            ) from exc

    def ask(self, question: Any) -> Any:
        """Return the answer to a question.

        Raises
        ------
        EOFError, OSError
            The process ended before it answered.
        """
        self._send(question)
        return pickle.load(self._process.stdout)  # type: ignore[arg-type]  # noqa: S301 - our own child

    def end(self) -> str:
        """Stop the process if it still runs, and say how it ended."""
        if self._process.poll() is None:
            try:
                self._process.wait(0.5)  # its end of the pipe closes a little before it is gone
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # a question that was never read is still in its buffer
                pipe.close()  # type: ignore[union-attr]
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _send(self, question: Any) -> None:
        pipe = self._process.stdin
        pickle.dump(question, pipe)  # type: ignore[arg-type]
        pipe.flush()  # type: ignore[union-attr]


def serve() -> None:
    """Answer a parent's questions on standard input until it closes: what a child process runs."""
    warnings.simplefilter("ignore")  # what is wrong with an image is in its row
    questions = sys.stdin.buffer
    # Decoders that print must not write into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        source = pickle.load(questions)  # noqa: S301 - from our own parent
        answer: Any = ("ready", None)
        while True:
            answers.write(_packed(answer))
            answers.flush()
            listed, size, max_pixels = pickle.load(questions)  # noqa: S301
            answer = _answer(source, listed, size, max_pixels)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has gone, or is done


def _answer(source: Source, listed: dict[str, Any], size: int, max_pixels: int) -> tuple[str, Any]:
    try:
        return "pixels", source.load(listed, size, max_pixels=max_pixels)
    except ImageError as exc:
        return "bad", (exc.status, exc.reason, exc.facts)
    except Exception as exc:  # a failure of the machine: the parent's to judge
        return "raised", exc


def _packed(answer: tuple[str, Any]) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception:  # pickling may raise anything; its cause must not pass for a crash
        return pickle.dumps((answer[0], RuntimeError(repr(answer[1]))))
