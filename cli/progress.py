"""Progress on standard error: a bar in a terminal, lines in a log, nothing where JSON is asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LOG_EVERY = 30.0
"""Seconds between progress lines where standard error is no terminal (a log file)."""
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
    began: float = field(default_factory=time.perf_counter)

    def on_start(self, todo: int, total: int) -> None:
        """Take the number of rows to do, and of all rows."""
        del total
        self.todo = todo
        self.show(self)

    def on_rows(self, rows: int, bad: int) -> None:
        """Count rows that are done, and the bad ones among them."""
        self.done, self.bad = self.done + rows, self.bad + bad
        self.show(self)

    def on_times(self, seconds: dict[str, float]) -> None:
        """Count seconds by share of the work."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more
        self.show(self)

    @property
    def rate(self) -> float:
        """Rows a second since the start."""
        return self.done / max(time.perf_counter() - self.began, 1e-9)

    @property
    def speed(self) -> str:
        """The rate in words."""
        return f"{self.rate:,.{0 if self.rate >= 10 else 1}f} {self.unit}/s"


@contextmanager
def tracked(label: str, unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Yield a :class:`Progress` that is drawn, or logged where there is no terminal."""
    if quiet:
        yield Progress(unit, lambda progress: None)
    elif not sys.stderr.isatty():
        yield Progress(unit, _logger(label))
    else:
        with _bar("{task.fields[speed]}", "{task.fields[bad]}") as bar:
            task = bar.add_task(label, total=None, speed="", bad="", below="")

            def draw(progress: Progress) -> None:
                bar.update(
                    task,
                    total=progress.todo,
                    completed=progress.done,
                    speed=progress.speed,
                    bad=f"{progress.bad:,} bad" if progress.bad else "",
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
    """Yield a callback (step, steps, loss) that draws the course of a training run."""
    if quiet or not sys.stderr.isatty():
        yield lambda step, total, loss: None
        return
    with _bar("loss {task.fields[loss]:.3f}") as bar:
        task = bar.add_task(label, total=None, loss=0.0)
        yield lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss)


def _bar(before_eta: str, after_eta: str = "") -> Any:
    """Return a transient Rich bar on standard error, with a text before and one after the time left.

    A task's field ``below`` is a line of its own: beside the bar it would squeeze the rest in 80 columns.
    """
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
        MofNCompleteColumn(),
        TextColumn(before_eta),
        TimeRemainingColumn(),
        TextColumn(after_eta),
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
        last, left = now, (progress.todo - progress.done) / progress.rate
        of, where = f"{progress.done:,} of {progress.todo:,}", shares(progress.seconds)
        parts = [of, progress.speed, f"{left:,.0f} s left", f"{progress.bad} bad", where]
        sys.stderr.write(f"{label}: {', '.join(part for part in parts if part)}\n")
        sys.stderr.flush()

    return log
