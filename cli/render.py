"""What a person sees in the terminal: progress, tables, plain sentences; and JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cli.demo import DemoResult
    from cli.solving import Solved
    from cli.workflows import MatchResult
    from latentstore.encode import EncodeSummary
    from latentstore.results import Figure, Match, Report
    from latentstore.verify import Verification

_LOG_EVERY = 30.0
"""Seconds between progress lines where standard error is no terminal (a log file)."""


def say(text: str = "") -> None:
    """Print to standard output; control characters (of a hostile file name, say) are spelled out."""
    sys.stdout.write("\n".join(printable(line) for line in text.split("\n")) + "\n")


def note(text: str) -> None:
    """Print to standard error."""
    sys.stderr.write("\n".join(printable(line) for line in text.split("\n")) + "\n")
    sys.stderr.flush()


def emit(value: Any) -> None:
    """Print one JSON value to standard output."""
    say(json.dumps(value, indent=1, ensure_ascii=False, default=str))


@contextmanager
def progress(
    label: str, unit: str, *, quiet: bool = False
) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """Yield (on_start, on_rows) that draw a bar with rate and ETA; log lines where there is no terminal."""
    if quiet:
        yield (lambda todo, total: None), (lambda rows, bad: None)
    elif sys.stderr.isatty():
        yield from _bar(label, unit)
    else:
        yield _log(label, unit)


def _progress_bar(before_eta: str, after_eta: str = "") -> Any:
    """Return a transient Rich bar on standard error, with a text before and one after the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(before_eta),
        TimeRemainingColumn(),
        TextColumn(after_eta),
        console=Console(stderr=True),
        transient=True,
    )


