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
_RESUMED = ("encode", "simulate", "demo")

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

    def stop(signum: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
            _fail(f"Stopped. {kept} the same command again to go on.", code)
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

    note(text if code in (INTERRUPTED, TERMINATED) else f"Error: {text}")
    raise typer.Exit(code)


def command_line() -> str:
    """Return the command as typed, for reports that say how to reproduce them."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
