"""Decoding in child processes: an image that takes its decoder down costs its own row, not the job.

A decoder that crashes (a segmentation fault, the system's out-of-memory killer) takes its process with it,
and no ``except`` helps. Here each decoding thread talks to a child process of its own through pipes, one
image at a time: the child's death names the image. Slower than decoding in threads, so it is used for shards
in which a process has died, or when it is asked for; passing the pixels on counts as reading.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from latentstore import images
from latentstore.errors import ImageError, LatentStoreError
from latentstore.files import partials_below
from latentstore.schema import STATUS_CODE
from latentstore.sources import Source, SourceError

_LONGEST, _LARGEST = 1 << 20, 1 << 30
"""Bytes of an answer, at most: of its line, and of its pixels."""
TRIES = 2
"""Processes that an image may take down before it is given up: the first death may have been another's."""
# Not multiprocessing: it refuses children to the daemonic processes that Dask's workers are.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
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
                answer, rgb = child.ask(_question(listed, size, max_pixels))
                result = _result(answer, rgb, size)
            except (EOFError, OSError, ValueError, KeyError, TypeError):  # it ended, or talks nonsense
                self._children.discard(child)
                how = child.end()
                continue
            self._idle.append(child)
            if isinstance(result, images.Pixels):
                return result
            raise result
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
            self.ask(_described(source))
        except (EOFError, OSError, ValueError) as exc:
            raise IsolationError(
                f"The process that decodes images apart could not start ({self.end()}); its own message is "
                "above. Every process must be able to import what the job uses."
            ) from exc

    def ask(self, question: Any) -> tuple[dict[str, Any], bytes]:
        """Return the answer to a question: a line of JSON, and the pixels that follow it.

        Nothing that a child says is unpickled: its decoder may have been taken over by the image.

        Raises
        ------
        EOFError, OSError, ValueError
            The process ended before it answered, or its answer is none.
        """
        self._send(question)
        pipe: Any = self._process.stdout
        line = pipe.readline(_LONGEST)
        if not line.endswith(b"\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        size = int(answer.get("pixels", 0))
        if not 0 <= size <= _LARGEST:
            raise ValueError
        rgb: bytes = pipe.read(size)
        if len(rgb) != size:
            raise EOFError
        return answer, rgb

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
        pipe: Any = self._process.stdin
        pipe.write(json.dumps(question).encode() + b"\n")
        pipe.flush()


def _described(source: Source) -> dict[str, Any]:
    """Return what a source is built from, as JSON types."""
    values = {f.name: getattr(source, f.name) for f in fields(source) if f.compare}
    return {
        "module": type(source).__module__,
        "name": type(source).__qualname__,
        "paths": {k: str(v) for k, v in values.items() if isinstance(v, Path)},
        "values": {k: v for k, v in values.items() if not isinstance(v, Path)},
    }


def _built(described: dict[str, Any]) -> Source:
    made: type[Source] = getattr(import_module(described["module"]), described["name"])
    values: dict[str, Any] = {k: Path(v) for k, v in described["paths"].items()}
    values |= {k: tuple(v) if isinstance(v, list) else v for k, v in described["values"].items()}
    return made(**values)


def _question(listed: Mapping[str, Any], size: int, max_pixels: int) -> dict[str, Any]:
    raw = listed.get("path_raw")
    name = None if raw is None else bytes(raw).hex()
    return {"path": listed["path"], "path_raw": name, "size": size, "max_pixels": max_pixels}


def _result(answer: dict[str, Any], rgb: bytes, size: int) -> images.Pixels | Exception:
    """Return the pixels, or the failure, that a child's answer tells of."""
    kind = answer["kind"]
    if kind == "pixels":
        pixels = np.frombuffer(rgb, np.uint8).reshape(size, size, 3)
        return images.Pixels(pixels, **answer["facts"])
    if kind == "bad":
        error = ImageError(str(answer["status"]), str(answer["reason"]))
        if error.status not in STATUS_CODE:
            raise ValueError
        if answer["facts"] is not None:
            error.facts = images.FileFacts(b"", **answer["facts"])
        return error
    # A failure of the machine: the parent's to judge.
    if answer["type"] == "SourceError":
        return SourceError(str(answer["text"]))
    if answer["errno"] is not None:
        return OSError(int(answer["errno"]), str(answer["text"]))
    return RuntimeError(str(answer["text"]))


def serve() -> None:
    """Answer a parent's questions on standard input until it closes: what a child process runs."""
    warnings.simplefilter("ignore")  # what is wrong with an image is in its row
    questions = sys.stdin.buffer
    # Decoders that print must not write into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        described = questions.readline()
        if not described:
            os._exit(0)  # the parent was killed before it asked anything
        source = _built(json.loads(described))
        answer: dict[str, Any] = {"kind": "ready"}
        rgb = b""
        while True:
            answers.write(json.dumps({**answer, "pixels": len(rgb)}).encode() + b"\n" + rgb)
            answers.flush()
            line = questions.readline()
            if not line:
                os._exit(0)  # the parent has gone, or is done
            answer, rgb = _answer(source, json.loads(line))
    except BrokenPipeError:
        os._exit(0)


def _answer(source: Source, question: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    raw = question["path_raw"]
    listed = {"path": question["path"], "path_raw": None if raw is None else bytes.fromhex(raw)}
    try:
        found = source.load(listed, question["size"], max_pixels=question["max_pixels"])
        facts = {k: v for k, v in vars(found).items() if k != "rgb"}
        return {"kind": "pixels", "facts": facts}, found.rgb.tobytes()
    except ImageError as exc:
        known = exc.facts if isinstance(exc.facts, images.FileFacts) else None
        file = None if known is None else {k: v for k, v in vars(known).items() if k != "data"}
        return {"kind": "bad", "status": exc.status, "reason": exc.reason, "facts": file}, b""
    except Exception as exc:  # a failure of the machine: the parent's to judge
        code, text = None, str(exc) if isinstance(exc, SourceError) else repr(exc)
        if isinstance(exc, OSError):
            code, text = exc.errno, exc.strerror or text
        return {"kind": "raised", "type": type(exc).__name__, "errno": code, "text": text}, b""