def _bar(label: str, unit: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    with _progress_bar("{task.fields[rate]}", "{task.fields[bad]}") as bar:
        task = bar.add_task(label, total=None, rate="", bad="")
        began, done, failed = time.perf_counter(), 0, 0

        def on_start(todo: int, total: int) -> None:
            del total
            bar.update(task, total=todo)

        def on_rows(rows: int, bad: int) -> None:
            nonlocal done, failed
            done, failed = done + rows, failed + bad
            rate = done / max(time.perf_counter() - began, 1e-9)
            bar.update(
                task, advance=rows, rate=f"{rate:,.0f} {unit}/s", bad=f"{failed} bad" if failed else ""
            )

        yield on_start, on_rows


def _log(label: str, unit: str) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    began, last, done, failed, total = time.perf_counter(), time.perf_counter(), 0, 0, 0

    def on_start(todo: int, of: int) -> None:
        nonlocal total
        del of
        total = todo

    def on_rows(rows: int, bad: int) -> None:
        nonlocal done, failed, last
        done, failed, now = done + rows, failed + bad, time.perf_counter()
        if now - last >= _LOG_EVERY:
            last, rate = now, done / (now - began)
            left = (total - done) / rate
            note(f"{label}: {done:,} of {total:,}, {rate:,.0f} {unit}/s, {left:,.0f} s left, {failed} bad")

    return on_start, on_rows


@contextmanager
def steps(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a callback (step, steps, loss) that draws the course of a training run."""
    if quiet or not sys.stderr.isatty():
        yield lambda step, total, loss: None
        return
    with _progress_bar("loss {task.fields[loss]:.3f}") as bar:
        task = bar.add_task(label, total=None, loss=0.0)
        yield lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss)


def table(header: list[str], rows: Iterable[list[str]], *, left: int = 1) -> str:
    """Return a plain aligned table; the first ``left`` columns are aligned to the left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for number, line in enumerate(lines):
        cells = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  " + "  ".join(cells).rstrip())
        if number == 0:
            out.append("  " + "  ".join("-" * w for w in widths))
    return "\n".join(out)


def percent(value: float, interval: tuple[float, float] | None = None) -> str:
    """Return a fraction as a percentage, with its interval."""
    text = f"{100 * value:.1f}" if value >= 0.001 or value == 0 else f"{100 * value:.2g}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def figures_table(figures: list[Figure], group: str) -> str:
    """Return mAP and Acc of every subject on one group, methods first."""
    here = [f for f in figures if f.group == group and f.name in ("mAP", "Acc")]
    order = {"method": 0, "control": 1, "chance": 2, "note": 3}
    subjects = sorted({(order[f.role], f.subject) for f in here}, key=lambda s: (s[0], _control_order(s[1])))
    rows = []
    for _, subject in subjects:
        found = {f.name: f for f in here if f.subject == subject}
        rows.append([subject, *(percent(found[n].value, found[n].interval) for n in ("mAP", "Acc"))])
    n = next((f.n for f in here if f.n), 0)
    title = f"  {group}: {n} queries; % [95 % interval]"
    return title + "\n" + table(["", "mAP", "Acc"], rows)


def _control_order(subject: str) -> tuple[int, str]:
    first = ("raw", "centred")
    return (first.index(subject), "") if subject in first else (2 + (subject == "random subspace"), subject)


def matches_table(matches: list[Match]) -> str:
    """Return the ranked origins of each query."""
    out = []
    for match in matches:
        rows = [[str(i + 1), f"{c.score:.4f}", printable(c.path)] for i, c in enumerate(match.candidates)]
        margin = "" if match.margin is None else f"   margin to the runner-up {match.margin:.4f}"
        out.append(f"{printable(match.query)}{margin}\n" + table(["rank", "score", "origin"], rows, left=0))
    return "\n\n".join(out)


def printable(text: str) -> str:
    """Return text that cannot move the cursor or break a line: control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encode_summary(summary: EncodeSummary) -> str:
    """Return what an encode run did, in a few lines."""
    total = summary.seconds.get("total", 0.0)
    rate = f", {summary.encoded / total:,.0f} images/s" if summary.encoded and total > 0 else ""
    kept = summary.rows - summary.encoded
    lines = [f"{summary.store}: {summary.rows:,} rows"]
    if summary.encoded:
        lines.append(f"  encoded {summary.encoded:,} now in {total:.1f} s{rate}")
    if kept:
        lines.append(f"  {kept:,} were there already")
    if summary.appended:
        lines.append(f"  {summary.appended:,} new files were appended behind the others")
    bad = {k: v for k, v in summary.counts.items() if k != "ok"}
    lines.append(f"  {summary.counts.get('ok', 0):,} ok" + "".join(f", {v:,} {k}" for k, v in bad.items()))
    lines += [f"  Warning: {w}; rows encoded now may differ in their last bits" for w in summary.warnings]
    lines += [f"    {printable(path)}: {status}: {reason}" for path, status, reason in summary.bad]
    more = sum(bad.values()) - len(summary.bad)
    if summary.bad and more > 0:
        lines.append(f"    and {more:,} more; all are in the manifest")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return a dataclass as plain JSON types."""
    import dataclasses

    return dataclasses.asdict(value)


def solved(result: Solved, path: Path) -> str:
    """Return what a solve found, in the terminal."""
    facts, lines = result.facts, [f"{result.report.title}: {path}"]
    rank = facts.get("numerical_rank")
    if rank is not None:
        lines.append(
            f"  T: {facts['n_pairs']:,} training pairs, numerical rank {rank} of {result.projection.dim} "
            f"(decided by {facts['decided_by']}: zero is below {facts['cutoff']:.3g}); singular values from "
            f"{facts['sigma_max']:.4g} down to {facts['sigma_min']:.3g}"
        )
    if facts.get("statement"):
        lines.append(f"  {facts['statement']}")
    chosen = result.projection.knobs.get("lam")
    if result.facts["choices"] and chosen is not None:
        lines.append(f"  λ = {chosen:g}, chosen on validation among {len(result.facts['choices'])}")
    residual = {f.subject: f for f in result.report.figures if f.name == "held-out residual"}
    if residual:
        own, random = (residual[s].value for s in (result.projection.method, "random subspace"))
        n = residual["random subspace"].n
        lines.append(
            f"  held-out ‖TW‖/‖(O−μ)W‖ = {own:.3f} on {n} test pairs; a random subspace: {random:.3f}"
        )
    return "\n".join([*lines, *_measured(result.report)])


def evaluated(report: Report) -> str:
    """Return an evaluation, in the terminal."""
    return "\n".join([report.title, *_measured(report)])


def _measured(report: Report) -> list[str]:
    groups = list(dict.fromkeys(f.group for f in report.figures if f.name == "mAP"))
    out = []
    for group in groups:
        out += ["", figures_table(report.figures, group)]
    return [
        *out,
        "",
        *(s for s in report.summary if s not in _statement(report)),
        *(f"Note: {c}" for c in report.caveats),
    ]


def _statement(report: Report) -> list[str]:
    # Already printed above the table.
    return report.summary[1:] if report.kind == "solve" else []


def matched(found: MatchResult) -> str:
    """Return the matches of all queries, in the terminal."""
    how = "made and kept" if found.made else "read"
    lines = [
        f"{found.method} map, {how}: {found.projection} ({found.backend})",
        "",
        matches_table(found.matches),
    ]
    lines += [f"\n{printable(name)} cannot be read: {why}" for name, why in found.unreadable]
    return "\n".join(lines)


def demonstrated(result: DemoResult) -> str:
    """Return the demo's outcome and where its page is."""
    lines = [""]
    for group in result.headline_groups:
        lines += [figures_table(result.report.figures, group), ""]
    lines += result.report.summary
    return "\n".join([*lines, "", f"The page: {result.html}", f"The figures: {result.json}"])


def facts(values: dict[str, Any]) -> str:
    """Return names and values, one a line, indented where they nest."""

    def lines(value: dict[str, Any], indent: str) -> Iterator[str]:
        for name, held in value.items():
            if isinstance(held, dict):
                yield f"{indent}{name}:"
                yield from lines(held, indent + "  ")
            else:
                yield f"{indent}{name}: {held:,}" if isinstance(held, int) else f"{indent}{name}: {held}"

    return "\n".join(lines(values, ""))


def verified(found: Verification, store: Path, repaired: int) -> str:
    """Return what a check of a store found."""
    lines = [f"{store}: {found.shards:,} shards, {found.bytes / 1e9:.2f} GB checked"]
    if repaired:
        lines.append(f"  {repaired:,} damaged shards were made anew")
    if found.sampled:
        lines.append(f"  {found.sampled:,} rows encoded again; the largest difference is {found.worst:.2g}")
    if found.open_shards:
        lines.append(f"  {found.open_shards:,} shards are not written yet; run encode again")
    lines += [
        f"  DAMAGED {'store' if d.shard is None else f'shard {d.shard}'}: {d.what}: {d.detail}"
        for d in found.damages[:50]
    ]
    if found.damaged_shards and not repaired:
        lines.append(
            f"  {len(found.damaged_shards):,} shards to make anew: latentstore verify {store} --repair"
        )
    return "\n".join(lines if found.damages else [*lines, "  whole"])
