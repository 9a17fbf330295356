"""What every command shares: options, and failures told in one paragraph."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

STORE = Path("latents.zarr")
INTERRUPTED, TERMINATED = 130, 143
_RESUMED = ("encode", "simulate", "import", "demo")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Store = Annotated[Path, typer.Option(help="The store of latents.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="[STORE]", help="The store.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a scheduler: preempted by Slurm, evicted by Kubernetes."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, unless the program around this one has a handler of its own."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(signum: int, frame: object) -> None:
    del signum, frame
    raise Terminated


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """Hold Ctrl-C and SIGTERM back, for work that stops by itself; the second of them ends it at once.

    Yields what tells which of them came, as the exception to be raised for it. Handlers of a program around
    this one are left alone.
    """
    came: list[KeyboardInterrupt] = []

    def hold(signum: int, frame: object) -> None:
        del frame
        asked = Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()
        if came:
            raise asked
        came.append(asked)
        say("Stopping at the end of this step; once more ends it at once.")

    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _unwind}
    main = threading.current_thread() is threading.main_thread()
    held = {s: handler for s, handler in ours.items() if main and signal.getsignal(s) is handler}
    for number in held:
        signal.signal(number, hold)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every expected failure into one paragraph and its exit code; our own bugs keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from latentstore.errors import LatentStoreError
        from solvers.errors import SolverError

        try:
            with _terminable(), warnings.catch_warnings():
                # What is wrong with an image is in its row; Pillow would say it over the progress bar.
                warnings.filterwarnings("ignore", module="PIL")
                command(*args, **kwargs)
        except (LatentStoreError, SolverError) as exc:
            _fail(str(exc), exc.exit_code)
        except KeyboardInterrupt as exc:
            # What was under way in other threads is let go; their loops would say so while the process ends.
            for name in ("asyncio", "distributed"):
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
            kept = "Finished shards are kept; run" if command.__name__ in _RESUMED else "Run"
            code = TERMINATED if isinstance(exc, Terminated) else INTERRUPTED
            _fail(str(exc) or f"Stopped. {kept} the same command again to go on.", code)
        except BrokenPipeError:
            # The reader of our output went away (`| head`): not our failure.
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
            raise typer.Exit(0) from None
        except (PermissionError, OSError) as exc:
            name = f"{exc.filename}: " if exc.filename else ""
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = " The disk is full: make room and run the same command again." if full else ""
            _fail(f"{name}{exc.strerror or exc}.{advice}", 1)

    return run


def _fail(text: str, code: int) -> None:
    from cli.render import note

    if leads():
        note(text if code in (INTERRUPTED, TERMINATED) else f"Error: {text}")
    raise typer.Exit(code)


def leads() -> bool:
    """Tell whether this process speaks and writes: of those that torchrun started, the first alone."""
    return os.environ.get("RANK", "0") == "0"


def command_line() -> str:
    """Return the command as typed, for reports that say how to reproduce them."""
    import shlex

    name = Path(sys.argv[0]).name
    program = ["python", "-m", "cli"] if name == "__main__.py" else [name]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = os.environ["LOCAL_WORLD_SIZE"]
        program = ["torchrun", "--standalone", "--nproc-per-node", processes, *program[1:]]
    return shlex.join([*program, *sys.argv[1:]])
