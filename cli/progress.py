"""Progress on standard error: a bar in a terminal, lines in a log, nothing where JSON is asked for."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

_LOG_EVERY = 30.0
"""Seconds between progress lines where standard error is no terminal (a log file)."""
_WINDOW = 30.0
"""Seconds that the rate looks back: what it is now, not since the start."""
_MARK_EVERY = 0.25
SHARES = ("read", "decode", "encode", "write")


def shares(seconds: dict[str, float]) -> str:
    """Return where time goes: each share of the work in per cent, summed over threads and processes."""
    total = sum(seconds.get(name, 0.0) for name in SHARES)
    if not total:
        return ""
    return " ".join(f"{name} {100 * seconds.get(name, 0.0) / total:.0f} %" for name in SHARES)


@dataclass
class Progress:
    """How far a job is. Each method is what a job calls; ``show`` is called after each change.

    Attributes
    ----------
    todo, done, bad : int
        Rows to do, rows done, bad ones among those.
    seconds : dict
        By share of the work.
    """

    unit: str
    show: Callable[[Progress], None]
    todo: int | None = None
    done: int = 0
    bad: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def on_start(self, todo: int, total: int) -> None:
        """Take the number of rows to do, and of all rows."""
        del total
        self.todo = todo
        self._marks.append((time.perf_counter(), self.done))
        self.show(self)

    def on_rows(self, rows: int, bad: int) -> None:
        """Count rows that are done, and the bad ones among them."""
        self.done, self.bad = self.done + rows, self.bad + bad
        now, marks = time.perf_counter(), self._marks
        if not marks or now - marks[-1][0] >= _MARK_EVERY:
            marks.append((now, self.done))
        # The first mark is the last one that is older than the window.
        while len(marks) > 2 and marks[1][0] <= now - _WINDOW:
            marks.popleft()
        self.show(self)

    def on_times(self, seconds: dict[str, float]) -> None:
        """Count seconds by share of the work."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more
        self.show(self)

    @property
    def rate(self) -> float:
        """Rows a second over the last half minute or so; loading and listing do not count."""
        if not self._marks:
            return 0.0
        since, done = self._marks[0]
        return (self.done - done) / max(time.perf_counter() - since, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds left at this rate; None where that is not known yet."""
        return None if self.todo is None or not self.rate else (self.todo - self.done) / self.rate

    @property
    def speed(self) -> str:
        """The rate in words."""
        return f"{self.rate:,.{0 if self.rate >= 10 else 1}f} {self.unit}/s"


@contextmanager
def tracked(label: str, unit: str, *, first: str = "starting", quiet: bool = False) -> Iterator[Progress]:
    """Yield a :class:`Progress` that is drawn, or logged where there is no terminal.

    ``first`` says what happens before it is known how much there is to do.
    """
    if quiet:
        yield Progress(unit, lambda progress: None)
    elif not sys.stderr.isatty():
        yield Progress(unit, _logger(label))
    else:
        with _bar("{task.fields[now]}") as bar:
            task = bar.add_task(label, total=None, now=first, below="")

            def draw(progress: Progress) -> None:
                bar.update(
                    task,
                    total=progress.todo,
                    completed=progress.done,
                    now=_now(progress, first),
                    below=shares(progress.seconds),
                )

            yield Progress(unit, draw)


@contextmanager
def progress(
    label: str, unit: str, *, quiet: bool = False
) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """Yield (on_start, on_rows) of a job that does not say where its time goes."""
    with tracked(label, unit, quiet=quiet) as shown:
        yield shown.on_start, shown.on_rows


@contextmanager
def steps(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a callback (step, steps, loss) that draws, or logs, the course of a training run."""
    if quiet:
        yield lambda step, total, loss: None
        return
    from rich.progress import MofNCompleteColumn

    if not sys.stderr.isatty():
        yield _stepped(Progress("steps", _logger(label)))
        return
    with _bar(MofNCompleteColumn(), "{task.fields[now]}") as bar:
        task = bar.add_task(label, total=None, now="reading")
        shown = Progress("steps", lambda progress: None)
        count = _stepped(shown)

        def draw(step: int, total: int, loss: float) -> None:
            count(step, total, loss)
            left = "" if shown.left is None else str(timedelta(seconds=round(shown.left)))
            bar.update(task, completed=step, total=total, now=f"loss {loss:.3f} {shown.speed} {left}")

        yield draw


@contextmanager
def passes(label: str, *, quiet: bool = False) -> Iterator[Callable[[int], Callable[[int, int], None]]]:
    """Yield what is told how many rows a pass will read, and returns what counts them."""
    with tracked(label, "rows", first="fitting", quiet=quiet) as shown:

        def begin(rows: int) -> Callable[[int, int], None]:
            shown.done = 0
            shown._marks.clear()
            shown.on_start(rows, rows)
            return shown.on_rows

        yield begin


@contextmanager
def phases(
    *, quiet: bool = False
) -> Iterator[Callable[[str, str], tuple[Callable[[int, int], None], Callable[[int, int], None]]]]:
    """Yield what begins a phase of a job (label, unit), and returns its (on_start, on_rows).

    One bar at a time: a phase ends the one before it.
    """
    with ExitStack() as stack:

        def begin(label: str, unit: str) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
            stack.close()
            shown = stack.enter_context(tracked(label, unit, quiet=quiet))
            return shown.on_start, shown.on_rows

        yield begin


def _stepped(shown: Progress) -> Callable[[int, int, float], None]:
    """Return a callback (step, steps, loss) that counts steps, of one run after the other, from any step."""

    def count(step: int, total: int, loss: float) -> None:
        del loss
        if shown.todo is None or step <= shown.done:
            shown.done = step - 1
            shown._marks.clear()
            shown.on_start(total, total)
        shown.on_rows(step - shown.done, 0)

    return count


def _now(progress: Progress, first: str) -> str:
    """Return how far it is, how fast it goes and how long it takes yet, as text beside the bar."""
    if progress.todo is None:
        return first
    left = progress.left
    parts = [
        f"{progress.done}/{progress.todo}",
        progress.speed if progress.done else "",
        "" if left is None else str(timedelta(seconds=round(left))),
        f"{progress.bad:,} bad" if progress.bad else "",
    ]
    return " ".join(part for part in parts if part)


def _bar(*columns: Any) -> Any:
    """Return a transient Rich bar on standard error, with columns (a str is a template) behind the bar.

    A task's field ``below`` is a line of its own: beside the bar it would squeeze the rest in 80 columns.
    """
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    class Bar(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            for task in self.tasks:
                if task.fields.get("below"):
                    yield Text(f"{' ' * len(task.description)} {task.fields['below']}", style="dim")

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *(TextColumn(column) if isinstance(column, str) else column for column in columns),
        console=Console(stderr=True),
        transient=True,
    )


def _logger(label: str) -> Callable[[Progress], None]:
    last = time.perf_counter()

    def log(progress: Progress) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < _LOG_EVERY or not progress.done or progress.todo is None:
            return
        last, left = now, progress.left or 0.0
        of, where = f"{progress.done:,} of {progress.todo:,}", shares(progress.seconds)
        bad = f"{progress.bad} bad" if progress.bad else ""
        parts = [of, progress.speed, f"{left:,.0f} s left", bad, where]
        sys.stderr.write(f"{label}: {', '.join(part for part in parts if part)}\n")
        sys.stderr.flush()

    return log
